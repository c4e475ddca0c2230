"""Stage 4: which fields a model reads, what is chosen on valid, what is trained, finished and refused."""

import functools
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import SMALL, ctr, dies, run_stage
from ctr_data import small_run_of, small_split
from test_checks import overwrite
from userip import ctr_training


def settings(*argv):
    rate = [] if "--tune" in argv else ["--lr", "0.003"]  # what --tune chooses may not be set
    return ctr.parse_args(["--epochs", "3", "--batch-size", "128", *rate, *map(str, argv)])


def group(run, *argv, name="dcn", features=("none",), seeds=(0,)):
    return ctr.train_group(settings(*argv), name, run, list(features), list(seeds))


def test_test_labels_reach_neither_training_nor_any_choice():
    first, second = small_run_of(), small_run_of()
    second.labels["test"] = 1 - second.labels["test"]
    (one,), (two,) = (group(run, "--tune").values() for run in (first, second))
    assert one["auc"] == pytest.approx(1 - two["auc"])
    for key in ("valid_auc", "valid_logloss", "best_epoch", *ctr.CHOICES):
        assert one[key] == two[key]


def test_the_best_epoch_is_restored_and_patience_stops():
    run = small_run_of()
    argv = lambda epochs: ("--epochs", epochs, "--patience", 20, "--lr", 0.05)
    long = group(run, *argv(20))[("none", 0)]
    # the figures are those of the best epoch's weights, not of the last
    assert long["best_epoch"] < 20 and long == group(run, *argv(long["best_epoch"]))[("none", 0)]
    stopped = group(run, *argv(20), "--patience", 1)[("none", 0)]
    assert stopped["best_epoch"] <= long["best_epoch"]


@functools.cache
def default_logloss():
    return group(small_run_of())[("none", 0)]["logloss"]


@pytest.mark.parametrize("change", [
    ("--lr", 0.03), ("--weight-decay", 0.1), ("--dropout", 0.6), ("--hidden", 8, 4),
    ("--layers", 1), ("--field-dim", 4), ("--batch-size", 64), ("--epochs", 1), ("--id-dropout", 0.3),
    ("--start", 0.1)])
def test_every_option_moves_the_result(change):
    assert group(small_run_of(), *change)[("none", 0)]["logloss"] != default_logloss()


def test_codes_that_tell_are_used_and_random_ones_are_not():
    argv = "--epochs", 25, "--lr", 0.005
    rows = group(small_run_of(), *argv, name="dcnv2", features=["codes", "random", "truth", "cf"])
    auc = {feature: figures["auc"] for (feature, _), figures in rows.items()}
    assert min(auc["codes"], auc["truth"]) > auc["random"] + 0.05
    dense = group(small_run_of(), *argv, name="dcnv2", features=["dense"])[("dense", 0)]["auc"]
    assert dense > auc["random"] + 0.05


def test_the_choice_is_the_best_mean_on_valid_and_is_that_run():
    run, grid = small_run_of(), ctr.candidates(settings("--tune"), "dcn")
    assert {row[1] for row in grid} == {3e-3, 0.1 * 3e-3} and len(grid) == 8
    size = "--batch-size", 512
    chosen = group(run, "--tune", *size, features=["codes", "random"], seeds=[0, 1])
    for feature in ("codes", "random"):
        mean = {}
        for values in grid:
            options = [f"--{key.replace('_', '-')}={value}" for key, value in zip(ctr.CHOICES, values)]
            alone = group(run, *options, *size, features=[feature], seeds=[0, 1])
            mean[values] = np.mean([figures["valid_logloss"] for figures in alone.values()])
            if values == tuple(chosen[feature, 0][key] for key in ctr.CHOICES):
                for seed in (0, 1):
                    assert chosen[feature, seed] == pytest.approx(alone[feature, seed], abs=1e-5, nan_ok=True)
        for seed in (0, 1):
            assert tuple(chosen[feature, seed][key] for key in ctr.CHOICES) == min(mean, key=mean.get)


def test_finished_rows_are_never_trained_twice_and_a_killed_run_ends_the_same(tmp_path, monkeypatch):
    run, seeds, features = small_run_of(), range(2), ["none", "codes", "random", "leniency"]
    rows = lambda folder, *more: ctr.train_run(
        settings("--run-dir", tmp_path / folder, "--epochs", 1, *more), run, ["dcn", "pnn"], features, seeds)
    whole = rows("whole")
    train, calls = ctr.train_group, []

    def killed(*rest):
        calls.append(rest)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*rest)

    monkeypatch.setattr(ctr, "train_group", killed)
    with pytest.raises(KeyboardInterrupt):
        rows("killed")
    monkeypatch.setattr(ctr, "train_group", lambda *rest: calls.append(rest) or train(*rest))
    again = rows("killed")
    assert len(calls) == 7  # of 6 groups one was killed
    same = lambda one, two: pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two), atol=1e-6)
    same(whole, again)
    same(rows("killed"), again)
    assert len(calls) == 7
    rows("killed", "--lr", 0.02)
    assert len(calls) == 13  # other options are other rows


def test_only_groups_that_are_missing_are_trained(tmp_path, monkeypatch, capsys):
    run, trained = small_run_of(), []
    train = ctr.train_stack
    monkeypatch.setattr(ctr, "train_stack", lambda args, name, members, *rest:
                        trained.append(len(members)) or train(args, name, members, *rest))
    score = lambda features, seeds, *more: ctr.train_run(
        settings("--run-dir", tmp_path, "--epochs", 1, *more), run, ["dcn"], features, range(seeds))
    score(["none", "codes"], 1)
    score(["none", "codes", "random"], 1)
    score(["codes", "random"], 1, "--paper")  # the learning rate is that of the tests all the same
    assert trained == [1, 1, 2] and "none: 1 rows of split 0 finished before" in capsys.readouterr().out
    monkeypatch.setattr(ctr, "CODE", ["common.py"])  # another program
    score(["none"], 1)
    assert trained == [1, 1, 2, 1]


def test_with_means_reads_the_two_means_where_valid_says_so(tmp_path, capsys):
    run, seeds, features = small_run_of(), range(2), ["codes+leniency", "random+random", "none"]
    rows = lambda features, *more: pd.DataFrame(ctr.train_run(
        settings("--run-dir", tmp_path, "--epochs", 1, "--features", *features, *more), run, ["dcn"], features,
        seeds)).set_index("features")  # with means, too, random+random deals what it deals without
    alone = rows([*features, *map(ctr.joined_with_means, features)])
    chosen, printed = rows(features, "--with-means"), capsys.readouterr().out
    assert not chosen.loc["none", "with_means"][:3].any()  # the base rate and `means`
    for feature in features:
        # the seeds' means decide, as they would among sets that were asked for by name
        losses = {name: alone.loc[name].query("model == 'dcn'")["valid_logloss"].mean()
                  for name in (feature, ctr.joined_with_means(feature))}
        both = "{:.4f}, with the means {:.4f}".format(*losses.values())
        assert f"dcn with {feature}: valid logloss {both}" in printed
        best, part = min(losses, key=losses.get), chosen.loc[feature].query("model == 'dcn'")
        assert (part["with_means"] == (best != feature)).all()
        assert np.allclose(part["auc"], alone.loc[best].query("model == 'dcn'")["auc"], atol=1e-4)
    assert [ctr.joined_with_means(name) for name in ("dense", "dense-means", "codes+dense-means", "none")] == [
        "dense", "dense-means", "codes+dense-means", "dense-means"]


def test_with_means_is_refused_where_no_set_could_take_them():
    for features in (["dense-means"], ["dense", "codes+dense-means"]):
        with pytest.raises(SystemExit):
            settings("--with-means", "--features", *features)
    assert settings("--with-means", "--features", "dense", "codes").with_means


def test_with_means_random_deals_what_it_deals_without():
    """`random` deals the codes, also beside the means, whichever set of two parts comes first"""
    args = settings("--with-means", "--features", "leniency16+tfidf", "codes", "random")
    assert ctr.parts_in(args, "random+dense-means") == [("codes", True), ("dense-means", False)]
    assert ctr.parts_in(args, "leniency16+tfidf+dense-means") == [
        ("leniency16", False), ("tfidf", False), ("dense-means", False)]
    assert ctr.parts_in(args, "dense-means") == [("dense-means", False)]
    asked = settings("--features", "leniency16+tfidf", "random+dense-means")  # by name it stands for its places
    assert ctr.parts_in(asked, "random+dense-means") == [("leniency16", True), ("dense-means", False)]


def test_the_choice_of_means_follows_valid_and_not_test():
    row = lambda feature, seed, valid, auc: {"model": "dcn", "features": feature, "seed": seed,
                                             "valid_logloss": valid, "auc": auc}
    rows = [{"model": "base rate", "features": "none", "auc": 0.5}, row("codes", 0, 0.5, 0.6), row("codes", 1, 0.5, 0.6),
            row("codes+dense-means", 0, 0.3, 0.1), row("codes+dense-means", 1, 0.6, 0.1)]
    assert [(row["features"], row["auc"], row["with_means"]) for row in ctr.choose_means(rows, ["codes"])] == [
        ("none", 0.5, False), ("codes", 0.1, True), ("codes", 0.1, True)]
    rows[-1]["valid_logloss"] = 0.8
    assert [row["auc"] for row in ctr.choose_means(rows, ["codes"])] == [0.5, 0.6, 0.6]


def test_random_codes_keep_sizes_and_usage_and_change_with_the_seed():
    run = small_run_of()
    run.split["test"] = pd.DataFrame({"user": range(300)})
    fields = lambda name, seed=0: ctr.further_fields(settings(), name, run, seed)[:2]
    codes, with_unknown = fields("codes")
    assert with_unknown == [5, 4] and (codes["test"] == run.codes).all()
    first, second = (fields("random", seed)[0]["test"] for seed in (0, 1))
    assert (np.sort(first, 0) == np.sort(codes["test"], 0)).all() and (first != second).any()
    for k in (0, 1):  # each field of its own
        assert (first[:, k] == np.random.default_rng([0, k]).permutation(run.codes[:, k])).all()
    assert fields("none")[0]["test"].shape == (300, 0)


def test_train_rows_read_the_codes_and_vectors_that_have_not_seen_them():
    """With folds: codes of train_codes, vectors of the row's fold; valid and test those with all evidence."""
    run = small_run_of()
    train, num_users = run.split["train"], len(run.users)
    rng = np.random.default_rng(0)
    run.train_codes = np.stack([rng.integers(4, size=len(train)), rng.integers(3, size=len(train))], 1)
    fields, sizes, _ = ctr.further_fields(settings(), "codes", run, 0)
    assert sizes == [5, 4] and (fields["train"] == run.train_codes).all()
    for name in ("valid", "test"):
        assert (fields[name] == run.codes[run.split[name]["user"]]).all()
    fold = torch.tensor(rng.integers(2, size=len(train)))
    number = torch.arange(3 * num_users).float()  # it says whose the vector is, and of which fold
    run.stored = {"fold": fold, "profiles": number.view(3, num_users, 1, 1) * torch.ones(2, 4)}
    rows = ctr.read_rows(settings(), run, [("dense", 0)])
    train_vectors = rows.read_vectors("train", torch.arange(len(train))[None], None)[0][0, :, 0]
    assert train_vectors.tolist() == (fold.numpy() * num_users + train["user"].to_numpy()).tolist()
    test_vectors = rows.read_vectors("test", torch.arange(len(run.split["test"]))[None], None)[0][0, :, 0]
    assert test_vectors.tolist() == (2 * num_users + run.split["test"]["user"].to_numpy()).tolist()


def test_each_model_reads_the_numbers_of_its_own_set_beside_the_ids():
    """Means of its own seed's folds, in the order of the rows, the item's first; codes stay sparse fields."""
    run = small_run_of()
    args = settings("--features", "codes+dense-means", "random+dense-means")
    rows = ctr.read_rows(args, run, [("codes+dense-means", 0), ("random+dense-means", 1)])
    assert rows.dims == (1, 1) and rows.ids["train"].shape[2] == 4
    chosen = torch.tensor([[5, 7, 900], [3, 0, 1]])
    for name in ("train", "test"):
        (numbers,) = rows.read_vectors(name, chosen % 300, torch.tensor([[1], [0]]))
        for model, seed in ((0, 1), (1, 0)):
            columns = ctr.set_columns([("dense-means", False)], run, seed)
            expected = np.stack([column.read(run.split)[name] for column in columns], 1)
            assert numbers[model].numpy() == pytest.approx(expected[chosen[model].numpy() % 300], rel=1e-5)


def test_dense_means_find_who_is_generous_where_ids_have_few_rows():
    """The numbers reach the logits, in training and in prediction."""
    run = small_run_of()
    run.split["train"] = run.split["train"].groupby("user").head(3)
    for name, frame in run.split.items():
        run.split[name] = frame.assign(label=(frame["rating"] > 3).astype(np.int8))
    run.labels = {name: run.split[name]["label"].to_numpy(copy=True) for name in run.labels}
    args = settings("--epochs", 4, "--lr", "0.01", "--features", "dense-means", "none")
    auc = {feature: ctr.train_group(args, "dcn", run, [feature], [0])[feature, 0]["auc"]
           for feature in args.features}
    assert auc["dense-means"] > auc["none"] + 0.03, auc


def test_every_field_has_rows_of_its_own_and_cold_users_are_unknown():
    run = small_run_of()
    rows = ctr.read_rows(settings(), run, list(itertools.product(["codes", "random"], [0, 1])))
    codes, same, random, other = rows.ids["test"]
    assert torch.equal(codes, same) and not torch.equal(random, other)  # codes know no seed
    first = codes.cpu().numpy()
    user = run.split["test"]["user"].to_numpy()
    assert (first[:, 0] == np.where(user < 280, user, 300)).all() and rows.unknown == 300
    ranges = np.cumsum([0, 301, 20, 5, 4])
    assert (first[:, 1] == 301 + run.split["test"]["item"]).all()
    assert (first[:, 2:] == run.codes[user] + ranges[2:4]).all() and rows.num_rows[0] == ranges[-1]


def test_items_without_a_train_row_share_one_and_id_dropout_trains_it_in_cold_item_splits(monkeypatch):
    split = small_split()[0]
    split["train"] = split["train"][~split["train"]["item"].isin([4, 9])]
    run = small_run_of(split)
    rows = ctr.read_rows(settings(), run, [("none", 0)])
    item = run.split["test"]["item"].to_numpy()
    assert (rows.ids["test"][0, :, 1].numpy() == 301 + np.where(item == 9, 4, item)).all()
    assert rows.dropped is None
    plain = group(run, "--id-dropout", 0.3)[("none", 0)]["auc"]
    run.prepared = {"split": "cold-item"}
    assert group(run, "--id-dropout", 0.3)[("none", 0)]["auc"] != plain
    rows = ctr.read_rows(settings("--id-dropout", 0.3), run, [("none", 0)])
    assert rows.dropped == 1 and rows.unknown == 305
    read = []
    monkeypatch.setattr(ctr_training.Stack, "train_step", lambda self, ids, *rest: read.append(ids))
    group(run, "--id-dropout", 0.3, "--epochs", 1)
    ids = torch.cat([part.flatten(0, 1) for part in read])
    assert (ids[:, 1] == 305).double().mean() == pytest.approx(0.3, abs=0.05) and (ids[:, 0] < 300).all()


def test_fields_are_read_by_every_set_and_named_in_the_report(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    plain = pd.read_parquet(small_run[1] / "results.parquet")
    run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *SMALL["04_train_ctr.py"], "--models", "dcn",
              "--fields", "category", "brand", "price")
    described = pd.read_parquet(tmp_path / "run/results.parquet")
    plain = plain[plain["model"] != "pnn"].reset_index(drop=True)
    is_read = ~plain["model"].isin(["base rate", "means"])
    assert ((plain["logloss"] != described["logloss"]) == is_read).all() and is_read.sum() == 6
    assert json.loads(described["options"][0])["fields"] == ["category", "brand", "price"]
    assert "(--fields): category, brand, price." in (tmp_path / "run/results.md").read_text()
    run_stage("05_case_study.py", "--run-dir", tmp_path / "run", "--num-users", 2)  # it trains with them, too
    line = run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", "--fields", "gender", ok=False)
    assert "--fields gender" in line and "category, brand, price" in line


def test_taste_reads_the_vectors_of_the_item_bank_and_refuses_a_run_without(small_run, tmp_path, capsys):
    shutil.copytree(small_run[1], tmp_path / "run")
    assert "--features taste" in dies(capsys, ctr.read_run, tmp_path / "run", ["codes+taste"])
    run_stage("02_infer_profiles.py", "--run-dir", tmp_path / "run", *SMALL["02_infer_profiles.py"], "--items")
    run_stage("03_quantize.py", "--run-dir", tmp_path / "run", *SMALL["03_quantize.py"])
    run = ctr.read_run(tmp_path / "run", ["codes+taste"])
    ids, sizes, numbers = ctr.further_fields(settings("--features", "codes+taste"), "codes+taste", run, 0)
    assert sizes == [3, 3] and numbers["train"].shape == (len(run.split["train"]), 1)
    by_words = ctr.further_fields(settings("--features", "tfidf-taste"), "tfidf-taste", run, 0)[2]
    for one in (numbers, by_words):
        assert one["test"].std() > 0 and np.isfinite(one["train"]).all()
    assert (numbers["test"] != by_words["test"]).any()


def test_means_stands_first_and_alone_where_no_other_model_is_asked_for(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", "--models", "means", "--seeds", 2)
    results = pd.read_parquet(tmp_path / "run/results.parquet")
    assert results["model"].tolist() == ["base rate", "means", "means"] and results["valid_auc"][1:].notna().all()
    before = pd.read_parquet(small_run[1] / "results.parquet")
    assert before["model"][1:3].eq("means").all() and before["auc"][1:3].equals(results["auc"][1:3])
    run_stage("05_case_study.py", "--run-dir", tmp_path / "run", "--num-users", 2)
    assert ctr.parse_args(["--models", "pnn", "means", "dcn"]).models == ["pnn", "dcn"]


def test_a_single_seed_has_no_interval_and_says_so(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    printed = run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", "--models", "dcn", "--seeds", 1,
                        "--epochs", 1)
    assert "one run, no interval" in printed and "± nan" not in printed


def test_results_hold_a_row_per_run_and_the_base_rate(small_run):
    results = pd.read_parquet(small_run[1] / "results.parquet")
    assert len(results) == 1 + 2 + 2 * 3 * 2 and set(results["features"]) == {"none", "codes", "random"}
    assert results["model"].iloc[0] == "base rate" and results["auc"].iloc[0] == 0.5
    markdown = (small_run[1] / "results.md").read_text()
    assert "codes - random" in markdown and "base rate" in markdown
    assert "Draws: 1, seeds of each: 2" in markdown and "not corrected for 20 looks" in markdown
    assert "--lr 0.005" in markdown
    rows = pd.read_parquet(small_run[1] / "interactions.parquet")
    test, train = (rows[rows["split"] == name] for name in ("test", "train"))
    users, items = (sum(one not in set(train[key]) for one in test[key]) for key in ("user", "item"))
    assert f"users without a train row: {users}, of such items: {items}." in markdown


def test_every_control_runs(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    options = "--models", "dcn", "afn", "--seeds", 1, "--epochs", 1, "--id-dropout", 0.3
    features = ["none", "codes", "random", "cf", "leniency", "dense", "tfidf", "codes+tfidf", "random+random",
                "leniency16+item-mean"]
    run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *options, "--features", *features)
    results = pd.read_parquet(tmp_path / "run/results.parquet")
    assert set(results["features"]) == set(features) and len(results) == 1 + 1 + 2 * 10
    markdown = (tmp_path / "run/results.md").read_text()
    assert "codes+tfidf - random+random" in markdown and "`random+random` deals parts of codes+tfidf." in markdown


@pytest.mark.parametrize("options, complaint", [
    (["--tune", "--lr", "0.1"], "--lr"), (["--tune", "--start", "1"], "--start"),
    (["--tune", "--paper"], "--paper"), (["--seed", str(2**32 - 1), "--seeds", "2"], "2**32"),
    (["--dropout", "1"], "--dropout"), (["--models", "means", "--features", "codes"], "--features"),
    (["--models", "means", "--codebook-sizes"], "--codebook-sizes")])
def test_options_that_make_no_sense_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        ctr.parse_args(options)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("feature", ["truth", "truth+tfidf"])
def test_truth_is_for_planted_data_only(small_run, feature):
    assert "truth" in run_stage("04_train_ctr.py", "--run-dir", small_run[1], "--features", feature, ok=False)


def test_truth_is_asked_for_only_where_every_profile_has_one():
    run = small_run_of()
    for run.names, expected in ((["hobby", "background"], True), (["hobby", "budget", "taste"], False)):
        assert ("truth" in ctr.check_features(settings(), run)) == expected


def test_compiling_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(ctr.shutil, "which", lambda name: None)
    assert "leave it out" in dies(capsys, ctr.main, settings("--compile"))


def test_a_diverging_model_says_so(capsys):
    assert "--lr 1e+20" in dies(capsys, group, small_run_of(), "--lr", 1e20)


def test_figures_5_and_6_show_what_stage_3_makes_of_other_sizes(small_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    monkeypatch.setattr(ctr, "FIGURES", {"figure5": (2, 5), "figure6": (2,)})
    ctr.main(ctr.parse_args(["--run-dir", str(run), "--models", "dcn", "--seeds", "2", "--epochs", "1",
                             "--codebook-sizes"]))
    for name, sizes in (("figure5", {2, 5}), ("figure6", {2})):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        figures = pd.read_csv(run / f"{name}.csv")
        assert set(figures["size"]) == sizes and len(figures) == 6 * len(sizes)
    made = json.loads((run / "codes-5-2/feature_bank.parquet.json").read_text())
    assert made["options"]["codes"] == [5, 2]


def test_peapod_is_one_more_feature_set_beside_the_codes(small_run, tmp_path):
    run = shutil.copytree(small_run[1], tmp_path / "run")
    stage = lambda *features, ok=True: run_stage("04_train_ctr.py", "--run-dir", run, "--models", "dcn", "--seeds",
                                                 1, "--epochs", 2, "--features", *features, ok=ok)
    auc = lambda: pd.read_parquet(run / "results.parquet").set_index("features")["auc"]
    assert "baselines/peapod.py" in stage("peapod", ok=False)
    folder = shutil.copytree(small_run[1], run / "peapod")
    assert "no profiles of this split" in stage("peapod", ok=False)  # they are of stage 2
    for name in ("interactions.parquet", "interactions.parquet.json"):  # as peapod.py links them
        (folder / name).unlink()
        (folder / name).symlink_to(Path("..") / name)
    sidecar = folder / "profiles.pt.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"stage": "baselines/peapod.py"}))
    stage("codes", "peapod", "codes+peapod")
    assert auc()["codes"] == auc()["peapod"] != auc()["codes+peapod"]  # here they are the same codes
    bank = pd.read_parquet(folder / "feature_bank.parquet")
    names = [*bank.columns.drop(["user", "user_id"])]
    overwrite(folder, "feature_bank.parquet", bank.assign(**{name: np.roll(bank[name], 1) for name in names}))
    before = auc()
    stage("codes", "peapod")
    assert auc()["codes"] == before["codes"] and auc()["peapod"] != before["peapod"]
    assert "leave peapod out" in stage("codes+peapod", "--splits", 2, ok=False)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"run": "another"}))
    assert "no profiles of this split" in stage("peapod", ok=False)


def test_each_model_has_a_penalty_of_its_own_unless_one_is_asked_for():
    args = ctr.parse_args([])
    decays = [ctr.candidates(args, name)[0][1] for name in ("ffm", "afm", "fibinet", "dcn")]
    assert decays == [1e-4, 1e-4, 1e-4, 3e-3]
    asked = ctr.parse_args(["--weight-decay", "0.003"])
    assert {ctr.candidates(asked, name)[0][1] for name in ctr.MODELS} == {3e-3}
    run = SimpleNamespace(digests={})
    key = lambda args, model: ctr.group_key(args, run, model, ["none"], [0])
    assert key(args, "dcn") == key(asked, "dcn") and key(args, "ffm") != key(asked, "ffm")


def test_rows_without_profiles_are_the_same_for_any_codebook_and_no_others():
    args = ctr.parse_args([])
    runs = [SimpleNamespace(digests={"interactions.parquet": rows, "feature_bank.parquet": bank})
            for rows, bank in (("a", "b"), ("a", "c"), ("d", "b"))]
    for feature in ctr.FEATURES:
        first, other_bank, other_rows = (ctr.group_key(args, run, "dcn", [feature], [0]) for run in runs)
        assert (first == other_bank) == (feature in ctr.PROFILE_FREE) and first != other_rows
    key = lambda *features: ctr.group_key(ctr.parse_args(["--features", *features]), runs[0], "dcn",
                                          ["random+random"], [0])
    assert key("random+random") != key("random+random", "leniency16+tfidf") != key("random+random", "cf+tfidf")
