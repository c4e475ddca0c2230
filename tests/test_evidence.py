import argparse

import numpy as np
import pandas as pd

from llm_cases import ITEMS, WORDS, events_of, routes_for
from userip.evidence import Evidence, assign_folds, rating_levels, route_fields
from userip.texts import FIELDS


def test_rating_levels_are_labels_or_stars_of_the_train_rows():
    rows = pd.DataFrame({"rating": [1.0, 4.0, 5.0, 2.4], "label": [0, 1, 1, 0],
                         "split": ["train", "train", "train", "test"]})
    train = rows[rows["split"] == "train"]
    of = lambda ratings: rating_levels(argparse.Namespace(ratings=ratings), rows, train)
    assert of("none")[0].tolist() == [0, 0, 0, 0] and of("none")[1] == [""]
    assert of("liked")[0].tolist() == [0, 1, 1, 0] and of("liked")[1] == WORDS
    assert of("stars")[0].tolist() == [0, 1, 2, 0]  # 2.4 is nearest to 1
    assert of("stars")[1] == ["rated 1", "rated 4", "rated 5"]


def test_folds_deal_out_each_users_rows_evenly():
    train = pd.DataFrame({"user": np.random.default_rng(0).integers(40, size=1000)})
    fold = assign_folds(train, 4, seed=1)
    counts = pd.crosstab(train["user"], fold)
    assert set(fold) == {0, 1, 2, 3} and (counts.max(axis=1) - counts.min(axis=1)).max() <= 1
    assert ((fold == assign_folds(train, 4, seed=1)).all()
            and (fold != assign_folds(train, 4, seed=2)).any())
    assert (assign_folds(train, 0, seed=1) == -1).all()


def test_routes_follow_the_option_and_the_data():
    args = argparse.Namespace(route=["title+category", "brand+price"], evidence="items", ratings="none")
    routes = lambda items: {fields: may_read.tolist()
                            for fields, may_read in route_fields(args, items, ["a", "b"])}
    assert routes(ITEMS) == {("title", "category"): [True, False], ("brand", "price"): [False, True]}
    bare = ITEMS.assign(brand=None, price=None, category=None)  # titles only: both read the titles
    assert routes(bare) == {("title",): [True, True]}
    args.route = ["none"]
    assert routes(ITEMS) == {FIELDS[:4]: [True, True]}
    args.route, args.ratings = ["title", "title+rating"], "liked"
    assert routes(ITEMS) == {("title",): [True, False], ("title", "rating"): [False, True]}
    args.evidence = "review"
    assert routes(ITEMS) == {("review",): [True, True]}


def test_items_are_evidence_one_by_one_and_histories_keep_the_latest(llm):
    events = events_of([0, 0, 0, 2], [0, 1, 2, 4])
    routes = routes_for(llm)
    args = argparse.Namespace(evidence="items", max_history=2)
    evidence = Evidence(args, llm[1], routes, events, 3)
    (_, first), (_, second) = evidence.of_events(events)
    assert first.user.tolist() == [0, 0, 0, 2] and first.text.tolist() == [0, 1, 2, 4]
    assert second.text.tolist() == [0, 1, 2, 4]
    assert Evidence(args, llm[1], routes[:1], events, 3).counts().tolist() == [[3, 0], [0, 0], [1, 0]]
    args.evidence = "history"
    assert Evidence(args, llm[1], routes[:1], events, 3).counts().tolist() == [[1, 0], [0, 0], [1, 0]]
    (route, pairs), _ = evidence.of_events(events)
    assert pairs.user.tolist() == [0, 2]
    told = llm[1].decode(route.texts.ids[0][route.texts.field[0] >= 0])
    assert told.strip() == "Kitchen: iron skillet 2. Games: café racer 3."


def test_evidence_by_blocks_is_that_of_all(llm):
    routes = routes_for(llm)
    events = events_of([2, 0, 1, 0, 2, 2, 4], [0, 1, 2, 3, 4, 1, 0])
    args = argparse.Namespace(evidence="items", max_history=2)
    evidence = Evidence(args, llm[1], routes, events, 5)
    pairs_of = lambda parts: sorted((user, row) for _, pairs in parts
                                    for user, row in zip(pairs.user.tolist(), pairs.text.tolist()))
    blocks = [evidence.of_users(first, last) for first, last in ((0, 2), (2, 3), (3, 5))]
    assert pairs_of(sum(blocks, [])) == pairs_of(evidence.of_events(events))
    assert evidence.of_users(0, 1)[0][1].text.tolist() == [1, 3]  # in the order in which they came
    assert pairs_of(evidence.of_users(3, 4)) == []
