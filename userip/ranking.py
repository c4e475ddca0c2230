"""Ranking items for users: who is asked what (leave one out), metrics, and three references without an LLM.

rows: frames with columns user, item, sorted by user and time, as in interactions.parquet.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from sklearn.preprocessing import normalize

HR, NDCG = (1, 5, 10), (5, 10)
SAMPLED = 99  # items beside the target that are ranked in the top-N task


class Targets(NamedTuple):
    """B users of whom one held-out row is asked for"""

    user: np.ndarray  # int64 [B]
    item: np.ndarray  # int64 [B], the right answer
    histories: list  # of int64 arrays: the user's own train or support items before the target, in order
    own: list  # of int64 arrays: all their train or support items
    sampled: np.ndarray  # int64 [B, 99], items that the user has no row of


def own_rows(interactions):
    """Train rows, and cold users' support rows: what may be known of a user"""
    return interactions[interactions["split"].isin(["train", "support"])]


def leave_one_out(interactions, split, num_items, max_users, seed):
    """The last row of this split of each user -> Targets of at most max_users users, drawn by the seed

    A user needs a train or support row, or nothing is known of them. With fewer than 99 items left, items are
    sampled with repetition.
    """
    own = own_rows(interactions)
    last = interactions[interactions["split"] == split].groupby("user").tail(1)
    last = last[last["user"].isin(own["user"])]
    rng = np.random.default_rng([seed, 6])
    if len(last) > max_users:
        last = last.iloc[np.sort(rng.choice(len(last), max_users, replace=False))]
    items_of = {user: (rows.index.to_numpy(), rows["item"].to_numpy()) for user, rows in own.groupby("user")}
    all_items = interactions.groupby("user")["item"].agg(set)
    histories, own_items, sampled = [], [], []
    for row, user in zip(last.index, last["user"]):
        index, items = items_of[user]
        own_items.append(items)
        histories.append(items[index < row])  # the table is sorted by user and time
        others = np.setdiff1d(np.arange(num_items), list(all_items[user]))
        others = others if len(others) else np.arange(num_items)
        sampled.append(rng.choice(others, SAMPLED, replace=len(others) < SAMPLED))
    return Targets(last["user"].to_numpy(), last["item"].to_numpy(), histories, own_items,
                   np.reshape(sampled, (-1, SAMPLED)))


def cut_sequences(train, fold, max_items):
    """Each user's train items in order, in parts of at most max_items -> users int64 [R], and lists of R
    int64 arrays: the items, and the folds of their rows. fold: int64 [train rows]
    """
    by_user = train.assign(fold=fold).groupby("user")[["item", "fold"]].agg(np.array)
    parts = [(user, items[first:first + max_items], folds[first:first + max_items])
             for user, items, folds in by_user.itertuples() for first in range(0, len(items), max_items)]
    users, items, folds = zip(*parts)
    return torch.tensor(users), items, folds


def pad_items(sequences):
    """Lists of items -> items int64 [B, T], is_item bool [B, T], pads on the right"""
    rows = [torch.as_tensor(np.asarray(sequence, dtype=np.int64)) for sequence in sequences]
    items = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return items, torch.arange(items.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]


# ----------------------------------------------------------------------------------------------------------
# metrics
# ----------------------------------------------------------------------------------------------------------


def ranks(scores, target, excluded):
    """scores [B, M], target [B], excluded: items of each user that are not ranked (a list of arrays) -> the
    target's rank, from 1, of equal scores the mean: float64 [B]
    """
    scores = np.array(scores, dtype=float)
    rows = np.arange(len(target))
    right = scores[rows, target]
    for row, items in enumerate(excluded):
        scores[row, items] = -np.inf
    scores[rows, target] = right  # also if the user had it before
    equal = (scores == right[:, None]).sum(1) - 1
    return 1 + (scores > right[:, None]).sum(1) + equal / 2


def sampled_ranks(scores, targets):
    """The target's rank among itself and the sampled items: scores [B, M] -> float64 [B]"""
    right = np.take_along_axis(scores, targets.item[:, None], 1)  # [B, 1]
    others = np.take_along_axis(scores, targets.sampled, 1)  # [B, 99]
    return 1 + (others > right).sum(1) + (others == right).sum(1) / 2


def ranking_figures(rank):
    """Hit ratio and normalized discounted cumulative gain of one right item each, at rank [B] -> a dict"""
    figures = {f"hr@{k}": float((rank <= k).mean()) for k in HR}
    return figures | {f"ndcg@{k}": float(np.where(rank <= k, 1 / np.log2(1 + rank), 0.0).mean())
                      for k in NDCG}


# ----------------------------------------------------------------------------------------------------------
# references: each gives functions of a list of histories -> scores [B, M]
# ----------------------------------------------------------------------------------------------------------


def count_matrix(users, items, shape):
    """A sparse matrix with the number of rows of each pair"""
    return sparse.csr_matrix((np.ones(len(users)), (users, items)), shape=shape)


def most_popular(train, num_items):
    """The number of train rows of an item, for all alike"""
    counts = np.bincount(train["item"], minlength=num_items).astype(float)
    return lambda histories: np.tile(counts, (len(histories), 1))


def item_knn(train, num_items):
    """The sum over the history of the cosine between two items' users (no item is its own neighbour)"""
    users = count_matrix(train["user"], train["item"], (int(train["user"].max()) + 1, num_items))
    users = normalize(users, axis=0)
    cosine = (users.T @ users).tolil()
    cosine.setdiag(0)
    cosine = cosine.tocsr()

    def score(histories):
        owner = np.repeat(np.arange(len(histories)), list(map(len, histories)))
        items = np.concatenate([*histories, np.array([], dtype=int)]).astype(int)
        return (count_matrix(owner, items, (len(histories), num_items)) @ cosine).toarray()
    return score


def markov_chain(train, num_items, prior_weight=10.0):
    """P(next item | last item), shrunk to the items' shares by prior_weight rows; without a history these"""
    is_pair = train["user"].to_numpy()[1:] == train["user"].to_numpy()[:-1]
    items = train["item"].to_numpy()
    steps = count_matrix(items[:-1][is_pair], items[1:][is_pair], (num_items, num_items))
    share = np.bincount(items, minlength=num_items) / len(items)

    def score(histories):
        last = np.array([history[-1] if len(history) else -1 for history in histories], dtype=int)
        counts = steps[last].toarray() * (last >= 0)[:, None]  # [B, M]
        return (counts + prior_weight * share) / (counts.sum(1, keepdims=True) + prior_weight)
    return score


REFERENCES = {"most popular": most_popular, "item-kNN": item_knn, "Markov chain": markov_chain}


def reference_rows(interactions, targets, num_items):
    """The figures of the references: a list of dicts of model, task and figures"""
    train, rows = interactions[interactions["split"] == "train"], []
    for name, fit in REFERENCES.items():
        score = fit(train, num_items)
        rank = {"sequential": ranks(score(targets.histories), targets.item, targets.own),
                "top-n": sampled_ranks(score(targets.own), targets)}
        rows += [{"model": name, "task": task, "users": len(part), **ranking_figures(part)}
                 for task, part in rank.items()]
    return rows
