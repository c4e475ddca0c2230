"""Every click-through model against its formula in plain loops, its identities, gradients and training."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import ctr_models
from common import logloss
from ctr_models import MODELS, Member, Rows, Stack, train_stack

SIZES = [7, 5, 4, 3]
SETTINGS = dict(field_dim=4, num_layers=3, hidden=(6, 4))
E, PAIRS = 4, list(itertools.combinations(range(len(SIZES)), 2))


def build(name, num_fields=len(SIZES)):
    """A model in double precision and evaluation mode, all of whose parameters and statistics are drawn."""
    torch.manual_seed(0)
    model = MODELS[name](num_fields, **SETTINGS).double().eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in key else torch.randn_like(value))
    return model


def rows_for(model, batch=9, num_fields=len(SIZES)):
    """Rows of an embedding table, drawn [B, F, W]"""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, num_fields, model.width, dtype=torch.double, generator=generator)


# --- the formulas, a number at a time --------------------------------------------------------------------


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def affine(layer, x):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + offset for row, offset in zip(layer.weight.tolist(), bias)]


def relu(x):
    return [max(0.0, value) for value in x]


def deep(mlp, x):
    return relu(affine(mlp.layers[1], relu(affine(mlp.layers[0], x))))


def concat(vectors):
    return [value for vector in vectors for value in vector]


def softmax(x):
    powers = [np.exp(value - max(x)) for value in x]
    return [power / sum(powers) for power in powers]


def first_order(e, factors=(1.0,) * len(SIZES)):
    return sum(x[-1] * factor for x, factor in zip(e, factors))


def attend(layer, e):
    """Two heads of width 2 over the fields e, residual, ReLU."""
    parts = layer.query, layer.key, layer.value, layer.residual
    q, k, v, r = ([affine(part, x) for x in e] for part in parts)
    out = []
    for field in range(len(e)):
        joined = []
        for head in (slice(0, 2), slice(2, 4)):
            a = softmax([dot(q[field][head], k[other][head]) for other in range(len(e))])
            joined += [sum(a[other] * v[other][head][d] for other in range(len(e))) for d in range(2)]
        out.append(relu([x + y for x, y in zip(joined, r[field])]))
    return out


def naive_ffm(m, e):
    part = lambda f, partner: e[f][E * partner:E * partner + E]
    return m.bias.item() + first_order(e) + sum(dot(part(p, q), part(q, p)) for p, q in PAIRS)


def naive_afm(m, rows):
    e = [x[:E] for x in rows]
    products = [[x * y for x, y in zip(e[p], e[q])] for p, q in PAIRS]
    a = softmax([affine(m.score, relu(affine(m.attention, product)))[0] for product in products])
    pooled = [sum(weight * product[d] for weight, product in zip(a, products)) for d in range(E)]
    return m.bias.item() + first_order(rows) + affine(m.head, pooled)[0]


def naive_deepfm(m, rows):
    e = [x[:E] for x in rows]
    products = sum(dot(e[p], e[q]) for p, q in PAIRS)
    return m.bias.item() + first_order(rows) + products + affine(m.head, deep(m.mlp, concat(e)))[0]


def naive_fibinet(m, rows):
    e = [x[:E] for x in rows]
    a = relu(affine(m.excite, relu(affine(m.squeeze, [sum(x) / E for x in e]))))
    v = [[factor * value for value in x] for factor, x in zip(a, e)]
    pairs = [[x * y for x, y in zip(affine(layer, z[p]), z[q])] for layer, z in zip(m.bilinear, (e, v))
             for p, q in PAIRS]
    return first_order(rows) + affine(m.head, deep(m.mlp, concat(pairs)))[0]


def naive_difm(m, rows):
    e = [x[:E] for x in rows]
    vectors = affine(m.from_vectors, concat(attend(m.attention, e)))
    factors = [x + y for x, y in zip(vectors, affine(m.from_bits, deep(m.mlp, concat(e))))]
    pairs = sum(factors[p] * factors[q] * dot(e[p], e[q]) for p, q in PAIRS)
    return m.bias.item() + first_order(rows, factors) + pairs


def naive_afn(m, e):
    norm = lambda layer, j, x: (x - float(layer.running_mean[j])) / np.sqrt(
        float(layer.running_var[j]) + layer.eps) * float(layer.weight[j]) + float(layer.bias[j])
    u = []
    for j in range(SETTINGS["hidden"][0]):
        for d in range(E):
            logs = [np.log(max(abs(x[d]), m.smallest)) for x in e]
            power = dot(m.powers.weight[j], logs)
            u.append(norm(m.behind, j, np.exp(norm(m.before, j, power))))
    return affine(m.head, deep(m.mlp, u))[0]


def naive_autoint(m, e):
    for layer in m.layers:
        e = attend(layer, e)
    return affine(m.head, concat(e))[0]


def naive_onn(m, e):
    part = lambda f, partner: e[f][E * partner:E * partner + E]
    products = [dot(part(p, q), part(q, p)) for p, q in PAIRS]
    return affine(m.head, deep(m.mlp, concat(part(f, f) for f in range(len(e))) + products))[0]


def naive_pnn(m, e):
    return affine(m.head, deep(m.mlp, concat(e) + [dot(e[p], e[q]) for p, q in PAIRS]))[0]


def naive_dcnv2(m, e):
    x_0 = x = concat(e)
    for layer in m.layers:
        x = [start * step + value for start, step, value in zip(x_0, affine(layer, x), x)]
    return affine(m.head, x + deep(m.mlp, x_0))[0]


def naive_dcn(m, e):
    x_0 = x = concat(e)
    for weight, bias in zip(m.net.weights.tolist(), m.net.biases.tolist()):
        x = [start * dot(weight, x) + b + value for start, b, value in zip(x_0, bias, x)]
    return affine(m.net.head, x + deep(m.net.mlp, x_0))[0]


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_a_naive_loop(name):
    model = build(name)
    rows = rows_for(model)
    with torch.no_grad():
        found = model(rows).tolist()
    expected = [globals()[f"naive_{name}"](model, e) for e in rows.tolist()]
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def wake(model):
    """No ReLU is dead."""
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            part.weight.data *= 0.1
            torch.nn.init.ones_(part.bias)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter_and_every_number_of_a_row(name):
    model = build(name)
    wake(model)
    if name == "fibinet":
        model.squeeze.weight.data.abs_(), model.excite.weight.data.abs_()
    rows = rows_for(model, 60).requires_grad_()
    model(rows).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    unused = rows.grad.abs().sum(0) == 0  # [F, W]
    if name == "ffm":  # an id's embedding for its own field has no partner
        for field in range(len(SIZES)):
            assert unused[field, E * field:E * field + E].all()
            unused[field, E * field:E * field + E] = False
    assert not unused.any()


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_an_argument_and_reaches_every_unit(name):
    model = build(name)
    wake(model)
    rows = rows_for(model, 40)
    ones = torch.ones(40, model.num_units, dtype=torch.double)
    assert torch.equal(model(rows), model(rows)) and torch.allclose(model(rows, ones), model(rows))
    for unit in range(model.num_units):
        keep = ones.clone()
        keep[:, unit] = 0
        assert not torch.equal(model(rows, keep), model(rows, ones))


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_see_each_other_at_evaluation(name):
    model = build(name)
    rows = rows_for(model)
    assert torch.allclose(model(rows)[3], model(rows[3:4])[0], atol=1e-12)


def test_dcnv2_with_equal_rows_and_no_bias_is_dcn():
    dcn, v2 = build("dcn"), build("dcnv2")
    torch.nn.init.zeros_(dcn.net.biases)
    for layer, weight in zip(v2.layers, dcn.net.weights):
        layer.weight.data = weight.detach().expand(16, 16).clone()  # W = 1 wᵀ
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(5, 16, dtype=torch.double)
    assert torch.allclose(v2.cross(x), dcn.net.cross(x), atol=1e-12)


def test_pnn_of_two_fields_without_its_mlp_is_the_dot_product_of_matrix_factorisation():
    user, item = torch.randn(2, 9, 4)
    found = ctr_models.inner_products(torch.stack([user, item], 1))
    assert torch.allclose(found[:, 0], (user * item).sum(1)) and found.shape == (9, 1)


def test_onn_with_equal_copies_is_pnn():
    onn, pnn = build("onn"), build("pnn")
    onn.load_state_dict(pnn.state_dict())
    rows = rows_for(pnn)
    assert torch.allclose(onn(rows.repeat(1, 1, 4)), pnn(rows), atol=1e-12)


def test_ffm_with_equal_copies_is_the_dot_products_of_a_factorisation_machine():
    ffm, deepfm = build("ffm"), build("deepfm")
    ffm.bias.data = deepfm.bias.data
    torch.nn.init.zeros_(deepfm.head.weight)
    rows = rows_for(deepfm)
    copies = torch.cat([rows[..., :E].repeat(1, 1, 4), rows[..., E:]], 2)
    assert torch.allclose(ffm(copies), deepfm(rows), atol=1e-10)


def test_afm_with_even_attention_is_the_mean_over_pairs():
    model = build("afm")
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.ones_(model.head.weight)
    rows = rows_for(model)
    pairs = ctr_models.inner_products(rows[..., :E]).mean(1)
    assert torch.allclose(model(rows), model.bias + rows[..., E].sum(1) + pairs, atol=1e-10)


def test_dcn_without_weights_is_the_identity():
    model = build("dcn")
    torch.nn.init.zeros_(model.net.weights), torch.nn.init.zeros_(model.net.biases)
    x = torch.randn(5, 16, dtype=torch.double)
    assert torch.equal(model.net.cross(x), x)


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_mapped_linearly_to_the_last_fields(name):
    model = ctr_models.build(name, len(SIZES), **SETTINGS, dims=(5, 3)).double().eval()
    rows, vectors = rows_for(model, num_fields=2), torch.randn(9, 8, dtype=torch.double)
    more = [model.maps[0](vectors[:, :5]), model.maps[1](vectors[:, 5:])]
    assert torch.equal(model(rows, None, vectors), model.model(torch.cat([rows, torch.stack(more, 1)], 1)))


# --- training: many side by side -------------------------------------------------------------------------


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
    members = [Member(0, 3, 0.01, 1e-3, 0.0), Member(1, 3, 0.05, 0.0, 1e-3), Member(0, 5, 0.5, 1e-3, 0.0),
               Member(1, 5, 0.002, 1e-2, 1e-2)]
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
    ctr_models.functions_of.cache_clear()
    rows, args = pairwise_rows(900, noise=0.2), settings(epochs=9, patience=1)
    members = [Member(0, seed, lr, 1e-3, 0.0) for seed in range(3) for lr in (0.005, 0.05, 0.3)]
    figures, stack = train_stack(args, "dcn", members, rows, is_compiled=True)
    expected, apart = train_stack(args, "dcn", members, rows)
    ctr_models.functions_of.cache_clear()
    assert [one["best_epoch"] for one in figures] == [one["best_epoch"] for one in expected]
    assert torch.allclose(stack.state["flat"], apart.state["flat"], atol=1e-6)


@pytest.mark.parametrize("name", ["dcn", "afn", "ffm"])
def test_a_step_is_that_of_torchs_adam_when_the_batch_meets_every_row(name, double):
    """Plain autograd, torch.optim.Adam with two groups of penalties; an id twice in a batch counts twice."""
    rows, member = pairwise_rows(500), Member(0, 3, 0.02, 1e-2, 1e-3)
    args = settings(batch_size=400, epochs=6, dropout=0.0, patience=99)
    figures, stack = train_stack(args, name, [member], rows)
    start = Stack((name, 3, 4, 3, (6, 4), ()), [member], rows, args.batch_size)
    torch.manual_seed(3)
    model = ctr_models.build(name, 3, 4, 3, (6, 4))
    table = start.state["table"][0, :, :model.width].clone().requires_grad_()
    groups = [{"params": [table], "weight_decay": 1e-2},
              {"params": list(model.parameters()), "weight_decay": 1e-3}]
    optimizer = torch.optim.Adam(groups, lr=0.02)
    label = torch.from_numpy(rows.labels["train"]).double()
    assert len(rows.ids["train"][0].unique()) == 28  # all but the unknown user
    table.data[12] = 0.0  # whom Adam would shrink, and who rests here
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
    members = [Member(0, 0, 0.1, 0.0, 0.0), Member(0, 0, 0.1, 0.0, 0.0, start=0.1)]
    stack = Stack(("autoint", 1, 500, 1, (6, 4), ()), members, rows, 64)
    for table, start in zip(stack.state["table"], (0.5, 0.1)):
        deviation = table[:, :500].std(1).tolist()
        assert deviation == pytest.approx([0, start * 5 / 105, start / 2, start * 20_000 / 20_100], rel=0.1)
    assert not stack.state["table"][..., 500:].any()  # Adam's averages


def test_a_row_that_rests_pays_its_penalty_when_it_is_met():
    """As many times the penalty as batches pass between two that meet the row, 1 at least."""
    train = torch.cat([torch.full((count,), k) for k, count in enumerate((0, 5, 100, 895))])
    rows = Rows({"train": train[None, :, None]}, {}, [4])
    member = Member(0, 0, 0.1, 1e-2, 0.0)
    rest = lambda size: Stack(("autoint", 1, 8, 1, (6, 4), ()), [member], rows, size).state["rest"][0]
    assert rest(50).tolist() == pytest.approx([1, 1000 / (5 * 50), 1, 1])
    assert rest(5).tolist() == pytest.approx([1, 40, 2, 1])


def test_the_penalty_of_a_single_step_is_the_rows_own(double):
    """One batch of one Adam step: torch.optim.Adam with a group per row, its penalty times its rest."""
    rows, member = pairwise_rows(300), Member(0, 3, 0.02, 1e-2, 0.0)
    start = Stack(("dcn", 3, 4, 3, (6, 4), ()), [member], rows, batch_size=8)
    table = start.state["table"][0, :, :4].clone()
    rest = start.state["rest"][0]
    assert (rest > 1).any()
    torch.manual_seed(3)
    model = ctr_models.build("dcn", 3, 4, 3, (6, 4))
    leaves = [row.clone().requires_grad_() for row in table]
    optimizer = torch.optim.Adam([{"params": [row], "weight_decay": 1e-2 * float(times)}
                                  for row, times in zip(leaves, rest)], lr=0.02)
    ids, label = rows.ids["train"][0, :8], torch.from_numpy(rows.labels["train"][:8]).double()
    torch.nn.functional.binary_cross_entropy_with_logits(model(torch.stack(leaves)[ids]), label).backward()
    met = ids.unique()
    for k in range(len(leaves)):
        if k not in met:
            leaves[k].grad = None
    optimizer.step()
    with torch.no_grad():
        start.train_step(ids[None], torch.ones(1, 8, 10, dtype=torch.bool), torch.zeros(1, dtype=torch.long),
                         label[None], [], False)
    assert torch.allclose(start.state["table"][0, :, :4], torch.stack(leaves).detach(), atol=1e-9)


def test_only_rows_of_the_batch_move():
    rows = pairwise_rows(300)
    ids = {key: part.clone() for key, part in rows.ids.items()}
    ids["train"][..., 0].clamp_(max=5)  # users 6 to 11 are in no train row
    rows = rows._replace(ids=ids)
    member = Member(0, 0, 0.05, 0.1, 0.0)
    before = Stack(("dcn", 3, 4, 3, (6, 4), ()), [member], rows, 64).state["table"]
    _, stack = train_stack(settings(), "dcn", [member], rows)
    moved = (stack.state["table"] != before)[0].any(1)
    assert not moved[6:13].any() and moved[:6].all() and moved[13:].all()


def test_id_dropout_shows_the_unknown_id_to_training_only_and_spares_the_rows(monkeypatch):
    rows, seen = pairwise_rows(3000), []
    before = rows.ids["train"].clone()
    step = Stack.train_step
    record = lambda self, ids, *rest: seen.append(ids) or step(self, ids, *rest)
    monkeypatch.setattr(Stack, "train_step", record)
    for share in (0.0, 0.3):
        seen.clear()
        train_stack(settings(id_dropout=share, epochs=2), "dcn", [Member(0, 0, 0.01, 0.0, 0.0)], rows)
        met = torch.cat(seen, 1)
        assert float((met[..., 0] == 12).float().mean()) == pytest.approx(share, abs=0.03)
        assert (met[..., 1:] != 12).all()
    assert torch.equal(rows.ids["train"], before)


def test_every_row_is_met_once_an_epoch_in_an_order_of_the_seed(monkeypatch):
    rows, seen = pairwise_rows(500), []
    rows = rows._replace(ids=rows.ids | {"train": torch.arange(400)[None, :, None]}, num_rows=[400])
    rows = rows._replace(ids={key: part[..., :1] % 400 for key, part in rows.ids.items()})
    step = Stack.train_step
    record = lambda self, ids, *rest: seen.append(ids) or step(self, ids, *rest)
    monkeypatch.setattr(Stack, "train_step", record)
    members = [Member(0, 0, 0.01, 0.0, 0.0), Member(0, 1, 0.01, 0.0, 0.0), Member(0, 0, 0.1, 0.0, 0.0)]
    train_stack(settings(epochs=2), "autoint", members, rows)
    met = torch.cat(seen, 1)[..., 0]  # [G, 2 · 400]
    assert torch.equal(met[0], met[2]) and not torch.equal(met[0], met[1])
    for epoch in met.split(400, 1):
        assert torch.equal(epoch.sort(1)[0], torch.arange(400).expand(3, -1))
    assert not torch.equal(met[0, :400], met[0, 400:])


@pytest.mark.parametrize("name", MODELS)
def test_model_learns_a_planted_interaction_and_none_beats_the_bayes_rate(name):
    """AUC above .9 where the true one is 1; with a fifth of the labels flipped, logloss above the entropy."""
    args = settings(epochs=40, patience=40, batch_size=512, field_dim=8, hidden=[16, 16])
    members = [Member(0, 0, 0.01, 1e-3, 0.0)]
    _, stack = train_stack(args, name, members, pairwise_rows())
    assert roc_auc_score(pairwise_rows().labels["test"], stack.predict(pairwise_rows(), "test")[0]) > 0.9
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
    rows, args = pairwise_rows(400), settings(epochs=2)
    members = [Member(0, 3, 0.01, 1e-3, 0.0), Member(0, 4, 0.05, 0.0, 1e-3)]
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
