"""Interests of PeaPOD's users: vectors by probabilistic matrix factorization (PMF) of the train ratings,
without each fold of a user's rows, the nearest other users, and soft prompts that are made of these.
"""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from userip.evidence import assign_folds

NUM_FOLDS, NUM_ROUNDS, NUM_NEIGHBOURS = 5, 15, 20


def solve_vectors(rows, by, factors, num, penalty):
    """The vectors that minimise Σ (r - u·v)² + λ |u|² with the others' factors [M, C] fixed, and the inverse
    of each one's Hessian. rows: user, item, rating (less the mean) by column; by: user or item -> [num, C],
    [num, C, C]
    """
    other = "item" if by == "user" else "user"
    pairs = rows[by], rows[other]
    matrix = lambda values: sparse.csr_matrix((values, pairs), shape=(num, len(factors)))
    products = (factors[:, :, None] * factors[:, None]).reshape(len(factors), -1)  # [M, C C]
    hessian = (matrix(np.ones(len(rows))) @ products).reshape(num, factors.shape[1], -1)
    inverse = np.linalg.inv(hessian + penalty * np.eye(factors.shape[1]))
    return np.einsum("nij,nj->ni", inverse, matrix(rows["rating"]) @ factors), inverse


def factorize(data, rank, penalty, seed):
    """PMF (Salakhutdinov and Mnih, 2007) by alternating least squares -> namespace of vectors float32
    [F + 1, N, C], of users without each fold of their train rows and, last, with all; deviation [N, C, C],
    the Cholesky factor of a vector's posterior covariance; fold int64 [train rows]; nearest int64
    [F + 1, N, 20], other users by cosine

    Items' factors are of all train rows, users' vectors are solved again without each fold. A support row
    reaches its own user only.
    """
    rng, sizes = np.random.default_rng([seed, 8]), (data.num_users, data.num_items)
    train, support = data.split["train"], data.split["support"]
    mean = train["rating"].mean()
    train, support = (rows.assign(rating=rows["rating"].astype(float) - mean) for rows in (train, support))
    items = 0.1 * rng.standard_normal((data.num_items, rank))
    for _ in range(NUM_ROUNDS):
        users, _ = solve_vectors(train, "user", items, sizes[0], penalty)
        items, _ = solve_vectors(train, "item", users, sizes[1], penalty)
    fold = assign_folds(train, NUM_FOLDS, seed)
    kept = [pd.concat([train[fold != left_out], support]) for left_out in range(NUM_FOLDS + 1)]
    vectors = []
    for rows in kept:  # the covariance is that of the last one
        part, covariance = solve_vectors(rows, "user", items, sizes[0], penalty)
        vectors.append(part)
    vectors = np.stack(vectors)
    residual = {name: rows["rating"] - mean * (name == "valid")
                - (vectors[-1, rows["user"]] * items[rows["item"]]).sum(1)
                for name, rows in (("train", train), ("valid", data.split["valid"]))}
    rmse = {name: math.sqrt((part**2).mean()) for name, part in residual.items()}
    print(f"PMF: RMSE of ratings {rmse['train']:.3f} on train, {rmse['valid']:.3f} on valid rows")
    scale = vectors[-1, data.is_warm].std(0).clip(min=1e-9)  # of each direction
    vectors = torch.tensor(vectors / scale, dtype=torch.float32)
    deviation = np.linalg.cholesky(covariance) * rmse["train"] / scale[:, None]
    nearest = torch.stack([nearest_users(part, vectors[-1], torch.tensor(data.is_warm)) for part in vectors])
    return SimpleNamespace(vectors=vectors, deviation=torch.tensor(deviation, dtype=torch.float32),
                           fold=torch.tensor(fold), nearest=nearest)


def nearest_users(vectors, others, is_warm, block=1024):
    """The 20 users with train rows whose vectors others [N, C] are nearest to each of vectors [N, C] by
    cosine, never the user themself: int64 [N, 20] (fewer if there are fewer users)
    """
    others, nearest = F.normalize(others, dim=1), []
    num = min(NUM_NEIGHBOURS, int(is_warm.sum()) - 1)
    for users in torch.arange(len(vectors)).split(block):
        cosine = F.normalize(vectors[users], dim=1) @ others.T  # [n, N]
        cosine[:, ~is_warm] = -2.0
        cosine[torch.arange(len(users)), users] = -3.0
        nearest.append(cosine.topk(num, dim=1).indices)
    return torch.cat(nearest)


class PoolPrompt(nn.Module):
    """θ_u = Σ_m a_m p_m, a = softmax(W v_u): vectors [B, C] -> soft prompts [B, S D], in units of scale"""

    def __init__(self, rank, num_prompts, num_soft, width):
        super().__init__()
        self.interest = nn.Linear(rank, num_prompts)
        self.prompts = nn.Parameter(torch.randn(num_prompts, num_soft * width))

    def attention(self, vectors):
        return self.interest(vectors).softmax(1)  # [B, m]

    def forward(self, vectors, neighbours):
        return self.attention(vectors) @ self.prompts


class NeighbourPrompt(nn.Module):
    """S heads of attention over other users' vectors: [B, C], neighbours [B, 20, C] -> [B, S D]

    The user's own vector asks, but no value is made of it.
    """

    def __init__(self, rank, num_prompts, num_soft, width):
        super().__init__()
        self.query = nn.Linear(rank, num_soft * rank)
        self.key, self.value = nn.Linear(rank, rank), nn.Linear(rank, width)
        self.start = nn.Parameter(torch.randn(num_soft, width))

    def attention(self, vectors, neighbours):
        query = self.query(vectors).view(len(vectors), len(self.start), -1)  # [B, S, C]
        return (query @ self.key(neighbours).mT / math.sqrt(query.shape[2])).softmax(2)  # [B, S, 20]

    def forward(self, vectors, neighbours):
        mixed = self.value(self.attention(vectors, neighbours) @ neighbours)  # [B, S, D]; weights sum to 1
        return (self.start + mixed).flatten(1)


PROMPTS = {"pool": PoolPrompt, "neighbours": NeighbourPrompt, "shared": PoolPrompt}  # shared: a pool of one
