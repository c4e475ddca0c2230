import argparse

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from conftest import ctr, dies, run_stage

def settings(**changes):
    return argparse.Namespace(**vars(ctr.parse_args(["--epochs", "40", "--patience", "40"])) | changes)


def pairwise_data(rows=6000, seed=0):
    """Labels that no single field explains: sign of a product of factors of two fields; a third is noise."""
    rng = np.random.default_rng(seed)
    sizes = [12, 12, 4]
    factor = [rng.choice([-1.0, 1.0], size=12) for _ in range(2)]
    ids = np.stack([rng.integers(size, size=rows) for size in sizes], 1)
    label = (factor[0][ids[:, 0]] * factor[1][ids[:, 1]] > 0).astype(np.int8)
    parts = np.split(np.arange(rows), [rows * 8 // 10, rows * 9 // 10])
    parts = dict(zip(("train", "valid", "test"), parts))
    ids = {name: torch.from_numpy(ids[part]) for name, part in parts.items()}
    return sizes, ids, {name: label[part] for name, part in parts.items()}


@pytest.mark.parametrize("name", ctr.MODELS)
def test_model_learns_a_planted_interaction(name):
    sizes, ids, labels = pairwise_data()
    assert ctr.train_one(settings(), name, sizes, ids, labels, seed=0)["auc"] > 0.9


def test_no_model_beats_chance_on_labels_of_chance():
    sizes, ids, labels = pairwise_data()
    rng = np.random.default_rng(1)
    labels = {key: rng.integers(2, size=len(value)).astype(np.int8) for key, value in labels.items()}
    assert abs(ctr.train_one(settings(epochs=5), "dcn", sizes, ids, labels, seed=0)["auc"] - 0.5) < 0.08


def test_test_labels_reach_neither_training_nor_the_choice_of_the_epoch():
    sizes, ids, labels = pairwise_data(rows=1500)
    poisoned = labels | {"test": 1 - labels["test"]}
    first, second = (ctr.train_one(settings(epochs=6), "dcn", sizes, ids, each, seed=0)
                     for each in (labels, poisoned))
    assert first["auc"] == pytest.approx(1 - second["auc"])
    for key in ("valid_auc", "valid_logloss", "best_epoch"):
        assert first[key] == second[key]


def test_the_best_epoch_is_restored_and_patience_stops():
    sizes, ids, labels = pairwise_data(rows=1500)
    options = lambda epochs: settings(epochs=epochs, patience=30, lr=0.05)
    long = ctr.train_one(options(30), "dcn", sizes, ids, labels, seed=0)
    cut = ctr.train_one(options(long["best_epoch"]), "dcn", sizes, ids, labels, seed=0)
    # the figures are those of the best epoch's weights, not of the last
    assert long["best_epoch"] < 30 and long == cut


@pytest.mark.parametrize("change", [{"lr": 0.03}, {"weight_decay": 0.1}, {"dropout": 0.6}, {"hidden": [8, 4]},
                                    {"layers": 1}, {"field_dim": 4}, {"batch_size": 64}, {"epochs": 1}])
def test_every_option_moves_the_result(change):
    sizes, ids, labels = pairwise_data(rows=1000)
    base = settings(epochs=3, patience=1)
    run = lambda args: ctr.train_one(args, "dcn", sizes, ids, labels, seed=0)["logloss"]
    assert run(base) != run(argparse.Namespace(**vars(base) | change))


def test_random_codes_keep_sizes_and_usage_and_change_with_the_seed():
    rng = np.random.default_rng(0)
    bank = pd.DataFrame({"user": range(300), "hobby": rng.integers(4, size=300),
                         "background": rng.integers(3, size=300)})
    names, sizes = ["hobby", "background"], [4, 3]
    codes, with_unknown = ctr.codes_of("codes", bank, None, names, sizes, 0)
    assert with_unknown == [5, 4] and (codes == bank[names].to_numpy()).all()
    first, second = (ctr.codes_of("random", bank, None, names, sizes, seed)[0] for seed in (0, 1))
    assert (np.sort(first, 0) == np.sort(codes, 0)).all() and (first != second).any()
    assert (first[:, 0] == codes[:, 0]).mean() < 0.4
    assert ctr.codes_of("none", bank, None, names, sizes, 0)[0].shape == (300, 0)


def test_the_papers_relative_improvements_come_out():
    """Eq. 10 and 11 on table 2's printed figures; tolerance: what rounding to four digits can do."""
    ours = {"clothing": (0.6269, 0.5126), "movies": (0.8184, 0.4566),
            "games": (0.7393, 0.7285), "yelp": (0.7314, 0.5558)}
    reference = {"clothing": (0.6214, 0.5322), "movies": (0.8167, 0.4582),
                 "games": (0.7317, 0.7744), "yelp": (0.7287, 0.5574)}
    printed = {"clothing": (4.5548, 3.8199), "movies": (0.5336, 0.3482),
               "games": (3.2755, 6.2992), "yelp": (1.1937, 0.2879)}
    for name, (auc, loss) in printed.items():
        assert ctr.rela_impr_auc(ours[name][0], reference[name][0]) == pytest.approx(auc, abs=0.09)
        assert ctr.rela_impr_logloss(ours[name][1], reference[name][1]) == pytest.approx(loss, abs=0.025)


def test_the_paired_interval_is_that_of_a_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 6))
    mean, half = ctr.paired_interval(first - second)
    low, high = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_the_summary_pairs_by_seed():
    planted = {"none": 0.0, "random": 0.01, "codes": 0.03, "truth": 0.05}
    rows = [{"model": "dcn", "features": name, "seed": seed, "auc": 0.6 + 0.1 * seed + gain, "logloss": 0.6}
            for name, gain in planted.items() for seed in (1, 0)]
    text, gains = ctr.summarize(pd.DataFrame(rows))
    assert gains["dcn"]["auc_gain"] == pytest.approx(0.02)
    assert gains["dcn"]["auc_half_interval"] == pytest.approx(0, abs=1e-9)
    assert gains["dcn"]["share_of_oracle"] == pytest.approx(0.5) and "50%" in text


def test_results_hold_a_row_per_run_and_the_base_rate(small_run):
    results = pd.read_parquet(small_run[1] / "results.parquet")
    assert len(results) == 1 + 2 * 3 * 2 and set(results["features"]) == {"none", "codes", "random"}
    assert results["model"].iloc[0] == "base rate" and results["auc"].iloc[0] == 0.5
    markdown = (small_run[1] / "results.md").read_text()
    assert "codes - random" in markdown and "base rate" in markdown


def test_truth_is_for_planted_data_only(small_run):
    assert "truth" in run_stage("04_train_ctr.py", "--run-dir", small_run[1], "--features", "truth", ok=False)


def test_auc_counts_ties_as_half():
    assert roc_auc_score([0, 1, 1], [0.5, 0.5, 0.9]) == pytest.approx(0.75)


def test_a_diverging_model_says_so(capsys):
    sizes, ids, labels = pairwise_data(rows=600)
    assert "--lr 1e+20" in dies(capsys, ctr.train_one, settings(lr=1e20), "dcn", sizes, ids, labels, 0)
