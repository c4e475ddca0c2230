import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

import common


def naive_mask(segment, is_soft, may_read):
    """Fig. 4, one pair of places at a time."""
    batch, num_profiles = may_read.shape
    length = len(segment)
    last_task = max(t for t in range(length) if segment[t] == num_profiles)
    mask = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for b in range(batch):
        for query in range(length):
            for key in range(query + 1):
                reads_all = segment[query] > num_profiles or query == last_task
                allowed = reads_all or segment[query] == segment[key]
                if reads_all and is_soft[key] and not may_read[b, segment[key]]:
                    allowed = False
                mask[b, 0, query, key] = allowed
    return mask


@pytest.mark.parametrize("num_profiles", [1, 2, 3])
def test_mask_equals_a_naive_double_loop(num_profiles):
    blocks = [3, 2, 4][:num_profiles] + [3, 5]
    segment = torch.tensor([k for k, size in enumerate(blocks) for _ in range(size)])
    is_soft = torch.zeros(len(segment), dtype=torch.bool)
    is_soft[np.cumsum(blocks[:num_profiles]) - 1] = True
    may_read = torch.rand(6, num_profiles, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(common.fig4_mask(segment, is_soft, may_read), naive_mask(segment, is_soft, may_read))


def test_quantizer_equals_a_naive_loop_and_passes_gradients_straight_through():
    torch.manual_seed(0)
    codebook, z = torch.randn(4, 3), torch.randn(10, 3, requires_grad=True)
    quantizer = common.VectorQuantizer(codebook, beta=0.3)
    quantized, codes, loss = quantizer(z)
    expected_loss = 0.0
    for b in range(10):
        distances = [float((z[b] - codebook[j]).detach().square().sum()) for j in range(4)]
        assert int(codes[b]) == int(np.argmin(distances))
        assert torch.allclose(quantized[b], codebook[codes[b]], atol=1e-6)
        expected_loss += 1.3 * min(distances) / 10
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    weight = torch.randn(10, 3)
    (gradient,) = torch.autograd.grad((quantized * weight).sum(), z, retain_graph=True)
    assert torch.equal(gradient, weight)


def test_each_vq_term_moves_its_own_side_and_beta_reaches_the_loss():
    z = torch.randn(6, 2, requires_grad=True)
    for beta in (0.0, 0.5, 2.0):
        codebook = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
        quantizer = common.VectorQuantizer(codebook, beta)
        _, codes, loss = quantizer(z)
        to_z, to_codebook = torch.autograd.grad(loss, [z, quantizer.codebook])
        chosen = quantizer.codebook.detach()[codes]
        assert torch.allclose(to_z, beta * 2 * (z.detach() - chosen) / 6, atol=1e-6)
        expected = torch.zeros(3, 2).index_add(0, codes, 2 * (chosen - z.detach()) / 6)
        assert torch.allclose(to_codebook, expected, atol=1e-6)


def test_dcn_equals_a_naive_loop():
    torch.manual_seed(0)
    net = common.DCN(2, 3, num_layers=3, hidden=(5, 4)).double().eval()
    torch.nn.init.normal_(net.biases)
    x = torch.randn(7, 6, dtype=torch.double)
    for b in range(7):
        state = x[b]
        for weight, bias in zip(net.weights, net.biases):
            product = sum(weight[j] * state[j] for j in range(6))
            state = torch.stack([x[b, d] * product + bias[d] + state[d] for d in range(6)])
        hidden = x[b]
        for layer in net.mlp.layers:
            hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
        logit = net.head.weight[0] @ torch.cat([state, hidden]) + net.head.bias[0]
        assert float(net(x.view(7, 2, 3))[b]) == pytest.approx(float(logit), abs=1e-10)


def test_logloss_equals_sklearn():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(2, size=200), rng.random(200)
    assert common.logloss(labels, probabilities) == pytest.approx(log_loss(labels, probabilities), rel=1e-9)
    assert np.isfinite(common.logloss(labels, labels.astype(float)))


def test_perplexity_counts_codes_that_are_used_alike():
    counts, perplexity = common.usage_of(np.array([0, 1, 1, 0, 3, 3, 4, 4]), 4)  # 4 = unknown
    assert counts.tolist() == [2, 2, 0, 2] and perplexity == pytest.approx(3.0)
    assert common.usage_of(np.zeros(9, dtype=int), 4)[1] == pytest.approx(1.0)
