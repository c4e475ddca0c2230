from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from userip import profiles


@pytest.mark.parametrize("options, expected", [
    ({"ratings": True, "route": ["title", "brand+rating"]}, [False, True]),
    ({"ratings": True, "route": ["none"]}, [True, True]),
    ({"ratings": False, "route": ["title", "brand"]}, [False, False]), ({}, [False, False])], ids=str)
def test_the_options_of_stage_2_say_which_profiles_read_ratings(options, expected, monkeypatch):
    stored = {"names": ["a", "b"], "profiles": torch.zeros(9, 2, 4), "num_evidence": torch.ones(9, 2),
              "gain": torch.ones(9, 2), "noise": torch.zeros(2, 4, 4), "has_evidence": torch.ones(9).bool(),
              "habits": torch.ones(9, 3)}
    monkeypatch.setattr(profiles, "read_sidecar", lambda *_: {"options": options})
    args, rows = SimpleNamespace(codes=None), SimpleNamespace(user=torch.arange(9))
    found = profiles.read_profiles(args, stored, rows, {})
    assert [profile.reads_ratings for profile in found] == expected
    assert args.codes == [profile.num_codes for profile in found] == [
        2 if reads else size for reads, size in zip(expected, (4, 3))]  # 16, but for so few users
    assert [profile.theta.shape for profile in found] == [(1, 9, 7 if reads else 4) for reads in expected]


def test_codes_are_compared_with_their_own_truth_and_with_the_others(capsys):
    rng = np.random.default_rng(0)
    users = pd.DataFrame({"user": range(400), "true_hobby": rng.integers(4, size=400),
                          "true_background": rng.integers(3, size=400)})
    bank = pd.DataFrame({"hobby": users["true_hobby"], "background": rng.integers(3, size=400)})
    facts = profiles.compare_with_truth(bank, ["hobby", "background"], users, {"hobby": 0.8})
    assert facts["hobby_vs_true_hobby"] == 1 and facts["hobby_share_of_bayes"] == 1.25
    assert abs(facts["hobby_vs_true_background"]) < 0.05 and abs(facts["background_vs_true_background"]) < 0.05
    assert "background_share_of_bayes" not in facts and len(facts) == 5
    assert "hobby: ARI 1.000 of the Bayes-optimal 0.800 (125%)" in capsys.readouterr().out
    assert profiles.compare_with_truth(bank, ["hobby"], users[["user"]], {}) == {}


def test_agreement_between_seeds_leaves_out_users_without_evidence():
    stability = lambda *codes: profiles.describe_codes("hobby", codes, 2)["hobby_stability"]
    codes, swapped = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 0, 0, 2, 2])
    assert stability(codes) is None
    assert stability(codes, swapped) == 1
    assert stability(codes, swapped, np.array([0, 1, 0, 1, 2, 2])) < 0.5
