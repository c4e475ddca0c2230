"""Feature sets of stage 4: fields of the user or the item beside the ids, sparse ones or numbers, alone or
composed with "+"; and the profiles as vectors. All are made of the train and support rows of run.split,
frames by name with columns user, item, rating, label.
"""

import argparse
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from userip.artifacts import fail
from userip.profiles import theta_of
from userip.rating_means import (NUM_FOLDS, draw_folds, foretold_means, means_without_folds, shrunk_means,
                                 user_habits)
from userip.taste import fit_taste, word_vectors

MIN_ROWS = 10  # train rows of a value of --fields that has a code of its own
NOT_DESCRIPTIVE = {"item", "item_id", "title", "user", "user_id"}


class Column(NamedTuple):
    """One field, a function of the user or the item: sparse, the code `size` - 1 or less, or a number"""

    key: str  # user or item
    codes: np.ndarray  # int64 [F + 1, N or M]: without each fold and, last, with all train rows; or float64
    size: int  # 0 of a number
    fold: np.ndarray | None = None  # of each train row [n], which reads the codes without it
    train: np.ndarray | None = None  # or the codes of the train rows themselves [n]

    def read(self, split):
        """The codes of the rows of each frame: {name: int64 [n]}"""
        codes = {name: self.codes[-1, frame[self.key]] for name, frame in split.items()}
        if self.train is not None:
            return codes | {"train": self.train}
        return codes if self.fold is None else codes | {
            "train": self.codes[self.fold, split["train"][self.key]]}

    def dealt(self, seed):
        """The control: users, or items, exchange their codes. Sizes and usage stay, the meaning goes."""
        order = np.random.default_rng(seed).permutation(self.codes.shape[1])
        return self._replace(codes=self.codes[:, order], train=None)


def levels(values, fitted, num_levels):
    """The quantile of each value [N] among the fitted ones: int64 [N]; of nan num_levels"""
    fitted = fitted[~np.isnan(fitted)]
    edges = np.quantile(fitted, np.arange(1, num_levels) / num_levels) if len(fitted) else fitted
    return np.where(np.isnan(values), num_levels, np.searchsorted(edges, values))


def bank_columns(run, seed):
    """The codes of the feature bank (eq. 8); the last code is "unknown" """
    return [Column("user", code[None], size + 1, train=train)
            for code, size, train in zip(run.codes.T, run.code_sizes, run.train_codes.T)]


def peapod_columns(run, seed):
    """The codes of PeaPOD's profiles"""
    return bank_columns(run.peapod, seed)


def item_bank_columns(run, seed):
    """The codes of the item bank"""
    return [Column("item", run.item_codes[None], run.num_item_codes)]


def taste_columns(run, seed):
    """What the user thinks of items with such texts, as an LLM reads them: a number"""
    return [fit_taste(run.split, run.item_vectors, seed, len(run.users))]


def tfidf_taste_columns(run, seed):
    """The control of `taste`: the same by the words of the texts, without an LLM"""
    vectors = torch.from_numpy(word_vectors(run.items, run.split["train"]))
    return [fit_taste(run.split, vectors, seed, len(run.users), is_scaled=False)]


def truth_columns(run, seed):
    codes = [pd.factorize(run.users[f"true_{name}"], sort=True)[0] for name in run.names]
    return [Column("user", code[None], int(code.max()) + 1) for code in codes]


def cf_columns(run, seed, rank=8):
    """k-means of users' factors, one field per size. Factors: truncated SVD of train rows; the support rows
    of cold users are folded in. A user with neither has the code K.
    """
    train, support = (sparse.csr_matrix((np.ones(len(rows)), (rows["user"], rows["item"])),
                                        shape=(len(run.users), run.num_items))
                      for rows in (run.split["train"], run.split["support"]))
    svd = TruncatedSVD(min(rank, run.num_items - 1), random_state=seed).fit(train)
    factors = normalize(svd.transform(train + support))  # the direction of taste, not the number of items
    is_warm, has_rows = train.getnnz(1) > 0, (train + support).getnnz(1) > 0
    codes = [KMeans(size, n_init=4, random_state=seed).fit(factors[is_warm]).predict(factors)
             for size in run.code_sizes]
    return [Column("user", np.where(has_rows, code, size).astype(np.int64)[None], size + 1)
            for code, size in zip(codes, run.code_sizes)]


def leniency_columns(run, seed):
    """Quartile of a user's mean residual, rating less the item's mean; 4 is unknown. A train row's code
    leaves out its own fold of the rows, or it would contain its own label.
    """
    train, fold = run.split["train"], draw_folds(run.split, seed)

    def user_means(left_out):
        rows = pd.concat([train[fold != left_out], run.split["support"]])
        residual = rows["rating"] - rows["item"].map(rows.groupby("item")["rating"].mean())
        return residual.groupby(rows["user"]).mean()

    means = [user_means(left_out).reindex(range(len(run.users))) for left_out in range(NUM_FOLDS + 1)]
    warm = means[-1][train["user"].unique()].to_numpy()
    return [Column("user", np.stack([levels(mean.to_numpy(), warm, 4) for mean in means]), 5, fold)]


def shrunk_columns(key, num_levels):
    """Quantile of the user's shrunk residual, or of the item's shrunk mean, among those with train rows; one
    more code is unknown. Train rows read means and quantiles made without their fold.
    """
    def columns(run, seed):
        *means, fold = means_without_folds(run.split, seed, len(run.users), run.num_items)
        warm = run.split["train"][key].unique()
        codes = [levels(mean, mean[warm], num_levels) for mean in means[key == "user"]]
        return [Column(key, np.stack(codes), num_levels + 1, fold)]
    return columns


def habits_columns(run, seed):
    """The control of codes of ratings: they are made of the same rating habits, without titles and LLM. One
    number per user, as a logistic regression of train rows' labels on habits and the item's mean weighs the
    habits, by k-means in 16 levels; 16 is unknown. A train row's code is made without its fold.
    """
    train, fold, num_users = run.split["train"], draw_folds(run.split, seed), len(run.users)
    kept = [train[fold != left_out] for left_out in range(NUM_FOLDS + 1)]
    habits = np.stack([user_habits(rows, run.split["support"], num_users, run.num_items) for rows in kept])
    item_means = np.stack([shrunk_means(rows, rows[:0], num_users, run.num_items)[0] for rows in kept])
    user, item = train["user"].to_numpy(), train["item"].to_numpy()
    inputs = np.column_stack([np.nan_to_num(item_means[fold, item]), habits[fold, user]])
    weights = LogisticRegression(max_iter=1000).fit(inputs, train["label"]).coef_[0, 1:]
    index, warm = habits @ weights, np.unique(user)  # [F + 1, N]
    kmeans = KMeans(min(16, len(warm)), n_init=4, random_state=seed).fit(index[-1, warm, None])
    codes = kmeans.predict(index.reshape(-1, 1)).reshape(index.shape).astype(np.int64)
    has_rows = np.stack([np.bincount(pd.concat([rows, run.split["support"]])["user"], minlength=num_users)
                         for rows in kept]) > 0
    return [Column("user", np.where(has_rows, codes, 16), 17, fold)]


def dense_means_columns(run, seed):
    """The item's and the user's shrunk mean, which ids estimate badly from few rows, as numbers of unit
    variance; 0 where nothing is known. A train row reads means, and their variance, made without its fold.
    """
    *means, fold = means_without_folds(run.split, seed, len(run.users), run.num_items)
    columns = []
    for key, mean in zip(("item", "user"), means):  # of [F + 1, M], [F + 1, N]
        scale = np.nanstd(mean, 1, keepdims=True).clip(1e-12)
        scale[-1] = scale[:-1].mean()  # the unit of the train rows: more rows shrink means less
        columns.append(Column(key, np.nan_to_num(mean / scale), 0, fold))
    return columns


def tfidf_columns(run, seed):
    """Octile, within its fold of the items, of the mean rating that other items' texts foretell"""
    means, fold = foretold_means(run.items, run.split["train"], seed)
    is_warm, codes = run.items["item"].isin(run.split["train"]["item"]).to_numpy(), np.zeros(len(means), int)
    for part in np.unique(fold):
        codes[fold == part] = levels(means[fold == part], means[(fold == part) & is_warm], 8)
    return [Column("item", codes[None], 8)]


def described_columns(names, items, users, train):
    """--fields: columns of items and users, frames [M], [N], as sparse fields (x of eq. 1), by train rows:
    octiles of numbers; texts that MIN_ROWS rows have, the others together; the last code is unknown.
    """
    known = {(key, name): column for key, frame in (("item", items), ("user", users))
             for name, column in frame.items()
             if name not in NOT_DESCRIPTIVE and not name.startswith("true_") and column.notna().any()}
    all_names, columns = dict.fromkeys(name for _, name in known), []
    if missing := [name for name in names if name not in all_names]:
        fail(f"--fields {missing[0]}: items.parquet and users.parquet describe "
             f"{', '.join(all_names) or 'nothing'}, beyond ids and titles")
    for (key, _), values in (pair for name in dict.fromkeys(names) for pair in known.items()
                            if pair[0][1] == name):
        numbers = pd.to_numeric(values.astype(object), errors="coerce").to_numpy(float)
        if (np.isnan(numbers) == values.isna()).all() and values.dtype != bool:
            codes, num_codes = levels(numbers, numbers[train[key]], 8), 8
        else:
            texts = values.astype(str)
            counts = texts.iloc[train[key]].value_counts()
            kept = sorted(counts.index[counts >= MIN_ROWS])
            num_codes = len(kept) + 1
            codes = pd.Index(kept).get_indexer(texts) % num_codes  # a rare text: -1, so the last
        columns.append(Column(key, np.where(values.isna(), num_codes, codes)[None], num_codes + 1))
    return columns


# run and seed -> list of Column, or a Taste. run: see read_run of stage 4
PARTS = {"codes": bank_columns, "truth": truth_columns, "cf": cf_columns, "leniency": leniency_columns,
         "leniency16": shrunk_columns("user", 16), "habits16": habits_columns, "peapod": peapod_columns,
         "item-mean": shrunk_columns("item", 8), "tfidf": tfidf_columns, "items": item_bank_columns,
         "taste": taste_columns, "tfidf-taste": tfidf_taste_columns, "dense-means": dense_means_columns}
FEATURES = ("none", "random", "dense", *PARTS)
PROFILE_FREE = {"none", "leniency", "leniency16", "habits16", "item-mean", "tfidf", "tfidf-taste",
                "dense-means"}  # the same for any codebook


def feature_set(text):
    """The type of --features: the text itself, if it is a set, or different sets joined by +"""
    parts = text.split("+")
    known = FEATURES if len(parts) == 1 else ("random", *PARTS)
    if odd := [part for part in parts if part not in known or part in PARTS and parts.count(part) > 1]:
        raise argparse.ArgumentTypeError(f"{text!r}: {odd[0]!r} is unknown or stands there twice; choose of "
                                         f"{' '.join(known)}")
    return text


def parts_of(feature, features):
    """Of a feature set among all that are asked for, its parts: a list of (name, is it dealt at random?).

    `random` alone deals the codes. Within a + it deals the part that has the same position in the first set
    of as many parts without `random`; where there is none the codes, and at later positions tfidf.
    """
    parts = feature.split("+")
    like = next((other.split("+") for other in features or () if other.count("+") == len(parts) - 1 > 0
                 and "random" not in other.split("+")), ["codes", *["tfidf"] * len(parts)])
    return [(like[index], True) if part == "random" else (part, False)
            for index, part in enumerate(parts) if part not in ("none", "dense")]


def set_columns(parts, run, seed):
    """The fields of the parts: list of Column. Each part is made once per run and seed, for all models."""
    made = vars(run).setdefault("made", {})
    made |= {(name, seed): PARTS[name](run, seed) for name, _ in parts if (name, seed) not in made}
    columns = [(column, is_random) for name, is_random in parts for column in made[name, seed]]
    return [column.dealt([seed, k]) if is_random else column for k, (column, is_random) in enumerate(columns)]


def profile_vectors(run, device):
    """Table 3, w/o VQ: the profiles in the codebook's coordinates as the last fields of Rows. A train row
    reads those without its own fold, the others the last ones, with all evidence.
    """
    vectors = []
    for k, name in enumerate(run.names):
        part = run.codebook[name]
        z = (theta_of(run.stored, k, len(part["transform"])) - part["mean"]) @ part["transform"]
        vectors.append(z.view(-1, len(run.users), z.shape[-1]))  # [F + 1, N, C]
    fold = dict.fromkeys(run.labels, len(vectors[0]) - 1) | {"train": run.stored.get("fold", 0)}
    users = {name: (torch.tensor(run.split[name]["user"].to_numpy()) + len(run.users) * index).to(device)
             for name, index in fold.items()}
    return {"vectors": torch.cat(vectors, 2).flatten(0, 1).to(device),  # [(F + 1) N, ΣC]
            "dims": tuple(z.shape[2] for z in vectors), "users": users}
