import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from common import write_artifact
from conftest import ctr, dies, run_stage

SPLITS = "train", "valid", "test"


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


def small_run_of(split=None, codes_tell=True, seed=0):
    """What read_run gives: users' codes decide, with the item's, whether they like it."""
    rng = np.random.default_rng(seed)
    split = split or small_split()[0]
    num_users = 1 + max(int(frame["user"].max()) for frame in split.values())
    codes = np.stack([rng.integers(4, size=num_users), rng.integers(3, size=num_users)], 1)
    told = codes[:, 0] if codes_tell else rng.integers(4, size=num_users)
    for name, frame in split.items():
        likes = (told[frame["user"]] + frame["item"]) % 4 < 2
        label = np.where(rng.random(len(frame)) < 0.1, ~likes, likes).astype(np.int8)
        split[name] = frame.assign(label=label)
    history = split["train"]["user"].value_counts().reindex(range(num_users), fill_value=0).to_numpy()
    vectors = [torch.eye(4)[codes[:, 0]], torch.eye(3)[codes[:, 1]]]
    return SimpleNamespace(
        split=split, labels={name: split[name]["label"].to_numpy(copy=True) for name in SPLITS},
        users=pd.DataFrame({"true_hobby": codes[:, 0], "true_background": codes[:, 1]}), codes=codes,
        code_sizes=[4, 3], names=["hobby", "background"], vectors=vectors, history=history, num_items=20,
        split_seed=0, digests={}, train_codes=None, fold=None)


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
    argv = lambda epochs: ("--epochs", epochs, "--patience", 30, "--lr", 0.05)
    long = group(run, *argv(30))[("none", 0)]
    # the figures are those of the best epoch's weights, not of the last
    assert long["best_epoch"] < 30 and long == group(run, *argv(long["best_epoch"]))[("none", 0)]
    stopped = group(run, *argv(30), "--patience", 1)[("none", 0)]
    assert stopped["best_epoch"] <= long["best_epoch"]


@pytest.mark.parametrize("change", [
    ("--lr", 0.03), ("--weight-decay", 0.1), ("--net-decay", 0.1), ("--dropout", 0.6), ("--hidden", 8, 4),
    ("--layers", 1), ("--field-dim", 4), ("--batch-size", 64), ("--epochs", 1), ("--id-dropout", 0.3),
    ("--start", 0.1)])
def test_every_option_moves_the_result(change):
    run = small_run_of()
    figure = lambda *argv: group(run, *argv)[("none", 0)]["logloss"]
    assert figure() != figure(*change)


def test_codes_that_tell_are_used_and_random_ones_are_not():
    found = group(small_run_of(), "--epochs", 40, name="dcnv2", features=["codes", "random", "truth", "cf"])
    auc = {feature: figures["auc"] for (feature, _), figures in found.items()}
    assert min(auc["codes"], auc["truth"]) > auc["random"] + 0.05
    dense = group(small_run_of(), "--epochs", 40, name="dcnv2", features=["dense"])[("dense", 0)]["auc"]
    assert dense > auc["random"] + 0.05


def test_the_choice_is_the_best_mean_on_valid_and_is_that_run():
    run, grid = small_run_of(), ctr.candidates_of(settings("--tune", "--net-decay", 0.02), "dcn")
    assert {row[1] for row in grid} == {3e-3, 0.1 * 3e-3} and {row[2] for row in grid} == {0.02}
    assert len(grid) == 8
    chosen = group(run, "--tune", "--net-decay", 0.02, features=["codes", "random"], seeds=[0, 1])
    for feature in ("codes", "random"):
        mean = {}
        for values in grid:
            options = [f"--{key.replace('_', '-')}={value}" for key, value in zip(ctr.CHOICES, values)]
            alone = group(run, *options, features=[feature], seeds=[0, 1])
            mean[values] = np.mean([figures["valid_logloss"] for figures in alone.values()])
            if values == tuple(chosen[feature, 0][key] for key in ctr.CHOICES):
                for seed in (0, 1):
                    assert chosen[feature, seed] == pytest.approx(alone[feature, seed], abs=1e-5, nan_ok=True)
        for seed in (0, 1):
            assert tuple(chosen[feature, seed][key] for key in ctr.CHOICES) == min(mean, key=mean.get)


def test_a_finished_row_is_never_trained_twice_and_a_killed_run_ends_the_same(tmp_path, monkeypatch, capsys):
    run, seeds, features = small_run_of(), range(2), ["none", "codes", "random", "leniency"]
    rows = lambda folder, *more: [
        {key: value for key, value in row.items() if key != "seconds"} for row in ctr.train_run(
            settings("--run-dir", tmp_path / folder, *more), run, ["dcn", "pnn"], features, seeds)]
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
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
    path = tmp_path / "killed/finished.jsonl"
    done = path.read_text()
    path.write_text(done[:-20])  # the last line cut short
    monkeypatch.setattr(ctr, "train_group", lambda *rest: calls.append(rest) or train(*rest))
    again = rows("killed")
    assert "unfinished line" in capsys.readouterr().out and len(calls) == 8  # the cut row, and 3 groups
    same = lambda one, two: pd.testing.assert_frame_equal(pd.DataFrame(one), pd.DataFrame(two), atol=1e-6)
    same(whole, again)
    same(rows("killed"), again)
    assert len(calls) == 8
    rows("killed", "--lr", 0.02)
    assert len(calls) == 14  # other options are other rows


def test_only_rows_that_are_missing_are_trained(tmp_path, monkeypatch, capsys):
    run, trained = small_run_of(), []
    train = ctr.train_stack
    monkeypatch.setattr(ctr, "train_stack", lambda args, name, members, *rest:
                        trained.append(len(members)) or train(args, name, members, *rest))
    score = lambda features, seeds, *more: ctr.train_run(settings("--run-dir", tmp_path, *more), run, ["dcn"],
                                                         features, range(seeds))
    score(["codes"], 1)
    score(["codes", "random"], 2)
    score(["codes", "random"], 2, "--paper")  # the learning rate is that of the tests all the same
    assert trained == [1, 3]
    monkeypatch.setattr(ctr, "code_digests", lambda: ["another program"])
    score(["codes"], 1)
    assert trained == [1, 3, 1] and "3 rows of split 0" in capsys.readouterr().out


def test_what_is_no_row_in_finished_jsonl_is_left_out_and_what_cannot_be_written_is_said(tmp_path, capsys):
    path = tmp_path / "finished.jsonl"
    path.write_bytes(b'123\n[1]\n{"no": "key"}\n\xff\xfe\n{"key": "a", "auc": 1}\n{"key": "b"')
    assert ctr.read_finished(path) == {"a": {"auc": 1}}
    assert capsys.readouterr().out.count("left out") == 5
    path.unlink()
    path.mkdir()
    assert "cannot read" in dies(capsys, ctr.read_finished, path)
    assert "cannot write" in dies(capsys, ctr.append, path, "")


def test_history_groups_are_a_partition_by_train_rows():
    run = small_run_of()
    groups = ctr.history_groups(run)
    assert (sum(mine.astype(int) for mine in groups.values()) == 1).all()
    users = run.split["test"]["user"].to_numpy()
    assert (groups["cold"] == (users >= 280)).all() and groups["cold"].any()
    run.history = np.arange(300)
    counts = [run.history[users][mine] for name, mine in ctr.history_groups(run).items() if name != "cold"]
    assert counts[0].max() < counts[1].min() and counts[1].max() < counts[2].min()
    sizes = [len(part) for part in counts]
    assert max(sizes) < 1.3 * min(sizes)


def test_random_codes_keep_sizes_and_usage_and_change_with_the_seed():
    run = small_run_of()
    run.split = {"test": pd.DataFrame({"user": range(300)})}
    fields = lambda name, seed=0: ctr.fields_of(name, run, seed)
    codes, with_unknown = fields("codes")
    assert with_unknown == [5, 4] and (codes["test"] == run.codes).all()
    first, second = (fields("random", seed)[0]["test"] for seed in (0, 1))
    assert (np.sort(first, 0) == np.sort(codes["test"], 0)).all() and (first != second).any()
    assert (first[:, 0] == codes["test"][:, 0]).mean() < 0.4
    assert fields("none")[0]["test"].shape == (300, 0)


def test_train_rows_read_the_codes_and_vectors_that_have_not_seen_them():
    """With folds: codes of train_codes, vectors of the row's fold; valid and test those with all evidence."""
    run = small_run_of()
    train, num_users = run.split["train"], len(run.users)
    rng = np.random.default_rng(0)
    run.train_codes = np.stack([rng.integers(4, size=len(train)), rng.integers(3, size=len(train))], 1)
    fields, sizes = ctr.fields_of("codes", run, 0)
    assert sizes == [5, 4] and (fields["train"] == run.train_codes).all()
    for name in ("valid", "test"):
        assert (fields[name] == run.codes[run.split[name]["user"]]).all()
    run.fold = torch.tensor(rng.integers(2, size=len(train)))
    told = torch.arange(3 * num_users).float()[:, None]  # a vector tells whose it is, and of which fold
    run.vectors = [told, -told]
    rows, _ = ctr.rows_of(settings(), run, ["dense"], [0])
    of_train = rows.vectors_of("train", torch.arange(len(train))[None])[0][0, :, 0]
    assert of_train.tolist() == (run.fold.numpy() * num_users + train["user"].to_numpy()).tolist()
    of_test = rows.vectors_of("test", torch.arange(len(run.split["test"]))[None])[0][0, :, 0]
    assert of_test.tolist() == (2 * num_users + run.split["test"]["user"].to_numpy()).tolist()


def test_every_field_has_rows_of_its_own_and_cold_users_are_unknown():
    run = small_run_of()
    rows, places = ctr.rows_of(settings(), run, ["codes", "random"], [0, 1])
    assert len(set(places.values())) == 3 and places["codes", 0] == places["codes", 1]  # codes know no seed
    first = rows.ids["test"][places["codes", 0]].cpu().numpy()
    user = run.split["test"]["user"].to_numpy()
    assert (first[:, 0] == np.where(user < 280, user, 300)).all() and rows.unknown == 300
    ranges = np.cumsum([0, 301, 20, 5, 4])
    assert (first[:, 1] == 301 + run.split["test"]["item"]).all()
    assert (first[:, 2:] == run.codes[user] + ranges[2:4]).all() and rows.num_rows[0] == ranges[-1]


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


def test_the_papers_relative_improvements_come_out():
    """Eq. 10 and 11 on table 2's printed figures; tolerance: what rounding to four digits can do."""
    figures = lambda *key: iter(ctr.PAPER_FIGURES[key])
    pairs = lambda *key: dict(zip(ctr.PAPER_DATA, zip(*[figures(*key)] * 2)))
    ours, reference = pairs("dcn", "codes"), pairs("dcn", "none") | {"yelp": pairs("pnn", "none")["yelp"]}
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


def test_results_hold_a_row_per_run_and_the_base_rate(small_run):
    results = pd.read_parquet(small_run[1] / "results.parquet")
    assert len(results) == 1 + 2 * 3 * 2 and set(results["features"]) == {"none", "codes", "random"}
    assert results["model"].iloc[0] == "base rate" and results["auc"].iloc[0] == 0.5
    markdown = (small_run[1] / "results.md").read_text()
    assert "codes - random" in markdown and "base rate" in markdown
    assert "1 draw with 2 seeds each" in markdown and "not corrected for 12 looks" in markdown
    assert "lr 0.005, decay of the embeddings 0.003 (dcn, pnn)" in markdown


def test_runs_that_cannot_be_repeated_are_refused_before_anything_is_trained(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    path = tmp_path / "run/profiles.pt.json"
    sidecar = json.loads(path.read_text())
    sidecar["options"]["prior"] = "run/codebook.pt"
    path.write_text(json.dumps(sidecar))
    for more in (("--splits", 2), ("--codebook-sizes",)):
        line = run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *more, ok=False)
        assert more[0] in line and "--prior" in line and not (tmp_path / "run/split-1").exists()


def test_every_control_runs(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    options = "--models", "dcn", "afn", "--seeds", 1, "--epochs", 1, "--id-dropout", 0.3
    features = ["none", "codes", "random", "cf", "leniency", "dense"]
    run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *options, "--features", *features)
    results = pd.read_parquet(tmp_path / "run/results.parquet")
    assert set(results["features"]) == set(features) and len(results) == 1 + 2 * 6


@pytest.mark.parametrize("options, complaint", [
    (["--tune", "--lr", "0.1"], "--lr"), (["--tune", "--start", "1"], "--start"),
    (["--tune", "--paper"], "--paper"), (["--seed", str(2**32 - 1), "--seeds", "2"], "2**32"),
    (["--dropout", "1"], "--dropout")])
def test_options_that_make_no_sense_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        ctr.parse_args(options)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_truth_is_for_planted_data_only(small_run):
    assert "truth" in run_stage("04_train_ctr.py", "--run-dir", small_run[1], "--features", "truth", ok=False)


def test_truth_is_asked_for_only_where_every_profile_has_one(monkeypatch):
    users = pd.DataFrame({"true_hobby": [0], "true_background": [1]})
    monkeypatch.setattr(ctr, "read_artifacts", lambda args, *names: [users])
    for names, expected in ((["hobby", "background"], True), (["hobby", "budget", "taste"], False)):
        monkeypatch.setattr(ctr, "read_sidecar", lambda args, name: {"names": names})
        assert ("truth" in ctr.check_features(settings())) == expected


def test_compiling_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(ctr.shutil, "which", lambda name: None)
    assert "leave it out" in dies(capsys, ctr.main, settings("--compile"))


def test_auc_counts_ties_as_half():
    assert roc_auc_score([0, 1, 1], [0.5, 0.5, 0.9]) == pytest.approx(0.75)


def test_a_diverging_model_says_so(capsys):
    assert "--lr 1e+20" in dies(capsys, group, small_run_of(), "--lr", 1e20)


def frame_of(gain, splits=(0,), seeds=(1, 0), model="dcn"):
    return pd.DataFrame([{"model": model, "features": name, "split_seed": split, "seed": seed,
                          "auc": 0.6 + 0.1 * seed + 0.02 * split + value, "logloss": 0.6,
                          "calibration_error": 0.0} for name, value in gain.items()
                         for split in splits for seed in seeds])


def test_the_differences_pair_by_split_and_seed():
    results = frame_of({"none": 0.0, "random": 0.01, "codes": 0.03, "truth": 0.05}, splits=(3, 2))
    lines, gains = ctr.table_of_differences(ctr.by_run(results.sample(frac=1, random_state=0)), 0.125)
    assert gains["dcn"]["auc_gain"] == pytest.approx(0.02)
    assert gains["dcn"]["auc_half_interval"] == pytest.approx(0, abs=1e-9)
    assert gains["dcn"]["share_of_oracle"] == pytest.approx(0.5) and any("50%" in line for line in lines)


def test_the_interval_over_splits_is_wider_by_their_overlap():
    differences = np.random.default_rng(0).normal(size=9)
    _, plain, p = ctr.paired_interval(differences)
    _, wide, corrected = ctr.paired_interval(differences, overlap=0.125)
    assert wide / plain == pytest.approx(np.sqrt((1 / 9 + 0.125) / (1 / 9))) and corrected > p
    assert ctr.paired_interval([0.0, 0.0])[2] == 1 and ctr.paired_interval([1.0, 1.0])[2] == 0


def test_the_papers_tables_stand_beside_ours_where_it_is_the_papers_data():
    results = pd.concat([frame_of({"none": 0.0, "codes": 0.1, "dense": 0.05}),
                         frame_of({"none": 0.0, "codes": 0.1}, model="pnn")])
    by = ctr.by_run(results)
    text = "\n".join(ctr.paper_tables(by, {"dataset": "games", "interactions": 27_024}))
    assert "19,927 interactions; here are 27,024" in text
    for line in ("| dcn | 0.6500 ± 0.0707 | 0.7317 | 0.6000 ± 0.0000 | 0.7744 |",  # table 2
                 "| UserIP w.o. VQ, dcn | 0.7000 ± 0.0707 | 0.7340 |",  # table 3
                 "| UserIP-pnn | 0.7500 ± 0.0707 | 0.7208 |"):  # table 4
        assert line in text
    other = "\n".join(ctr.paper_tables(by, {"dataset": "table", "interactions": 27_024}))
    assert "0.7317" not in other and "| UserIP-pnn | 0.7500" in other
    assert ctr.paper_name({"dataset": "nete", "interactions": 441_783}) == "movies"


def test_a_folded_dcn_is_the_dcn_with_the_bank():
    torch.manual_seed(0)
    sizes = [7, 5, 4, 3]
    tables = [torch.randn(size, 8) for size in sizes]
    codes = torch.stack([torch.randint(size, (7,)) for size in sizes[2:]], 1)
    net = ctr.MODELS["dcn"](4, 8, 3, [16, 16])
    for value in net.parameters():
        torch.nn.init.normal_(value, std=0.3)
    user, item = torch.arange(7).repeat(5), torch.arange(5).repeat_interleave(7)
    ids = [user, item, *codes[user].T]
    with torch.no_grad():
        expected = net(torch.stack([table[column] for table, column in zip(tables, ids)], 1))
        assert torch.allclose(ctr.FoldedDCN(net.net, tables, codes)(user, item), expected, atol=1e-4)


def test_table_6_tells_what_is_held_and_how_long_it_takes():
    codes = torch.randint(3, (50, 2))
    rounds = {1: 20, 10_000: 10}
    figures = ctr.serving_table(settings(), 50, 20, codes, [4, 4], torch.randn(50, 256), rounds)
    vectors = 50 * 256 * 4 / 2**20
    assert figures["DCN + vectors"]["megabytes"] - figures["DCN"]["megabytes"] > vectors
    assert figures["DCN + bank"]["megabytes"] - figures["DCN"]["megabytes"] < vectors / 2
    assert all(row["p99_1"] >= row["median_1"] > row["median_10000"] > 0 for row in figures.values())
    assert len(ctr.print_serving(figures)) == 2 + 2 + len(figures)


def test_a_switch_that_is_off_stays_off_on_a_command_line():
    import importlib

    quantize = importlib.import_module("03_quantize")
    for argv in ([], ["--no-whiten"], ["--released"], ["--no-revive", "--codes", "3", "4"]):
        options = vars(quantize.parse_args(argv))
        assert vars(quantize.parse_args(ctr.command_line(options))) == options


def test_options_become_a_command_line_again():
    options = {"run_dir": "x", "paper": True, "codes": [4, 3], "raw": None, "columns": [], "strict": False,
               "beta": 0.0, "download": ""}
    assert ctr.command_line(options) == ["--run-dir", "x", "--paper", "--codes", "4", "3", "--beta", "0.0"]


def test_further_splits_are_made_by_the_stages_with_the_same_options(small_run, tmp_path, monkeypatch):
    """Another split has rows and codes of its own; it is made once, and again when the options differ."""
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    argv = ("04_train_ctr.py", "--run-dir", run, "--models", "dcn", "--seeds", 2, "--epochs", 1,
            "--splits", 2)
    printed = run_stage(*argv)
    assert "split-1: 01_prepare.py" in printed and "split-1: 03_quantize.py" in printed
    results = pd.read_parquet(run / "results.parquet")
    assert set(results["split_seed"]) == {0, 1} and len(results) == 2 * (1 + 3 * 2)
    first, second = (pd.read_parquet(folder / "interactions.parquet") for folder in (run, run / "split-1"))
    assert first.drop(columns="split").equals(second.drop(columns="split"))
    assert (first["split"] != second["split"]).any()
    for name in ("interactions.parquet", "profiles.pt", "feature_bank.parquet"):
        one, two = (json.loads((folder / f"{name}.json").read_text())["options"]
                    for folder in (run, run / "split-1"))
        assert {key for key in one if one[key] != two[key]} <= {"run_dir", "split_seed"}
    again = run_stage(*argv)
    assert "01_prepare.py" not in again and "finished before" in again
    assert pd.read_parquet(run / "results.parquet").equals(results)
    assert "Nadeau" in (run / "results.md").read_text()
    # as after a kill between stages 1 and 2: the options are as asked for, but stage 2 has read other rows
    path = run / "split-1/interactions.parquet"
    made = json.loads((run / "split-1/interactions.parquet.json").read_text())["options"]
    write_artifact(SimpleNamespace(**made), path.name, pd.read_parquet(path).iloc[:-1], split_seed=1, seed=0,
                   **{key: value for key, value in made.items() if key in ("split", "dataset")})
    monkeypatch.setattr(ctr.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    assert "02_infer_profiles.py failed" in run_stage(*argv, ok=False)


def test_figures_5_and_6_show_what_stage_3_makes_of_other_sizes(small_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    monkeypatch.setattr(ctr, "FIGURES", {"figure5.png": (2, 5), "figure6.png": (2,)})
    ctr.main(ctr.parse_args(["--run-dir", str(run), "--models", "dcn", "--seeds", "2", "--epochs", "1",
                             "--codebook-sizes"]))
    for name, sizes in (("figure5.png", {2, 5}), ("figure6.png", {2})):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        figures = json.loads((run / f"{name}.json").read_text())["figures"]
        assert {row["size"] for row in figures} == sizes and len(figures) == 6 * len(sizes)
    made = json.loads((run / "codes-5-2/feature_bank.parquet.json").read_text())
    assert made["options"]["codes"] == [5, 2]


def test_each_model_has_a_penalty_of_its_own_unless_one_is_asked_for():
    args = ctr.parse_args([])
    assert [ctr.decay_of(args, name) for name in ("ffm", "afm", "fibinet", "dcn")] == [1e-4, 1e-4, 1e-4, 3e-3]
    asked = ctr.parse_args(["--weight-decay", "0.003"])
    assert {ctr.decay_of(asked, name) for name in ctr.MODELS} == {3e-3}
    run = SimpleNamespace(digests={})
    key = lambda args, model: ctr.key_of(args, run, model, "none", 0)
    assert key(args, "dcn") == key(asked, "dcn") and key(args, "ffm") != key(asked, "ffm")


def test_rows_without_profiles_are_the_same_for_any_codebook_and_no_others():
    args = ctr.parse_args([])
    runs = [SimpleNamespace(digests={"interactions.parquet": rows, "feature_bank.parquet": bank})
            for rows, bank in (("a", "b"), ("a", "c"), ("d", "b"))]
    for feature in ctr.FEATURES:
        first, other_bank, other_rows = (ctr.key_of(args, run, "dcn", feature, 0) for run in runs)
        assert (first == other_bank) == (feature in ("none", "leniency")) and first != other_rows
