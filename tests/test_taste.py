"""Taste: the posterior mean by the kernel's formula, its variances, and what it finds where users differ."""

import numpy as np
import pandas as pd
import pytest
import torch

import userip.taste as taste_room
from userip.item_bank import landmarks_of, similarity
from userip.rating_means import residuals
from userip.taste import Taste, coordinates, fit_taste, posterior_mean, variances, word_vectors


def likes(num_users=120, num_items=40, rows_each=12, strength=1.0, seed=0):
    """Users like items of their own kind, of two, more than the other one's, and some users like everything;
    the last 20 have support rows only, of the last 4 items none has a train row. -> split, vectors [M, V], side
    """
    rng = np.random.default_rng(seed)
    side, kind = rng.choice([-1, 1], num_users), np.arange(num_items) % 2 * 2 - 1
    rows = pd.DataFrame([(user, item) for user in range(num_users)
                         for item in rng.choice(num_items, rows_each, replace=False)], columns=["user", "item"])
    user, item = rows["user"], rows["item"]
    rows["rating"] = (3 + rng.normal(size=num_items)[item] + rng.normal(size=num_users)[user]
                      + strength * side[user] * kind[item] + rng.normal(size=len(rows)))
    is_new = item >= num_items - 4
    place = np.where(is_new | (rows.groupby("user").cumcount() >= rows_each - 3), "test", "train").astype(object)
    place[(user >= num_users - 20) & (place == "train")] = "support"
    split = {name: rows[place == name] for name in ("train", "support", "test")}
    vectors = torch.tensor(kind[:, None] + 0.3 * rng.normal(size=(num_items, 6))).float()
    return split, vectors, side * 1.0, kind


def test_the_number_foretells_the_ratings_of_warm_and_cold_users_and_of_new_items():
    split, vectors, side, kind = likes()
    taste, test = fit_taste(split, vectors, 0, 120), split["test"]
    number, truth = taste.read(split)["test"], (side[test["user"]] * kind[test["item"]])
    for rows in (test["user"] < 100, test["user"] >= 100, test["item"] >= 36):
        assert np.corrcoef(number[rows], truth[rows])[0, 1] > 0.75
    dealt = taste.dealt([0, 0])
    assert abs(np.corrcoef(dealt.read(split)["test"], truth)[0, 1]) < 0.2
    assert (np.sort(dealt.users, 1) == np.sort(taste.users, 1)).all() and (dealt.items == taste.items).all()


def test_how_generous_users_are_is_no_taste():
    split, vectors, *_ = likes(strength=0.0)
    found = fit_taste(split, vectors, 0, 120).read(split)["test"]
    assert found.std() < 0.15  # in units of its own deviation


def test_a_train_row_reads_the_weights_without_its_fold_and_others_the_last_ones():
    users = np.arange(12.0).reshape(3, 4, 1)  # [F + 1, N, C]
    taste = Taste(users, np.array([[1.0], [10.0]]), np.array([1, 0]))
    frame = pd.DataFrame({"user": [0, 3], "item": [0, 1]})
    assert taste.read({"train": frame, "test": frame})["train"].tolist() == [4.0, 30.0]
    assert taste.read({"train": frame, "test": frame})["test"].tolist() == [8.0, 110.0]


def test_a_weight_is_the_posterior_mean_of_a_user_without_the_fold(monkeypatch):
    """Against a plain loop over one user's rows, with residuals and given variances of the other folds"""
    monkeypatch.setattr(taste_room, "variances", lambda *_: (0.5, 0.25, 2.0))
    split, vectors, *_ = likes()
    taste, train = fit_taste(split, vectors, 0, 120), split["train"]
    phi = coordinates(vectors, train, is_scaled=True)
    for user, left_out in ((3, 0), (3, 4), (110, 2), (57, 5)):
        kept = train[taste.fold != left_out]
        rows = pd.concat([kept, split["support"]])
        own = (rows["user"] == user).to_numpy()
        r = residuals(kept, split["support"], 40)[0][own]
        x = phi[rows["item"][own]]
        covariance = 0.25 * x @ x.T + 0.5 + 2.0 * np.eye(len(r))
        expected = 0.25 * x.T @ np.linalg.solve(covariance, r) / 0.5  # in units of τ = .5
        assert taste.users[left_out, user] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_rows", [3, 30])
def test_the_posterior_mean_is_that_of_the_kernel(num_rows):
    """Both ways to solve, against k(x, X) (K + σ² I)⁻¹ r of Rasmussen and Williams, eq. 2.25"""
    rng = np.random.default_rng(0)
    x, residual, new = rng.normal(size=(2, num_rows, 5)), rng.normal(size=(2, num_rows)), rng.normal(size=5)
    x[1, 0] = 0  # left out
    found = posterior_mean(x, residual, np.array([0.5, 2.0])) @ new
    for fold, noise in enumerate((0.5, 2.0)):
        rows = slice(fold, None)
        part, r = x[fold, rows], residual[fold, rows]
        expected = part @ new @ np.linalg.solve(part @ part.T + noise * np.eye(len(r)), r)
        assert found[fold] == pytest.approx(expected)


def test_variances_are_found():
    rng = np.random.default_rng(0)
    user, phi = np.arange(3000).repeat(6), rng.normal(size=(18_000, 2))
    b, w = 0.7 * rng.normal(size=3000), 1.5 * rng.normal(size=(3000, 2))
    residual = b[user] + (w[user] * phi).sum(1) + 2 * rng.normal(size=18_000)
    found = variances(phi + 0.0, residual, user)
    assert np.sqrt(found[:2]) == pytest.approx([0.7, 1.5], rel=0.1) and found[2] == pytest.approx(4, rel=0.06)
    assert variances(phi, rng.normal(size=18_000), user)[1] < 0.02
    assert np.isfinite(variances(phi[:1], residual[:1], user[:1])).all()  # no pair


@pytest.mark.parametrize("is_scaled", [True, False])
def test_coordinates_have_the_products_of_the_centred_kernel(is_scaled):
    split, vectors, *_ = likes()
    phi = coordinates(vectors, split["train"], is_scaled)
    landmarks, mean, scale = landmarks_of(vectors, split["train"])
    scale = scale if is_scaled else 1.0
    assert set(landmarks.tolist()) == set(split["train"]["item"]) and phi.shape == (40, len(landmarks) - 1)
    kernel = similarity(vectors, vectors, mean, scale).double().numpy()
    known = landmarks.numpy()
    rows, overall = kernel[:, known].mean(1), kernel[known][:, known].mean()
    centred = kernel - rows[:, None] - rows[None] + overall
    assert (phi @ phi.T)[known][:, known] == pytest.approx(centred[known][:, known], abs=1e-5)
    one = pd.DataFrame({"user": [0], "item": [3], "rating": [5.0]})
    assert np.isfinite(coordinates(vectors, one, is_scaled=True)).all()


def test_where_texts_or_ratings_are_all_alike_there_is_no_taste():
    split, vectors, *_ = likes(num_items=400)
    alike = {name: rows.assign(rating=4.0) for name, rows in split.items()}
    for rows, texts in ((split, torch.ones(400, 6)), (alike, vectors)):
        assert (fit_taste(rows, texts, 0, 120).read(rows)["test"] == 0).all()


def test_words_that_items_share_bring_their_vectors_together():
    items = pd.DataFrame({"title": ["Red Shoes", "Blue Shoes", "Chess Set", None], "brand": None,
                          "category": ["Footwear", "Footwear", "Board Games", None]})
    items["item"], train = range(4), pd.DataFrame({"item": [0, 1, 2, 3]})
    vectors = word_vectors(items, train)
    assert vectors.shape == (4, 3) and np.isfinite(vectors).all()
    assert vectors[0] @ vectors[1] > 2 * abs(vectors[0] @ vectors[2])
    alike = word_vectors(items.assign(title="!", category=None), train)
    assert (alike == 1).all()  # no word but the one they share
    # the words of an item that only test rows have move no vector but its own
    known = word_vectors(items, train[:3])
    moved = word_vectors(items.assign(title=[*items["title"][:3], "Chess Shoes Poison"]), train[:3])
    assert (known[:3] == moved[:3]).all() and (known[3] != moved[3]).any()
