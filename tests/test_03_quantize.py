import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from common import usage_of
from conftest import HELDOUT, quantize, run_stage
from test_checks import overwrite
from userip.artifacts import read_artifacts, write_artifact


def clusters(num_users=1200, dim=24, num_codes=4, spread=3.0, seed=0):
    """Users of a few kinds in white noise, seen through a matrix that hides it: deviation, noise, kind."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(num_codes, size=num_users)
    centres = np.zeros((num_codes, dim))
    centres[:, :num_codes] = spread * np.eye(num_codes)
    mixing = rng.standard_normal((dim, dim)) * np.exp(rng.standard_normal(dim))
    z = centres[kind] + rng.standard_normal((num_users, dim))
    deviation = torch.tensor((z - z.mean(0)) @ mixing, dtype=torch.float32)
    return deviation, torch.tensor(mixing.T @ mixing, dtype=torch.float32), kind


def profile_of(deviation, num_codes=4, noise=None, **changes):
    """A profile whose deviations [F + 1, N, D] or [N, D] are given; every user has evidence and train rows."""
    deviation = deviation[None] if deviation.ndim == 2 else deviation
    num_users = deviation.shape[1]
    facts = {"name": "hobby", "num_codes": num_codes, "theta": deviation, "deviation": deviation,
             "mean": torch.zeros(deviation.shape[2]), "num_evidence": torch.ones(deviation.shape[:2]),
             "gain": torch.ones(num_users), "noise": noise, "is_fitted": torch.ones(num_users).bool(),
             "has_noise_level": True, "reads_ratings": False, "theta_dim": deviation.shape[2]}
    return SimpleNamespace(**facts | changes)


def rows_of(user, item, label, fold=None, num_items=None):
    fold = torch.zeros_like(user) if fold is None else fold
    return SimpleNamespace(user=user, item=item, label=label.float(), fold=fold,
                           num_items=num_items or int(item.max()) + 1)


def first_transform(deviation, noise, num_codes=11, options=(), **changes):
    """Without a choice on valid rows, unless options say so"""
    args = quantize.parse_args(["--rec-weight", "0", *options])
    return quantize.first_transform(args, profile_of(deviation, num_codes, noise, **changes), None, None)


def test_whitening_finds_exactly_the_directions_that_hold_information():
    deviation, noise, kind = clusters()
    transform, eigenvalues = first_transform(deviation, noise)
    assert transform.shape == (24, 3)  # four kinds differ in three directions
    assert float(eigenvalues[3:].mean()) == pytest.approx(1.0, abs=0.1)
    from sklearn.cluster import KMeans

    whitened = KMeans(4, n_init=4, random_state=0).fit_predict((deviation @ transform).numpy())
    plain = KMeans(4, n_init=4, random_state=0).fit_predict(deviation.numpy())
    assert adjusted_rand_score(kind, whitened) > 0.85 > 0.3 > adjusted_rand_score(kind, plain)


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_whitening_does_not_ask_how_large_steps_of_gradient_were(factor):
    deviation, noise, _ = clusters()
    assert first_transform(factor * deviation, noise, has_noise_level=False)[0].shape == (24, 3)
    assert first_transform(factor * deviation, noise)[0].shape[1] in (1, 10)  # none, or all


def test_a_profile_with_evidence_of_fewer_users_than_codes_is_refused_by_name(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    stored = torch.load(run / "profiles.pt", weights_only=True)
    stored["num_evidence"][2:, 1] = 0  # as with brands of two items only
    overwrite(run, "profiles.pt", stored)
    line = run_stage("03_quantize.py", "--run-dir", run, ok=False)
    assert f"only 2 users have evidence of {stored['names'][1]} and train rows, fewer than the 3 codes" in line


def test_a_profile_in_which_users_do_not_differ_is_not_probed(capsys):
    torch.manual_seed(0)
    deviation, users = torch.randn(60, 5), pd.DataFrame({"gender": ["F", "M"] * 30})
    profiles = [profile_of(deviation, noise=torch.eye(5)), profile_of(0 * deviation, noise=torch.zeros(5, 5))]
    args = argparse.Namespace(whiten=True)
    assert quantize.probe_profiles(args, profiles, users) == quantize.probe_profiles(args, profiles[:1], users)
    assert quantize.probe_profiles(args, profiles[1:], users) == {}


@pytest.mark.parametrize("method, is_known", [("score", True), ("gradient", False)])
def test_only_scores_come_with_the_size_of_their_noise(small_run, tmp_path, method, is_known):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    sidecar = json.loads((run / "profiles.pt.json").read_text())
    sidecar["options"]["method"] = method
    (run / "profiles.pt.json").write_text(json.dumps(sidecar))
    printed = run_stage("03_quantize.py", "--run-dir", run, "--codes", 2, 2, "--epochs", 1)
    assert ("(noise 1, its edge" in printed) == is_known


def test_the_number_of_codes_binds_the_number_of_directions():
    deviation, noise, _ = clusters()
    assert first_transform(deviation, noise, num_codes=3)[0].shape[1] == 2
    nothing = torch.randn(len(deviation), 24) @ torch.linalg.cholesky(noise).T
    assert first_transform(nothing, noise, num_codes=4)[0].shape[1] == 1  # never fewer than one


def losses_with(far=0.0, **changes):
    """Train two small profiles for an epoch and return the weights that moved."""
    torch.manual_seed(0)
    defaults = {"epochs": 1, "batch_size": 32, "lr": 0.01, "vq_weight": 1.0, "rec_weight": 1.0,
                "init": "released"}
    options = argparse.Namespace(**defaults | changes)
    deviation = torch.randn(40, 5)
    codebook = torch.randn(3, 2) + torch.tensor([[0.0], [0.0], [far]])
    quantizer = quantize.Quantizer(torch.eye(5)[:, :2], codebook, changes.get("beta", 0.25))
    surrogate = quantize.Surrogate([2], 10)
    rows = rows_of(torch.randint(40, (100,)), torch.randint(10, (100,)), torch.randint(2, (100,)))
    torch.manual_seed(1)
    quantize.train(options, torch.nn.ModuleList([quantizer]), surrogate, [profile_of(deviation)], rows)
    return {"transform": quantizer.transform.detach(), "codebook": quantizer.vq.codebook.detach(),
            "item": surrogate.item.weight.detach()}


@pytest.mark.parametrize("change, moves", [
    ({"vq_weight": 0.1}, "codebook"), ({"rec_weight": 0.1}, "transform"),
    ({"beta": 2.0}, "transform"), ({"rec_weight": 0.0}, "item")])
def test_every_weight_reaches_the_loss(change, moves):
    assert not torch.equal(losses_with()[moves], losses_with(**change)[moves])


def test_without_rec_weight_the_surrogate_stands_still():
    torch.manual_seed(0)
    torch.randn(40, 5), torch.randn(3, 2)
    untouched = quantize.Surrogate([2], 10).item.weight.detach()
    assert torch.equal(losses_with(rec_weight=0.0)["item"], untouched)


def test_a_dead_codeword_is_revived_at_a_user_unless_the_start_is_the_released_one():
    largest = lambda init: float(losses_with(far=99.0, init=init)["codebook"][2].abs().max())
    assert largest("released") > 50 > 10 > largest("kmeans")


def test_a_train_row_is_read_with_the_profile_that_has_not_seen_it():
    """Deviations of the row's own fold reach the losses; those of the other folds do not."""
    def loss_of(poisoned):
        torch.manual_seed(0)
        deviation = torch.randn(3, 40, 5)
        user, fold = torch.arange(40), torch.arange(40) % 2
        if poisoned == "own":
            deviation[0, 4] += 5.0
        elif poisoned == "other":
            deviation[1, 4] += 5.0  # user 4's row is in fold 0
            deviation[2, 4] += 5.0
        options = argparse.Namespace(epochs=1, batch_size=8, lr=0.01, vq_weight=1.0, rec_weight=1.0,
                                     init="released")
        quantizer = quantize.Quantizer(torch.eye(5)[:, :2], torch.zeros(2, 2), 0.25)
        rows = rows_of(user, torch.arange(40) % 10, torch.arange(40) % 3 > 0, fold)
        quantize.train(options, torch.nn.ModuleList([quantizer]), quantize.Surrogate([2], 10),
                       [profile_of(deviation)], rows)
        return quantizer.vq.codebook.detach()

    clean = loss_of(None)
    assert torch.equal(clean, loss_of("other")) and not torch.equal(clean, loss_of("own"))


@pytest.mark.parametrize("init", ["kmeans", "released"])
def test_rows_of_users_without_evidence_move_no_codeword(init):
    """The codebook is the same wherever θ of these users lies, also if a codeword is dead"""
    def codebook_with(elsewhere):
        torch.manual_seed(0)
        deviation, num_evidence = torch.randn(1, 40, 5), (torch.arange(40)[None] % 8 == 0).long()  # few have any
        deviation[num_evidence == 0] += elsewhere
        profile = profile_of(deviation, num_evidence=num_evidence, is_fitted=num_evidence[0] > 0)
        options = argparse.Namespace(epochs=2, batch_size=8, lr=0.01, vq_weight=1.0, rec_weight=0.0, init=init)
        quantizer = quantize.Quantizer(torch.eye(5)[:, :2], torch.tensor([[0.0, 0], [1, 1], [99, 99]]), 0.25)
        rows = rows_of(torch.arange(40), torch.arange(40) % 10, torch.arange(40) % 2 > 0)
        quantize.train(options, torch.nn.ModuleList([quantizer]), quantize.Surrogate([2], 10), [profile], rows)
        return quantizer.vq.codebook.detach()

    assert torch.equal(codebook_with(0.0), codebook_with(7.0))


def test_the_released_start_collapses_where_kmeans_finds_all_kinds():
    """Runs of the released start end with one code, where k-means++ on the same vectors finds the
    clusters: in many dimensions all users are alike, seen from codewords far outside.
    """
    rng = np.random.default_rng(0)
    kind = rng.integers(4, size=200)
    deviation = torch.tensor(3 * np.eye(64)[kind] + rng.standard_normal((200, 64)), dtype=torch.float32)
    rows = rows_of(torch.arange(200), torch.zeros(200, dtype=torch.long), torch.zeros(200))
    start, profile = torch.eye(64) / deviation.std(), profile_of(deviation - deviation.mean(0))
    for options in (["--released"], ["--rec-weight", "0"]):
        args = quantize.parse_args([*options, "--codes", "4", "--epochs", "25", "--batch-size", "16"])
        for seed in range(3):
            (part,), _ = quantize.fit(args, [profile], [start], rows, seed)
            codes = quantize.nearest_codes(part, profile.theta[0], profile.num_evidence[0]).numpy()
            perplexity = usage_of(codes, 4)[1]
            assert (perplexity < 1.2) if args.released else (perplexity > 3), (seed, perplexity)
            assert args.released or adjusted_rand_score(kind, codes) > 0.4


def test_the_directions_that_matter_to_what_users_like_are_kept():
    """Users differ most in a direction that says nothing of their likes; the second decides them."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(2, (2, 600), generator=generator) * 2.0 - 1
    deviation = torch.stack([3 * kind[0], 2 * kind[1]], 1) + 0.2 * torch.randn(600, 2, generator=generator)
    user, item = torch.arange(600).repeat(10), torch.randint(6, (6000,), generator=generator)
    args, profile = argparse.Namespace(seed=0), profile_of(deviation, 2)
    split = lambda label: (rows_of(*(column[:5000] for column in (user, item, label))),
                           rows_of(*(column[5000:] for column in (user, item, label))))

    def is_kept(label):
        first, second = torch.eye(2)[:, :1], torch.eye(2)[:, 1:]
        candidates = {"second": second, "first": first}
        chosen = quantize.choose_directions(args, profile, candidates, *split(label))
        return "first" if torch.equal(chosen, first) else "second"

    assert is_kept(kind[0][user] * (item % 2 * 2 - 1) > 0) == "first"
    assert is_kept(kind[1][user] * (item % 2 * 2 - 1) > 0) == "second"
    label = kind[0][user] * (item % 2 * 2 - 1) > 0
    losses = [quantize.recommendation_losses((values > 0).long()[None], 2, *split(label), 0).mean()
              for values in kind]
    assert losses[0] < 0.2 and losses[1] > 0.6


@pytest.mark.parametrize("better, kept", [(0.0007, "leading 2"), (0.02, "leading 1")])
def test_a_direction_is_given_up_for_no_tie(monkeypatch, better, kept):
    """Less loss on valid rows without it, by less and by more than the standard error, .1 / √1000."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(1000)
    losses = iter([np.ones(1000)] * 2 + [0.6 + noise - noise.mean() - better] * 2 + [np.full(1000, 0.6)] * 2)
    monkeypatch.setattr(quantize, "recommendation_losses", lambda *_: next(losses))
    profile = profile_of(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), 2)
    candidates = {"of the label": torch.eye(2)[:, 1:], "leading 1": torch.eye(2)[:, :1], "leading 2": torch.eye(2)}
    chosen = quantize.choose_directions(argparse.Namespace(seed=0), profile, candidates, (), ())
    assert torch.equal(chosen, torch.eye(2)[:, :int(kept[-1])])


def test_the_direction_of_the_label_is_found_whatever_its_variance():
    """Who rates generously differs along a direction of little variance, out of fold."""
    generator = torch.Generator().manual_seed(0)
    deviation = torch.randn(2, 500, 4, generator=generator) * torch.tensor([5.0, 3.0, 1.0, 0.5])
    deviation[1] = 99.0  # the fold that has seen the rows is not looked at
    user, item = torch.arange(500).repeat(8), torch.randint(20, (4000,), generator=generator)
    generous = deviation[0, :, 2] + deviation[0, :, 3]
    quality = torch.randn(20, generator=generator)
    label = (generous[user] + quality[item] + torch.randn(4000, generator=generator) > 0).float()
    found = quantize.label_direction(torch.eye(4), deviation, rows_of(user, item, label))[:, 0]
    assert found.shape == (4,) and float(found @ torch.tensor([0, 0, 1.0, 1.0])) / 2**0.5 > 0.97


@pytest.mark.parametrize("knows_more", [True, False])
def test_titles_enter_codes_of_ratings_only_where_they_lower_the_loss_on_valid_rows(knows_more):
    """θ [.., 4] tells a part of who likes what that the habit behind it does not, or nothing."""
    generator = torch.Generator().manual_seed(0)
    deviation = torch.randn(1, 600, 5, generator=generator)
    user, item = torch.arange(600).repeat(12), torch.randint(20, (7200,), generator=generator)
    generous = deviation[0, :, 4] + 1.5 * knows_more * deviation[0, :, 1]
    label = (generous[user] + 0.5 * torch.randn(7200, generator=generator) > 0).float()
    rows, valid = (rows_of(user[part], item[part], label[part], num_items=20)
                   for part in (slice(0, 6000), slice(6000, None)))
    profile = profile_of(deviation, 8, theta_dim=4)
    candidates = quantize.rating_directions(torch.eye(5)[:, :4], profile, rows)
    assert list(candidates) == ["habits and titles", "habits"] and not candidates["habits"][:4].any()
    found = quantize.choose_directions(argparse.Namespace(seed=0), profile, candidates, rows, valid)[:, 0]
    assert bool(found[:4].any()) == knows_more
    assert abs(float(found[4])) > 10 * float(found[[0, 2, 3]].abs().max())


@pytest.fixture(scope="module")
def rated_run(small_run, tmp_path_factory):
    """The small run up to stage 2, inferred with ratings and three folds. Its codes may be overwritten."""
    run = tmp_path_factory.mktemp("rated") / "run"
    shutil.copytree(small_run[1], run)
    run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--tiny-steps", 4,
              "--shared-steps", 3, "--map-steps", 3, "--heldout", 60, "--ratings", "--folds", 3)
    return run


@pytest.mark.parametrize("options, sizes", [((), [4, 3, None]), (("--codes", 2, 2, 3), [2, 2, 3])], ids=str)
def test_ratings_are_quantized_along_one_direction_into_a_code_per_twenty_users(rated_run, options, sizes):
    """Sixteen at most. Other profiles choose their directions."""
    run_stage("03_quantize.py", "--run-dir", rated_run, "--epochs", 1, "--stability", 0, *options)
    codebook = torch.load(rated_run / "codebook.pt", weights_only=True)
    num_fitted = len(pd.read_parquet(rated_run / "train_codes.parquet")["user"].unique())
    sizes = [size or min(16, num_fitted // 20) for size in sizes]
    assert [len(part["codebook"]) for part in codebook.values()] == sizes
    assert codebook["judgement"]["transform"].shape[1] == 1


def test_codes_of_train_rows_are_those_without_their_own_fold(rated_run):
    run = rated_run
    printed = run_stage("03_quantize.py", "--run-dir", run, "--codes", 2, 3, 2, "--epochs", 1, "--stability", 2)
    assert printed.count("ARI between seeds") == 3
    options = argparse.Namespace(run_dir=str(run), seed=0)
    stored, bank, codebook, of_train, rows = read_artifacts(
        options, "profiles.pt", "feature_bank.parquet", "codebook.pt", "train_codes.parquet",
        "interactions.parquet")
    rows = rows[rows["split"] == "train"]
    assert (of_train[["user", "item"]].to_numpy() == rows[["user", "item"]].to_numpy()).all()
    assert list(bank.columns[2:]) == list(of_train.columns[2:]) == ["hobby", "background", "judgement"]
    differs = 0
    for k, name in enumerate(stored["names"]):
        part = codebook[name]
        for row in range(0, len(of_train), 37):
            user, fold = of_train["user"][row], int(stored["fold"][row])
            theta = stored["profiles"][fold, user, k]
            if name == "judgement":
                theta = torch.cat([theta, stored["habits"][fold, user]])
            z = (theta - part["mean"]) @ part["transform"]
            assert of_train[name][row] == int((part["codebook"] - z).square().sum(1).argmin())
        differs += (of_train[name].to_numpy() != bank[name].to_numpy()[of_train["user"]]).sum()
    assert differs > 0


def test_the_recommendation_loss_reaches_encoder_and_items_through_the_codewords():
    quantizer = quantize.Quantizer(torch.randn(5, 2), torch.randn(3, 2), 0.25)
    surrogate = quantize.Surrogate([2], 4)
    quantized, _, _ = quantizer(torch.randn(6, 5), torch.ones(6).bool())
    surrogate([quantized], torch.randint(4, (6,))).sum().backward()
    assert quantizer.transform.grad.abs().sum() > 0 and surrogate.item.weight.grad.abs().sum() > 0


def test_the_bank_holds_one_code_per_user_and_unknown_for_those_without_evidence(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    options = argparse.Namespace(run_dir=str(run), seed=0)
    stored, bank = read_artifacts(options, "profiles.pt", "feature_bank.parquet")
    assert bank["user"].tolist() == list(range(60)) and set(bank["hobby"]) <= {0, 1}
    stored["num_evidence"][3] = 0
    stored["num_evidence"][5, 1] = 0
    write_artifact(options, "profiles.pt", stored, ["interactions.parquet", "items.parquet"], heldout_nll=HELDOUT)
    run_stage("03_quantize.py", "--run-dir", run, "--codes", 2, 3, "--epochs", 1)
    bank, codebook = read_artifacts(options, "feature_bank.parquet", "codebook.pt")
    assert bank.loc[3, ["hobby", "background"]].tolist() == [2, 3]
    assert bank.loc[5, "background"] == 3 and bank.loc[5, "hobby"] < 2
    for k, name in enumerate(("hobby", "background")):  # eq. 6, with what codebook.pt alone tells
        part = codebook[name]
        z = (stored["profiles"][:, k] - part["mean"]) @ part["transform"]
        nearest = torch.cdist(z, part["codebook"]).argmin(1).numpy()
        mask = stored["num_evidence"][:, k].numpy() > 0
        assert (bank[name].to_numpy()[mask] == nearest[mask]).all()
        assert part["usage"].tolist() == np.bincount(nearest[mask], minlength=2 + k).tolist()


def test_probes_of_movielens_users_find_what_profiles_hold_and_chance_elsewhere(capsys):
    rng = np.random.default_rng(0)
    users = pd.DataFrame({"gender": rng.choice(["F", "M"], 300), "age": rng.integers(10, 60, 300).astype(str)})
    theta = rng.standard_normal((300, 4)).astype(np.float32)
    theta[:, 2] += 3.0 * (users["gender"] == "M")
    args, profiles = quantize.parse_args(["--no-whiten"]), [profile_of(torch.tensor(theta))]
    facts = quantize.probe_profiles(args, profiles, users)
    assert facts["probe_gender"] > 0.95 and facts["probe_age_over_30"] == pytest.approx(0.5, abs=0.1)
    assert "gender AUC" in capsys.readouterr().out
    assert set(quantize.probe_profiles(args, profiles, users[["age"]])) == {"probe_age_over_30"}


def test_facts_of_users_that_cannot_be_probed_are_left_out_with_a_line(capsys):
    """Other codes for gender, ages as ranges or all alike, blanks: what is for checking only stops nothing."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((300, 4)).astype(np.float32)
    gender = rng.choice(["0", "1", None], 300, p=[0.4, 0.4, 0.2])
    theta[:, 2] += 3.0 * (gender == "1")
    args, profiles = quantize.parse_args(["--no-whiten"]), [profile_of(torch.tensor(theta))]
    users = pd.DataFrame({"gender": gender, "age": rng.choice(["18-24", "35-44", "56+"], 300)})
    assert quantize.probe_profiles(args, profiles, users)["probe_gender"] > 0.95
    assert "probe_gender" not in quantize.probe_profiles(
        args, profiles, users.assign(gender=rng.choice(["F", "M", "X"], 300)))
    assert "gender has 3 codes" in capsys.readouterr().out
    assert quantize.probe_profiles(args, profiles, users.assign(gender="M", age="?")) == {}
    assert capsys.readouterr().out.count("left out") == 2


def test_users_who_do_not_differ_are_said_to_say_nothing(capsys):
    for deviation, noise in ((torch.zeros(300, 4), torch.eye(4)), (torch.randn(300, 4), torch.zeros(4, 4))):
        rows = rows_of(torch.arange(300), torch.arange(300) % 7, torch.arange(300) % 2)
        profile = profile_of(deviation, noise=noise)
        transform, eigenvalues = quantize.first_transform(quantize.parse_args([]), profile, rows, rows)
        assert transform.shape == (4, 1) and torch.isfinite(transform).all() and eigenvalues is None
    assert capsys.readouterr().out.count("its codes say nothing") == 2
