import numpy as np
import pandas as pd
import pytest

from userip import probes


def test_codes_are_compared_with_their_own_truth_and_with_the_others(capsys):
    rng = np.random.default_rng(0)
    users = pd.DataFrame({"user": range(400), "true_hobby": rng.integers(4, size=400),
                          "true_background": rng.integers(3, size=400)})
    bank = pd.DataFrame({"hobby": users["true_hobby"], "background": rng.integers(3, size=400)})
    facts = probes.compare_with_truth(bank, ["hobby", "background"], users, {"hobby": 0.8})
    assert facts["hobby_vs_true_hobby"] == 1 and facts["hobby_share_of_bayes"] == 1.25
    assert abs(facts["hobby_vs_true_background"]) < 0.05 and abs(facts["background_vs_true_background"]) < 0.05
    assert "background_share_of_bayes" not in facts and len(facts) == 5
    assert "hobby: ARI 1.000 of the Bayes-optimal 0.800 (125%)" in capsys.readouterr().out
    assert probes.compare_with_truth(bank, ["hobby"], users[["user"]], {}) == {}


def test_agreement_between_seeds_leaves_out_users_without_evidence():
    codes = np.array([0, 0, 1, 1, 2, 2])
    assert probes.seed_agreement([codes], 2) is None
    swapped = np.array([1, 1, 0, 0, 2, 2])
    assert probes.seed_agreement([codes, swapped], 2) == 1
    assert probes.seed_agreement([codes, swapped, np.array([0, 1, 0, 1, 2, 2])], 2) < 0.5


def test_a_probe_finds_what_features_hold_and_chance_elsewhere(capsys):
    rng = np.random.default_rng(0)
    users = pd.DataFrame({"gender": rng.choice(["F", "M"], 300), "age": rng.integers(10, 60, 300).astype(str)})
    features = rng.standard_normal((300, 4))
    features[:, 2] += 3.0 * (users["gender"] == "M")
    facts = probes.probe_demographics(features, users)
    assert facts["probe_gender"] > 0.95 and facts["probe_age_over_30"] == pytest.approx(0.5, abs=0.1)
    assert "gender AUC" in capsys.readouterr().out
