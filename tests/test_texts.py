from llm_cases import ITEMS, prompt_of, texts_of, rating_route, events_of, soft_for
from userip.texts import FIELDS, item_pieces, join


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
    assert join(item_pieces(item, FIELDS, "rated 4")) == (
        " Games: red racer 1 by Acme for $3 rated 4.")
    route = rating_route(llm)
    rows = route.text_index(events_of([0, 1], [2, 0], [1, 0]))
    assert rows.tolist() == [5, 0]
    prompt = prompt_of(llm)
    nll = prompt.nll(soft_for(prompt, 2), route.texts.select(rows), route.may_read)
    told = route.texts.select(rows).field >= 0
    assert (nll[told] > 0).all() and nll[~told].abs().sum() == 0 and 0 < told.sum() < told.numel()
    assert route.texts.num_scored_tokens()[rows].tolist() == told.sum(1).tolist()
