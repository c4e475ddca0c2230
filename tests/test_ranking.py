import math

import numpy as np
import pandas as pd
import pytest

from userip.ranking import (REFERENCES, leave_one_out, ranking_figures, ranks, reference_rows, sampled_ranks)


def table(rows):
    """rows: (user, item, split) in the order of time"""
    return pd.DataFrame(rows, columns=["user", "item", "split"])


SMALL = table([(0, 0, "train"), (0, 1, "valid"), (0, 2, "train"), (0, 3, "test"), (0, 4, "train"),
               (1, 1, "train"), (1, 0, "train"), (1, 5, "test"), (1, 2, "test"),
               (2, 3, "support"), (2, 4, "test"), (3, 5, "test"), (3, 0, "valid")])


def test_the_last_row_of_each_user_is_asked_and_earlier_train_rows_are_the_history():
    targets = leave_one_out(SMALL, "test", 200, 10, seed=0)
    assert targets.user.tolist() == [0, 1, 2]  # nothing is known of user 3
    assert targets.item.tolist() == [3, 2, 4]
    # neither valid nor later rows
    assert [history.tolist() for history in targets.histories] == [[0, 2], [1, 0], [3]]
    for user, sampled in zip(targets.user, targets.sampled):
        assert len(set(sampled)) == 99 and not set(sampled) & set(SMALL["item"][SMALL["user"] == user])
    assert len(leave_one_out(SMALL, "test", 200, 2, seed=0).user) == 2
    assert leave_one_out(SMALL, "test", 6, 10, seed=0).sampled.shape == (3, 99)  # few items: with repetition


def test_figures_equal_a_naive_loop_over_sorted_items():
    rng = np.random.default_rng(0)
    scores, target = rng.permuted(np.tile(np.arange(30.0), (50, 1)), axis=1), rng.integers(30, size=50)
    excluded = [rng.choice(30, 4, replace=False) for _ in range(50)]
    figures = ranking_figures(ranks(scores, target, excluded))
    hits, gains = dict.fromkeys((1, 5, 10), 0), dict.fromkeys((5, 10), 0.0)
    for row in range(50):
        left = [item for item in range(30) if item == target[row] or item not in excluded[row]]
        best = sorted(left, key=lambda item: -scores[row, item])
        for k in hits:
            hits[k] += target[row] in best[:k]
        for k in gains:
            gains[k] += sum(1 / math.log2(2 + above) for above in range(k) if best[above] == target[row])
    assert figures == pytest.approx({f"hr@{k}": hits[k] / 50 for k in hits}
                                    | {f"ndcg@{k}": gains[k] / 50 for k in gains})


def test_a_worked_example_of_ndcg():
    """One right item at rank 3 of the ideal list of one: DCG = 1 / log2(4), ideal DCG = 1"""
    figures = ranking_figures(np.array([3.0]))
    assert figures == {"hr@1": 0.0, "hr@5": 1.0, "hr@10": 1.0, "ndcg@5": 0.5, "ndcg@10": 0.5}


def test_equal_scores_give_the_mean_rank():
    assert ranks(np.zeros((1, 9)), np.array([2]), [np.array([0, 1])]).tolist() == [4.0]  # of 1 to 7
    targets = leave_one_out(SMALL, "test", 200, 1, seed=0)
    assert sampled_ranks(np.zeros((1, 200)), targets).tolist() == [50.5]


def test_references_equal_naive_counts():
    train = SMALL[SMALL["split"] == "train"]
    histories = [np.array([0, 2]), np.array([], dtype=int), np.array([1])]
    scores = {name: fit(train, 6)(histories) for name, fit in REFERENCES.items()}
    counts = [sum(train["item"] == item) for item in range(6)]
    assert scores["most popular"].tolist() == [counts] * 3
    buyers = [set(train["user"][train["item"] == item]) for item in range(6)]
    for row, history in enumerate(histories):
        expected = [sum(len(buyers[a] & buyers[b]) / math.sqrt(len(buyers[a]) * len(buyers[b]))
                        for a in history if a != b and buyers[b]) for b in range(6)]
        assert scores["item-kNN"][row] == pytest.approx(expected)
    share = np.array(counts) / len(train)
    assert scores["Markov chain"][0] == pytest.approx((10 * share + np.eye(6)[4]) / 11)  # 2 -> 4 once
    assert scores["Markov chain"][1] == pytest.approx(share)
    assert scores["Markov chain"][2] == pytest.approx((10 * share + np.eye(6)[0]) / 11)  # 1 -> 0 once


def test_a_chain_that_is_in_the_data_is_found():
    rng, rows = np.random.default_rng(0), []
    for user in range(200):
        start = int(rng.integers(40))
        rows += [(user, (start + step) % 40, "test" if step == 5 else "train") for step in range(6)]
    frame = table(rows)
    targets = leave_one_out(frame, "test", 40, 1000, seed=0)
    figures = {(row["model"], row["task"]): row["hr@1"] for row in reference_rows(frame, targets, 40)}
    assert figures["Markov chain", "sequential"] == 1.0 and figures["most popular", "sequential"] < 0.2
