"""Every click model against its formula in plain loops, its identities and gradients."""

import itertools

import numpy as np
import pytest
import torch

from userip import ctr_models
from userip.ctr_models import MODELS

SIZES = [7, 5, 4, 3]
SETTINGS = dict(field_dim=4, num_layers=3, hidden=(6, 4))
E, PAIRS = 4, list(itertools.combinations(range(len(SIZES)), 2))


def build(name, num_fields=len(SIZES)):
    """A model in double precision and evaluation mode, all of whose parameters and statistics are drawn."""
    torch.manual_seed(0)
    model = ctr_models.build(name, num_fields, **SETTINGS).double().eval()
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
    return sum(x * y for x, y in zip(a, b))


def affine(layer, x):
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    return [dot(row, x) + offset for row, offset in zip(layer.weight.tolist(), bias)]


def relu(x):
    return [max(0.0, value) for value in x]


def deep(mlp, x):
    return relu(affine(mlp.layers[1], relu(affine(mlp.layers[0], x))))


def with_head(part, x):
    return affine(part.head, deep(part.mlp, x))[0]


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
    return m.bias.item() + first_order(rows) + products + with_head(m.deep, concat(e))


def naive_fibinet(m, rows):
    e = [x[:E] for x in rows]
    a = relu(affine(m.excite, relu(affine(m.squeeze, [sum(x) / E for x in e]))))
    v = [[factor * value for value in x] for factor, x in zip(a, e)]
    pairs = [[x * y for x, y in zip(affine(layer, z[p]), z[q])] for layer, z in zip(m.bilinear, (e, v))
             for p, q in PAIRS]
    return first_order(rows) + with_head(m.deep, concat(pairs))


def naive_difm(m, rows):
    e = [x[:E] for x in rows]
    vectors = affine(m.from_vectors, concat(attend(m.attention, e)))
    factors = [x + y for x, y in zip(vectors, affine(m.from_bits, deep(m.mlp, concat(e))))]
    pairs = sum(factors[p] * factors[q] * dot(e[p], e[q]) for p, q in PAIRS)
    return m.bias.item() + first_order(rows, factors) + pairs


def naive_afn(m, e):
    norm = lambda layer, j, x: (x - float(layer.running_mean[j])) / np.sqrt(
        float(layer.running_var[j]) + layer.eps) * layer.weight[j].item() + layer.bias[j].item()
    u = []
    for j in range(SETTINGS["hidden"][0]):
        for d in range(E):
            logs = [np.log(max(abs(x[d]), m.smallest)) for x in e]
            power = dot(m.powers.weight[j].tolist(), logs)
            u.append(norm(m.behind, j, np.exp(norm(m.before, j, power))))
    return with_head(m.deep, u)


def naive_autoint(m, e):
    for layer in m.layers:
        e = attend(layer, e)
    return affine(m.head, concat(e))[0]


def naive_onn(m, e):
    part = lambda f, partner: e[f][E * partner:E * partner + E]
    products = [dot(part(p, q), part(q, p)) for p, q in PAIRS]
    return with_head(m.deep, concat(part(f, f) for f in range(len(e))) + products)


def naive_pnn(m, e):
    return with_head(m.deep, concat(e) + [dot(e[p], e[q]) for p, q in PAIRS])


def naive_dcnv2(m, e):
    x_0 = x = concat(e)
    for layer in m.layers:
        x = [start * step + value for start, step, value in zip(x_0, affine(layer, x), x)]
    return affine(m.head, x + deep(m.mlp, x_0))[0]


def naive_dcn(m, e):
    x_0 = x = concat(e)
    for weight, bias in zip(m.weights.tolist(), m.biases.tolist()):
        x = [start * dot(weight, x) + b + value for start, b, value in zip(x_0, bias, x)]
    return affine(m.head, x + deep(m.mlp, x_0))[0]


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
    torch.nn.init.zeros_(dcn.biases)
    v2.mlp, v2.head = dcn.mlp, dcn.head
    for layer, weight in zip(v2.layers, dcn.weights):
        layer.weight.data = weight.detach().expand(16, 16).clone()  # W = 1 wᵀ
        torch.nn.init.zeros_(layer.bias)
    assert torch.allclose(v2(rows_for(v2)), dcn(rows_for(dcn)), atol=1e-10)


def test_pnn_of_two_fields_without_its_mlp_is_the_dot_product_of_matrix_factorisation():
    user, item = torch.randn(2, 9, 4)
    fields = torch.stack([user, item], 1)
    found = ctr_models.pair_products(fields, fields).sum(2)
    assert torch.allclose(found[:, 0], (user * item).sum(1)) and found.shape == (9, 1)


def test_onn_with_equal_copies_is_pnn():
    onn, pnn = build("onn"), build("pnn")
    onn.load_state_dict(pnn.state_dict())
    rows = rows_for(pnn)
    assert torch.allclose(onn(rows.repeat(1, 1, 4)), pnn(rows), atol=1e-12)


def test_ffm_with_equal_copies_is_the_dot_products_of_a_factorisation_machine():
    ffm, deepfm = build("ffm"), build("deepfm")
    ffm.bias.data = deepfm.bias.data
    torch.nn.init.zeros_(deepfm.deep.head.weight)
    rows = rows_for(deepfm)
    copies = torch.cat([rows[..., :E].repeat(1, 1, 4), rows[..., E:]], 2)
    assert torch.allclose(ffm(copies), deepfm(rows), atol=1e-10)


def test_afm_with_even_attention_is_the_mean_over_pairs():
    model = build("afm")
    torch.nn.init.zeros_(model.score.weight)
    torch.nn.init.ones_(model.head.weight)
    rows = rows_for(model)
    pairs = ctr_models.pair_products(rows[..., :E], rows[..., :E]).sum(2).mean(1)
    assert torch.allclose(model(rows), model.bias + rows[..., E].sum(1) + pairs, atol=1e-10)


def test_dcn_without_weights_reads_its_input_as_it_is():
    model = build("dcn")
    torch.nn.init.zeros_(model.weights), torch.nn.init.zeros_(model.biases)
    rows = rows_for(model)
    x = rows.flatten(1)
    assert torch.allclose(model(rows), model.head(torch.cat([x, model.mlp(x)], 1))[:, 0])


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_mapped_linearly_to_the_last_fields(name):
    model = ctr_models.build(name, len(SIZES), **SETTINGS, dims=(5, 3)).double().eval()
    rows, vectors = rows_for(model, num_fields=2), torch.randn(9, 8, dtype=torch.double)
    more = [model.maps[0](vectors[:, :5]), model.maps[1](vectors[:, 5:])]
    assert torch.equal(model(rows, None, vectors), model.model(torch.cat([rows, torch.stack(more, 1)], 1)))
