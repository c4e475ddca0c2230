"""Controls beside the codes: what they are made of, and that no label reaches its own row."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score

from ctr_data import small_split
from userip.features import cf_codes, leniency_codes


def test_leniency_is_the_quartile_of_the_users_residual_also_of_cold_users():
    split, generous = small_split()
    fields = leniency_codes(split, seed=0)
    for name in ("test", "valid"):
        code, truth = fields[name][:, 0], generous[split[name]["user"]]
        assert np.corrcoef(code, truth)[0, 1] > 0.85 and set(code) == {0, 1, 2, 3}
    cold_codes = fields["test"][split["test"]["user"] >= 280, 0]
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
    fields = leniency_codes(split, seed=0)
    for left_out in range(5):
        used = [row for index, row in enumerate(own) if index >= num_train or fold[index] != left_out]
        mean = means(used)
        for index in np.flatnonzero(fold[:num_train] == left_out):
            user = own[index][0]
            expected = int(np.searchsorted(edges, mean[user])) if user in mean else 4
            assert fields["train"][index, 0] == expected


def test_neither_valid_nor_test_rows_reach_cf_and_leniency():
    split, _ = small_split()
    other = split | {name: split[name].assign(rating=1.0, item=(split[name]["item"] + 3) % 20)
                     for name in ("valid", "test")}
    run_of = lambda split: SimpleNamespace(split=split, users=range(300), code_sizes=[4, 3], num_items=20)
    assert (cf_codes(run_of(split), 0) == cf_codes(run_of(other), 0)).all()
    for name in ("train", "valid", "test"):
        assert (leniency_codes(split, 0)[name] == leniency_codes(other, 0)[name]).all()


def test_cf_finds_who_likes_the_same_items_and_folds_cold_users_in():
    rng = np.random.default_rng(0)
    rows = [(user, item) for user in range(200)
            for item in rng.choice(20, 8, replace=False) + 20 * (user % 2)]
    frame = pd.DataFrame(rows, columns=["user", "item"])
    split = {"train": frame[frame["user"] < 150], "support": frame[frame["user"].between(150, 197)]}
    run = SimpleNamespace(split=split, users=range(200), code_sizes=[2], num_items=40)
    codes = cf_codes(run, 0)[:, 0]
    assert adjusted_rand_score(np.arange(198) % 2, codes[:198]) > 0.95
    assert (codes[198:] == 2).all()  # neither train nor support rows
