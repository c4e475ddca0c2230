"""Feature sets: what they are made of, how they compose, and that no label reaches its own row."""

import argparse
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from conftest import dies
from ctr_data import small_run_of, small_split
from userip.features import (PARTS, cf_columns, described_columns, feature_set, leniency_columns, parts_of,
                             set_columns)
from userip.rating_means import means_without_folds


def run_of(split):
    items = pd.DataFrame({"item": range(20), "title": [f"item {item % 4}" for item in range(20)],
                          "category": None, "brand": None})
    return SimpleNamespace(split=split, users=range(300), code_sizes=[4, 3], num_items=20, items=items)


def leniency_of(split):
    return leniency_columns(run_of(split), seed=0)[0].read(split)


def test_leniency_is_the_quartile_of_the_users_residual_also_of_cold_users():
    split, generous = small_split()
    fields = leniency_of(split)
    for name in ("test", "valid"):
        code, truth = fields[name], generous[split[name]["user"]]
        assert np.corrcoef(code, truth)[0, 1] > 0.85 and set(code) == {0, 1, 2, 3}
    cold_codes = fields["test"][split["test"]["user"] >= 280]
    assert len(cold_codes) == 80 and set(cold_codes) <= {0, 1, 2, 3}


def test_leniency_of_a_train_row_is_made_without_its_own_fold():
    """Against plain loops; a row's own rating, however high, is in no mean that its code is made of."""
    split = {name: rows.assign(user=rows["user"] % 40) for name, rows in small_split()[0].items()}
    split = {name: rows[rows["user"] < 30] if name != "support" else rows for name, rows in split.items()}
    own = [(row.user, row.item, row.rating) for name in ("train", "support")
           for row in split[name].itertuples()]
    num_train = len(split["train"])
    fold = np.random.default_rng([0, 3]).integers(5, size=len(own))

    def means(used):
        item_ratings, residuals = {}, {}
        for user, item, rating in used:
            item_ratings.setdefault(item, []).append(rating)
        for user, item, rating in used:
            residuals.setdefault(user, []).append(rating - np.mean(item_ratings[item]))
        return {user: np.mean(values) for user, values in residuals.items()}

    trained = set(split["train"]["user"])
    everything = means(own)
    edges = np.quantile([mean for user, mean in everything.items() if user in trained], [0.25, 0.5, 0.75])
    fields = leniency_of(split)
    for left_out in range(5):
        used = [row for index, row in enumerate(own) if index >= num_train or fold[index] != left_out]
        mean = means(used)
        for index in np.flatnonzero(fold[:num_train] == left_out):
            user = own[index][0]
            expected = int(np.searchsorted(edges, mean[user])) if user in mean else 4
            assert fields["train"][index] == expected


WITHOUT_LLM = ["cf", "leniency", "leniency16", "habits16", "item-mean", "tfidf", "dense-means", "tfidf-taste"]


@pytest.mark.parametrize("name", WITHOUT_LLM)
def test_neither_valid_nor_test_rows_reach_what_needs_no_llm(name):
    split, _ = small_split()
    other = split | {name: split[name].assign(rating=1.0, item=(split[name]["item"] + 3) % 20)
                     for name in ("valid", "test")}
    for one, two in zip(*(PARTS[name](run_of(rows), 0) for rows in (split, other))):
        codes, others = (column.read(split) for column in (one, two))  # of the same rows
        assert all((codes[key] == others[key]).all() and codes[key].min() < codes[key].max() for key in codes)
        assert one.size == 0 or codes["test"].max() < one.size  # 0: a number


@pytest.mark.parametrize("name", ["leniency16", "item-mean", "tfidf", "dense-means", "tfidf-taste"])
def test_a_rows_own_rating_is_not_in_the_codes_that_it_reads(name):
    split, _ = small_split()
    read = lambda split: np.stack([column.read(split)["train"] for column in PARTS[name](run_of(split), 0)])
    before, moved = read(split), 0
    for row in (0, 444, 1500):
        train = split["train"].copy()
        train.iloc[row, train.columns.get_loc("rating")] += 50
        after = read(split | {"train": train})
        assert (after[:, row] == before[:, row]).all()
        moved += (after != before).sum()
    assert moved


def test_shrunk_codes_are_quantiles_and_follow_the_truth():
    split, generous = small_split()
    column = PARTS["leniency16"](run_of(split), 0)[0]
    assert column.size == 17 and (np.bincount(column.codes[-1][:280]) >= 17).all()
    assert np.corrcoef(column.codes[-1], generous)[0, 1] > 0.9  # cold users, too, by their support rows
    split = {name: rows.assign(rating=rows["rating"] + rows["item"] / 5) for name, rows in split.items()}
    column = PARTS["item-mean"](run_of(split), 0)[0]
    assert column.key == "item" and np.corrcoef(column.codes[-1], range(20))[0, 1] > 0.9
    split = {name: rows[rows["item"] != 7] if name != "test" else rows for name, rows in split.items()}
    assert (PARTS["item-mean"](run_of(split), 0)[0].codes[:, 7] == 8).all()  # no train row


def test_numbers_of_valid_and_test_are_in_the_unit_of_the_train_rows():
    split, generous = small_split()
    item, user = PARTS["dense-means"](run_of(split), 0)
    assert (item.key, user.key, item.size, user.size) == ("item", "user", 0, 0)
    means, users, fold = means_without_folds(split, 0, 300, 20)
    unit = np.nanstd(users[:-1], 1)
    assert user.codes[:-1] == pytest.approx(np.nan_to_num(users[:-1] / unit[:, None]))
    assert user.codes[-1] == pytest.approx(users[-1] / unit.mean()) and (user.fold == fold).all()
    assert np.corrcoef(user.codes[-1], generous)[0, 1] > 0.95


def test_habits_follow_the_truth_and_a_user_without_rows_is_unknown():
    split, generous = small_split()
    split["support"] = split["support"][split["support"]["user"] < 299]
    (column,) = PARTS["habits16"](run_of(split), 0)
    assert column.size == 17 and column.codes[-1, 299] == 16 and column.codes[-1, :299].max() < 16
    mean = pd.Series(generous[:299]).groupby(column.codes[-1, :299]).mean()  # a level's number means nothing
    assert np.corrcoef(mean[column.codes[-1, :299]], generous[:299])[0, 1] > 0.9


def test_random_parts_keep_sizes_and_usage_and_lose_the_meaning():
    """leniency16 is dealt to users, tfidf to items, fold by fold; a row's code stays its user's and fold's."""
    run = small_run_of()
    real, dealt = (set_columns(parts_of(name, ["none", "leniency16+tfidf", "random+random"]), run, 0)
                   for name in ("leniency16+tfidf", "random+random"))
    for one, two in zip(real, dealt):
        assert (one.key, one.size) == (two.key, two.size) and len(one.codes) == len(two.codes)
        assert (np.sort(one.codes, 1) == np.sort(two.codes, 1)).all() and (one.codes != two.codes).any()
        order = np.lexsort(one.codes), np.lexsort(two.codes)  # whole users move, with their codes of all folds
        assert (one.codes[:, order[0]] == two.codes[:, order[1]]).all()
    assert abs(np.corrcoef(real[0].codes[-1], dealt[0].codes[-1])[0, 1]) < 0.2


@pytest.mark.parametrize("feature, features, parts", [
    ("none", [], []), ("random", ["leniency16+tfidf"], [("codes", True)]), ("codes", None, [("codes", False)]),
    ("random+random", None, [("codes", True), ("tfidf", True)]),
    ("random+random", ["random+tfidf", "cf+item-mean", "codes+tfidf"], [("cf", True), ("item-mean", True)]),
    ("codes+random", ["codes+item-mean"], [("codes", False), ("item-mean", True)]),
    ("random+random+random", ["cf+tfidf", "cf+tfidf+codes"], [("cf", True), ("tfidf", True), ("codes", True)])])
def test_random_within_a_plus_stands_for_the_part_of_the_same_position(feature, features, parts):
    assert parts_of(feature, features) == parts


@pytest.mark.parametrize("text", ["x", "x+codes", "codes+codes", "none+codes", "codes+dense", "+", "codes+"])
def test_unknown_and_repeated_parts_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="choose of"):
        feature_set(text)
    assert feature_set("random+random") == "random+random"


def test_described_fields_are_octiles_and_names_of_train_rows():
    """Numbers also as texts, rare values together, unknown apart; items that only test rows have teach none."""
    train = pd.DataFrame({"user": np.arange(400) % 4, "item": np.arange(400) % 20})
    items = pd.DataFrame({"item": range(22), "title": "x", "brand": ["Acme", "Bolt"] * 10 + ["Test", "Test"],
                          "price": [*map(float, range(19)), None, 500.0, -1.0], "true_kind": "a"})
    users = pd.DataFrame({"user": range(5), "age": ["7", "30", None, "30", "99"], "kind": list("aabcd")})
    users["kind"] = users["kind"].mask(users["user"] == 2)
    brand, price, age, kind = described_columns(["brand", "price", "age", "kind"], items, users, train)
    assert brand.key == "item" and brand.size == 4 and brand.codes[0].tolist() == [0, 1] * 10 + [2, 2]
    edges = np.quantile(np.arange(19.0).repeat(20), np.arange(1, 8) / 8)
    assert price.codes[0, :19].tolist() == np.searchsorted(edges, np.arange(19)).tolist()
    assert price.codes[0, 19:].tolist() == [8, 7, 0] and price.size == 9
    assert age.key == "user" and age.codes[0].tolist() == [0, 2, 8, 2, 7]
    assert kind.codes[0].tolist() == [0, 0, kind.size - 1, 1, 2]
    few = described_columns(["kind"], items, users, train[train["user"] != 3].iloc[:30])[0]
    assert few.codes[0].tolist() == [0, 0, 2, 1, 1]  # c and d are rare


def test_unknown_fields_are_refused_with_what_there_is(capsys):
    items = pd.DataFrame({"item": [0], "item_id": "a", "title": "x", "brand": "Acme", "price": np.nan})
    users = pd.DataFrame({"user": [0], "user_id": "a", "age": 3, "true_hobby": "chess"})
    train = pd.DataFrame({"user": [0], "item": [0]})
    for name in ("gender", "title", "true_hobby", "price"):
        line = dies(capsys, described_columns, [name], items, users, train)
        assert f"--fields {name}: " in line and "brand, age," in line


def test_cf_finds_who_likes_the_same_items_and_folds_cold_users_in():
    rng = np.random.default_rng(0)
    rows = [(user, item) for user in range(200)
            for item in rng.choice(20, 8, replace=False) + 20 * (user % 2)]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    split = {"train": frame[frame["user"] < 150], "support": frame[frame["user"].between(150, 197)]}
    run = SimpleNamespace(split=split, users=range(200), code_sizes=[2], num_items=40)
    codes = cf_columns(run, 0)[0].codes[-1]
    assert adjusted_rand_score(np.arange(198) % 2, codes[:198]) > 0.95
    assert (codes[198:] == 2).all()  # neither train nor support rows
