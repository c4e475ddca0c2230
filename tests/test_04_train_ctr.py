import argparse
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import adjusted_rand_score, roc_auc_score

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


def small_split(num_users=300, num_items=20, seed=0):
    """Frames by split; users 0 to 279 have train, valid and test rows, the others support and test rows."""
    rng = np.random.default_rng(seed)
    generous = rng.normal(size=num_users)
    rows = pd.DataFrame([(user, item) for user in range(num_users)
                         for item in rng.choice(num_items, 8, replace=False)], columns=["user", "item"])
    rows["rating"] = 3 + generous[rows["user"]] + 0.3 * rng.normal(size=len(rows))
    place = rows.groupby("user").cumcount()
    warm = np.where(place < 6, "train", np.where(place < 7, "valid", "test"))
    name = np.where(rows["user"] < 280, warm, np.where(place < 4, "support", "test"))
    return {key: rows[name == key] for key in ("train", "valid", "test", "support")}, generous


def test_random_codes_keep_sizes_and_usage_and_change_with_the_seed():
    rng = np.random.default_rng(0)
    bank = pd.DataFrame({"user": range(300), "hobby": rng.integers(4, size=300),
                         "background": rng.integers(3, size=300)})
    names, sizes = ["hobby", "background"], [4, 3]
    everyone = {"test": pd.DataFrame({"user": range(300)})}
    fields = lambda name, seed=0: ctr.fields_of(name, everyone, bank, None, names, sizes, [], seed)
    codes, with_unknown = fields("codes")
    assert with_unknown == [5, 4] and (codes["test"] == bank[names].to_numpy()).all()
    first, second = (fields("random", seed)[0]["test"] for seed in (0, 1))
    assert (np.sort(first, 0) == np.sort(codes["test"], 0)).all() and (first != second).any()
    assert (first[:, 0] == codes["test"][:, 0]).mean() < 0.4
    assert fields("none")[0]["test"].shape == (300, 0)


def test_leniency_is_the_quartile_of_the_users_residual_also_of_cold_users():
    split, generous = small_split()
    fields, sizes = ctr.leniency_of(split, seed=0)
    assert sizes == [5]
    for name in ("test", "valid"):
        code, truth = fields[name][:, 0], generous[split[name]["user"]]
        assert np.corrcoef(code, truth)[0, 1] > 0.85 and set(code) == {0, 1, 2, 3}
    of_cold = fields["test"][split["test"]["user"] >= 280, 0]
    assert len(of_cold) == 80 and set(of_cold) <= {0, 1, 2, 3}


def test_leniency_of_a_train_row_is_made_without_its_own_fold():
    """Against plain loops; a row's own rating, however high, is in no mean that its code is made of."""
    split = {name: rows.assign(user=rows["user"] % 40) for name, rows in small_split()[0].items()}
    split = {name: rows[rows["user"] < 30] if name != "support" else rows for name, rows in split.items()}
    own = [(row.user, row.item, row.rating) for name in ("train", "support")
           for row in split[name].itertuples()]
    num_train = len(split["train"])
    fold = np.random.default_rng([0, 3]).integers(5, size=len(own))

    def means(used):
        of_item, of_user = {}, {}
        for user, item, rating in used:
            of_item.setdefault(item, []).append(rating)
        for user, item, rating in used:
            of_user.setdefault(user, []).append(rating - np.mean(of_item[item]))
        return {user: np.mean(values) for user, values in of_user.items()}

    trained = set(split["train"]["user"])
    everything = means(own)
    edges = np.quantile([mean for user, mean in everything.items() if user in trained], [0.25, 0.5, 0.75])
    fields, _ = ctr.leniency_of(split, seed=0)
    for left_out in range(5):
        used = [row for place, row in enumerate(own) if place >= num_train or fold[place] != left_out]
        mean = means(used)
        for place in np.flatnonzero(fold[:num_train] == left_out):
            user = own[place][0]
            expected = int(np.searchsorted(edges, mean[user])) if user in mean else 4
            assert fields["train"][place, 0] == expected


def test_neither_valid_nor_test_rows_reach_cf_and_leniency():
    split, _ = small_split()
    other = split | {name: split[name].assign(rating=1.0, item=(split[name]["item"] + 3) % 20)
                     for name in ("valid", "test")}
    assert (ctr.cf_of(split, 300, [4, 3], 0) == ctr.cf_of(other, 300, [4, 3], 0)).all()
    for name in ("train", "valid", "test"):
        assert (ctr.leniency_of(split, 0)[0][name] == ctr.leniency_of(other, 0)[0][name]).all()


def test_cf_finds_who_likes_the_same_items_and_folds_cold_users_in():
    rng = np.random.default_rng(0)
    rows = [(user, item) for user in range(200)
            for item in rng.choice(20, 8, replace=False) + 20 * (user % 2)]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    split = {"train": frame[frame["user"] < 150], "support": frame[frame["user"].between(150, 197)]}
    codes = ctr.cf_of(split, 200, [2], 0)[:, 0]
    assert adjusted_rand_score(np.arange(198) % 2, codes[:198]) > 0.95
    assert (codes[198:] == 2).all()  # neither train nor support rows


def test_dense_fields_are_mapped_linearly_and_learn():
    sizes, ids, labels = pairwise_data()
    vectors = torch.randn(12, 5)
    rows = {name: part[:, [1, 2, 0]] for name, part in ids.items()}  # dense fields stand last
    for name in ctr.MODELS:
        model = ctr.MODELS[name]([*sizes[1:], vectors], 8, 2, (6, 4), 0.0).eval()
        e = model.embed(rows["test"])
        expected = model.embed.maps[0](vectors[ids["test"][:, 0]])
        assert torch.equal(e[:, -1], expected) and model(rows["test"]).shape == labels["test"].shape
    one_hot = torch.eye(12)
    assert ctr.train_one(settings(), "dcnv2", [*sizes[1:], one_hot], rows, labels, seed=0)["auc"] > 0.9


def test_id_dropout_shows_the_unknown_id_to_training_only_and_spares_the_rows(monkeypatch):
    sizes, ids, labels = pairwise_data(rows=3000)
    sizes = [sizes[0] + 1, *sizes[1:]]
    before, seen = ids["train"].clone(), {True: [], False: []}

    class Recorder(ctr.MODELS["dcn"]):
        def forward(self, ids):
            seen[self.training].append((ids[:, 0] == sizes[0] - 1).float())
            return super().forward(ids)

    monkeypatch.setitem(ctr.MODELS, "dcn", Recorder)
    for share in (0.0, 0.3):
        seen[True].clear()
        ctr.train_one(settings(epochs=3, id_dropout=share), "dcn", sizes, ids, labels, seed=0)
        assert float(torch.cat(seen[True]).mean()) == pytest.approx(share, abs=0.03)
    assert not torch.cat(seen[False]).any() and torch.equal(ids["train"], before)


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
    mean, half, p = ctr.paired_interval(first - second)
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert p == pytest.approx(test.pvalue)


def test_a_single_seed_has_no_interval_and_says_so(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    printed = run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", "--models", "dcn", "--seeds", 1,
                        "--epochs", 1)
    assert "one run, no interval" in printed and "± nan" not in printed


def test_calibration_error_is_zero_for_the_truth_and_the_shift_for_a_shift():
    rng = np.random.default_rng(0)
    probabilities = rng.uniform(0.2, 0.6, 200_000)
    labels = (rng.random(200_000) < probabilities).astype(np.int8)
    assert ctr.calibration_error(labels, probabilities) < 0.01
    assert ctr.calibration_error(labels, probabilities + 0.3) == pytest.approx(0.3, abs=0.01)
    extreme = np.where(probabilities < 0.4, 0.0, 0.8)  # right on average, wrong by 0.3 and by 0.3
    assert ctr.calibration_error(labels, extreme) == pytest.approx(0.3, abs=0.01)
    assert ctr.calibration_error(np.array([0, 1]), np.array([0.25, 1.0])) == pytest.approx(0.125)


def test_the_summary_pairs_by_seed():
    planted = {"none": 0.0, "random": 0.01, "codes": 0.03, "truth": 0.05}
    rows = [{"model": "dcn", "features": name, "seed": seed, "auc": 0.6 + 0.1 * seed + gain, "logloss": 0.6,
             "calibration_error": 0.0}
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


def test_every_control_runs(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    options = "--models", "dcn", "afn", "--seeds", 1, "--epochs", 1, "--id-dropout", 0.3
    features = ["none", "codes", "random", "cf", "leniency", "dense"]
    run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *options, "--features", *features)
    results = pd.read_parquet(tmp_path / "run/results.parquet")
    assert set(results["features"]) == set(features) and len(results) == 1 + 2 * 6


def test_truth_is_for_planted_data_only(small_run):
    assert "truth" in run_stage("04_train_ctr.py", "--run-dir", small_run[1], "--features", "truth", ok=False)


def test_auc_counts_ties_as_half():
    assert roc_auc_score([0, 1, 1], [0.5, 0.5, 0.9]) == pytest.approx(0.75)


def test_a_diverging_model_says_so(capsys):
    sizes, ids, labels = pairwise_data(rows=600)
    assert "--lr 1e+20" in dies(capsys, ctr.train_one, settings(lr=1e20), "dcn", sizes, ids, labels, 0)
