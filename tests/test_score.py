import pytest
import torch

from llm_cases import events_of, prompt_of, rating_route, routes_for, run_of, soft_for, weights_of
from userip.evidence import FIELDS, Route, tokenize
from userip.score import (audience, centred_scores, field_weights, incidence, project_scores, text_scores,
                          user_steps)


def test_scores_are_the_gradients_of_single_items(llm):
    prompt, weights = prompt_of(llm), weights_of()
    shared = soft_for(prompt, 1)[0]
    for route in routes_for(llm):
        rows = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
        scores = text_scores(prompt, route, rows, shared, weights, 100)
        for place, row in enumerate(rows):
            soft = shared[None].clone().requires_grad_()
            loss = 0.0
            nll = prompt.nll(soft, route.texts.select(row[None]), route.may_read)[0]
            for token in range(len(nll)):
                loss = loss + weights[route.texts.field[row, token]] * nll[token]
            (gradient,) = torch.autograd.grad(-loss, soft)
            assert torch.allclose(scores[place], gradient[0], atol=1e-5)


def test_sums_by_user_equal_a_double_loop_and_have_the_same_bits_in_any_company():
    generator = torch.Generator().manual_seed(0)
    user, row = torch.randint(9, (200,), generator=generator), torch.randint(20, (200,), generator=generator)
    of_row = torch.randn(20, 16, generator=generator)
    sums = lambda user, row, num_users: torch.from_numpy(
        incidence(user, row, (num_users, 20))[0] @ of_row.double().numpy())
    total = sums(user, row, 9)
    expected = torch.zeros(9, 16, dtype=torch.float64)
    for one, text in zip(user, row):
        expected[one] += of_row[text].double()
    assert torch.allclose(total, expected)
    order = torch.randperm(200, generator=generator)
    assert torch.equal(sums(user[order], row[order], 9), total)
    mine = user == 4
    assert torch.equal(sums(torch.zeros_like(user[mine]), row[mine], 1)[0], total[4])
    count, pull, lift = torch.bincount(user).float()[:, None], torch.ones(1), torch.randn(1, 16, 32)
    placed = user_steps(total.float()[:, None], count, pull, lift)
    alone = user_steps(total.float()[4:5, None], count[4:5], pull, lift)
    assert torch.equal(alone[0], placed[4])
    assert torch.allclose(placed[:, 0], (total.float() / (count + 1)) @ lift[0], atol=1e-5)


def test_an_audience_is_all_others_and_a_prior():
    """A double loop: who gave the level is not among the others; strangers meet all of them."""
    count = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    others, strangers = audience(count, weight=2.0)
    prior = [(3 + 1) / (6 + 2), (3 + 1) / (6 + 2)]
    for item in range(3):
        for level in range(2):
            total = float(count[item].sum()) + 2.0
            assert float(strangers[item, level]) == pytest.approx(
                (float(count[item, level]) + 2 * prior[level]) / total)
            if count[item, level]:
                for other in range(2):
                    votes = float(count[item, other]) - (other == level)
                    assert float(others[item, level, other]) == pytest.approx(
                        (votes + 2 * prior[other]) / (total - 1))


def test_ratings_are_centred_by_the_items_audience_and_items_by_popularity(llm):
    """Score by score: left of a rating is its score less the audience's mean; of an item, less all."""
    prompt, weights = prompt_of(llm), weights_of()
    shared = soft_for(prompt, 1)[0]
    route, count = rating_route(llm), torch.tensor([3.0, 1, 0, 2, 0, 0, 1, 1, 0, 0])
    occurs = torch.arange(10) < 8  # nobody had item 4
    texts = torch.arange(10).repeat_interleave(count.long())
    train = events_of([0] * len(texts), (texts // 2).tolist(), (texts % 2).tolist())
    # a cold user had item 2
    own = events_of([0] * (len(texts) + 1), [*(texts // 2).tolist(), 2], [*(texts % 2).tolist(), 0])
    run = run_of(llm, prompt, [route], train, own)
    result = centred_scores(run, route, shared, weights, shrinkage=0.0)
    _, own, strangers, taken, noise = result[1]
    assert set(result) == {1} and taken.tolist() == occurs.tolist()
    score = lambda row: text_scores(prompt, route, torch.tensor([row]), shared, weights, 500)[0, 1]
    others, everyone = audience(count.view(5, 2))
    expected = torch.zeros_like(noise)
    for item in range(4):
        both = torch.stack([score(2 * item), score(2 * item + 1)])
        for level in range(2):
            row = 2 * item + level
            mine = both[level] - others[item, level] @ both
            assert torch.allclose(own[row], mine, atol=1e-5)
            assert torch.allclose(strangers[row], both[level] - everyone[item] @ both, atol=1e-5)
            expected += count[row] / count.sum() * torch.outer(mine, mine)
    assert torch.allclose(noise, expected, atol=1e-6) and own[8:].abs().max() == 0
    (title, _), share = routes_for(llm), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    train = events_of([0] * 10, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    _, own, strangers, _, _ = centred_scores(run_of(llm, prompt, [title], train), title, shared, weights)[0]
    mean = sum(share[row]
               * text_scores(prompt, title, torch.tensor([row]), shared, weights, 500)[0, 0]
               for row in range(4))
    first = text_scores(prompt, title, torch.tensor([0]), shared, weights, 500)[0, 0]
    assert torch.allclose(own[0], first - mean, atol=1e-5) and torch.equal(own, strangers)


def test_field_weights_bring_all_fields_to_the_same_noise(llm):
    prompt, routes = prompt_of(llm), routes_for(llm)
    shared = soft_for(prompt, 1)[0]
    weights = field_weights(run_of(llm, prompt, routes, events_of([0] * 5, range(5))), shared, 512)
    for route in routes:
        for field in route.fields:
            only = torch.zeros(len(FIELDS))
            only[FIELDS.index(field)] = weights[FIELDS.index(field)]
            rows = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
            scores = text_scores(prompt, route, rows, shared, only, 500)
            noise = float((scores - scores.mean(0)).square().sum((1, 2)).mean())
            assert noise == pytest.approx(1, rel=1e-3)


def test_a_field_that_few_texts_have_is_weighed_by_these_and_one_that_tells_nothing_is_left_out(llm, capsys):
    prompt, shared = prompt_of(llm), soft_for(prompt_of(llm), 1)[0]
    brands = [("brand", f" by {name}") for name in ("Acme", "Bolt", "Frugo")]

    def weights_with(texts, num_sample):
        pieces = [[("price", f" costs ${number}"), *texts.get(number, [])] for number in range(40)]
        route = Route(("brand", "price"), torch.tensor([False, True]), 1, pieces, tokenize(llm[1], pieces))
        run = run_of(llm, prompt, [route], events_of([0] * 40, list(range(40))))
        return field_weights(run, shared, num_sample)[[FIELDS.index(name) for name in ("brand", "price")]]

    rare = {number: [brand] for number, brand in zip((5, 20, 33), brands)}
    few, all_texts = weights_with(rare, 3), weights_with(rare, 512)
    assert few[0] == pytest.approx(float(all_texts[0]), rel=1e-4) and 0.2 < few[1] / all_texts[1] < 5
    for texts in ({}, {7: [brands[0]]}):  # no brand, and one
        weights = weights_with(texts, 512)
        assert weights[0] == 0 and weights[1] > 0
        assert "field brand is left out" in capsys.readouterr().out


def test_directions_by_blocks_of_users_are_those_of_the_covariance(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    user, row = torch.randint(60, (500,), generator=generator), torch.randint(30, (500,), generator=generator)
    tables = torch.randn(30, 8, generator=generator)
    is_warm = torch.arange(60) % 5 > 0
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    noise = root @ root.T + torch.eye(8)
    (user_texts, count), found = incidence(user, row, (60, 30)), []
    for block in (7, 2**16):
        monkeypatch.setattr("userip.score.USERS_AT_ONCE", block)
        found.append(project_scores(user_texts, tables, count, noise, is_warm, rank=3))
    values, vectors = torch.linalg.eigh(noise)
    whiten = vectors * values.rsqrt() @ vectors.T
    mine = is_warm & (count > 0)
    sums = torch.from_numpy(user_texts @ tables.double().numpy())
    z = (sums @ whiten / count.clamp(min=1).sqrt()[:, None])[mine]
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[:3]
    for projection, values in found:
        assert torch.allclose(values, eigenvalues)
        assert torch.allclose(torch.cov((z @ torch.linalg.pinv(whiten) @ projection).T),
                              torch.diag(eigenvalues), atol=1e-8)
