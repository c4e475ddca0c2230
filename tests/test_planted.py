from types import SimpleNamespace

import pytest

from conftest import prepare
from userip.planted import bayes_ari, read_planted


def planted_table(seed, split, min_interactions=1):
    """Interactions, items and users of a planted world, as the stage splits them."""
    interactions, items, users = read_planted(SimpleNamespace(seed=seed))
    interactions = prepare.keep_core(interactions, min_interactions)
    table, users, items, _ = prepare.index_ids(interactions, users, items)
    table["split"] = prepare.draw_split(split, table, seed)
    return table, items, users


@pytest.mark.parametrize("seed", [0, 1, 2, 11])
def test_the_planted_world_keeps_its_limits(seed):
    table, items, users = planted_table(seed, "random", min_interactions=4)
    for ari in bayes_ari(seed, table, items, users).values():
        assert 0.5 < ari < 0.9
    assert len(items) == 600 and len(users) > 1900 and 0.5 < (table["rating"] > 3).mean() < 0.8


def test_bayes_needs_the_right_truth():
    table, items, users = planted_table(0, "random")
    shuffled = users.assign(true_hobby=users["true_hobby"].sample(frac=1, random_state=0).to_numpy())
    ari = bayes_ari(0, table, items, shuffled)
    assert abs(ari["hobby"]) < 0.02 and ari["background"] > 0.5


def test_bayes_sees_the_support_rows_of_cold_users_and_knows_how_few_they_are():
    table, items, users = planted_table(0, "cold-user")
    cold = users["user"].isin(table.loc[table["split"] == "support", "user"])
    best = bayes_ari(0, table, items, users)
    unseen = bayes_ari(0, table.replace({"split": {"support": "test"}}), items, users)
    few = bayes_ari(0, table.replace({"split": {"support": "train"}}), items, users)
    assert 150 < cold.sum() < 250
    for name, ari in best.items():
        assert 0.5 < ari < 0.9 and ari > unseen[name] + 0.05 and ari >= few[name]
