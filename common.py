"""The method's shared parts: the Fig. 4 mask, the VQ layer, DCN and its MLP, metrics.

Shapes use one letter per meaning, here and everywhere: B rows of a batch, N users, M items, P profile names,
S soft tokens per profile, T tokens, D width of the LLM, V its vocabulary, K codes of a profile, C width of a
codeword, F fields of a click model, E width of a field's embedding.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def fig4_mask(segment, is_soft, may_read, is_causal=False):
    """Who may attend to whom (Fig. 4): segment [T], is_soft [T], may_read [B, P] -> bool [B, 1, T, T].

    True at [b, 0, query, key]: the query may read the key. segment: k in 0..P-1 for the name and soft tokens
    of profile k, P for the task text, P + 1 for the evidence. Always causal; name and soft tokens of one
    profile see only each other; the task text sees only itself, but for its last token, which predicts the
    first evidence token; the evidence sees everything before it. may_read[b, k]: may row b read θ_k at all?
    (routing; all True = the figure as printed). is_causal: plain causal instead, for the ablation.
    """
    num_profiles, length = may_read.shape[1], len(segment)
    query, key = segment[:, None], segment[None, :]  # [T, 1], [1, T]
    reader = segment > num_profiles
    reader[(segment == num_profiles).nonzero().max()] = True  # the last task token
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    allowed = causal & ((query == key) | reader[:, None] | is_causal)  # [T, T]
    profile = F.one_hot(segment.clamp(max=num_profiles), num_profiles + 1)[:, :num_profiles]  # [T, P]
    is_hidden = is_soft & (may_read.float() @ profile.T.float() == 0)  # [B, T] soft tokens hidden from a row
    return (allowed & ~(is_hidden[:, None, :] & reader[:, None]))[:, None]


class VectorQuantizer(nn.Module):
    """Codebook with straight-through estimator (eq. 5, 6): z [B, C] -> quantized [B, C], codes [B], loss [].

    loss = ||sg[z] - e||² + beta ||z - sg[e]||², summed over C, mean over B.
    quantized = z + sg[e - z]: its value is the codeword, its gradient goes to z.
    """

    def __init__(self, codebook, beta=0.25):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())  # [K, C]
        self.beta = beta

    def forward(self, z):
        codes = torch.cdist(z.detach(), self.codebook.detach()).argmin(1)  # [B], eq. 6
        chosen = self.codebook[codes]  # [B, C]
        codebook_term = (z.detach() - chosen).square().sum(1).mean()
        commitment_term = (z - chosen.detach()).square().sum(1).mean()
        return z + (chosen - z).detach(), codes, codebook_term + self.beta * commitment_term


class DCN(nn.Module):
    """Deep & Cross Network (Wang et al., 2017) on embedded fields: e [B, F, E] -> logits [B], e = x_0 [B, X]

    x_{l+1} = x_0 (w_lᵀ x_l) + b_l + x_l  beside an MLP on x_0;  logit = wᵀ [x_L ; MLP(x_0)].
    """

    def __init__(self, num_fields, field_dim, num_layers=3, hidden=(16, 16), dropout=0.0):
        super().__init__()
        input_dim = num_fields * field_dim
        self.weights = nn.Parameter(torch.randn(num_layers, input_dim) / math.sqrt(input_dim))
        self.biases = nn.Parameter(torch.zeros(num_layers, input_dim))
        self.mlp = MLP(input_dim, hidden, dropout)
        self.head = nn.Linear(input_dim + hidden[-1], 1)

    def forward(self, e, keep=None):
        x = x_0 = e.flatten(1)  # [B, X]
        for weight, bias in zip(self.weights, self.biases):
            x = x_0 * (x @ weight)[:, None] + bias + x
        return self.head(torch.cat([x, self.mlp(x_0, keep)], 1)).squeeze(1)


class MLP(nn.Module):
    """Linear, ReLU, dropout for each width in `hidden`: [B, input_dim] -> [B, hidden[-1]]. keep [B,
    sum(hidden)]: the dropout's factors, 0 or 1 / (1 - p), where the caller draws them.
    """

    def __init__(self, input_dim, hidden, dropout=0.0):
        super().__init__()
        self.hidden = list(hidden)
        self.layers = nn.ModuleList(nn.Linear(*dims) for dims in zip([input_dim, *hidden], hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None):
        parts = [None] * len(self.hidden) if keep is None else keep.split(self.hidden, 1)
        for layer, part in zip(self.layers, parts):
            x = layer(x).relu()
            x = self.dropout(x) if part is None else x * part
        return x


def logloss(labels, probabilities):
    """Mean binary cross-entropy in nats; labels [B] of 0 and 1, probabilities [B] or one number for all."""
    probabilities = np.clip(np.broadcast_to(probabilities, np.shape(labels)), 1e-7, 1 - 1e-7)
    return float(-np.where(np.asarray(labels) == 1, np.log(probabilities), np.log1p(-probabilities)).mean())


def with_interval(mean, half):
    """A difference and half of its 95% interval as text; a single run has none."""
    return f"{mean:+.4f} ± {half:.4f}" if half == half else f"{mean:+.4f} (one run, no interval)"


def usage_of(codes, num_codes):
    """codes [N] -> users per code [K], perplexity (1: one has all, K: all alike). Unknown (K) is left out."""
    counts = np.bincount(codes[codes < num_codes], minlength=num_codes)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return counts, float(np.exp(-(shares * np.log(shares)).sum()))
