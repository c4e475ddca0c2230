import argparse
import copy

import numpy as np
import pandas as pd
import pytest
import torch

from userip.pmf import factorize, nearest_users, solve_vectors


def small_data(num_users=12, num_items=9, seed=0):
    """Data with ratings of two groups, as read_data gives it"""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame([(user, item, 5.0 if (user + item) % 2 else 1.0) for user in range(num_users)
                         for item in rng.choice(num_items, 6, replace=False)],
                        columns=["user", "item", "rating"])
    split = np.where(np.arange(len(rows)) % 6 == 5, "valid", "train").astype(object)
    split[rows["user"] == num_users - 1] = "support"
    is_warm = np.isin(np.arange(num_users), rows["user"][split == "train"])
    return argparse.Namespace(num_users=num_users, num_items=num_items, is_warm=is_warm, split={
        name: rows[split == name] for name in ("train", "valid", "support")})


def test_neighbours_are_the_nearest_other_warm_users():
    rng = torch.Generator().manual_seed(0)
    vectors, is_warm = torch.randn(40, 3, generator=rng), torch.arange(40) % 7 > 0
    nearest = nearest_users(vectors, vectors, is_warm, block=16)
    assert nearest.shape == (40, 20)
    for user in range(40):
        cosine = [float(torch.cosine_similarity(vectors[user], vectors[other], dim=0)) for other in range(40)]
        others = [other for other in range(40) if other != user and is_warm[other]]
        assert nearest[user].tolist() == sorted(others, key=lambda other: -cosine[other])[:20]
    assert nearest_users(vectors[:5], vectors[:5], torch.ones(5, dtype=torch.bool)).shape == (5, 4)


def test_pmf_solves_the_ridge_regression_of_each_user_without_the_fold():
    data = small_data()
    pmf = factorize(data, 3, 2.0, 0)
    assert pmf.vectors.shape == (6, 12, 3) and len(pmf.fold) == len(data.split["train"])
    rows = data.split["train"].assign(rating=lambda rows: rows["rating"] - rows["rating"].mean())
    items = np.random.default_rng(1).standard_normal((9, 3))
    vectors, inverse = solve_vectors(rows, "user", items, 12, 2.0)
    for user in range(11):
        x, y = items[rows["item"][rows["user"] == user]], rows["rating"][rows["user"] == user]
        hessian = x.T @ x + 2.0 * np.eye(3)
        assert vectors[user] == pytest.approx(np.linalg.solve(hessian, x.T @ y))
        assert inverse[user] == pytest.approx(np.linalg.inv(hessian))
    for fold in range(5):  # only a user with rows in the fold has another vector without it
        users = set(data.split["train"]["user"][pmf.fold.numpy() == fold])
        moved = (pmf.vectors[fold] - pmf.vectors[-1]).abs().amax(1) > 1e-6
        assert {user for user in range(12) if moved[user]} == users


def test_a_support_row_moves_its_own_user_only():
    data = small_data()
    before, other = factorize(data, 3, 2.0, 0), copy.deepcopy(data)
    other.split["support"] = other.split["support"].assign(rating=lambda rows: 6 - rows["rating"])
    after = factorize(other, 3, 2.0, 0)
    assert torch.equal(before.vectors[:, :11], after.vectors[:, :11])
    assert not torch.equal(before.vectors[:, 11], after.vectors[:, 11])
    assert 11 not in before.nearest[:, :11]
