import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import prepare, run_stage, write_table


def frame_of(pairs):
    return pd.DataFrame(pairs, columns=["user_id", "item_id"])


def prepare_table(tmp_path, *options):
    run = tmp_path / "run"
    run_stage("01_prepare.py", "--dataset", "table", "--raw", tmp_path / "raw", "--run-dir", run, *options)
    return [pd.read_parquet(run / f"{name}.parquet") for name in ("interactions", "items", "users")]


def test_the_filter_is_iterated_until_nothing_falls():
    # u3 falls with its 1 row; then item c has 1 row left and falls; then u2 has 1 row left and falls
    pairs = [("u1", "a"), ("u1", "b"), ("u4", "a"), ("u4", "b"), ("u2", "a"), ("u2", "c"), ("u3", "c")]
    kept = prepare.keep_core(frame_of(pairs), 2)
    assert sorted(set(kept["user_id"])) == ["u1", "u4"] and len(kept) == 4
    assert len(prepare.keep_core(kept, 2)) == 4


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), unique=True), least=st.integers(1, 5))
def test_the_core_is_a_fixed_point_and_its_rows_stay_in_order(pairs, least):
    kept = prepare.keep_core(frame_of(pairs), least)
    assert kept.index.is_monotonic_increasing
    for side in ("user_id", "item_id"):
        assert (kept[side].value_counts() >= least).all()
    again = prepare.keep_core(kept, least)
    assert again.index.equals(kept.index)


@pytest.mark.parametrize("seed", range(5))
def test_the_core_is_a_fixed_point_and_keeps_all_it_can(seed):
    rng = np.random.default_rng(seed)
    frame = frame_of([(f"u{rng.integers(30)}", f"i{rng.integers(20)}") for _ in range(150)]).drop_duplicates()
    kept = prepare.keep_core(frame, 4)
    assert (kept.groupby("user_id").size() >= 4).all() and (kept.groupby("item_id").size() >= 4).all()
    alive = set(map(tuple, frame.to_numpy()))  # naive: remove one offender at a time
    count = lambda pair, side: sum(other[side] == pair[side] for other in alive)
    while True:
        offenders = [pair for pair in alive if min(count(pair, 0), count(pair, 1)) < 4]
        if not offenders:
            break
        alive.remove(sorted(offenders)[0])
    assert set(map(tuple, kept.to_numpy())) == alive


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 5))))
def test_of_duplicates_the_latest_stays_and_of_equal_times_the_last(rows):
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"], dtype="int64")
    naive = {}
    for place, (user, item, when) in enumerate(rows):
        if (user, item) not in naive or when >= rows[naive[user, item]][2]:
            naive[user, item] = place
    assert prepare.keep_latest(frame).index.tolist() == sorted(naive.values())


def test_rows_are_sorted_by_user_and_time_with_ties_as_they_stand():
    rng = np.random.default_rng(0)
    interactions = pd.DataFrame({"user_id": rng.choice(["b", "a", "c"], 300), "item_id": "x",
                                 "rating": 1.0, "timestamp": rng.choice([7, -5, 2**62], 300)})
    table, users, *_ = prepare.index_ids(interactions, pd.DataFrame({"user_id": ["c", "b", "a"]}),
                                         pd.DataFrame({"item_id": ["x"], "title": ["X"]}))
    assert users["user_id"].tolist() == ["a", "b", "c"]
    expected = sorted(range(300), key=lambda row: tuple(interactions.loc[row, ["user_id", "timestamp"]]))
    assert table.index.tolist() == expected
    assert table["user"].map(users["user_id"]).tolist() == interactions["user_id"][expected].tolist()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data())
def test_taken_texts_equal_a_take_from_the_whole(sizes, data):
    values = [f"text {place}" if place % 4 else None for place in range(sum(sizes))]
    ends = np.cumsum(sizes)
    chunks = [pa.array(values[end - size:end], pa.large_string()) for size, end in zip(sizes, ends)]
    rows = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1) if values else st.just([]))
    if rows:
        assert prepare.take_texts(chunks, np.array(rows)).to_pylist() == [values[row] for row in rows]


# --- splits ---------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """Interactions as `tabulate` leaves them: sorted by user and time, with ties."""
    rows = draw(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 9), st.integers(0, 6)), min_size=1,
                         max_size=80, unique_by=lambda row: row[:2]))
    table = pd.DataFrame(rows, columns=["user", "item", "timestamp"])
    table["user"] = pd.factorize(table["user"], sort=True)[0]
    return table.iloc[np.lexsort((table["timestamp"], table["user"]))]


def with_split(table, name, seed=0):
    return table.assign(split=prepare.draw_split(name, table, seed))


def test_the_split_is_8_1_1_disjoint_and_stays_with_its_seed():
    table = pd.DataFrame({"user": range(1005)})
    split = prepare.draw_split("random", table, seed=3)
    counts = pd.Series(split).value_counts()
    assert counts.to_dict() == {"train": 805, "valid": 100, "test": 100}
    assert (split == prepare.draw_split("random", table, seed=3)).all()
    assert (split != prepare.draw_split("random", table, seed=4)).any()


@settings(deadline=None)
@given(table=tables(), name=st.sampled_from(["random", "temporal", "cold-user", "cold-item"]), seed=st.integers(0, 3))
def test_every_row_has_one_split_and_the_seed_decides_it(table, name, seed):
    split = with_split(table, name, seed)["split"]
    assert split.isin(["train", "valid", "test", "support"]).all() and len(split) == len(table)
    assert split.equals(with_split(table, name, seed)["split"])
    if name != "cold-user":
        assert not split.eq("support").any()


@settings(deadline=None)
@given(table=tables())
def test_no_future_leaks_in_temporal(table):
    table = with_split(table, "temporal")
    for _, rows in table.groupby("user"):
        place = rows["split"].map({"train": 0, "valid": 1, "test": 2})
        assert place.is_monotonic_increasing  # rows stand in the order of time
        tenth = max(1, round(len(rows) / 10))
        assert (place == 2).sum() == (tenth if len(rows) > 1 else 0)
        assert (place == 1).sum() == (tenth if len(rows) > 2 else 0)


@settings(deadline=None)
@given(table=tables(), seed=st.integers(0, 3))
def test_no_cold_user_is_in_train_or_valid(table, seed):
    table = with_split(table, "cold-user", seed)
    cold = set(table.loc[table["split"].isin(["test", "support"]), "user"])
    assert len(cold) == max(1, round(table["user"].nunique() / 10))
    assert not table.loc[table["split"].isin(["train", "valid"]), "user"].isin(cold).any()
    for user in cold:
        rows = table.loc[table["user"] == user, "split"].tolist()
        assert rows == ["support"] * (len(rows) // 2) + ["test"] * (len(rows) - len(rows) // 2)
    warm = table[~table["user"].isin(cold)]
    assert (warm["split"] == "valid").sum() == round(len(warm) / 9)


@settings(deadline=None)
@given(table=tables(), seed=st.integers(0, 3))
def test_a_tenth_of_the_items_is_cold_and_all_their_rows_are_test(table, seed):
    table = with_split(table.assign(item=pd.factorize(table["item"])[0]), "cold-item", seed)
    is_test = table["split"] == "test"
    cold = set(table.loc[is_test, "item"])
    assert len(cold) == max(1, round(table["item"].nunique() / 10))
    assert not table.loc[~is_test, "item"].isin(cold).any()
    assert (table["split"] == "valid").sum() == round((~is_test).sum() / 9)


@pytest.mark.parametrize("split", ["random", "temporal", "cold-user", "cold-item"])
def test_what_has_no_train_row_is_counted(tmp_path, split):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    last = interactions.groupby("user_id").tail(1).index  # items of their own, in the users' last rows only
    interactions.loc[last, "item_id"] = [f"x{place // 2}" for place in range(len(last))]
    interactions.to_csv(tmp_path / "raw/interactions.csv", index=False)
    options = "--min-interactions", 1, "--split", split
    table, *_ = prepare_table(tmp_path, *options)
    told = json.loads((tmp_path / "run/prepare.json").read_text())
    held = table[table["split"].isin(["valid", "test"])]
    trained = table[table["split"] == "train"]
    assert told["untrained"]["items"] == held.loc[~held["item"].isin(trained["item"]), "item"].nunique() > 0
    assert told["untrained"]["users"] == held.loc[~held["user"].isin(trained["user"]), "user"].nunique()
    assert told["rows_of_split"] == table["split"].value_counts().to_dict()
    if split == "cold-user":
        assert told["untrained"]["users"] == 6


def test_a_split_without_rows_is_refused(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions.head(4).assign(rating=[1, 5, 1, 5]).to_csv(tmp_path / "raw/interactions.csv", index=False)
    options = "--dataset", "table", "--raw", tmp_path / "raw", "--min-interactions", 1
    assert "leaves no valid row" in refuse(tmp_path, *options)


# --- artifacts ------------------------------------------------------------------------------------------


def test_labels_duplicates_and_table_1(tmp_path):
    interactions, _ = write_table(tmp_path / "raw")
    again = interactions.iloc[[5]].assign(rating=1, timestamp=1_600_000_000)  # the latest of a pair counts
    old = interactions.iloc[[6]].assign(rating=1, timestamp=1)
    pd.concat([interactions, again, old]).to_csv(tmp_path / "raw/interactions.csv.gz", index=False)
    table, items, users = prepare_table(tmp_path)
    merged = table.merge(items, on="item").merge(users, on="user").set_index(["user_id", "item_id"])
    key, other = (tuple(interactions.loc[row, ["user_id", "item_id"]]) for row in (5, 6))
    assert merged.loc[key, "rating"] == 1 and merged.loc[key, "label"] == 0
    assert merged.loc[other, "rating"] == interactions.loc[6, "rating"]
    assert (table["label"] == (table["rating"] > 3)).all()
    facts = json.loads((tmp_path / "run/interactions.parquet.json").read_text())
    assert facts["duplicates"] == 2 and facts["interactions"] == len(table)
    assert facts["sparsity_percent"] == round(100 * (1 - len(table) / (len(users) * len(items))), 2)
    share = table["label"].mean()
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert facts["base_rate_logloss"] == pytest.approx(entropy)
    assert table.dtypes.astype(str).to_dict() | {"review": "", "split": ""} == {
        "user": "int64", "item": "int64", "rating": "float32", "label": "int8", "timestamp": "int64",
        "split": "", "review": ""}


def test_threshold_and_min_interactions_move_what_they_should(tmp_path):
    interactions, _ = write_table(tmp_path / "raw")
    fewer = interactions.drop(index=range(12))  # u000 keeps 2 of 14
    fewer.to_csv(tmp_path / "raw/interactions.csv.gz", index=False)
    table, _, users = prepare_table(tmp_path)
    stricter, _, _ = prepare_table(tmp_path, "--threshold", 4)
    assert stricter["label"].sum() == (table["rating"] > 4).sum() < table["label"].sum()
    more, _, everyone = prepare_table(tmp_path, "--min-interactions", 1)
    assert len(more) == len(table) + 2 == 60 * 14 - 12 and len(everyone) == len(users) + 1


def test_items_without_a_title_keep_their_id(tmp_path):
    _, items = write_table(tmp_path / "raw")
    items.loc[2, "title"] = None
    items.drop(index=3).to_csv(tmp_path / "raw/items.csv.gz", index=False)
    _, stored, _ = prepare_table(tmp_path)
    assert stored.set_index("item_id").loc[["i002", "i003"], "title"].tolist() == ["i002", "i003"]
    assert json.loads((tmp_path / "run/items.parquet.json").read_text())["untitled_items"] == 2


# --- refusals -------------------------------------------------------------------------------------------


def refuse(tmp_path, *options):
    line = run_stage("01_prepare.py", "--run-dir", tmp_path / "run", *options, ok=False)
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True
    return line


def test_a_missing_folder(tmp_path):
    assert "nowhere" in refuse(tmp_path, "--dataset", "table", "--raw", tmp_path / "nowhere")
    assert "--raw" in refuse(tmp_path, "--dataset", "table")


def test_no_user_left(tmp_path):
    write_table(tmp_path / "raw")
    options = "--dataset", "table", "--raw", tmp_path / "raw", "--min-interactions", 1000
    assert "--min-interactions" in refuse(tmp_path, *options)


@pytest.mark.parametrize("options", [
    ["--dataset", "table", "--max-bad", "0.5"], ["--dataset", "yelp", "--category", "Books"],
    ["--dataset", "nete", "--columns", "a=b"], ["--dataset", "yelp", "--download"],
    ["--dataset", "amazon", "--download"], ["--dataset", "ml-1m", "--split", "published"],
    ["--dataset", "nete", "--min-interactions", "5"], ["--dataset", "nete", "--split-seed", "5"],
    ["--dataset", "games", "--split", "temporal", "--split-seed", "1"], ["--dataset", "games", "--fold", "2"],
    ["--dataset", "nete", "--split", "random", "--fold", "2"], ["--dataset", "games", "--max-bad", "1%"],
    ["--dataset", "games", "--max-bad", "-1"], ["--dataset", "games", "--max-bad", "1.5"], ["--dataset", "games", "--max-bad", "nan"]])
def test_options_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse_args([*options, "--raw", "x"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
