import argparse

import numpy as np
import pandas as pd

from llm_cases import ITEMS, WORDS, events_of, prompt_of, rating_route, routes_for, soft_for, texts_of
from userip.evidence import FIELDS, Evidence, assign_folds, item_pieces, join, observe, route_fields


def test_an_items_text_leaves_out_what_is_missing():
    told = [join(item_pieces(item, FIELDS)) for item in ITEMS.itertuples()]
    assert told == [" Games: red racer 1 by Acme for $3.", " Kitchen: iron skillet 2 for $13.",
                    " Games: café racer 3 by Acme.", " a job by Bolt for $140.",
                    " Games: sport by Bolt for $5.5."]
    brands = [join(item_pieces(item, ("brand",))) for item in ITEMS.itertuples()]
    assert brands == [" by Acme.", "", " by Acme.", " by Bolt.", " by Bolt."]


def test_every_token_knows_its_field_and_the_texts_are_whole(llm):
    tokenizer = llm[1]
    texts = texts_of(llm)
    for row, item in enumerate(ITEMS.itertuples()):
        field = texts.field[row]
        decode = lambda mask: tokenizer.decode(texts.ids[row][mask]).strip()
        assert decode(field == FIELDS.index("title")) == item.title
        assert decode(field >= 0) == join(item_pieces(item, FIELDS)).strip()
        present = {name for name in FIELDS[:4] if join(item_pieces(item, (name,)))}
        assert {FIELDS[index] for index in set(field.tolist()) - {-1}} == present


def test_a_rating_is_told_behind_its_title_which_is_context_only(llm):
    item = next(ITEMS.itertuples())
    pieces = item_pieces(item, ("rating",), "liked")
    assert pieces == [("context", " red racer 1"), ("rating", " liked.")]
    assert join(item_pieces(item, FIELDS, "liked")) == (
        " Games: red racer 1 by Acme for $3 liked.")
    route = rating_route(llm)
    rows = route.text_index(events_of([0, 1], [2, 0], [1, 0]))
    assert rows.tolist() == [5, 0]
    prompt = prompt_of(llm)
    nll = prompt.nll(soft_for(prompt, 2), route.texts.select(rows), route.may_read)
    told = route.texts.select(rows).field >= 0
    assert (nll[told] > 0).all() and nll[~told].abs().sum() == 0 and 0 < told.sum() < told.numel()
    assert route.texts.num_scored_tokens()[rows].tolist() == told.sum(1).tolist()


def test_events_know_the_split_and_with_ratings_who_liked():
    rows = pd.DataFrame({"user": [0, 0, 2, 1, 2], "item": [0, 1, 1, 2, 0], "label": [0, 1, 1, 1, 0],
                         "split": ["train", "train", "train", "support", "test"]})
    of = lambda ratings: observe(argparse.Namespace(ratings=ratings, folds=0, seed=0), rows, 3)
    assert of(False).rows.level.tolist() == [0, 0, 0, 0, 0] and of(False).words == [""]
    assert of(True).rows.level.tolist() == [0, 1, 1, 1, 0] and of(True).words == WORDS
    assert of(True).train.row.tolist() == [0, 1, 2] and of(True).own.row.tolist() == [0, 1, 2, 3]
    assert of(True).is_warm.tolist() == [True, False, True]


def test_folds_deal_out_each_users_rows_evenly():
    train = pd.DataFrame({"user": np.random.default_rng(0).integers(40, size=1000)})
    fold = assign_folds(train, 4, seed=1)
    counts = pd.crosstab(train["user"], fold)
    assert set(fold) == {0, 1, 2, 3} and (counts.max(axis=1) - counts.min(axis=1)).max() <= 1
    assert ((fold == assign_folds(train, 4, seed=1)).all()
            and (fold != assign_folds(train, 4, seed=2)).any())


def test_routes_follow_the_option_and_the_data():
    args = argparse.Namespace(route=["title+category", "brand+price"], evidence="items", ratings=False)
    routes = lambda items: {fields: may_read.tolist()
                            for fields, may_read in route_fields(args, items, ["a", "b"])}
    assert routes(ITEMS) == {("title", "category"): [True, False], ("brand", "price"): [False, True]}
    bare = ITEMS.assign(brand=None, price=None, category=None)  # titles only: both read the titles
    assert routes(bare) == {("title",): [True, True]}
    args.route = ["none"]
    assert routes(ITEMS) == {FIELDS[:4]: [True, True]}
    args.route, args.ratings = ["title", "title+rating"], True
    assert routes(ITEMS) == {("title",): [True, False], ("title", "rating"): [False, True]}
    args.evidence = "review"
    assert routes(ITEMS) == {("review",): [True, True]}


def test_items_are_evidence_one_by_one_and_histories_keep_the_latest(llm):
    events = events_of([0, 0, 0, 2], [0, 1, 2, 4])
    routes = routes_for(llm)
    args = argparse.Namespace(evidence="items", max_history=2)
    (_, first, user), (_, second, _) = Evidence(args, llm[1], routes, events, 3).of_events(events)
    assert user.tolist() == [0, 0, 0, 2] and first.tolist() == second.tolist() == [0, 1, 2, 4]
    assert Evidence(args, llm[1], routes[:1], events, 3).counts().tolist() == [[3, 0], [0, 0], [1, 0]]
    args.evidence = "history"
    evidence = Evidence(args, llm[1], routes, events, 3)
    assert evidence.counts().tolist() == [[1, 1], [0, 0], [1, 1]]
    (route, _, user), _ = evidence.of_users(0, 3)
    assert user.tolist() == [0, 2] and evidence.of_users(1, 2) == []
    shown = llm[1].decode(route.texts.ids[0][route.texts.field[0] >= 0])
    assert shown.strip() == "Kitchen: iron skillet 2. Games: café racer 3."


def test_evidence_by_blocks_is_that_of_all(llm):
    routes = routes_for(llm)
    events = events_of([2, 0, 1, 0, 2, 2, 4], [0, 1, 2, 3, 4, 1, 0])
    args = argparse.Namespace(evidence="items", max_history=2)
    evidence = Evidence(args, llm[1], routes, events, 5)
    pairs_of = lambda parts, first=0: sorted((user + first, text) for _, texts, users in parts
                                             for user, text in zip(users.tolist(), texts.tolist()))
    blocks = [pairs_of(evidence.of_users(*block), block[0]) for block in ((0, 2), (2, 3), (3, 5))]
    assert sorted(sum(blocks, [])) == pairs_of(evidence.of_events(events))
    assert evidence.of_users(0, 1)[0][1].tolist() == [1, 3]  # in the order in which they came
    assert evidence.of_users(3, 4) == []
