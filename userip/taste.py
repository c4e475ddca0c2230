"""Taste: how a user's ratings depart from the other users', as a function of the items' texts.

A residual r_ui, the rating less the item's shrunk mean, is b_u + f_u(x_i) + noise. b_u, of variance τ_b², is
how generous the user is. x_i is the item's vector: what an LLM reads in its text (item_vectors.pt) or, as a
control without an LLM, its row in an SVD of TF-IDF. f_u, the taste, is a Gaussian process with τ² times the
item bank's kernel (Rasmussen and Williams, 2006, chapter 2). In the kernel's principal coordinates φ_i [C] it
is linear, f_u(x_i) = w_uᵀ φ_i, and the posterior mean of (b_u, w_u) is a ridge regression on the user's own
rows. So a user has C numbers, an item has C, and a model reads w_uᵀ φ_i.
# differs from the paper: its codes are of users only, and no text meets the item that is scored.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.decomposition import KernelPCA, TruncatedSVD

from userip.item_bank import landmarks_of, similarity
from userip.rating_means import draw_folds, residuals, words_of_items

NUM_COORDINATES = 64  # C


class Taste(NamedTuple):
    """A field of a row's user and item, the number w_uᵀ φ_i in units of τ"""

    users: np.ndarray  # w float32 [F + 1, N, C], without each fold of the train rows and, last, with all rows
    items: np.ndarray  # φ float32 [M, C]
    fold: np.ndarray  # of each train row [n], which reads the w without it
    size: int = 0  # a number, see Column

    def read(self, split):
        """The numbers of the rows of each frame: {name: float64 [n]}"""
        fold = dict.fromkeys(split, -1) | {"train": self.fold}
        return {name: (self.users[fold[name], frame["user"]].astype(float) * self.items[frame["item"]]).sum(1)
                for name, frame in split.items()}

    def dealt(self, seed):
        """The control: users exchange their w"""
        order = np.random.default_rng(seed).permutation(self.users.shape[1])
        return self._replace(users=self.users[:, order])


def word_vectors(items, train, fields=("title", "category", "brand"), size=128):
    """The truncated SVD of TF-IDF of these fields' words, fitted to items with train rows: float64 [M, at
    most `size`]
    """
    texts, vectorizer = words_of_items(items, fields)
    is_known = items["item"].isin(train["item"])
    known, matrix = vectorizer.fit_transform(texts[is_known]), vectorizer.transform(texts)
    size = min(size, min(known.shape) - 1)
    return TruncatedSVD(size, random_state=0).fit(known).transform(matrix) if size > 0 else matrix.toarray()


def coordinates(vectors, train, is_scaled):
    """φ: kernel PCA of items by their vectors, torch [M, V], fitted to those with train rows: float64 [M, C].
    is_scaled: all V are brought to unit variance first
    """
    landmarks, mean, scale = landmarks_of(vectors, train)
    kernel = similarity(vectors, vectors[landmarks], mean, scale if is_scaled else 1.0)  # [M, L]
    kernel = kernel.double().numpy()
    if np.ptp(kernel) < 1e-6:  # all texts are alike
        return np.zeros((len(vectors), 1))
    size = max(1, min(NUM_COORDINATES, len(landmarks) - 1))
    solver = "arpack" if 4 * size < len(landmarks) else "dense"
    pca = KernelPCA(size, kernel="precomputed", eigen_solver=solver, random_state=0)
    return pca.fit(kernel[landmarks.numpy()]).transform(kernel)


def rows_of_users(user):
    """user int64 [n] -> the positions of each user's rows: list of (user, int64 array)"""
    order = np.argsort(user, kind="stable")
    users, first = np.unique(user[order], return_index=True)
    return list(zip(users, np.split(order, first[1:])))


def variances(phi, residual, user):
    """τ_b², τ² and σ² by moments: over pairs of rows of one user E[r_i r_j] = τ_b² + τ² φ_iᵀ φ_j, by least
    squares, and E[r_i²] is σ² more. phi [n, C], residual [n], user [n]; the pairs of a user weigh 1 / n_u.
    """
    norm, moments = np.square(phi).sum(1), [np.zeros(5)]  # [n]
    for _, rows in rows_of_users(user):
        p, r, k = phi[rows], residual[rows], norm[rows]
        moments.append(np.array([  # over i ≠ j: Σ 1, Σ φ_iᵀφ_j, Σ (φ_iᵀφ_j)², Σ r_i r_j, Σ r_i r_j φ_iᵀφ_j
            len(r) ** 2 - len(r), np.square(p.sum(0)).sum() - k.sum(), np.square(p.T @ p).sum() - k @ k,
            r.sum() ** 2 - r @ r, np.square(r @ p).sum() - r**2 @ k]) / len(r))
    count, kernel, square, product, both = np.sum(moments, 0)
    pairs = [[count + 1e-9, kernel], [kernel, square + 1e-9]]
    generosity, taste = np.linalg.solve(pairs, [product, both]).clip(1e-9)
    return generosity, taste, max((residual**2).mean() - generosity - taste * norm.mean(), 1e-9)


def posterior_mean(x, residual, noise):
    """(X_fᵀ X_f + noise_f I)⁻¹ X_fᵀ r_f of one user: x [F, n, D], zero in rows that are left out, residual
    [F, n], noise [F] -> [F, D]
    """
    _, num_rows, size = x.shape
    transposed, ridge = x.transpose(0, 2, 1), noise[:, None, None] * np.eye(min(num_rows, size))
    if num_rows < size:  # the same number by an [n, n] system
        return (transposed @ np.linalg.solve(x @ transposed + ridge, residual[:, :, None]))[:, :, 0]
    return np.linalg.solve(transposed @ x + ridge, transposed @ residual[:, :, None])[:, :, 0]


def fit_taste(split, vectors, seed, num_users, is_scaled=True):
    """split: frames by name with user, item, rating; vectors: torch [M, V] -> Taste. A train row reads what
    is made without its fold: the items' means, the variances, w. A support row moves its own user's w only.
    """
    train, support = split["train"], split["support"]
    rows, fold = pd.concat([train, support]), draw_folds(split, seed)
    coordinates_of_items, user = coordinates(vectors, train, is_scaled), rows["user"].to_numpy()
    phi, fold_of_row = coordinates_of_items[rows["item"]], np.r_[fold, np.full(len(support), -1)]
    is_kept = fold_of_row != np.arange(fold.max() + 2)[:, None]  # [F + 1, n]
    residual, found = np.zeros(is_kept.shape), []
    for left_out, kept in enumerate(is_kept):
        residual[left_out, kept], _ = residuals(train[fold != left_out], support, len(vectors))
        used = np.flatnonzero(kept[:len(train)])
        found.append(variances(phi[used], residual[left_out, used], user[used]))
    generosity, taste, noise = np.array(found).T  # [F + 1] each
    x = np.concatenate([np.ones((len(phi), 1)), phi], 1)
    users = np.zeros((len(is_kept), num_users, phi.shape[1]), dtype=np.float32)
    for one, own in rows_of_users(user):
        seen = is_kept[:, own, None] * x[own]  # [F + 1, n_u, 1 + C]
        seen[:, :, 0] *= np.sqrt(generosity / taste)[:, None]  # b_u in units of τ, as w_u
        users[:, one] = posterior_mean(seen, residual[:, own], noise / taste)[:, 1:] / np.sqrt(taste)[:, None]
    return Taste(users, coordinates_of_items.astype(np.float32), fold)
