"""The eleven click models, from their formulas: rows of an embedding table [B, F, W] -> logits [B].

e_f [E] is the embedding of field f, e their concatenation, w_f a first-order weight, p < q a pair of fields,
MLP the layers of widths `hidden`; `num_layers` counts cross or attention layers. An id's row is W wide: E, or
F E where an id has one embedding per field, and one more, the last, with first-order weights. keep [B,
num_units]: factors of dropout, 0 or 1 / (1 - p), so that each of the models that train side by side has noise
of its own; None at evaluation.
"""

import torch
from torch import nn

from common import DCN, MLP


def pair_products(x, y):
    """x, y [B, F, E] -> x_p ∘ y_q for all p < q [B, F (F - 1) / 2, E]"""
    p, q = torch.triu_indices(x.shape[1], x.shape[1], offset=1, device=x.device)
    return x[:, p] * y[:, q]


def crossed_products(e):
    """e [B, F, F, E], e[:, p, q] = e_p^(q) -> <e_p^(q), e_q^(p)> for all p < q [B, F (F - 1) / 2]"""
    p, q = torch.triu_indices(e.shape[1], e.shape[1], offset=1, device=e.device)
    return (e[:, p, q] * e[:, q, p]).sum(2)


class DeepPart(nn.Module):
    """An MLP with one linear output: x [B, input_dim] -> [B]"""

    def __init__(self, input_dim, hidden, bias=True):
        super().__init__()
        self.mlp = MLP(input_dim, hidden)
        self.head = nn.Linear(hidden[-1], 1, bias=bias)

    def forward(self, x, keep=None):
        return self.head(self.mlp(x, keep)).squeeze(1)


class FieldAttention(nn.Module):
    """Multi-head self-attention over fields with residual (Song et al., 2019): [B, F, E] -> [B, F, E]

    head h: softmax_q(<W_Q e_p, W_K e_q>) W_V e_q;  ReLU(concat of heads + W_R e_p). Not scaled by the width.
    """

    def __init__(self, dim):
        super().__init__()
        self.num_heads = 2 if dim % 2 == 0 else 1
        self.query, self.key, self.value, self.residual = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, e):
        query, key, value = (layer(e).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, F, E / H]
                             for layer in (self.query, self.key, self.value))
        attention = (query @ key.transpose(2, 3)).softmax(3)  # [B, H, F, F]
        heads = (attention @ value).transpose(1, 2).flatten(2)  # [B, F, E]
        return (heads + self.residual(e)).relu()


class FFM(nn.Module):
    """Field-aware factorisation machine (Juan et al., 2016): b + Σ w_f + Σ_{p<q} <e_p^(q), e_q^(p)>"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1].unflatten(2, (rows.shape[1], -1))  # [B, F], [B, F, F, E]
        return self.bias + w.sum(1) + crossed_products(e).sum(1)


class AFM(nn.Module):
    """Attentional factorisation machine (Xiao et al., 2017): b + Σ w_f + pᵀ Σ_{p<q} a_pq (e_p ∘ e_q)

    a = softmax_pq(hᵀ ReLU(W (e_p ∘ e_q) + b')), E wide; dropout on the pooled pairs.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.attention = nn.Linear(field_dim, field_dim)
        self.score = nn.Linear(field_dim, 1, bias=False)
        self.head = nn.Linear(field_dim, 1, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        product = pair_products(e, e)  # [B, F (F - 1) / 2, E]
        attention = self.score(self.attention(product).relu()).softmax(1)
        pooled = (attention * product).sum(1)  # [B, E]
        pooled = pooled if keep is None else pooled * keep
        return self.bias + w.sum(1) + self.head(pooled).squeeze(1)


class DeepFM(nn.Module):
    """DeepFM (Guo et al., 2017): b + Σ w_f + Σ_{p<q} <e_p, e_q> + MLP(e)"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.deep = DeepPart(num_fields * field_dim, hidden, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        deep = self.deep(e.flatten(1), keep)
        return self.bias + w.sum(1) + pair_products(e, e).sum(2).sum(1) + deep


class FiBiNET(nn.Module):
    """FiBiNET (Huang et al., 2019): Σ w_f + MLP([(e_p W) ∘ e_q ; (v_p W') ∘ v_q for p < q]), v_f = a_f e_f

    SENET: a = ReLU(W_2 ReLU(W_1 mean(e_f))) with a third of the fields between W_1 and W_2.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.squeeze = nn.Linear(num_fields, max(1, num_fields // 3), bias=False)
        self.excite = nn.Linear(max(1, num_fields // 3), num_fields, bias=False)
        self.bilinear = nn.ModuleList(nn.Linear(field_dim, field_dim, bias=False) for _ in range(2))
        self.deep = DeepPart(num_fields * (num_fields - 1) * field_dim, hidden)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        a = self.excite(self.squeeze(e.mean(2)).relu()).relu()  # [B, F]
        products = [pair_products(layer(x), x) for layer, x in zip(self.bilinear, (e, a[:, :, None] * e))]
        return w.sum(1) + self.deep(torch.cat(products, 1).flatten(1), keep)


class DIFM(nn.Module):
    """Dual input-aware factorisation machine (Lu et al., 2020): b + Σ m_f w_f + Σ_{p<q} <m_p e_p, m_q e_q>

    m = W_v vec(attention(e)) + W_b MLP(e), one factor per field.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.attention = FieldAttention(field_dim)
        self.mlp = MLP(num_fields * field_dim, hidden)
        self.from_vectors = nn.Linear(num_fields * field_dim, num_fields, bias=False)
        self.from_bits = nn.Linear(hidden[-1], num_fields, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        m = self.from_vectors(self.attention(e).flatten(1)) + self.from_bits(self.mlp(e.flatten(1), keep))
        e = m[:, :, None] * e
        return self.bias + (m * w).sum(1) + pair_products(e, e).sum(2).sum(1)


class AFN(nn.Module):
    """Adaptive factorisation network (Cheng et al., 2020): MLP([u_1 ; u_2 ; …]), u_j = exp(Σ_f w_jf ln |e_f|)

    hidden[0] products u_j [E] of the fields with learnt powers; batch norm before and behind exp.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.smallest, num_neurons = 1e-4, hidden[0]
        self.powers = nn.Linear(num_fields, num_neurons, bias=False)
        self.before, self.behind = nn.BatchNorm1d(num_neurons), nn.BatchNorm1d(num_neurons)
        self.deep = DeepPart(num_neurons * field_dim, hidden)

    def forward(self, e, keep=None):
        logs = e.abs().clamp(min=self.smallest).log()  # [B, F, E]
        u = self.before(self.powers(logs.transpose(1, 2)).transpose(1, 2)).exp()  # [B, J, E]
        return self.deep(self.behind(u).flatten(1), keep)


class AutoInt(nn.Module):
    """AutoInt (Song et al., 2019): wᵀ concat of the fields behind `num_layers` layers of FieldAttention"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.layers = nn.Sequential(*(FieldAttention(field_dim) for _ in range(num_layers)))
        self.head = nn.Linear(num_fields * field_dim, 1)

    def forward(self, e, keep=None):
        return self.head(self.layers(e).flatten(1)).squeeze(1)


class PNN(nn.Module):
    """Product-based network, inner product (Qu et al., 2016): MLP([e ; <e_p, e_q> for p < q])"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.deep = DeepPart(num_fields * field_dim + num_fields * (num_fields - 1) // 2, hidden)

    def forward(self, e, keep=None):
        return self.deep(torch.cat([e.flatten(1), pair_products(e, e).sum(2)], 1), keep)


class ONN(PNN):
    """Operation-aware network (Yang et al., 2020): MLP([e^raw ; <e_p^(q), e_q^(p)> for p < q])

    Each id has F embeddings: one for each partner field, and at the index of its own field the raw one.
    """

    def forward(self, rows, keep=None):
        e = rows.unflatten(2, (rows.shape[1], -1))  # [B, F, F, E]
        raw = e.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # [B, E, F] -> [B, F E]
        return self.deep(torch.cat([raw, crossed_products(e)], 1), keep)


class DCNv2(nn.Module):
    """DCN V2 (Wang et al., 2021): x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l;  wᵀ [x_L ; MLP(x_0)]"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        input_dim = num_fields * field_dim
        self.layers = nn.ModuleList(nn.Linear(input_dim, input_dim) for _ in range(num_layers))
        self.mlp = MLP(input_dim, hidden)
        self.head = nn.Linear(input_dim + hidden[-1], 1)

    def forward(self, e, keep=None):
        x = x_0 = e.flatten(1)  # [B, X]
        for layer in self.layers:
            x = x_0 * layer(x) + x
        return self.head(torch.cat([x, self.mlp(x_0, keep)], 1)).squeeze(1)


MODELS = {"ffm": FFM, "afm": AFM, "fibinet": FiBiNET, "difm": DIFM, "afn": AFN, "deepfm": DeepFM,
          "autoint": AutoInt, "onn": ONN, "pnn": PNN, "dcnv2": DCNv2, "dcn": DCN}


class WithVectors(nn.Module):
    """The last P fields are vectors, each mapped to a row (table 3): rows [B, F - P, W], vectors [B, ΣC]"""

    def __init__(self, model, width, dims):
        super().__init__()
        self.model, self.dims = model, list(dims)
        self.maps = nn.ModuleList(nn.Linear(dim, width) for dim in dims)

    def forward(self, rows, keep=None, vectors=None):
        fields = [layer(part) for layer, part in zip(self.maps, vectors.split(self.dims, 1))]
        return self.model(torch.cat([rows, torch.stack(fields, 1)], 1), keep)  # [B, F, W]


def build(name, num_fields, field_dim, num_layers, hidden, dims=()):
    """A model, with the width of its rows, whether they end in a first-order weight, and how many units
    dropout may drop. Its last fields may be vectors of widths `dims`.
    """
    first_order = name in ("ffm", "afm", "fibinet", "difm", "deepfm")
    width = field_dim * (num_fields if name in ("ffm", "onn") else 1) + first_order
    model = MODELS[name](num_fields, field_dim, num_layers, hidden)
    model = WithVectors(model, width, dims) if dims else model
    model.width, model.first_order = width, first_order
    model.num_units = {"ffm": 0, "autoint": 0, "afm": field_dim}.get(name, sum(hidden))
    return model
