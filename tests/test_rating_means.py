"""Shrunk means against plain loops; no label of valid, test or of the row itself is in what a row reads."""

import numpy as np
import pandas as pd
import pytest

from ctr_data import SPLITS, small_run_of, small_split
from userip import rating_means
from userip.rating_means import (draw_folds, foretold_means, habits_by_fold, means_model, means_without_folds,
                                 shrunk_means, user_habits, variance_ratio)


def naive_ratio(groups):
    """σ² / τ² of {group: list of values} by the textbook's sums of squares"""
    values = [value for part in groups.values() for value in part]
    num, mean = len(values), sum(values) / len(values)
    within = sum((value - np.mean(part)) ** 2 for part in groups.values() for value in part) / (num - len(groups))
    spread = sum(len(part) * (np.mean(part) - mean) ** 2 for part in groups.values()) - (len(groups) - 1) * within
    return mean, within / (spread / (num - sum(len(part) ** 2 for part in groups.values()) / num))


def by(rows, index):
    groups = {}
    for row in rows:
        groups.setdefault(row[index], []).append(row[2])
    return groups


def test_shrunk_means_are_those_of_plain_loops():
    """Unequal sizes; support rows, which are in no item's mean; a residual against the other users' ratings."""
    split, _ = small_split(num_users=60)
    split = {name: rows[(rows["user"] + rows["item"]) % 5 > 0] for name, rows in split.items()}
    support = split["train"][split["train"]["user"] < 5]
    train = split["train"][split["train"]["user"] >= 5]
    rows, own = ([(row.user, row.item, row.rating) for row in frame.itertuples()] for frame in (support, train))
    mean, ratio = naive_ratio(by(own, 1))
    item_rows = by([(user, item, rating - mean) for user, item, rating in own], 1)
    residuals = []
    for user, item, rating in [*own, *rows]:
        others = item_rows[item].copy()
        if user >= 5:
            others.remove(rating - mean)
        residuals.append((user, item, rating - mean - sum(others) / (len(others) + ratio)))
    average, user_ratio = naive_ratio(by(residuals[:len(own)], 0))
    items, users = shrunk_means(train, support, 61, 20)
    for item in range(20):
        assert items[item] == pytest.approx(sum(item_rows[item]) / (len(item_rows[item]) + ratio), abs=1e-6)
    for user, values in by(residuals, 0).items():
        expected = (sum(values) - len(values) * average) / (len(values) + user_ratio)
        assert users[user] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(users[60])


def test_the_variances_are_estimated():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4000), rng.integers(1, 9, size=4000))
    values = 3 + 0.5 * rng.normal(size=4000)[group] + 1.5 * rng.normal(size=len(group))
    assert variance_ratio(values, group)[1] == pytest.approx(9, rel=0.1)
    assert variance_ratio(np.tile([1.0, 5.0], 9), np.repeat(np.arange(9), 2))[1] == 1e9  # groups are alike


def inputs_of(split, items):
    """What each train row reads: its item's and user's mean, what its item's text foretells"""
    item_means, user_means, fold = means_without_folds(split, 0, 300, 20)
    train = split["train"]
    foretold = foretold_means(items, train, 0)[0][train["item"]]
    return np.column_stack([item_means[fold, train["item"]], user_means[fold, train["user"]], foretold])


def test_a_rows_own_rating_is_in_nothing_that_it_reads():
    run = small_run_of()
    before, moved = inputs_of(run.split, run.items), 0
    for row in (0, 333, 1234):
        train = run.split["train"].copy()
        train.iloc[row, train.columns.get_loc("rating")] += 50
        after = inputs_of(run.split | {"train": train}, run.items)
        assert (after[row] == before[row]).all()
        moved += (after != before).sum()
    assert moved > 100


def test_habits_are_the_shrunk_numbers_of_plain_loops():
    """Shares of the highest rating and of label 0; residuals of ratings and labels are those of shrunk_means."""
    split, _ = small_split(num_users=60)
    train, support = (split["train"].assign(rating=lambda rows: rows["rating"].round().clip(1, 5)),
                      split["train"][:0])
    habits = user_habits(train, support, 61, 20)
    assert habits.shape == (61, 4) and not habits[60].any()
    for k, name in ((0, "rating"), (1, "label")):
        assert habits[:60, k] == pytest.approx(shrunk_means(train, support, 61, 20, name)[1][:60])
    for k, share in ((2, train["rating"] == 5), (3, train["label"] == 0)):
        groups = by(zip(train["user"], train["item"], share.astype(float)), 0)
        mean, ratio = naive_ratio(groups)
        for user, values in groups.items():
            expected = (sum(values) - len(values) * mean) / (len(values) + ratio)
            assert habits[user, k] == pytest.approx(expected, abs=1e-6)


def test_a_rows_own_rating_and_rows_of_valid_and_test_are_in_no_habit_that_it_reads():
    split, _ = small_split()
    rows = pd.concat([frame.assign(split=name) for name, frame in split.items()])
    fold = np.random.default_rng(0).integers(3, size=len(split["train"]))
    user = split["train"]["user"].to_numpy()
    before, moved = habits_by_fold(rows, fold, 3), 0
    assert before.shape == (4, 300, 4) and before.dtype == np.float32
    unseen = rows["split"].isin(["valid", "test"])
    assert (habits_by_fold(rows.assign(rating=rows["rating"].where(~unseen, 99.0),
                                       label=rows["label"].where(~unseen, 0)), fold, 3) == before).all()
    for row in (0, 333, 1234):
        train = split["train"].assign(split="train")
        train.iloc[row, train.columns.get_loc("rating")] += 50
        train.iloc[row, train.columns.get_loc("label")] ^= 1
        after = habits_by_fold(pd.concat([train, rows[rows["split"] != "train"]]), fold, 3)
        assert (after[fold[row]] == before[fold[row]]).all()
        moved += (after[-1, user[row]] != before[-1, user[row]]).sum()
    assert moved


def test_support_ratings_reach_their_own_user_only():
    split, _ = small_split()
    support = split["support"].copy()
    support.loc[support["user"] == 290, "rating"] += 50
    before, after = (means_without_folds(split | {"support": rows}, 0, 300, 20)[:2]
                     for rows in (split["support"], support))
    assert (before[0] == after[0]).all()
    assert set(np.nonzero(before[1] != after[1])[1]) == {290}


def test_leniencys_folds_are_those_of_its_first_version():
    split, _ = small_split()
    num = len(split["train"]), len(split["support"])
    assert (draw_folds(split, 7) == np.random.default_rng([7, 3]).integers(5, size=sum(num))[:num[0]]).all()


def test_texts_of_other_items_foretell_an_items_mean_also_of_items_without_rows():
    rng = np.random.default_rng(0)
    items = pd.DataFrame({"item": range(120), "category": None, "brand": None,
                          "title": [f"{('good', 'bad')[item % 2]} thing {item}" for item in range(120)]})
    rows = pd.DataFrame({"user": rng.integers(30, size=900), "item": rng.integers(100, size=900)})
    rows["rating"] = 3 + (1 - rows["item"] % 2) + rng.normal(size=900)
    foretold, fold = foretold_means(items, rows, 0)
    assert foretold[::2].min() > foretold[1::2].max()  # 100 to 119 have no rows
    assert (np.bincount(fold) == 12).all()
    longer = items.assign(title=items["title"] + np.where(items["item"] >= 100, " bad", ""))
    assert (foretold_means(longer, rows, 0)[0][:100] == foretold[:100]).all()  # their texts teach nothing


def test_the_model_means_reads_neither_test_labels_nor_ratings_of_valid_and_test():
    run, other = small_run_of(), small_run_of()
    for name in SPLITS[1:]:
        other.split[name] = other.split[name].assign(rating=9.0)
    other.labels["test"] = 1 - other.labels["test"]
    one, two = (means_model(each.split, each.labels, 0, 300, 20) for each in (run, other))
    assert one["valid_logloss"] == two["valid_logloss"] and one["valid_auc"] == two["valid_auc"]
    assert one["auc"] == pytest.approx(1 - two["auc"])


def test_the_model_means_is_fitted_to_what_was_made_without_a_rows_fold(monkeypatch):
    read, fit = [], rating_means.LogisticRegression.fit
    monkeypatch.setattr(rating_means.LogisticRegression, "fit",
                        lambda self, inputs, label: read.append(inputs) or fit(self, inputs, label))
    run = small_run_of()
    means_model(run.split, run.labels, 0, 300, 20)
    assert (read[0] == np.nan_to_num(inputs_of(run.split, run.items)[:, :2])).all()


def test_the_model_means_learns_who_is_generous_also_of_cold_users():
    split, _ = small_split()
    labels = {name: (split[name]["rating"] > 3).to_numpy() for name in SPLITS}
    assert means_model(split, labels, 0, 300, 20)["auc"] > 0.9
