import argparse
import hashlib
import json
import shutil
import socket

import numpy as np
import pandas as pd
import pytest
import torch

import common
from conftest import NAME_TEXTS, TASK_TEXT, dies, infer, run_stage, save_llm

ITEMS = pd.DataFrame({"title": ["red racer 1", "iron skillet 2", "café racer 3", "a job", "sport"],
                      "category": ["Games", "Kitchen", "Games", None, "Games"],
                      "brand": ["Acme", None, "Acme", "Bolt", "Bolt"],
                      "price": [3.0, 12.99, None, 140.0, 5.5]})
FIELD_SETS = [("title", "category"), ("brand", "price")]


@pytest.fixture(scope="module")
def llm(llm_folder):
    return common.load_llm(argparse.Namespace(run_dir="unused"), str(llm_folder))


def prompt_of(llm, names=tuple(NAME_TEXTS), task=TASK_TEXT, **options):
    return infer.Prompt(*llm, [f"n{k}" for k in range(len(names))], names, task, **options)


def texts_of(llm, fields=infer.FIELDS, words=("",)):
    return infer.tokenize(llm[1], [infer.pieces_of(item, fields, word) for item in ITEMS.itertuples()
                                   for word in words])


def streams_of(llm, fields=FIELD_SETS):
    sees = torch.eye(2, dtype=torch.bool) if len(fields) == 2 else [torch.ones(2, dtype=torch.bool)]
    return [infer.Stream(each, seen, 1, texts_of(llm, each)) for each, seen in zip(fields, sees)]


WORDS = ["disliked", "liked"]


def rating_stream(llm, num_profiles=2):
    """The second profile is told how users rated."""
    sees = torch.arange(num_profiles) == num_profiles - 1
    return infer.Stream(("rating",), sees, 2, texts_of(llm, ("rating",), WORDS))


def events_of(users, items, verdicts=None, folds=None):
    column = lambda values: torch.tensor(values)
    rows = len(users)
    return infer.Events(column(users), column(items), column(verdicts or [0] * rows), torch.arange(rows),
                        column(folds or [-1] * rows))


def soft_for(prompt, rows, seed=0):
    shape = rows, prompt.num_profiles, prompt.num_soft * prompt.embedding.shape[1]
    return prompt.scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- evidence -------------------------------------------------------------------------------------------


def test_an_items_text_leaves_out_what_is_missing():
    told = [infer.text_of(infer.pieces_of(item, infer.FIELDS)) for item in ITEMS.itertuples()]
    assert told == [" Games: red racer 1 by Acme for $3.", " Kitchen: iron skillet 2 for $13.",
                    " Games: café racer 3 by Acme.", " a job by Bolt for $140.",
                    " Games: sport by Bolt for $5.5."]
    brands = [infer.text_of(infer.pieces_of(item, ("brand",))) for item in ITEMS.itertuples()]
    assert brands == [" by Acme.", "", " by Acme.", " by Bolt.", " by Bolt."]


def test_every_token_knows_its_field_and_the_texts_are_whole(llm):
    tokenizer = llm[1]
    texts = texts_of(llm)
    for row, item in enumerate(ITEMS.itertuples()):
        field = texts.field[row]
        decode = lambda mask: tokenizer.decode(texts.ids[row][mask]).strip()
        assert decode(field == infer.FIELDS.index("title")) == item.title
        assert decode(field >= 0) == infer.text_of(infer.pieces_of(item, infer.FIELDS)).strip()
        present = {name for name in infer.FIELDS[:4] if infer.text_of(infer.pieces_of(item, (name,)))}
        assert {infer.FIELDS[index] for index in set(field.tolist()) - {-1}} == present


def test_a_rating_is_told_behind_its_title_which_is_context_only(llm):
    item = next(ITEMS.itertuples())
    pieces = infer.pieces_of(item, ("rating",), "liked")
    assert pieces == [("context", " red racer 1"), ("rating", " liked.")]
    assert infer.text_of(infer.pieces_of(item, infer.FIELDS, "rated 4")) == (
        " Games: red racer 1 by Acme for $3 rated 4.")
    stream = rating_stream(llm)
    rows = infer.rows_of(stream, events_of([0, 1], [2, 0], [1, 0]))
    assert rows.tolist() == [5, 0]
    prompt = prompt_of(llm)
    nll = prompt.nll(soft_for(prompt, 2), infer.cut(stream.texts, rows), stream.sees)
    told = infer.cut(stream.texts, rows).field >= 0
    assert (nll[told] > 0).all() and nll[~told].abs().sum() == 0 and 0 < told.sum() < told.numel()
    assert infer.told_of(stream.texts)[rows].tolist() == told.sum(1).tolist()


def test_verdicts_are_labels_or_stars_of_the_train_rows():
    rows = pd.DataFrame({"rating": [1.0, 4.0, 5.0, 2.4], "label": [0, 1, 1, 0],
                         "split": ["train", "train", "train", "test"]})
    train = rows[rows["split"] == "train"]
    of = lambda ratings: infer.verdicts_of(argparse.Namespace(ratings=ratings), rows, train)
    assert of("none")[0].tolist() == [0, 0, 0, 0] and of("none")[1] == [""]
    assert of("liked")[0].tolist() == [0, 1, 1, 0] and of("liked")[1] == WORDS
    assert of("stars")[0].tolist() == [0, 1, 2, 0]  # 2.4 is nearest to 1
    assert of("stars")[1] == ["rated 1", "rated 4", "rated 5"]


def test_folds_deal_out_each_users_rows_evenly():
    train = pd.DataFrame({"user": np.random.default_rng(0).integers(40, size=1000)})
    fold = infer.folds_of(train, 4, seed=1)
    counts = pd.crosstab(train["user"], fold)
    assert set(fold) == {0, 1, 2, 3} and (counts.max(axis=1) - counts.min(axis=1)).max() <= 1
    assert ((fold == infer.folds_of(train, 4, seed=1)).all()
            and (fold != infer.folds_of(train, 4, seed=2)).any())
    assert (infer.folds_of(train, 0, seed=1) == -1).all()


def test_routes_follow_the_option_and_the_data():
    args = argparse.Namespace(route=["title+category", "brand+price"], evidence="items", ratings="none")
    routes = lambda items: {key: sees.tolist() for key, sees in infer.routes_of(args, items, ["a", "b"])}
    assert routes(ITEMS) == {("title", "category"): [True, False], ("brand", "price"): [False, True]}
    bare = ITEMS.assign(brand=None, price=None, category=None)  # titles only: both are told the titles
    assert routes(bare) == {("title",): [True, True]}
    args.route = ["none"]
    assert routes(ITEMS) == {infer.FIELDS[:4]: [True, True]}
    args.route, args.ratings = ["title", "title+rating"], "liked"
    assert routes(ITEMS) == {("title",): [True, False], ("title", "rating"): [False, True]}
    args.evidence = "review"
    assert routes(ITEMS) == {("review",): [True, True]}


def test_items_are_evidence_one_by_one_and_histories_keep_the_latest(llm):
    events = events_of([0, 0, 0, 2], [0, 1, 2, 4])
    streams = streams_of(llm)
    pieces = [[infer.pieces_of(item, fields) for item in ITEMS.itertuples()] for fields in FIELD_SETS]
    args = argparse.Namespace(evidence="items", max_history=2)
    (_, first), (_, second) = infer.evidence_of(args, llm[1], streams, pieces, events)
    assert first.user.tolist() == [0, 0, 0, 2] and first.row.tolist() == [0, 1, 2, 4]
    assert second.row.tolist() == [0, 1, 2, 4]
    assert infer.evidence_counts(args, streams[:1], events, 3, 2).tolist() == [[3, 0], [0, 0], [1, 0]]
    args.evidence = "history"
    (stream, pairs), _ = infer.evidence_of(args, llm[1], streams, pieces, events)
    assert pairs.user.tolist() == [0, 2]
    told = llm[1].decode(stream.texts.ids[0][stream.texts.field[0] >= 0])
    assert told.strip() == "Kitchen: iron skillet 2. Games: café racer 3."


# --- the prompt under the mask of Fig. 4 ----------------------------------------------------------------


def hidden_of_block(llm, prompt, soft, block, texts, sees):
    """All layers' hidden states at the name and soft tokens of one profile: [layers, B, L_k, D]"""
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees.expand(len(texts.ids), -1))
    output = llm[0](inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                    output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, :, (prompt.segment == block).nonzero()[:, 0]]


@pytest.mark.parametrize("block", [0, 1])
def test_a_profile_is_blind_to_the_other_name_the_other_soft_token_and_the_task(llm, block):
    texts = texts_of(llm)
    sees = torch.ones(2, dtype=torch.bool)
    prompt = prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, block, texts, sees)
    other_soft = soft.clone()
    other_soft[:, 1 - block] += 1.0
    assert torch.equal(before, hidden_of_block(llm, prompt, other_soft, block, texts, sees))
    other_name = ["her job is" if k != block else NAME_TEXTS[k] for k in range(2)]
    longer_task = "a much longer task text: a job or a sport and a job or a sport"
    for names, task in ((other_name, TASK_TEXT), (NAME_TEXTS, "a job or a sport"), (NAME_TEXTS, longer_task)):
        after = hidden_of_block(llm, prompt_of(llm, names, task), soft, block, texts, sees)
        # the same numbers, computed in a sequence of another length: kernels may add in another order
        assert torch.allclose(before, after, atol=1e-6, rtol=0)
    own_soft = soft.clone()
    own_soft[:, block] += 1.0
    assert not torch.allclose(before, hidden_of_block(llm, prompt, own_soft, block, texts, sees), atol=1e-3)


def test_a_name_or_task_of_equal_length_changes_no_bit_of_the_other_profile(llm):
    texts = texts_of(llm)
    sees, prompt = torch.ones(2, dtype=torch.bool), prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, 0, texts, sees)
    for place in (int((prompt.segment == 1).nonzero()[0]) + 1, int((prompt.segment == 2).nonzero()[-1])):
        changed = prompt_of(llm)
        changed.embedding[place] += 1.0  # another token of the other name, of the task text
        assert torch.equal(before, hidden_of_block(llm, changed, soft, 0, texts, sees))


def test_routed_evidence_is_blind_to_the_other_profile(llm):
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    soft = soft_for(prompt, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(prompt.nll(soft, first.texts, first.sees).sum(), soft)
    assert gradient[:, 1].abs().max() == 0 and gradient[:, 0].abs().max() > 0


def test_the_first_evidence_token_depends_on_the_profile(llm):
    """The last task token predicts it: blind, the category could not depend on θ."""
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    nll = [prompt.nll(soft_for(prompt, 5, seed), first.texts, first.sees)[:, 0] for seed in (0, 1)]
    assert (nll[0] - nll[1]).abs().min() > 1e-6


def test_the_causal_mask_lets_profiles_see_what_stands_before_them(llm):
    """The ablation: the second profile sees the first, never the other way round; positions in a row."""
    texts, sees = texts_of(llm), torch.ones(2, dtype=torch.bool)
    prompt = prompt_of(llm, mask="causal")
    assert prompt.position.tolist() == list(range(len(prompt.segment)))
    soft = soft_for(prompt, 5)
    for block in range(2):
        other = soft.clone()
        other[:, 1 - block] += 1.0
        hidden = [hidden_of_block(llm, prompt, part, block, texts, sees) for part in (soft, other)]
        assert torch.equal(*hidden) == (block == 0)


def test_the_released_prompt_names_the_items_brand_and_price(llm):
    """Against one text at a time, its prompt written out: what an item lacks is not there, not even a pad."""
    model, tokenizer = llm
    name_texts, words = ("{brand} he likes", "at {price} dollars"), ("", " more")
    plain = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    targets = infer.targets_of(tokenizer, name_texts, ITEMS)
    prompt = prompt_of(llm, name_texts, mask="causal", room=[target.shape[1] for target in targets])
    streams = [infer.Stream(("title",), torch.ones(2, dtype=torch.bool), 2, None)]
    pieces = [[infer.pieces_of(item, ("title",)) for item in ITEMS.itertuples() for _ in words]]
    args = argparse.Namespace(evidence="items")
    (stream,) = infer.tell(args, tokenizer, streams, pieces, targets, None, ITEMS)
    soft = soft_for(prompt, len(pieces[0]))
    texts = infer.cut(stream.texts, torch.arange(len(soft)).flip(0))
    nll = prompt.nll(soft.flip(0), texts, stream.sees).flip(0)
    bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
    for row in range(len(soft)):
        item = ITEMS.iloc[row // 2]
        brand = plain(f" {item.brand}") if isinstance(item.brand, str) else []
        price = plain({3: " 3", 12.99: " 13", 140: " 140", 5.5: " 5.5"}.get(item.price, ""))
        embed = lambda *ids: prompt.embed(torch.tensor(sum(ids, []), dtype=torch.long))
        before = [embed(bos, brand, plain(" he likes")), soft[row, :1],
                  embed(plain("at"), price, plain(" dollars")), soft[row, 1:], embed(plain(TASK_TEXT))]
        told = stream.texts.ids[row, :stream.texts.length[row]]
        logits = model(inputs_embeds=torch.cat([*before, prompt.embed(told)])[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-len(told) - 1:-1], told, reduction="none")
        assert torch.allclose(nll[row, :len(told)], expected, atol=1e-5)
    assert {len(set((target >= 0).sum(1).tolist())) for target in targets} == {2, 4}  # of several lengths


@pytest.mark.parametrize("num_soft", [2, 3])
def test_each_of_several_soft_tokens_counts_and_none_sees_the_other_profile(llm, num_soft):
    prompt, streams = prompt_of(llm, num_soft=num_soft), streams_of(llm)
    dim = prompt.embedding.shape[1]
    soft = soft_for(prompt, 5).requires_grad_()
    assert soft.shape[2] == num_soft * dim and len(prompt.soft_places) == 2 * num_soft
    (gradient,) = torch.autograd.grad(prompt.nll(soft, streams[0].texts, streams[0].sees).sum(), soft)
    assert (gradient[:, 0].unflatten(1, (num_soft, dim)).abs().amax((0, 2)) > 0).all()
    assert gradient[:, 1].abs().max() == 0


@pytest.mark.parametrize("init", ["random", "names", "vocab", "uniform"])
def test_soft_tokens_start_as_asked(llm, init):
    prompt = infer.Prompt(*llm, ["hobby", "job"], NAME_TEXTS, TASK_TEXT, num_soft=2)
    args = argparse.Namespace(init=init)
    soft = infer.first_soft(args, prompt, 50, torch.Generator().manual_seed(0)).unflatten(2, (2, -1))
    table = prompt.embed.weight.detach()
    if init == "names":
        ids = llm[1](" hobby", add_special_tokens=False).input_ids
        assert torch.allclose(soft[7, 0, 1], table[ids].mean(0)) and torch.equal(soft[0], soft[1])
    elif init == "vocab":
        assert (soft[3, 1, 0] == table).all(1).any() and not torch.equal(soft[0], soft[1])
    else:
        expected = {"random": prompt.scale, "uniform": 0.2 / 12**0.5}[init]
        assert float(soft.std()) == pytest.approx(expected, rel=0.1)
        assert soft.abs().max() <= 0.1 or init == "random"


def test_padding_changes_nothing(llm):
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    soft = soft_for(prompt, 5)
    together = prompt.nll(soft, first.texts, first.sees)
    for row in range(5):
        alone = infer.cut(first.texts, torch.tensor([row]))
        nll = prompt.nll(soft[row:row + 1], alone, first.sees)[0]
        assert torch.allclose(together[row, :len(nll)], nll, atol=1e-5)
        assert together[row, len(nll):].abs().sum() == 0
    junk = first.texts._replace(ids=torch.where(first.texts.field < 0, 7, first.texts.ids))
    assert torch.equal(prompt.nll(soft, junk, first.sees), together)


def test_the_loss_is_the_llms_own(llm):
    model, prompt, texts = llm[0], prompt_of(llm), texts_of(llm)
    sees = torch.ones(5, 2, dtype=torch.bool)
    soft = soft_for(prompt, 5)
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees)
    labels = torch.where(texts.field < 0, -100, texts.ids)
    labels = torch.nn.functional.pad(labels, (len(prompt.segment), 0), value=-100)
    own = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position, labels=labels).loss
    ours = prompt.nll(soft, texts, sees[0])
    assert float(ours.sum() / (texts.field >= 0).sum()) == pytest.approx(float(own), rel=1e-5)


def test_bos_opens_each_stream_where_the_llm_has_one(llm):
    prompt, tokenizer = prompt_of(llm), llm[1]
    starts = [int((prompt.segment == k).nonzero()[0]) for k in range(3)]
    with torch.no_grad():
        bos = prompt.embed(torch.tensor(tokenizer.bos_token_id))
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert all(torch.equal(prompt.embedding[start], bos) == has_bos for start in starts)


# --- score and gradient ---------------------------------------------------------------------------------


def weights_of(seed=0):
    return 0.5 + torch.rand(len(infer.FIELDS), generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_gradients_of_single_items(llm):
    prompt, weights = prompt_of(llm), weights_of()
    shared = soft_for(prompt, 1)[0]
    for stream in streams_of(llm):
        rows = (infer.told_of(stream.texts) > 0).nonzero()[:, 0]
        scores = infer.scores_of(prompt, stream, rows, shared, weights, 100)
        for place, row in enumerate(rows):
            soft = shared[None].clone().requires_grad_()
            loss = 0.0
            nll = prompt.nll(soft, infer.cut(stream.texts, row[None]), stream.sees)[0]
            for token in range(len(nll)):
                loss = loss + weights[stream.texts.field[row, token]] * nll[token]
            (gradient,) = torch.autograd.grad(-loss, soft)
            assert torch.allclose(scores[place], gradient[0], atol=1e-5)


def test_sums_by_user_equal_a_double_loop_and_have_the_same_bits_in_any_company():
    generator = torch.Generator().manual_seed(0)
    user, row = torch.randint(9, (200,), generator=generator), torch.randint(20, (200,), generator=generator)
    of_row = torch.randn(20, 16, generator=generator)
    total = infer.sum_by_user(user, row, of_row, 9)
    expected = torch.zeros(9, 16, dtype=torch.float64)
    for one, text in zip(user, row):
        expected[one] += of_row[text].double()
    assert torch.allclose(total, expected)
    order = torch.randperm(200, generator=generator)
    assert torch.equal(infer.sum_by_user(user[order], row[order], of_row, 9), total)
    mine = user == 4
    assert torch.equal(infer.sum_by_user(torch.zeros_like(user[mine]), row[mine], of_row, 1)[0], total[4])
    count, pull, lift = torch.bincount(user).float()[:, None], torch.ones(1), torch.randn(1, 16, 32)
    placed = infer.place_users(total.float()[:, None], count, pull, lift)
    alone = infer.place_users(total.float()[4:5, None], count[4:5], pull, lift)
    assert torch.equal(alone[0], placed[4])
    assert torch.allclose(placed[:, 0], (total.float() / (count + 1)) @ lift[0], atol=1e-5)


def test_an_audience_is_all_others_and_a_prior():
    """A double loop: who gave the verdict is not among the others; strangers meet all of them."""
    count = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    others, strangers = infer.audience(count, weight=2.0)
    prior = [(3 + 1) / (6 + 2), (3 + 1) / (6 + 2)]
    for item in range(3):
        for verdict in range(2):
            total = float(count[item].sum()) + 2.0
            assert float(strangers[item, verdict]) == pytest.approx(
                (float(count[item, verdict]) + 2 * prior[verdict]) / total)
            if count[item, verdict]:
                for other in range(2):
                    votes = float(count[item, other]) - (other == verdict)
                    assert float(others[item, verdict, other]) == pytest.approx(
                        (votes + 2 * prior[other]) / (total - 1))


def test_ratings_are_centred_by_the_items_audience_and_items_by_popularity(llm):
    """Score by score: left of a rating is its score less the audience's mean; of an item, less all."""
    prompt, weights = prompt_of(llm), weights_of()
    shared = soft_for(prompt, 1)[0]
    stream, count = rating_stream(llm), torch.tensor([3.0, 1, 0, 2, 0, 0, 1, 1, 0, 0])
    known = torch.arange(10) < 8  # item 4 is unknown
    score_of = lambda stream: lambda rows, weights, name: infer.scores_of(prompt, stream, rows, shared,
                                                                          weights, 500)
    result = infer.information_of(score_of(stream), stream, count, known, shared, weights, shrinkage=0.0)
    own, strangers, taken, noise = result[1]
    assert set(result) == {1} and taken.tolist() == known.tolist()
    score = lambda row: infer.scores_of(prompt, stream, torch.tensor([row]), shared, weights, 500)[0, 1]
    others, audience = infer.audience(count.view(5, 2))
    expected = torch.zeros_like(noise)
    for item in range(4):
        both = torch.stack([score(2 * item), score(2 * item + 1)])
        for verdict in range(2):
            row = 2 * item + verdict
            mine = both[verdict] - others[item, verdict] @ both
            assert torch.allclose(own[row], mine, atol=1e-5)
            assert torch.allclose(strangers[row], both[verdict] - audience[item] @ both, atol=1e-5)
            expected += count[row] / count.sum() * torch.outer(mine, mine)
    assert torch.allclose(noise, expected, atol=1e-6) and own[8:].abs().max() == 0
    (title, _), share = streams_of(llm), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    own, strangers, _, _ = infer.information_of(score_of(title), title, share, share > 0, shared, weights)[0]
    mean = sum(share[row]
               * infer.scores_of(prompt, title, torch.tensor([row]), shared, weights, 500)[0, 0]
               for row in range(4))
    first = infer.scores_of(prompt, title, torch.tensor([0]), shared, weights, 500)[0, 0]
    assert torch.allclose(own[0], first - mean, atol=1e-5) and torch.equal(own, strangers)


class NoProgress:
    """Nothing is kept on disk."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def keep(self, name, make):
        return make()


def score_case(llm, events, is_warm, **changes):
    """Profiles of a few users by the score method, all that is shared held fixed: a function of events."""
    prompt, streams = prompt_of(llm), [streams_of(llm)[0], rating_stream(llm)]
    options = {"folds": 0, "pull": 2.0, "rank": 16, "map_steps": 3, "tokens_per_batch": 500}
    args = argparse.Namespace(**options | changes)
    shared = soft_for(prompt, 1)[0]
    counts = [torch.bincount(infer.rows_of(stream, events), minlength=len(stream.texts.ids)).float()
              for stream in streams]
    information = []
    for stream, count in zip(streams, counts):
        scores = lambda rows, weights, name: infer.scores_of(prompt, stream, rows, shared, weights, 500)
        information.append(infer.information_of(scores, stream, count, torch.ones_like(count).bool(), shared,
                                                weights_of()))

    coordinates = infer.coordinates_of(args, prompt, streams, information, events, is_warm)

    def infer_users(own, prior=()):
        profiles, needs = infer.infer_by_score(args, prompt, streams, events, own, coordinates, shared,
                                               events, is_warm, list(prior), NoProgress())
        return profiles.all(), needs

    return infer_users, coordinates, streams


EVENTS = ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3], [0, 1, 2, 1, 3, 4, 0, 2, 4, 3, 0],
          [0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0])


def test_the_score_profile_is_the_shrunken_sum_of_single_items(llm, capsys):
    """A double loop over users and items: Σ over what they had, / (n + pull), mapped by B; folds left out."""
    events = events_of(*EVENTS)
    infer_users, coordinates, streams = score_case(llm, events, torch.ones(4, dtype=torch.bool), folds=2)
    profiles, needs = infer_users(events)
    assert profiles.shape[:3] == (3, 4, 2)
    for place, left_out in enumerate([0, 1, None]):
        for user in range(4):
            for k, stream in enumerate(streams):
                total, number = torch.zeros(16), 0
                for index in range(11):
                    if EVENTS[0][index] == user and EVENTS[3][index] != left_out:
                        if infer.told_of(stream.texts)[infer.rows_of(stream, events)[index]]:
                            total += coordinates[k].own[infer.rows_of(stream, events)[index]]
                            number += 1
                expected = needs["shared"][k] + (total / (number + 2.0)) @ needs["lift"][k]
                assert torch.allclose(profiles[place, user, k], expected, atol=1e-4)


def test_evidence_of_the_left_out_fold_changes_nothing(llm, monkeypatch):
    """What all users share (directions, map, step length) held fixed."""
    monkeypatch.setattr(infer, "choose_length", lambda *arguments: torch.ones(2))
    events = events_of(*EVENTS)
    infer_users, _, _ = score_case(llm, events, torch.ones(4, dtype=torch.bool), folds=2)
    before = infer_users(events)[0]
    flipped = events._replace(verdict=torch.where(events.fold == 0, 1 - events.verdict, events.verdict))
    after = infer_users(flipped)[0]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])
    assert torch.equal(before[:, :, 0], after[:, :, 0])  # a profile that no rating tells of stays


def test_a_codebook_as_prior_pulls_each_user_to_the_codeword_nearest_to_him(llm, capsys):
    events = events_of(*EVENTS)
    infer_users, _, _ = score_case(llm, events, torch.ones(4, dtype=torch.bool), pull=1e6)
    plain, needs = infer_users(events)
    prior = []
    for k in range(2):
        transform = torch.linalg.pinv(needs["lift"][k])[:, :2]  # the first two coordinates
        prior.append({"codebook": 0.3 * torch.tensor([[1.0, 0], [-1, 1], [0, -1]]), "transform": transform,
                      "mean": needs["shared"][k], "shared": torch.zeros(2)})
    pulled, _ = infer_users(events, prior)
    for k, part in enumerate(prior):
        z = (pulled[-1, :, k] - part["mean"]) @ part["transform"]
        distance = torch.cdist(z, part["codebook"]).min(1).values
        assert distance.max() < 1e-2  # so strong a pull leaves all at a codeword
        plain_z = (plain[-1, :, k] - part["mean"]) @ part["transform"]
        assert torch.cdist(plain_z, part["codebook"]).min(1).values.min() > 0.05
    assert len(set(torch.cdist((pulled[-1, :, 0] - prior[0]["mean"]) @ prior[0]["transform"],
                               prior[0]["codebook"]).argmin(1).tolist())) > 1


def test_field_weights_bring_all_fields_to_the_same_noise(llm):
    args = argparse.Namespace(tokens_per_batch=500)
    prompt, streams = prompt_of(llm), streams_of(llm)
    shared = soft_for(prompt, 1)[0]
    generator = torch.Generator().manual_seed(0)
    weights = infer.field_weights(args, prompt, streams, [torch.ones(5)] * 2, shared, generator)
    for stream in streams:
        for field in stream.fields:
            only = torch.zeros(len(infer.FIELDS))
            only[infer.FIELDS.index(field)] = weights[infer.FIELDS.index(field)]
            rows = (infer.told_of(stream.texts) > 0).nonzero()[:, 0]
            scores = infer.scores_of(prompt, stream, rows, shared, only, 500)
            noise = float((scores - scores.mean(0)).square().sum((1, 2)).mean())
            assert noise == pytest.approx(1, rel=1e-3)


def gradient_case(llm, mask="fig4", **changes):
    """Three users with histories of unequal length; inference of those users by gradient."""
    args = argparse.Namespace(**{"lr": 0.01, "tokens_per_batch": 200} | changes)
    prompt, streams = prompt_of(llm, mask=mask), streams_of(llm)
    pairs = infer.Pairs(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 3, 2, 3, 4, 0]))
    evidence = [(stream, pairs) for stream in streams]
    shared = soft_for(prompt, 1)[0]
    noise = torch.eye(shared.shape[1]).expand(2, -1, -1)

    def infer_users(users, pull=0.5, num_steps=3, start=None):
        start, users = shared.expand(3, -1, -1) if start is None else start, torch.tensor(users)
        mine = [(stream, infer.select(pairs, torch.isin(pairs.user, users))) for stream, pairs in evidence]
        return infer.infer_by_gradient(args, prompt, mine, weights_of(), start[users], shared, noise, pull,
                                       num_steps, users)

    return infer_users, shared


def test_a_user_alone_gets_what_the_block_gives(llm):
    infer_users, _ = gradient_case(llm)
    together = infer_users([0, 1, 2])
    for user in range(3):
        assert torch.allclose(infer_users([user])[0], together[user], atol=1e-5)


@pytest.mark.parametrize("mask", ["fig4", "causal"])
def test_the_token_budget_changes_no_profile(llm, mask):
    """With a budget of one token each text is alone in its row and its batch."""
    together = gradient_case(llm, mask)[0]([0, 1, 2])
    assert torch.allclose(gradient_case(llm, mask, tokens_per_batch=1)[0]([0, 1, 2]), together, atol=1e-5)


def test_pull_steps_lr_and_start_move_the_profiles(llm):
    users = [0, 1, 2]
    infer_users, shared = gradient_case(llm)
    base = infer_users(users)
    drift = lambda **options: float((infer_users(users, **options) - shared).norm())
    assert 0 < drift(pull=1e4) and not torch.equal(infer_users(users, pull=5.0), base)
    assert drift(num_steps=8, pull=1e4) < drift(num_steps=8, pull=0.0)
    assert not torch.equal(infer_users(users, num_steps=1), base)
    assert not torch.equal(gradient_case(llm, lr=0.02)[0](users), base)
    assert not torch.equal(infer_users(users, start=shared.expand(3, -1, -1) + 0.01), base)


def test_the_shared_point_and_personal_steps_lower_the_nll_and_leave_the_llm_untouched(llm):
    model = llm[0]
    content = lambda: b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    digest = lambda: hashlib.sha256(content()).hexdigest()
    before = digest()
    prompt, streams = prompt_of(llm), streams_of(llm)
    pairs = infer.Pairs(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 4, 2, 3]))
    evidence = [(stream, pairs) for stream in streams]
    args = argparse.Namespace(shared_steps=25, tokens_per_batch=2000, lr=0.02, batch_size=8, init="random")
    ones = torch.ones(len(infer.FIELDS))
    nll = lambda soft: float(sum(infer.weighted_nll(prompt, soft, stream, pairs.row, ones, pairs.user)
                                 for stream in streams))
    shared, curve = infer.fit_shared(args, prompt, evidence, ones, torch.Generator().manual_seed(0))
    assert len(curve) == 25 and np.mean(curve[-5:]) < np.mean(curve[:5])
    start, everyone = soft_for(prompt, 1).expand(3, -1, -1), shared.expand(3, -1, -1)
    noise = torch.zeros(2, shared.shape[1], shared.shape[1])
    own = infer.infer_by_gradient(args, prompt, evidence, ones, everyone, shared, noise, 0.0, 10,
                                  torch.arange(3))
    assert nll(own) < nll(everyone) < nll(start)
    assert digest() == before and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_map_never_sees_the_item_that_it_foretells(llm):
    """Users of a single item: with it left out nothing is known of them, and the map cannot learn."""
    prompt, streams = prompt_of(llm), streams_of(llm)
    train = events_of(list(range(5)), list(range(5)))
    args = argparse.Namespace(map_steps=3, tokens_per_batch=500)
    shared, is_warm = soft_for(prompt, 1)[0], torch.ones(5, dtype=torch.bool)

    def fitted(twice):
        events = events_of([*range(5)] * 2, [*range(5), *([1, 2, 3, 4, 0] if twice else range(5))])
        events = events if twice else train
        tables = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
        known = torch.ones(5, dtype=torch.bool)
        at = [infer.Coordinates(k, tables[k], tables[k], known, 1.0) for k in range(2)]
        return infer.fit_map(args, prompt, streams, events, shared, at, is_warm,
                             torch.Generator().manual_seed(0))

    assert fitted(False).abs().max() == 0 and fitted(True).abs().max() > 0


def test_users_who_choose_and_users_who_report_are_not_the_same(llm):
    rows = pd.DataFrame({"user": [0, 1, 2, 3, 3, 4], "item": [0, 1, 2, 3, 4, 0]})
    rows["split"] = 5 * ["valid"] + ["test"]
    tune, report = infer.heldout_rows(rows, np.zeros(6, dtype=np.int64), streams_of(llm), 100, seed=0)
    assert sorted(tune.user.tolist()) == [0, 2] and sorted(report.user.tolist()) == [1, 3, 3]
    assert report.item.tolist() == [1, 3, 4] and report.place.tolist() == [1, 3, 4]


def test_a_user_interval_is_that_of_the_ratio():
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(5, 15, size=4000)).float()
    difference = -0.1 * tokens + torch.tensor(rng.standard_normal(4000)).float()
    mean, half = infer.interval(difference, tokens)
    assert abs(mean + 0.1) < half < 0.01
    assert half == pytest.approx(1.96 / np.sqrt(4000) / float(tokens.mean()), rel=0.05)


# --- the whole stage ------------------------------------------------------------------------------------


def infer_run(small_run, tmp_path, *options, ok=True):
    """Stage 2 on a copy of the small run's stage 1, tiny LLM kept where the texts are the same."""
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(small_run[1], run)
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--tiny-steps", 6, "--shared-steps", 4,
                        "--map-steps", 4, "--heldout", 60, "--steps", 2, *options, ok=ok)
    if not ok:
        return printed
    stored = torch.load(run / "profiles.pt", weights_only=True)
    return printed, stored, json.loads((run / "profiles.pt.json").read_text())


def test_profiles_hold_what_the_readme_says(small_run):
    stored = torch.load(small_run[1] / "profiles.pt", weights_only=True)
    assert stored["profiles"].shape == (60, 2, 128) and stored["profiles"].dtype == torch.float32
    assert stored["noise"].shape == (2, 128, 128) and stored["has_evidence"].all()
    assert stored["names"] == ["hobby", "background"]
    figures = json.loads((small_run[1] / "profiles.pt.json").read_text())["heldout_nll"]
    assert {"none", "shared", "shuffled", "own", "own_minus_shared", "own_minus_shuffled"} == set(figures)


THREE_PROFILES = ("--profiles", "hobby=This user's hobby is", "job=her job is", "sport=This user's sport is")


@pytest.mark.parametrize("options, num_profiles", [
    (("--paper",), 2), (("--method", "gradient"), 2), (("--method", "gradient", "--evidence", "history"), 2),
    (("--released", "--evidence", "items"), 2), (("--soft-tokens", 2), 2), (THREE_PROFILES, 3),
    (("--ratings",), 3), (("--ratings", "stars", "--folds", 2, "--method", "gradient"), 3),
    (("--ratings", "--route", "title+rating", "brand+price"), 2)], ids=lambda value: str(value)[:60])
def test_methods_evidence_and_any_number_of_profiles_run(small_run, tmp_path, options, num_profiles):
    _, stored, sidecar = infer_run(small_run, tmp_path, "--llm", "tiny", *options)
    profiles, folds = stored["profiles"], sidecar["options"]["folds"]
    assert profiles.shape[:-3] == ((folds + 1,) if folds else ()) and ("fold" in stored) == bool(folds)
    assert profiles.shape[-2] == len(stored["names"]) == num_profiles
    assert profiles.shape[-1] == 128 * sidecar["options"]["soft_tokens"]
    assert torch.isfinite(profiles).all() and (profiles.std(-3) > 0).any()
    assert stored["num_evidence"].shape == profiles.shape[:-1]
    assert np.isfinite(sidecar["heldout_nll"]["own"])


def test_the_rank_says_in_how_many_directions_profiles_differ(small_run, tmp_path):
    _, stored, _ = infer_run(small_run, tmp_path, "--llm", "tiny", "--rank", 3)
    for k in range(2):
        profiles = stored["profiles"][:, k].double()
        sizes = torch.linalg.svdvals(profiles - profiles.mean(0))
        assert sizes[2] > 1e-3 * sizes[0] and sizes[3] < 1e-5 * sizes[0]


def test_reviews_are_evidence_their_first_sentence_only(small_run, tmp_path):
    """Reviews that say what group a user is of; those of test rows, and second sentences, move nothing."""
    interactions = pd.read_parquet(small_run[1] / "interactions.parquet")
    profiles = []
    for poison in ("plain", "poison"):
        run = tmp_path / poison
        run.mkdir()
        for name in ("items", "users"):
            for suffix in (".parquet", ".parquet.json"):
                (run / f"{name}{suffix}").write_bytes((small_run[1] / f"{name}{suffix}").read_bytes())
        text = (np.where(interactions["user"] % 2, "I race all day. ", "I cook all day. ").astype(object)
                + poison)
        text[(interactions["split"] == "test").to_numpy()] = poison
        options = argparse.Namespace(run_dir=str(run), seed=0)
        common.write_artifact(options, "interactions.parquet", interactions.assign(review=text))
        printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--evidence", "review",
                            "--tiny-steps", 6, "--shared-steps", 4, "--map-steps", 4, "--heldout", 60)
        profiles.append((run / "profiles.pt").read_bytes())
    assert profiles[0] == profiles[1] and "field weights: review" in printed
    line = infer_run(small_run, tmp_path, "--evidence", "review", "--llm", "tiny", ok=False)
    assert "holds no reviews" in line and "--evidence items" in line


def test_new_users_get_the_bits_that_the_run_would_give_them(tmp_path):
    """Cold users of the run come again, later and alone: same profiles, same codes; others are told apart."""
    from conftest import SMALL, run_pipeline, write_table

    write_table(tmp_path / "raw")
    run = tmp_path / "run"
    run_pipeline(run, tmp_path / "raw", stages=1, split=["cold-user"])
    for script in list(SMALL)[:2]:
        codes = ["--codes", 2, 2, 2] if script.startswith("03") else []
        run_stage(script, "--run-dir", run, *SMALL[script], *codes, *["--ratings"] * script.startswith("02"))
    options = argparse.Namespace(run_dir=str(run))
    rows, items, users, stored, bank = common.read_artifacts(
        options, "interactions.parquet", "items.parquet", "users.parquet", "profiles.pt",
        "feature_bank.parquet")
    rows = rows[rows["split"] == "support"].sample(frac=1, random_state=0)
    table = pd.DataFrame({"user_id": users["user_id"].to_numpy()[rows["user"]], "rating": rows["rating"],
                          "item_id": items["item_id"].to_numpy()[rows["item"]]})
    cold = users[users["user"].isin(rows["user"])]
    for chosen in (cold["user_id"], cold["user_id"].iloc[2:3]):
        file = tmp_path / f"new{len(chosen)}.csv"
        stranger = pd.DataFrame({"user_id": ["zz"], "item_id": ["no such item"], "rating": [3]})
        pd.concat([table[table["user_id"].isin(chosen)], stranger]).to_csv(file, index=False)
        told = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file)
        assert f"{len(chosen) + 1} new users, {len(chosen)} of them with evidence" in told
        assert "1 of " in told and "does not know, the first of them 'no such item'" in told
        assert "ratings=none" not in told  # nor any other option that the run may have had otherwise
        run_stage("03_quantize.py", "--run-dir", run, "--apply")
        new, codes = common.read_artifacts(options, "new_profiles.pt", "new_codes.parquet")
        place = users.set_index("user_id")["user"].reindex(new["user_id"][:-1]).to_numpy().astype(int)
        assert new["user_id"][-1] == "zz" and len(place) == len(chosen)
        assert torch.equal(new["profiles"][:-1], stored["profiles"][-1][place])
        assert (codes[stored["names"]].to_numpy()[:-1] == bank[stored["names"]].to_numpy()[place]).all()
        assert codes[stored["names"]].to_numpy()[-1].tolist() == [2, 2, 2]
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", tmp_path / "none.csv",
                     ok=False)
    assert "--only-users" in line and "user_id, item_id" in line
    table.drop(columns="rating").to_csv(file, index=False)
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
    assert "no column rating" in line
    table.assign(user_id=["", *table["user_id"].iloc[1:]]).to_csv(file, index=False)
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
    assert f"1 of {len(table)} rows have no user_id" in line
    for strange in ("good", ""):
        table.assign(rating=[*table["rating"].iloc[1:], strange]).to_csv(file, index=False)
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert f"1 of {len(table)} rows have no number as rating, the first of them {strange!r}" in line
    for empty in ("", "user_id,item_id,rating\n"):
        file.write_text(empty)
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert str(file) in line and "it holds no rows" in line and "user_id, item_id" in line
    path = run / "profiles.pt.json"
    whole = path.read_text()
    for key, value, told in (("prior", "codebook.pt", "--prior"),
                             ("evidence", "review", "--evidence review")):
        sidecar = json.loads(whole)
        sidecar["options"][key] = value
        path.write_text(json.dumps(sidecar))
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert told in line and "2 and 3 without it" in line


@pytest.mark.parametrize("options", [("--evidence", "items"), ("--evidence", "history", "--start", "random")],
                         ids=lambda options: options[1])
def test_new_users_by_gradient_get_what_the_run_gives_them(small_run, tmp_path, options):
    """Three users of the run come again: from θ̄ the same profiles, from a random start others."""
    infer_run(small_run, tmp_path, "--method", "gradient", *options, "--stop", "none", "--steps", 4, "--llm",
              save_llm(tmp_path / "llm", "gpt2"))
    run = tmp_path / "run"
    read = argparse.Namespace(run_dir=str(run))
    rows, items, users, stored = common.read_artifacts(read, "interactions.parquet", "items.parquet",
                                                       "users.parquet", "profiles.pt")
    rows = rows[(rows["split"] == "train") & (rows["user"] < 3)]
    table = pd.DataFrame({"user_id": users["user_id"].to_numpy()[rows["user"]],
                          "item_id": items["item_id"].to_numpy()[rows["item"]]})
    stranger = pd.DataFrame({"user_id": ["zz"], "item_id": ["no such item"]})
    found = []
    for chosen in (range(3), [1]):
        mine = table["user_id"].isin(users["user_id"].iloc[list(chosen)])
        pd.concat([stranger, table[mine]]).to_csv(tmp_path / "new.csv", index=False)
        told = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", tmp_path / "new.csv")
        assert f"{len(chosen) + 1} new users, {len(chosen)} of them with evidence" in told
        (new,) = common.read_artifacts(read, "new_profiles.pt")
        assert new["user_id"] == [*users["user_id"].iloc[list(chosen)], "zz"]
        assert torch.equal(new["num_evidence"][:-1], stored["num_evidence"][list(chosen)])
        assert torch.equal(new["profiles"][-1], stored["shared"])
        found.append(new["profiles"][:-1])
    assert torch.equal(found[0][1], found[1][0])  # the same bits in any company
    moved = (found[0] - stored["shared"]).norm()
    distance = (found[0] - stored["profiles"][:3]).norm() / moved
    assert moved > 0.1 and (distance > 0.5 if "random" in options else distance < 1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_the_tiny_llm_takes_any_number_of_steps(tmp_path, num_steps):
    histories = [[" red racer 1.", " iron skillet 2."], [" café racer 3."]]
    curve = infer.pretrain_tiny(tmp_path, histories, NAME_TEXTS, TASK_TEXT, num_steps, 0)
    assert len(curve) == num_steps and np.isfinite(curve).all()
    assert common.load_llm(argparse.Namespace(run_dir=""), str(tmp_path))[0].config.n_layer == 4


def test_rounds_of_em_never_raise_the_objective(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    infer_run(small_run, tmp_path, "--llm", llm)
    run = tmp_path / "run"
    run_stage("03_quantize.py", "--run-dir", run, *("--codes", 2, 3, "--epochs", 2))
    totals = []
    for _ in range(2):
        printed, stored, sidecar = infer_run(small_run, tmp_path, "--llm", llm,
                                             "--prior", run / "codebook.pt")
        line = next(line for line in printed.splitlines() if line.startswith("objective"))
        before, after = (float(part.split(" = ")[1].split()[0].rstrip(";")) for part in line.split("after"))
        assert after <= before and sum(sidecar["objective"]) == pytest.approx(after, abs=1e-3)
        totals += [before, after]
        told = run_stage("03_quantize.py", "--run-dir", run)
        for line in told.splitlines():
            if "quantization loss" in line:
                first, second = (float(part.split()[0]) for part in line.split("loss ")[1].split("-> "))
                assert second <= first
    assert totals == sorted(totals, reverse=True)
    codes = pd.read_parquet(run / "feature_bank.parquet")
    assert set(codes["hobby"]) <= {0, 1} and set(codes["background"]) <= {0, 1, 2}
    assert "between seeds" not in told  # nothing is trained in a round
    for options in (["--rec-weight", 0], ["--released"], ["--codebook", "ema"]):
        line = run_stage("03_quantize.py", "--run-dir", run, *options, ok=False)
        assert options[0] in line and "--prior" in line
    line = infer_run(small_run, tmp_path, "--llm", llm, "--prior", tmp_path / "other.pt", ok=False)
    assert "--prior" in line and "codebook.pt" in line


def test_a_prior_that_is_not_there_is_named_before_a_llm_is_loaded(small_run, tmp_path):
    prior = shutil.copytree(small_run[1], tmp_path / "run") / "codebook.pt"
    prior.unlink()
    line = infer_run(small_run, tmp_path, "--llm", "./none", "--prior", prior, ok=False)
    assert "codebook.pt is missing" in line and "python 03_quantize.py" in line


def test_a_saved_llm_of_either_architecture_runs(small_run, tmp_path, llm_folder):
    """GPT-2 and Llama, each saved to a folder with its tokenizer, as users have them."""
    before = {path.name: common.sha256_of(path) for path in llm_folder.iterdir()}
    printed, stored, _ = infer_run(small_run, tmp_path, "--llm", llm_folder)
    assert stored["profiles"].shape == (60, 2, 32) and stored["llm"] == str(llm_folder)
    assert before == {path.name: common.sha256_of(path) for path in llm_folder.iterdir()}
    assert "own - shuffled" in printed


def test_task_text_route_and_names_move_the_profiles(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    base = infer_run(small_run, tmp_path, "--llm", llm)[1]["profiles"]
    for options in (("--task-text", "a job"), ("--route", "none"), ("--route", "title", "price"),
                    ("--field-weights", "none"), ("--pull", 500), ("--mask", "causal"), ("--init", "names"),
                    ("--init", "vocab"),
                    ("--profiles", "hobby=This user's hobby is", "job=her job is"), ("--seed", 1)):
        profiles = infer_run(small_run, tmp_path, "--llm", llm, *options)[1]["profiles"]
        assert not torch.equal(profiles, base), options


def test_auto_says_which_llm_and_why_within_seconds(monkeypatch):
    monkeypatch.setattr(infer, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(infer, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(infer, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert infer.choose_llm()[0] == "gpt2"  # a hub answers: GPT-2 can be fetched
    assert infer.choose_llm()[0] == "tiny"  # nobody listens any more
    only_gpt2 = lambda repository, name: "/cache/x" if repository == "gpt2" else None
    monkeypatch.setattr(infer, "try_to_load_from_cache", only_gpt2)
    assert infer.choose_llm() == ("gpt2", "its weights are on this machine")
    monkeypatch.setattr(infer, "try_to_load_from_cache", lambda repository, name: "/cache/x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert infer.choose_llm()[0] == "meta-llama/Llama-2-7b-hf"


def test_the_score_method_finds_a_planted_hobby(tmp_path):
    """The planted world with a hastily pretrained LLM: stages 1 to 3 still find half of what can be found."""
    run_stage("01_prepare.py", "--run-dir", tmp_path, "--seed", 5)
    run_stage("02_infer_profiles.py", "--run-dir", tmp_path, "--llm", "tiny", "--tiny-steps", 60,
              "--shared-steps", 40, "--map-steps", 5, "--heldout", 200)
    run_stage("03_quantize.py", "--run-dir", tmp_path, "--epochs", 3)
    figures = json.loads((tmp_path / "feature_bank.parquet.json").read_text())
    assert figures["hobby_share_of_bayes"] > 0.5 and figures["background_share_of_bayes"] > 0.5
    assert abs(figures["hobby_vs_true_background"]) < 0.05 and abs(figures["background_vs_true_hobby"]) < 0.05


# --- bad input ------------------------------------------------------------------------------------------


def test_a_folder_without_weights_or_tokenizer(small_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no tokenizer" in infer_run(small_run, tmp_path, "--llm", empty, ok=False)
    llm = save_llm(tmp_path / "llm", "gpt2")
    (llm / "model.safetensors").unlink()
    line = infer_run(small_run, tmp_path, "--llm", llm, ok=False)
    assert "no weights" in line and "--llm" in line


def test_a_text_longer_than_the_context(llm, capsys):
    prompt = prompt_of(llm)
    long = infer.tokenize(llm[1], [[("title", " racer")], [("title", " red racer" * 200)]])
    line = dies(capsys, prompt.check_context, long.length, "item", "shorten it")
    assert "item 1 needs" in line and "256" in line and "shorten it" in line


@pytest.mark.parametrize("options, complaint", [
    (["--profiles", "hobby"], "NAME=TEXT"), (["--profiles", "a=x", "a=y"], "differ"),
    (["--route", "colour", "price"], "--route"), (["--route", "title"], "--route"),
    (["--task-text", " "], "--task-text"), (["--method", "magic"], "--method"),
    (["--meth", "score"], "--meth"), (["--evidence", "history"], "--method gradient"),
    (["--profiles", "a=likes {brand}"], "--mask causal"), (["--profiles", "a=likes {Brand}"], "{Brand}"),
    (["--pull", "0"], "--pull"), (["--method", "gradient", "--lr", "0"], "--lr"),
    (["--only-users", "x.csv", "--seed", "3"], "--seed"),
    (["--released", "--evidence", "history"], "one item at a time"),
    (["--paper", "--released"], "two recipes"), (["--folds", "1"], "--folds"),
    (["--ratings", "--evidence", "review"], "--ratings"),
    (["--ratings", "--route", "title", "price"], "rating"),
    (["--route", "title", "rating"], "--ratings"), (["--only-users", "x.csv", "--steps", "3"], "--steps")])
def test_options_that_make_no_sense_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.parse_args(options)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_preset_gives_way_to_what_is_typed():
    args = infer.parse_args(["--paper", "--steps", "3"])
    assert args.steps == 3 and args.lr == 0.001 and args.method == "gradient" and args.route == ["none"]


def test_a_missing_predecessor_is_named(tmp_path):
    assert "python 01_prepare.py" in run_stage("02_infer_profiles.py", "--run-dir", tmp_path, ok=False)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["score", "gradient"])
def test_a_llm_in_bfloat16_gives_what_it_gives_in_single_precision(small_run, tmp_path, monkeypatch,
                                                                   architecture, method):
    """As on a GPU, where it is so by default: each dtype meets each other one, and errors stay small."""
    options = ("--llm", save_llm(tmp_path / "llm", architecture), "--method", method, "--start", "shared")
    _, single, of_single = infer_run(small_run, tmp_path / "single", *options)
    load_llm = infer.load_llm
    monkeypatch.setattr(infer, "load_llm", lambda *arguments, **options: (
        (loaded := load_llm(*arguments, **options))[0].bfloat16(), loaded[1]))
    _, half, of_half = infer_run(small_run, tmp_path / "half", *options)
    assert half["profiles"].dtype == torch.float32 and not torch.equal(half["profiles"], single["profiles"])
    for key in ("none", "shared", "own"):
        assert of_half["heldout_nll"][key] == pytest.approx(of_single["heldout_nll"][key], rel=1e-3), key
    moved = (profiles["profiles"] - profiles["shared"] for profiles in (half, single))
    assert torch.nn.functional.cosine_similarity(*(m.flatten() for m in moved), dim=0) > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_llm_is_bfloat16_and_the_profiles_float32(small_run, tmp_path):
    _, stored, _ = infer_run(small_run, tmp_path, "--llm", save_llm(tmp_path / "llm", "llama"))
    assert stored["profiles"].dtype == torch.float32 and torch.isfinite(stored["profiles"]).all()
