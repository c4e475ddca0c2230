"""The click-through models of stage 4: ids int64 [B, F], one column per field, -> logits [B].

All take (sizes [F], field_dim E, num_layers, hidden, dropout); sizes[f] = number of ids of field f, or its
vectors [N, C] where the field is dense. Written from the formulas: e_f [E] is the embedding of field f, e
their concatenation, w_f a first-order weight, p < q a pair of fields. `num_layers` counts cross layers (DCN,
DCNv2) or attention layers (AutoInt) and means nothing for the others.
"""

import itertools

import torch
from torch import nn

from common import DCN, mlp

# ----------------------------------------------------------------------------------------------------------
# fields
# ----------------------------------------------------------------------------------------------------------


class FieldEmbedding(nn.Module):
    """One table for all fields, each with its own range of rows: ids [B, F] -> [B, F, E]

    A field whose size is a tensor [N, C] is dense: its ids are rows of that tensor, mapped to E by a linear
    layer. Dense fields stand behind the others.
    """

    def __init__(self, sizes, dim):
        super().__init__()
        dense = [size for size in sizes if isinstance(size, torch.Tensor)]
        sizes = sizes[:len(sizes) - len(dense)]
        self.table = nn.Embedding(sum(sizes), dim)
        nn.init.normal_(self.table.weight, std=0.5)  # products of much smaller embeddings start on a saddle
        self.register_buffer("offsets", torch.tensor([0, *itertools.accumulate(sizes)][:-1]))
        self.maps = nn.ModuleList(nn.Linear(values.shape[1], dim) for values in dense)
        for k, values in enumerate(dense):
            self.register_buffer(f"values_{k}", values, persistent=False)

    def forward(self, ids):
        num_sparse = len(self.offsets)
        e = self.table(ids[:, :num_sparse] + self.offsets)
        dense = [layer(getattr(self, f"values_{k}")[ids[:, num_sparse + k]])
                 for k, layer in enumerate(self.maps)]
        return torch.cat([e, torch.stack(dense, 1)], 1) if dense else e


def pairs_of(num_fields, device=None):
    """Indices p < q of all pairs of fields: two of [F (F - 1) / 2]"""
    return torch.triu_indices(num_fields, num_fields, offset=1, device=device)


class FirstOrder(nn.Module):
    """b + Σ_f w_f: ids [B, F] -> [B]; or b + Σ_f m_f w_f with input-aware factors m [B, F] (DIFM)"""

    def __init__(self, sizes):
        super().__init__()
        self.weight = FieldEmbedding(sizes, 1)
        nn.init.zeros_(self.weight.table.weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, ids, factors=1.0):
        return self.bias + (self.weight(ids).squeeze(2) * factors).sum(1)


def inner_products(e):
    """e [B, F, E] -> <e_p, e_q> for all p < q [B, F (F - 1) / 2]"""
    p, q = pairs_of(e.shape[1], e.device)
    return (e[:, p] * e[:, q]).sum(2)


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


# ----------------------------------------------------------------------------------------------------------
# shallow: FFM, AFM
# ----------------------------------------------------------------------------------------------------------


class FFM(nn.Module):
    """Field-aware factorisation machine (Juan et al., 2016): b + Σ w_f + Σ_{p<q} <e_p^(q), e_q^(p)>"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        self.field_dim = field_dim
        self.first_order = FirstOrder(sizes)
        self.embed = FieldEmbedding(sizes, len(sizes) * field_dim)

    def forward(self, ids):
        e = self.embed(ids).unflatten(2, (-1, self.field_dim))  # [B, F, F, E], e[:, p, q] = e_p^(q)
        p, q = pairs_of(e.shape[1], e.device)
        return self.first_order(ids) + (e[:, p, q] * e[:, q, p]).sum((1, 2))


class AFM(nn.Module):
    """Attentional factorisation machine (Xiao et al., 2017): b + Σ w_f + pᵀ Σ_{p<q} a_pq (e_p ∘ e_q)

    a = softmax_pq(hᵀ ReLU(W (e_p ∘ e_q) + b')), E wide; dropout on the pooled pairs.
    """

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        self.first_order = FirstOrder(sizes)
        self.embed = FieldEmbedding(sizes, field_dim)
        self.attention = nn.Linear(field_dim, field_dim)
        self.score = nn.Linear(field_dim, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(field_dim, 1, bias=False)

    def forward(self, ids):
        e = self.embed(ids)
        p, q = pairs_of(e.shape[1], e.device)
        product = e[:, p] * e[:, q]  # [B, F (F - 1) / 2, E]
        attention = self.score(self.attention(product).relu()).softmax(1)
        pooled = self.dropout((attention * product).sum(1))  # [B, E]
        return self.first_order(ids) + self.head(pooled).squeeze(1)


# ----------------------------------------------------------------------------------------------------------
# deep: DeepFM, FiBiNET, DIFM, AFN, AutoInt, PNN, ONN
# ----------------------------------------------------------------------------------------------------------


class DeepFM(nn.Module):
    """DeepFM (Guo et al., 2017): b + Σ w_f + Σ_{p<q} <e_p, e_q> + MLP(e)"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        self.first_order = FirstOrder(sizes)
        self.embed = FieldEmbedding(sizes, field_dim)
        self.mlp = mlp(len(sizes) * field_dim, hidden, dropout)
        self.head = nn.Linear(hidden[-1], 1, bias=False)

    def forward(self, ids):
        e = self.embed(ids)
        deep = self.head(self.mlp(e.flatten(1))).squeeze(1)
        return self.first_order(ids) + inner_products(e).sum(1) + deep


class FiBiNET(nn.Module):
    """FiBiNET (Huang et al., 2019): Σ w_f + MLP([(e_p W) ∘ e_q ; (v_p W') ∘ v_q for p < q]), v_f = a_f e_f

    SENET: a = ReLU(W_2 ReLU(W_1 mean(e_f))) with a third of the fields between W_1 and W_2.
    """

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        num_fields = len(sizes)
        self.first_order = FirstOrder(sizes)
        self.embed = FieldEmbedding(sizes, field_dim)
        self.squeeze = nn.Linear(num_fields, max(1, num_fields // 3), bias=False)
        self.excite = nn.Linear(max(1, num_fields // 3), num_fields, bias=False)
        self.bilinear = nn.ModuleList(nn.Linear(field_dim, field_dim, bias=False) for _ in range(2))
        self.mlp = mlp(num_fields * (num_fields - 1) * field_dim, hidden, dropout)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, ids):
        e = self.embed(ids)
        p, q = pairs_of(e.shape[1], e.device)
        a = self.excite(self.squeeze(e.mean(2)).relu()).relu()  # [B, F]
        pairs = [layer(x)[:, p] * x[:, q] for layer, x in zip(self.bilinear, (e, a[:, :, None] * e))]
        deep = self.head(self.mlp(torch.cat(pairs, 1).flatten(1))).squeeze(1)
        return self.first_order(ids) + deep


class DIFM(nn.Module):
    """Dual input-aware factorisation machine (Lu et al., 2020): b + Σ m_f w_f + Σ_{p<q} <m_p e_p, m_q e_q>

    m = W_v vec(attention(e)) + W_b MLP(e), one factor per field.
    """

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        width = len(sizes) * field_dim
        self.first_order = FirstOrder(sizes)
        self.embed = FieldEmbedding(sizes, field_dim)
        self.attention = FieldAttention(field_dim)
        self.mlp = mlp(width, hidden, dropout)
        self.from_vectors = nn.Linear(width, len(sizes), bias=False)
        self.from_bits = nn.Linear(hidden[-1], len(sizes), bias=False)

    def forward(self, ids):
        e = self.embed(ids)
        m = self.from_vectors(self.attention(e).flatten(1)) + self.from_bits(self.mlp(e.flatten(1)))  # [B, F]
        return self.first_order(ids, m) + inner_products(m[:, :, None] * e).sum(1)


class AFN(nn.Module):
    """Adaptive factorisation network (Cheng et al., 2020): MLP([u_1 ; u_2 ; …]), u_j = exp(Σ_f w_jf ln |e_f|)

    u_j [E] is a product of the fields with learnt powers; as many of them as the MLP is wide, with batch norm
    before and behind exp.
    """

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout, smallest=1e-4):
        super().__init__()
        num_neurons = hidden[0]
        self.smallest = smallest
        self.embed = FieldEmbedding(sizes, field_dim)
        self.powers = nn.Linear(len(sizes), num_neurons, bias=False)
        self.before, self.behind = nn.BatchNorm1d(num_neurons), nn.BatchNorm1d(num_neurons)
        self.mlp = mlp(num_neurons * field_dim, hidden, dropout)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, ids):
        logs = self.embed(ids).abs().clamp(min=self.smallest).log()  # [B, F, E]
        u = self.before(self.powers(logs.transpose(1, 2)).transpose(1, 2)).exp()  # [B, J, E]
        return self.head(self.mlp(self.behind(u).flatten(1))).squeeze(1)


class AutoInt(nn.Module):
    """AutoInt (Song et al., 2019): wᵀ concat of the fields behind `num_layers` layers of FieldAttention"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        self.embed = FieldEmbedding(sizes, field_dim)
        self.layers = nn.Sequential(*(FieldAttention(field_dim) for _ in range(num_layers)))
        self.head = nn.Linear(len(sizes) * field_dim, 1)

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)).flatten(1)).squeeze(1)


class PNN(nn.Module):
    """Product-based network, inner product (Qu et al., 2016): MLP([e ; <e_p, e_q> for p < q])"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        num_pairs = len(sizes) * (len(sizes) - 1) // 2
        self.embed = FieldEmbedding(sizes, field_dim)
        self.mlp = mlp(len(sizes) * field_dim + num_pairs, hidden, dropout)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, ids):
        e = self.embed(ids)  # [B, F, E]
        return self.head(self.mlp(torch.cat([e.flatten(1), inner_products(e)], 1))).squeeze(1)


class ONN(nn.Module):
    """Operation-aware network (Yang et al., 2020): MLP([e^raw ; <e_p^(q), e_q^(p)> for p < q])

    Each id has F embeddings: one for each partner field, and in the place of its own field the raw one.
    """

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        num_fields = len(sizes)
        self.field_dim = field_dim
        self.embed = FieldEmbedding(sizes, num_fields * field_dim)
        self.mlp = mlp(num_fields * field_dim + num_fields * (num_fields - 1) // 2, hidden, dropout)
        self.head = nn.Linear(hidden[-1], 1)

    def products(self, e):
        """e [B, F, F, E], e[:, p, q] = e_p^(q) -> <e_p^(q), e_q^(p)> [B, F (F - 1) / 2]"""
        p, q = pairs_of(e.shape[1], e.device)
        return (e[:, p, q] * e[:, q, p]).sum(2)

    def forward(self, ids):
        e = self.embed(ids).unflatten(2, (-1, self.field_dim))  # [B, F, F, E]
        raw = e.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # [B, E, F] -> [B, F E]
        return self.head(self.mlp(torch.cat([raw, self.products(e)], 1))).squeeze(1)


# ----------------------------------------------------------------------------------------------------------
# cross networks: DCN, DCNv2
# ----------------------------------------------------------------------------------------------------------


class DCNModel(nn.Module):
    """Deep & Cross Network (Wang et al., 2017): x_{l+1} = x_0 (w_lᵀ x_l) + b_l + x_l;  wᵀ [x_L ; MLP(x_0)]"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        self.embed = FieldEmbedding(sizes, field_dim)
        self.net = DCN(len(sizes) * field_dim, num_layers, hidden, dropout)

    def forward(self, ids):
        return self.net(self.embed(ids).flatten(1))  # [B, F E] -> [B]


class DCNv2(nn.Module):
    """DCN V2 (Wang et al., 2021): x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l;  wᵀ [x_L ; MLP(x_0)]"""

    def __init__(self, sizes, field_dim, num_layers, hidden, dropout):
        super().__init__()
        width = len(sizes) * field_dim
        self.embed = FieldEmbedding(sizes, field_dim)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.mlp = mlp(width, hidden, dropout)
        self.head = nn.Linear(width + hidden[-1], 1)

    def cross(self, x_0):
        """x_0 [B, X] -> x_L [B, X]"""
        x = x_0
        for layer in self.layers:
            x = x_0 * layer(x) + x
        return x

    def forward(self, ids):
        x_0 = self.embed(ids).flatten(1)  # [B, X]
        return self.head(torch.cat([self.cross(x_0), self.mlp(x_0)], 1)).squeeze(1)


MODELS = {"ffm": FFM, "afm": AFM, "fibinet": FiBiNET, "difm": DIFM, "afn": AFN, "deepfm": DeepFM,
          "autoint": AutoInt, "onn": ONN, "pnn": PNN, "dcnv2": DCNv2, "dcn": DCNModel}
