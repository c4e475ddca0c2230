"""Means of ratings, shrunk by how many there are (empirical Bayes), out of fold for train rows; users' rating
habits; the mean that an item's text foretells; and the model `means`, a logistic regression on two of them.

split: frames by name with columns user, item, rating. Statistics of items and all variances are of train
rows; a support row reaches its own user only.
"""

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from common import logloss

NUM_FOLDS = 5


def variance_ratio(values, group):
    """Mean of values [n], and σ² / τ², their variance within over that between groups [n]: moments of the
    analysis of variance, unequal sizes; at most 1e9, where groups do not differ
    """
    _, group, count = np.unique(group, return_inverse=True, return_counts=True)
    total, num, mean = np.bincount(group, values), len(values), values.mean()
    within = ((values - (total / count)[group]) ** 2).sum() / max(num - len(count), 1)
    between = (count * (total / count - mean) ** 2).sum() - (len(count) - 1) * within
    between /= max(num - (count**2).sum() / num, 1e-9)
    return mean, min(within / between, 1e9) if between > 0 else 1e9


def shrunk_sums(values, group, ratio, size):
    """Σ of a group's values / (its n + ratio), and n: float64 [size], int64 [size]"""
    count = np.bincount(group, minlength=size)
    return np.bincount(group, values, size) / np.maximum(count + ratio, 1e-9), count


def residuals(train, support, num_items, column="rating"):
    """Each row's rating less the item's shrunk mean over *other* users, less the mean of that in train rows:
    float64 [n], train rows first; and the items' shrunk means less the overall mean [M], nan without a row
    """
    rows = pd.concat([train, support])
    item, rating = (rows[name].to_numpy() for name in ("item", column))
    num = len(train)
    mean, ratio = variance_ratio(rating[:num].astype(float), item[:num])
    rating = rating - mean
    item_mean, count = shrunk_sums(rating[:num], item[:num], ratio, num_items)
    is_own = np.arange(len(rows)) < num  # is the row in its item's mean?
    others = (item_mean * (count + ratio))[item] - np.where(is_own, rating, 0.0)
    residual = rating - others / np.maximum(count[item] - is_own + ratio, 1e-9)
    return residual - residual[:num].mean(), np.where(count > 0, item_mean, np.nan)


def shrunk_means(train, support, num_users, num_items, column="rating"):
    """An item's mean rating and a user's mean residual, both shrunk and less the overall mean: float64 [M],
    [N]; nan without a row. column: rating, or label, for the shares of likes
    """
    user = pd.concat([train, support])["user"].to_numpy()
    residual, item_mean = residuals(train, support, num_items, column)
    _, ratio = variance_ratio(residual[:len(train)], user[:len(train)])
    user_mean, num_rows = shrunk_sums(residual, user, ratio, num_users)
    return item_mean, np.where(num_rows > 0, user_mean, np.nan)


def user_habits(train, support, num_users, num_items):
    """How users rate, four shrunk numbers: the mean residuals of their ratings and of their labels, and their
    shares of the highest rating and of label 0, less the mean: float64 [N, H], 0 without a row
    """
    # in the order of items, so that a user gets the same bits in any company
    train, support = (frame.sort_values(["user", "item"]) for frame in (train, support))
    rows, habits = pd.concat([train, support]), []
    user, num = rows["user"].to_numpy(), len(train)
    for column in ("rating", "label"):
        habits.append(shrunk_means(train, support, num_users, num_items, column)[1])
    for column in (rows["rating"] >= train["rating"].max(), rows["label"] == 0):
        share = column.to_numpy(float)
        mean, ratio = variance_ratio(share[:num], user[:num])
        habits.append(shrunk_sums(share - mean, user, ratio, num_users)[0])
    return np.nan_to_num(np.stack(habits, 1))


def habits_by_fold(interactions, fold, num_folds):
    """user_habits without each fold of the train rows, int64 [n], and last with all: float32 [F + 1, N, H]"""
    train, support = (interactions[interactions["split"] == split] for split in ("train", "support"))
    num_users, num_items = (int(interactions[key].max()) + 1 for key in ("user", "item"))
    habits = [user_habits(train[fold != left_out], support, num_users, num_items)
              for left_out in range(num_folds + 1)]
    return np.stack(habits).astype(np.float32)


def draw_folds(split, seed):
    """The fold of each train row, int64 [n]"""
    return np.random.default_rng([seed, 3]).integers(NUM_FOLDS, size=len(split["train"]))


def means_without_folds(split, seed, num_users, num_items):
    """shrunk_means without each fold of the train rows and, last, with all: items' [F + 1, M], users'
    [F + 1, N]; the fold of each train row [n], whose label is in none of the means without this fold
    """
    fold, train = draw_folds(split, seed), split["train"]
    means = [shrunk_means(train[fold != left_out], split["support"], num_users, num_items)
             for left_out in range(NUM_FOLDS + 1)]
    return *map(np.stack, zip(*means)), fold


def residual_means(rows, num_items):
    """The mean rating of each item, less what its users give on average, and its reliability, n / (n +
    σ²/τ²), from a frame of rows: float64 [M], [M], 0 without a row
    """
    rating, user, item = (rows[name].to_numpy() for name in ("rating", "user", "item"))
    mean, ratio = variance_ratio(rating.astype(float), user)
    user_mean, _ = shrunk_sums(rating - mean, user, ratio, user.max() + 1)
    residual = rating - mean - user_mean[user]
    item_mean, count = shrunk_sums(residual, item, 0.0, num_items)
    return item_mean, count / (count + variance_ratio(residual, item)[1])


def words_of_items(items, fields=("title", "category", "brand")):
    """These fields of each item as a text, a Series, and a TF-IDF of its words and pairs of words"""
    texts = items[list(fields)].astype(object).fillna("").astype(str).agg(" ".join, axis=1)
    return "text " + texts, TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", sublinear_tf=True)


def foretold_means(items, train, seed, num_folds=10):
    """The mean rating of each item that texts of other items foretell [M], and its fold of the items [M]: a
    ridge regression of items' means, less what their users give on average, on TF-IDF of words and pairs of
    words of title, category and brand. It reads no rating and no text of the fold.
    """
    texts, vectorizer = words_of_items(items)
    fold = np.random.default_rng([seed, 4]).permutation(len(items)) % num_folds
    foretold, has_rows = np.zeros(len(items)), items["item"].isin(train["item"]).to_numpy()
    for left_out in np.unique(fold) if len(items) > 1 else []:
        rows = train[fold[train["item"]] != left_out]
        known, asked = has_rows & (fold != left_out), fold == left_out
        item_mean, weight = (part[known] for part in residual_means(rows, len(items)))
        model = Ridge().fit(vectorizer.fit_transform(texts[known]), item_mean, weight / weight.mean())
        foretold[asked] = model.predict(vectorizer.transform(texts[asked]))
    return foretold, fold


def means_model(split, labels, seed, num_users, num_items):
    """The model `means`: logistic regression on an item's shrunk mean and a user's shrunk residual, 0 where
    nothing is known; fitted to train rows, out of fold. A dict of figures on valid and test.
    """
    item_means, user_means, fold = means_without_folds(split, seed, num_users, num_items)

    def inputs(name):
        left_out, rows = fold if name == "train" else NUM_FOLDS, split[name]
        return np.nan_to_num([item_means[left_out, rows["item"]], user_means[left_out, rows["user"]]]).T

    model = LogisticRegression().fit(inputs("train"), labels["train"])
    valid, test = (model.predict_proba(inputs(name))[:, 1] for name in ("valid", "test"))
    return {f"{prefix}{name}": float(metric(labels[split_name], probabilities))
            for prefix, split_name, probabilities in (("valid_", "valid", valid), ("", "test", test))
            for name, metric in (("auc", roc_auc_score), ("logloss", logloss))}
