import argparse
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from conftest import quantize, run_stage


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


def test_whitening_finds_exactly_the_directions_that_hold_information():
    deviation, noise, kind = clusters()
    transform, eigenvalues = quantize.whiten(deviation, torch.ones(len(deviation)), noise, 0, 10)
    assert transform.shape == (24, 3)  # four kinds differ in three directions
    assert float(eigenvalues[3:].mean()) == pytest.approx(1.0, abs=0.1)
    from sklearn.cluster import KMeans

    whitened = KMeans(4, n_init=4, random_state=0).fit_predict((deviation @ transform).numpy())
    plain = KMeans(4, n_init=4, random_state=0).fit_predict(deviation.numpy())
    assert adjusted_rand_score(kind, whitened) > 0.85 > 0.3 > adjusted_rand_score(kind, plain)


def test_dims_and_most_bind_the_number_of_directions():
    deviation, noise, _ = clusters()
    gain = torch.ones(len(deviation))
    assert quantize.whiten(deviation, gain, noise, 7, 3)[0].shape[1] == 7
    assert quantize.whiten(deviation, gain, noise, 0, 2)[0].shape[1] == 2
    nothing = deviation[torch.randperm(len(deviation))] * 0
    nothing = nothing + torch.randn(len(deviation), 24) @ torch.linalg.cholesky(noise).T
    assert quantize.whiten(nothing, gain, noise, 0, 3)[0].shape[1] == 1  # never fewer than one


def losses_with(**changes):
    """Train two small profiles for an epoch and return the weights that moved."""
    torch.manual_seed(0)
    defaults = {"epochs": 1, "batch_size": 32, "lr": 0.01, "vq_weight": 1.0, "rec_weight": 1.0}
    options = argparse.Namespace(**defaults | changes)
    deviation = torch.randn(40, 5)
    quantizer = quantize.Quantizer(torch.eye(5)[:, :2], torch.randn(3, 2), changes.get("beta", 0.25))
    surrogate = quantize.Surrogate([2], 10)
    rows = torch.randint(40, (100,)), torch.randint(10, (100,)), torch.randint(2, (100,)).float()
    torch.manual_seed(1)
    quantize.train(options, torch.nn.ModuleList([quantizer]), surrogate, [deviation], *rows)
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


def test_the_recommendation_loss_reaches_encoder_and_items_through_the_codewords():
    quantizer = quantize.Quantizer(torch.randn(5, 2), torch.randn(3, 2), 0.25)
    surrogate = quantize.Surrogate([2], 4)
    quantized, *_ = quantizer(torch.randn(6, 5))
    surrogate([quantized], torch.randint(4, (6,))).sum().backward()
    assert quantizer.transform.grad.abs().sum() > 0 and surrogate.item.weight.grad.abs().sum() > 0


def test_the_bank_holds_one_code_per_user_and_unknown_for_those_without_evidence(small_run, tmp_path):
    import shutil

    import common

    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    options = argparse.Namespace(run_dir=str(run), seed=0)
    stored, bank = common.read_artifacts(options, "profiles.pt", "feature_bank.parquet")
    assert bank["user"].tolist() == list(range(60)) and set(bank["hobby"]) <= {0, 1}
    stored["num_evidence"][3] = 0
    stored["num_evidence"][5, 1] = 0
    common.write_artifact(options, "profiles.pt", stored, ["interactions.parquet", "items.parquet"])
    run_stage("03_quantize.py", "--run-dir", run, "--codes", 2, 3, "--epochs", 1)
    bank, codebook = common.read_artifacts(options, "feature_bank.parquet", "codebook.pt")
    assert bank.loc[3, ["hobby", "background"]].tolist() == [2, 3]
    assert bank.loc[5, "background"] == 3 and bank.loc[5, "hobby"] < 2
    for k, name in enumerate(("hobby", "background")):  # eq. 6, with what codebook.pt alone tells
        part = codebook[name]
        z = (stored["profiles"][:, k] - part["mean"]) @ part["transform"]
        nearest = torch.cdist(z, part["codebook"]).argmin(1).numpy()
        told = stored["num_evidence"][:, k].numpy() > 0
        assert (bank[name].to_numpy()[told] == nearest[told]).all()
        assert part["usage"].tolist() == np.bincount(nearest[told], minlength=2 + k).tolist()


def test_bad_input(small_run, tmp_path):
    line = run_stage("03_quantize.py", "--run-dir", small_run[1], "--codes", 4, ok=False)
    assert "--codes" in line and "hobby, background" in line
    assert "at least 2" in run_stage("03_quantize.py", "--run-dir", small_run[1], "--codes", 4, 1, ok=False)
    assert "02_infer_profiles.py" in run_stage("03_quantize.py", "--run-dir", tmp_path, ok=False)


def test_the_edge_of_pure_noise():
    """White noise of N users in D dimensions stays below (1 + √(D/N))² but for a little."""
    z = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    assert float(torch.linalg.eigvalsh(torch.cov(z.T))[-1]) < 1.03 * (1 + math.sqrt(100 / 2000)) ** 2
