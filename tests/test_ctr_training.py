"""Models trained side by side: each is the one trained alone; Adam, penalty, start, dropout, batches."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from common import logloss
from userip import ctr_training
from userip.ctr_models import MODELS, build
from userip.ctr_training import Member, Rows, Stack, train_stack


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings(**changes):
    return SimpleNamespace(**dict(field_dim=4, layers=3, hidden=[6, 4], dropout=0.2, id_dropout=0.0,
                                  batch_size=64, epochs=3, patience=9) | changes)


def pairwise_rows(batch=6000, num_sets=1, seed=0, noise=0.0):
    """Labels that no single field explains: sign of a product of factors of two fields; a third is noise."""
    rng = np.random.default_rng(seed)
    sizes = [13, 12, 4]
    factor = [rng.choice([-1.0, 1.0], size=13) for _ in range(2)]
    ids = np.stack([rng.integers(size - (size == 13), size=batch) for size in sizes], 1)
    label = factor[0][ids[:, 0]] * factor[1][ids[:, 1]] > 0
    label = np.where(rng.random(batch) < noise, ~label, label).astype(np.int8)
    sets = [ids.copy() for _ in range(num_sets)]
    for other in sets[1:]:  # the other sets differ in the third field
        other[:, 2] = rng.integers(4, size=batch)
    parts = np.split(np.arange(batch), [batch * 8 // 10, batch * 9 // 10])
    parts = dict(zip(("train", "valid", "test"), parts))
    rows = torch.from_numpy(np.stack(sets) + [0, 13, 25])
    return Rows({name: rows[:, part] for name, part in parts.items()},
                {name: label[part] for name, part in parts.items()}, [29] * num_sets, unknown=12)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_of_a_stack_is_the_one_trained_alone(name, double):
    """To 1e-6, in figures, parameters and predictions, dropout and all, also when others stop before it."""
    rows, args = pairwise_rows(900, num_sets=2, noise=0.2), settings(epochs=4, patience=1, id_dropout=0.1)
    members = [Member(0, 3, 0.01, 1e-3), Member(1, 3, 0.05, 0.0), Member(0, 5, 0.5, 1e-3),
               Member(1, 5, 0.002, 1e-2)]
    figures, stack = train_stack(args, name, members, rows)
    together = stack.predict(rows, "test")
    for place, member in enumerate(members):
        (alone,), single = train_stack(args, name, [member], rows)
        assert figures[place]["valid_logloss"] == pytest.approx(alone["valid_logloss"], abs=1e-6)
        assert figures[place]["best_epoch"] == alone["best_epoch"]
        assert single.predict(rows, "test")[0] == pytest.approx(together[place], abs=1e-6)
        assert torch.allclose(single.state["flat"][0], stack.state["flat"][place], atol=1e-6)
    assert len({figure["valid_logloss"] for figure in figures}) == 4


def test_a_member_that_is_done_stays_so_among_compiled_companions(double, monkeypatch):
    """They keep it in the stack, but no later epoch may become its best. (Nothing is compiled here.)"""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ctr_training._functions.cache_clear()
    rows, args = pairwise_rows(900, noise=0.2), settings(epochs=9, patience=1)
    members = [Member(0, seed, lr, 1e-3) for seed in range(3) for lr in (0.005, 0.05, 0.3)]
    figures, stack = train_stack(args, "dcn", members, rows, is_compiled=True)
    expected, apart = train_stack(args, "dcn", members, rows)
    ctr_training._functions.cache_clear()
    assert [one["best_epoch"] for one in figures] == [one["best_epoch"] for one in expected]
    assert torch.allclose(stack.state["flat"], apart.state["flat"], atol=1e-6)


@pytest.mark.parametrize("name", ["dcn", "afn", "ffm"])
def test_a_step_is_that_of_torchs_adam_when_the_batch_meets_every_row(name, double):
    """Plain autograd, torch.optim.Adam with a penalty on the table; an id twice in a batch counts twice."""
    rows, member = pairwise_rows(500), Member(0, 3, 0.02, 1e-2)
    args = settings(batch_size=400, epochs=6, dropout=0.0, patience=99)
    figures, stack = train_stack(args, name, [member], rows)
    start = Stack((name, 3, 4, 3, (6, 4), ()), [member], rows, args.batch_size)
    torch.manual_seed(3)
    model = build(name, 3, 4, 3, (6, 4))
    table = start.state["table"][0, :, :model.width].clone().requires_grad_()
    groups = [{"params": [table], "weight_decay": 1e-2}, {"params": list(model.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=0.02)
    label = torch.from_numpy(rows.labels["train"]).double()
    assert len(rows.ids["train"][0].unique()) == 28  # all but the unknown user
    table.data[12] = 0.0  # whom Adam would shrink; here the row does not move
    for _ in range(figures[0]["best_epoch"]):
        model.train()
        optimizer.zero_grad()
        logit = model(table[rows.ids["train"][0]])
        torch.nn.functional.binary_cross_entropy_with_logits(logit, label).backward()
        optimizer.step()
        model.eval()
    expected = model(table[rows.ids["test"][0]]).sigmoid()
    assert figures[0]["best_epoch"] > 1 or name == "afn"
    assert stack.predict(rows, "test")[0] == pytest.approx(expected.tolist(), abs=1e-9)


def test_an_id_starts_the_larger_the_more_train_rows_have_it():
    train = torch.cat([torch.full((count,), k) for k, count in enumerate((0, 5, 100, 20_000))])
    rows = Rows({"train": train[None, :, None]}, {}, [4])
    members = [Member(0, 0, 0.1, 0.0), Member(0, 0, 0.1, 0.0, start=0.1)]
    stack = Stack(("autoint", 1, 500, 1, (6, 4), ()), members, rows, 64)
    for table, start in zip(stack.state["table"], (0.5, 0.1)):
        deviation = table[:, :500].std(1).tolist()
        assert deviation == pytest.approx([0, start * 5 / 105, start / 2, start * 20_000 / 20_100], rel=0.1)
    assert not stack.state["table"][..., 500:].any()  # Adam's averages


def test_the_penalty_of_an_id_is_as_many_times_as_large_as_steps_pass_between_its_batches():
    """As many times the penalty as batches pass between two that meet the row, 1 at least."""
    train = torch.cat([torch.full((count,), k) for k, count in enumerate((0, 5, 100, 895))])
    rows = Rows({"train": train[None, :, None]}, {}, [4])
    member = Member(0, 0, 0.1, 1e-2)
    interval = lambda size: Stack(("autoint", 1, 8, 1, (6, 4), ()), [member], rows,
                                  size).state["interval"][0]
    assert interval(50).tolist() == pytest.approx([1, 1000 / (5 * 50), 1, 1])
    assert interval(5).tolist() == pytest.approx([1, 40, 2, 1])


def test_the_penalty_of_a_single_step_is_the_rows_own(double):
    """One batch of one Adam step: torch.optim.Adam with a group per row, its penalty times its interval."""
    rows, member = pairwise_rows(300), Member(0, 3, 0.02, 1e-2)
    start = Stack(("dcn", 3, 4, 3, (6, 4), ()), [member], rows, batch_size=8)
    table = start.state["table"][0, :, :4].clone()
    interval = start.state["interval"][0]
    assert (interval > 1).any()
    torch.manual_seed(3)
    model = build("dcn", 3, 4, 3, (6, 4))
    leaves = [row.clone().requires_grad_() for row in table]
    optimizer = torch.optim.Adam([{"params": [row], "weight_decay": 1e-2 * float(times)}
                                  for row, times in zip(leaves, interval)], lr=0.02)
    ids, label = rows.ids["train"][0, :8], torch.from_numpy(rows.labels["train"][:8]).double()
    torch.nn.functional.binary_cross_entropy_with_logits(model(torch.stack(leaves)[ids]), label).backward()
    met = ids.unique()
    for k in range(len(leaves)):
        if k not in met:
            leaves[k].grad = None
    optimizer.step()
    with torch.no_grad():
        start.train_step(ids[None], torch.ones(1, 8, 10, dtype=torch.bool), label[None])
    assert torch.allclose(start.state["table"][0, :, :4], torch.stack(leaves).detach(), atol=1e-9)


def test_only_rows_of_the_batch_move():
    rows = pairwise_rows(300)
    ids = {key: part.clone() for key, part in rows.ids.items()}
    ids["train"][..., 0].clamp_(max=5)  # users 6 to 11 are in no train row
    rows = rows._replace(ids=ids)
    member = Member(0, 0, 0.05, 0.1)
    before = Stack(("dcn", 3, 4, 3, (6, 4), ()), [member], rows, 64).state["table"]
    _, stack = train_stack(settings(), "dcn", [member], rows)
    moved = (stack.state["table"] != before)[0].any(1)
    assert not moved[6:13].any() and moved[:6].all() and moved[13:].all()


def test_id_dropout_shows_the_unknown_id_to_training_only_and_spares_the_rows(monkeypatch):
    rows, seen = pairwise_rows(3000), []
    before = rows.ids["train"].clone()
    step = Stack.train_step
    record = lambda self, ids, *inputs: seen.append(ids) or step(self, ids, *inputs)
    monkeypatch.setattr(Stack, "train_step", record)
    for share in (0.0, 0.3):
        seen.clear()
        train_stack(settings(id_dropout=share, epochs=2), "dcn", [Member(0, 0, 0.01, 0.0)], rows)
        met = torch.cat(seen, 1)
        assert float((met[..., 0] == 12).float().mean()) == pytest.approx(share, abs=0.03)
        assert (met[..., 1:] != 12).all()
    assert torch.equal(rows.ids["train"], before)


def test_every_row_is_met_once_an_epoch_in_an_order_of_the_seed(monkeypatch):
    rows, seen = pairwise_rows(500), []
    rows = rows._replace(ids=rows.ids | {"train": torch.arange(400)[None, :, None]}, num_rows=[400])
    rows = rows._replace(ids={key: part[..., :1] % 400 for key, part in rows.ids.items()})
    step = Stack.train_step
    record = lambda self, ids, *inputs: seen.append(ids) or step(self, ids, *inputs)
    monkeypatch.setattr(Stack, "train_step", record)
    members = [Member(0, 0, 0.01, 0.0), Member(0, 1, 0.01, 0.0), Member(0, 0, 0.1, 0.0)]
    train_stack(settings(epochs=2), "autoint", members, rows)
    met = torch.cat(seen, 1)[..., 0]  # [G, 2 · 400]
    assert torch.equal(met[0], met[2]) and not torch.equal(met[0], met[1])
    for epoch in met.split(400, 1):
        assert torch.equal(epoch.sort(1)[0], torch.arange(400).expand(3, -1))
    assert not torch.equal(met[0, :400], met[0, 400:])


@pytest.mark.parametrize("name", MODELS)
def test_model_learns_a_planted_interaction_and_none_beats_the_bayes_rate(name):
    """AUC above .9 where the true one is 1; with a fifth of the labels flipped, logloss above the entropy."""
    args = settings(epochs=30, patience=6, batch_size=512, field_dim=8, hidden=[16, 16])
    members, rows = [Member(0, 0, 0.02, 1e-3)], pairwise_rows()
    _, stack = train_stack(args, name, members, rows)
    assert roc_auc_score(rows.labels["test"], stack.predict(rows, "test")[0]) > 0.9
    noisy = pairwise_rows(noise=0.2)
    _, stack = train_stack(args, name, members, noisy)
    label, probability = noisy.labels["test"], stack.predict(noisy, "test")[0]
    chance = 3 * np.sqrt(0.2 * 0.8 / len(label))  # three standard errors of the test rows' own draw
    assert roc_auc_score(label, probability) < 0.8 + chance
    entropy = -0.2 * np.log(0.2) - 0.8 * np.log(0.8)
    assert logloss(label, probability) > entropy - chance * np.log(4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_is_the_step():
    """In double precision: in single, Adam turns the last bit of a small gradient into a step of its own."""
    rows, args = pairwise_rows(400), settings(epochs=2, hidden=[4])
    members = [Member(0, 3, 0.01, 1e-3), Member(0, 4, 0.05, 0.0)]
    torch.set_default_dtype(torch.float64)
    try:
        figures, stack = train_stack(args, "pnn", members, rows)
        compiled, other = train_stack(args, "pnn", members, rows, is_compiled=True)
        assert stack.state["table"].dtype == stack.state["flat"].dtype == torch.float64
        for one, two in zip(figures, compiled):
            assert two == pytest.approx(one, abs=1e-9)
        assert other.predict(rows, "test") == pytest.approx(stack.predict(rows, "test"), abs=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)
