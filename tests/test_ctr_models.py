"""Every click-through model against its formula in plain loops, its identities, its gradients."""

import itertools

import numpy as np
import pytest
import torch

import ctr_models
from ctr_models import MODELS

SIZES = [7, 5, 4, 3]
SETTINGS = dict(field_dim=4, num_layers=3, hidden=(6, 4), dropout=0.2)
E, PAIRS = 4, list(itertools.combinations(range(len(SIZES)), 2))


def build(name, sizes=SIZES, **changes):
    """A model in double precision and evaluation mode, all of whose parameters and statistics are drawn."""
    torch.manual_seed(0)
    model = MODELS[name](sizes, **SETTINGS | changes).double().eval()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in key else torch.randn_like(value))
    return model


def ids_for(sizes=SIZES, rows=9, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(size, size=rows) for size in sizes], 1))


# --- the formulas, a number at a time --------------------------------------------------------------------


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b))


def affine(layer, x):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + offset for row, offset in zip(layer.weight.tolist(), bias)]


def relu(x):
    return [max(0.0, value) for value in x]


def deep(mlp, x):
    return relu(affine(mlp[3], relu(affine(mlp[0], x))))


def concat(vectors):
    return [value for vector in vectors for value in vector]


def softmax(x):
    powers = [np.exp(value - max(x)) for value in x]
    return [power / sum(powers) for power in powers]


def first_order(model, row, factors=(1.0,) * len(SIZES)):
    weights = rows_of(model.first_order.weight.table, row)
    return float(model.first_order.bias) + sum(w[0] * m for w, m in zip(weights, factors))


def rows_of(table, row):
    offsets = np.cumsum([0, *SIZES[:-1]])
    return [table.weight[offset + index].tolist() for offset, index in zip(offsets, row)]


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


def naive_ffm(m, e, row):
    part = lambda f, partner: e[f][E * partner:E * partner + E]
    return first_order(m, row) + sum(dot(part(p, q), part(q, p)) for p, q in PAIRS)


def naive_afm(m, e, row):
    products = [[x * y for x, y in zip(e[p], e[q])] for p, q in PAIRS]
    a = softmax([affine(m.score, relu(affine(m.attention, product)))[0] for product in products])
    pooled = [sum(weight * product[d] for weight, product in zip(a, products)) for d in range(E)]
    return first_order(m, row) + affine(m.head, pooled)[0]


def naive_deepfm(m, e, row):
    products = sum(dot(e[p], e[q]) for p, q in PAIRS)
    return first_order(m, row) + products + affine(m.head, deep(m.mlp, concat(e)))[0]


def naive_fibinet(m, e, row):
    a = relu(affine(m.excite, relu(affine(m.squeeze, [sum(x) / E for x in e]))))
    v = [[factor * value for value in x] for factor, x in zip(a, e)]
    pairs = [[x * y for x, y in zip(affine(layer, z[p]), z[q])] for layer, z in zip(m.bilinear, (e, v))
             for p, q in PAIRS]
    return first_order(m, row) + affine(m.head, deep(m.mlp, concat(pairs)))[0]


def naive_difm(m, e, row):
    vectors = affine(m.from_vectors, concat(attend(m.attention, e)))
    factors = [x + y for x, y in zip(vectors, affine(m.from_bits, deep(m.mlp, concat(e))))]
    return first_order(m, row, factors) + sum(factors[p] * factors[q] * dot(e[p], e[q]) for p, q in PAIRS)


def naive_afn(m, e, row):
    norm = lambda layer, j, x: (x - float(layer.running_mean[j])) / np.sqrt(
        float(layer.running_var[j]) + layer.eps) * float(layer.weight[j]) + float(layer.bias[j])
    u = []
    for j in range(SETTINGS["hidden"][0]):
        for d in range(E):
            logs = [np.log(max(abs(x[d]), m.smallest)) for x in e]
            power = dot(m.powers.weight[j], logs)
            u.append(norm(m.behind, j, np.exp(norm(m.before, j, power))))
    return affine(m.head, deep(m.mlp, u))[0]


def naive_autoint(m, e, row):
    for layer in m.layers:
        e = attend(layer, e)
    return affine(m.head, concat(e))[0]


def naive_onn(m, e, row):
    part = lambda f, partner: e[f][E * partner:E * partner + E]
    products = [dot(part(p, q), part(q, p)) for p, q in PAIRS]
    return affine(m.head, deep(m.mlp, concat(part(f, f) for f in range(len(e))) + products))[0]


def naive_pnn(m, e, row):
    return affine(m.head, deep(m.mlp, concat(e) + [dot(e[p], e[q]) for p, q in PAIRS]))[0]


def naive_dcnv2(m, e, row):
    x_0 = x = concat(e)
    for layer in m.layers:
        x = [start * step + value for start, step, value in zip(x_0, affine(layer, x), x)]
    return affine(m.head, x + deep(m.mlp, x_0))[0]


def naive_dcn(m, e, row):
    x_0 = x = concat(e)
    for weight, bias in zip(m.net.weights.tolist(), m.net.biases.tolist()):
        x = [start * dot(weight, x) + b + value for start, b, value in zip(x_0, bias, x)]
    return affine(m.net.head, x + deep(m.net.mlp, x_0))[0]


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_a_naive_loop(name):
    model, ids = build(name), ids_for()
    with torch.no_grad():
        found = model(ids).tolist()
    naive = globals()[f"naive_{name}"]
    expected = [naive(model, rows_of(model.embed.table, row), row) for row in ids.tolist()]
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_every_parameter(name):
    model = build(name, dropout=0.0)
    for part in model.modules():
        if isinstance(part, torch.nn.Linear) and part.bias is not None:
            torch.nn.init.normal_(part.bias, 1.0)  # no ReLU is dead
    if name == "fibinet":
        model.squeeze.weight.data.abs_(), model.excite.weight.data.abs_()
    model(ids_for(rows=60)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_random_at_evaluation_and_dropout_is_in_training(name):
    model, ids = build(name), ids_for(rows=40)
    assert torch.equal(model(ids), model(ids))
    if name not in ("ffm", "autoint"):  # these have no dropout
        model.train()
        assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_see_each_other_at_evaluation(name):
    model, ids = build(name), ids_for()
    assert torch.allclose(model(ids)[3], model(ids[3:4])[0], atol=1e-12)


def test_dcnv2_with_equal_rows_and_no_bias_is_dcn():
    dcn, v2 = build("dcn"), build("dcnv2")
    torch.nn.init.zeros_(dcn.net.biases)
    for layer, weight in zip(v2.layers, dcn.net.weights):
        layer.weight.data = weight.detach().expand(16, 16).clone()  # W = 1 wᵀ
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(5, 16, dtype=torch.double)
    assert torch.allclose(v2.cross(x), dcn.net.cross(x), atol=1e-12)


def test_pnn_of_two_fields_without_its_mlp_is_the_dot_product_of_matrix_factorisation():
    model, ids = build("pnn", sizes=[7, 5]), ids_for([7, 5])
    e = model.embed(ids)
    user, item = model.embed.table.weight[ids[:, 0]], model.embed.table.weight[7 + ids[:, 1]]
    assert torch.allclose(ctr_models.inner_products(e)[:, 0], (user * item).sum(1), atol=1e-12)


def test_onn_with_equal_copies_is_pnn():
    onn, pnn = build("onn"), build("pnn")
    onn.embed.table.weight.data = pnn.embed.table.weight.detach().repeat(1, 4)
    onn.mlp.load_state_dict(pnn.mlp.state_dict())
    onn.head.load_state_dict(pnn.head.state_dict())
    assert torch.allclose(onn(ids_for()), pnn(ids_for()), atol=1e-12)


def test_ffm_with_equal_copies_is_the_dot_products_of_a_factorisation_machine():
    ffm, deepfm = build("ffm"), build("deepfm")
    ffm.embed.table.weight.data = deepfm.embed.table.weight.detach().repeat(1, 4)
    ffm.first_order.load_state_dict(deepfm.first_order.state_dict())
    torch.nn.init.zeros_(deepfm.head.weight)
    assert torch.allclose(ffm(ids_for()), deepfm(ids_for()), atol=1e-10)


def test_afm_with_even_attention_is_the_mean_over_pairs():
    model, ids = build("afm"), ids_for()
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.ones_(model.head.weight)
    expected = model.first_order(ids) + ctr_models.inner_products(model.embed(ids)).mean(1)
    assert torch.allclose(model(ids), expected, atol=1e-10)


def test_dcn_without_weights_is_the_identity():
    model = build("dcn")
    torch.nn.init.zeros_(model.net.weights), torch.nn.init.zeros_(model.net.biases)
    x = torch.randn(5, 16, dtype=torch.double)
    assert torch.equal(model.net.cross(x), x)


def test_first_order_weights_add_up():
    layer, ids = build("ffm").first_order, ids_for()
    w = layer.weight(ids)[:, :, 0]
    assert torch.allclose(layer(ids), layer.bias + w.sum(1))
    assert torch.allclose(layer(ids, 2 * torch.ones_like(w)), layer.bias + 2 * w.sum(1))


def test_field_embedding_gives_each_field_its_own_rows():
    embed = ctr_models.FieldEmbedding([3, 2], 4)
    ids = torch.tensor([[2, 0], [2, 1]])
    assert torch.equal(embed(ids)[:, 0], embed.table.weight[[2, 2]])
    assert torch.equal(embed(ids)[:, 1], embed.table.weight[[3, 4]])
