"""The click-through models of stage 4: rows of an embedding table [B, F, W] -> logits [B]; how they train.

All take (num_fields F, field_dim E, num_layers, hidden) and are written from their formulas: e_f [E] is the
embedding of field f, e their concatenation, w_f a first-order weight, p < q a pair of fields. A model says
how wide the row of an id must be: W = E, or F E where an id has one embedding per field, and one more
number, the last, where the model has first-order weights. The table is not in it: `train_stack` looks rows up
for G models at once, trains them side by side, and moves those rows only that a batch has met.

keep [B, num_units]: dropout's factors, 0 or 1 / (1 - p), an argument so that each of the models trained
together has noise of its own; None at evaluation. `num_layers` counts cross layers (DCN, DCNv2) or attention
layers (AutoInt) and means nothing for the others.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from common import DCN, MLP, logloss

# ----------------------------------------------------------------------------------------------------------
# parts
# ----------------------------------------------------------------------------------------------------------


class WithVectors(nn.Module):
    """A model whose last fields are vectors [B, C] instead of ids, mapped to rows by a linear layer each.

    rows [B, F - P, W], vectors [B, ΣC] -> logits [B]
    """

    def __init__(self, model, dims):
        super().__init__()
        self.model, self.dims = model, list(dims)
        self.width, self.first_order, self.num_units = model.width, model.first_order, model.num_units
        self.maps = nn.ModuleList(nn.Linear(dim, model.width) for dim in dims)

    def forward(self, rows, keep=None, vectors=None):
        parts = vectors.split(self.dims, 1)
        more = torch.stack([layer(part) for layer, part in zip(self.maps, parts)], 1)  # [B, P, W]
        return self.model(torch.cat([rows, more], 1), keep)


def pairs_of(num_fields, device=None):
    """Indices p < q of all pairs of fields: two of [F (F - 1) / 2]"""
    return torch.triu_indices(num_fields, num_fields, offset=1, device=device)


def inner_products(e):
    """e [B, F, E] -> <e_p, e_q> for all p < q [B, F (F - 1) / 2]"""
    p, q = pairs_of(e.shape[1], e.device)
    return (e[:, p] * e[:, q]).sum(2)


def crossed_products(e):
    """e [B, F, F, E], e[:, p, q] = e_p^(q) -> <e_p^(q), e_q^(p)> for all p < q [B, F (F - 1) / 2]"""
    p, q = pairs_of(e.shape[1], e.device)
    return (e[:, p, q] * e[:, q, p]).sum(2)


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

    num_units = 0

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order = num_fields * field_dim + 1, True
        self.field_dim = field_dim
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1].unflatten(2, (-1, self.field_dim))  # [B, F], [B, F, F, E]
        return self.bias + w.sum(1) + crossed_products(e).sum(1)


class AFM(nn.Module):
    """Attentional factorisation machine (Xiao et al., 2017): b + Σ w_f + pᵀ Σ_{p<q} a_pq (e_p ∘ e_q)

    a = softmax_pq(hᵀ ReLU(W (e_p ∘ e_q) + b')), E wide; dropout on the pooled pairs.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim + 1, True, field_dim
        self.bias = nn.Parameter(torch.zeros(()))
        self.attention = nn.Linear(field_dim, field_dim)
        self.score = nn.Linear(field_dim, 1, bias=False)
        self.head = nn.Linear(field_dim, 1, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        p, q = pairs_of(e.shape[1], e.device)
        product = e[:, p] * e[:, q]  # [B, F (F - 1) / 2, E]
        attention = self.score(self.attention(product).relu()).softmax(1)
        pooled = (attention * product).sum(1)  # [B, E]
        pooled = pooled if keep is None else pooled * keep
        return self.bias + w.sum(1) + self.head(pooled).squeeze(1)


# ----------------------------------------------------------------------------------------------------------
# deep: DeepFM, FiBiNET, DIFM, AFN, AutoInt, PNN, ONN
# ----------------------------------------------------------------------------------------------------------


class DeepFM(nn.Module):
    """DeepFM (Guo et al., 2017): b + Σ w_f + Σ_{p<q} <e_p, e_q> + MLP(e)"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim + 1, True, sum(hidden)
        self.bias = nn.Parameter(torch.zeros(()))
        self.mlp = MLP(num_fields * field_dim, hidden)
        self.head = nn.Linear(hidden[-1], 1, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        deep = self.head(self.mlp(e.flatten(1), keep)).squeeze(1)
        return self.bias + w.sum(1) + inner_products(e).sum(1) + deep


class FiBiNET(nn.Module):
    """FiBiNET (Huang et al., 2019): Σ w_f + MLP([(e_p W) ∘ e_q ; (v_p W') ∘ v_q for p < q]), v_f = a_f e_f

    SENET: a = ReLU(W_2 ReLU(W_1 mean(e_f))) with a third of the fields between W_1 and W_2.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim + 1, True, sum(hidden)
        self.squeeze = nn.Linear(num_fields, max(1, num_fields // 3), bias=False)
        self.excite = nn.Linear(max(1, num_fields // 3), num_fields, bias=False)
        self.bilinear = nn.ModuleList(nn.Linear(field_dim, field_dim, bias=False) for _ in range(2))
        self.mlp = MLP(num_fields * (num_fields - 1) * field_dim, hidden)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        p, q = pairs_of(e.shape[1], e.device)
        a = self.excite(self.squeeze(e.mean(2)).relu()).relu()  # [B, F]
        pairs = [layer(x)[:, p] * x[:, q] for layer, x in zip(self.bilinear, (e, a[:, :, None] * e))]
        deep = self.head(self.mlp(torch.cat(pairs, 1).flatten(1), keep)).squeeze(1)
        return w.sum(1) + deep


class DIFM(nn.Module):
    """Dual input-aware factorisation machine (Lu et al., 2020): b + Σ m_f w_f + Σ_{p<q} <m_p e_p, m_q e_q>

    m = W_v vec(attention(e)) + W_b MLP(e), one factor per field.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim + 1, True, sum(hidden)
        self.bias = nn.Parameter(torch.zeros(()))
        self.attention = FieldAttention(field_dim)
        self.mlp = MLP(num_fields * field_dim, hidden)
        self.from_vectors = nn.Linear(num_fields * field_dim, num_fields, bias=False)
        self.from_bits = nn.Linear(hidden[-1], num_fields, bias=False)

    def forward(self, rows, keep=None):
        w, e = rows[..., -1], rows[..., :-1]  # [B, F], [B, F, E]
        m = self.from_vectors(self.attention(e).flatten(1)) + self.from_bits(self.mlp(e.flatten(1), keep))
        return self.bias + (m * w).sum(1) + inner_products(m[:, :, None] * e).sum(1)


class AFN(nn.Module):
    """Adaptive factorisation network (Cheng et al., 2020): MLP([u_1 ; u_2 ; …]), u_j = exp(Σ_f w_jf ln |e_f|)

    u_j [E] is a product of the fields with learnt powers; as many of them as the MLP is wide, with batch norm
    before and behind exp.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden, smallest=1e-4):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim, False, sum(hidden)
        self.smallest, num_neurons = smallest, hidden[0]
        self.powers = nn.Linear(num_fields, num_neurons, bias=False)
        self.before, self.behind = nn.BatchNorm1d(num_neurons), nn.BatchNorm1d(num_neurons)
        self.mlp = MLP(num_neurons * field_dim, hidden)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, e, keep=None):
        logs = e.abs().clamp(min=self.smallest).log()  # [B, F, E]
        u = self.before(self.powers(logs.transpose(1, 2)).transpose(1, 2)).exp()  # [B, J, E]
        return self.head(self.mlp(self.behind(u).flatten(1), keep)).squeeze(1)


class AutoInt(nn.Module):
    """AutoInt (Song et al., 2019): wᵀ concat of the fields behind `num_layers` layers of FieldAttention"""

    num_units = 0

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order = field_dim, False
        self.layers = nn.Sequential(*(FieldAttention(field_dim) for _ in range(num_layers)))
        self.head = nn.Linear(num_fields * field_dim, 1)

    def forward(self, e, keep=None):
        return self.head(self.layers(e).flatten(1)).squeeze(1)


class PNN(nn.Module):
    """Product-based network, inner product (Qu et al., 2016): MLP([e ; <e_p, e_q> for p < q])"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim, False, sum(hidden)
        self.mlp = MLP(num_fields * field_dim + num_fields * (num_fields - 1) // 2, hidden)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, e, keep=None):
        return self.head(self.mlp(torch.cat([e.flatten(1), inner_products(e)], 1), keep)).squeeze(1)


class ONN(nn.Module):
    """Operation-aware network (Yang et al., 2020): MLP([e^raw ; <e_p^(q), e_q^(p)> for p < q])

    Each id has F embeddings: one for each partner field, and in the place of its own field the raw one.
    """

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = num_fields * field_dim, False, sum(hidden)
        self.field_dim = field_dim
        self.mlp = MLP(num_fields * field_dim + num_fields * (num_fields - 1) // 2, hidden)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, rows, keep=None):
        e = rows.unflatten(2, (-1, self.field_dim))  # [B, F, F, E]
        raw = e.diagonal(dim1=1, dim2=2).transpose(1, 2).flatten(1)  # [B, E, F] -> [B, F E]
        return self.head(self.mlp(torch.cat([raw, crossed_products(e)], 1), keep)).squeeze(1)


# ----------------------------------------------------------------------------------------------------------
# cross networks: DCN, DCNv2
# ----------------------------------------------------------------------------------------------------------


class DCNModel(nn.Module):
    """Deep & Cross Network (Wang et al., 2017): x_{l+1} = x_0 (w_lᵀ x_l) + b_l + x_l;  wᵀ [x_L ; MLP(x_0)]"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim, False, sum(hidden)
        self.net = DCN(num_fields * field_dim, num_layers, hidden, dropout=0.0)  # `keep` is its dropout

    def forward(self, e, keep=None):
        return self.net(e.flatten(1), keep)


class DCNv2(nn.Module):
    """DCN V2 (Wang et al., 2021): x_{l+1} = x_0 ∘ (W_l x_l + b_l) + x_l;  wᵀ [x_L ; MLP(x_0)]"""

    def __init__(self, num_fields, field_dim, num_layers, hidden):
        super().__init__()
        self.width, self.first_order, self.num_units = field_dim, False, sum(hidden)
        input_dim = num_fields * field_dim
        self.layers = nn.ModuleList(nn.Linear(input_dim, input_dim) for _ in range(num_layers))
        self.mlp = MLP(input_dim, hidden)
        self.head = nn.Linear(input_dim + hidden[-1], 1)

    def cross(self, x_0):
        """x_0 [B, X] -> x_L [B, X]"""
        x = x_0
        for layer in self.layers:
            x = x_0 * layer(x) + x
        return x

    def forward(self, e, keep=None):
        x_0 = e.flatten(1)  # [B, X]
        return self.head(torch.cat([self.cross(x_0), self.mlp(x_0, keep)], 1)).squeeze(1)


MODELS = {"ffm": FFM, "afm": AFM, "fibinet": FiBiNET, "difm": DIFM, "afn": AFN, "deepfm": DeepFM,
          "autoint": AutoInt, "onn": ONN, "pnn": PNN, "dcnv2": DCNv2, "dcn": DCNModel}

# ----------------------------------------------------------------------------------------------------------
# training: G models of one kind side by side, each as if it were alone
# ----------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """One model of a stack: which set of fields it reads, its seed (start, batches, noise), Adam's options.

    weight_decay: L2 penalty of the embeddings (see Stack.rest_of); net_decay: of all other parameters; start:
    standard deviation at which the embeddings of frequent ids begin (see Stack.draw).
    """

    fields: int
    seed: int
    lr: float
    weight_decay: float
    net_decay: float
    start: float = 0.5


class Rows(NamedTuple):
    """What the models read: by split, ids int64 [U, n, F] for U sets of fields, and labels, numpy [n].

    The ids are rows of a table, num_rows[u] of them, which all fields of a set share; row `unknown` is the
    user whom nobody knows. Where the last fields are vectors: `vectors` [N, ΣC], their widths `dims`, and by
    split whose they are, `users` [n].
    """

    ids: dict
    labels: dict
    num_rows: list
    unknown: int = 0
    vectors: torch.Tensor | None = None
    dims: tuple = ()
    users: dict | None = None

    def vectors_of(self, split, rows):
        """rows of the split [G, B] -> a list of their vectors [G, B, ΣC]; an empty one without vectors"""
        return [] if self.vectors is None else [self.vectors[self.users[split][rows]]]


def table_rows(split, fields, sizes, is_warm, num_items, has_unknown=False):
    """Ids as rows of one table in which each field has rows of its own, user and item before all others.

    split: by name a data frame with columns user and item [n]; fields: by name the further ids int64 [n, P],
    of `sizes`. Users without a train row are unknown to the models and share one id behind the others, which
    has_unknown makes in any case. -> {name: int64 [n, 2 + P]}, rows of the table, the unknown user's.
    """
    num_users = len(is_warm) + (has_unknown or not is_warm.all())
    user_id = np.where(is_warm, np.arange(len(is_warm)), len(is_warm))
    first = np.cumsum([0, num_users, num_items, *sizes])
    ids = {name: torch.from_numpy(np.column_stack([user_id[frame["user"]], frame["item"], fields[name]])
                                  + first[:-1]) for name, frame in split.items()}
    return ids, int(first[-1]), num_users - 1


def build(name, num_fields, field_dim, num_layers, hidden, dims=()):
    """A model of the zoo; its last fields are vectors of widths `dims`, if there are any."""
    model = MODELS[name](num_fields, field_dim, num_layers, hidden)
    return WithVectors(model, dims) if dims else model


def adam_(weight, mean, square, grad, lr, weight_decay, step):
    """One step of Adam (Kingma and Ba, 2015) with an L2 penalty, in place; lr and weight_decay broadcast."""
    grad = grad + weight_decay * weight
    mean.lerp_(grad, 0.1)
    square.lerp_(grad * grad, 0.001)
    weight.sub_(lr * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))


def step_rows_(adam_, table, total, index, found, grad, *options):
    """Adam on those rows of the tables [G N, 3 W] that a batch has met; the others rest, penalty and all.

    A row holds an embedding and Adam's two averages. index [G n]; found, what stands there [G, n, 3 W]; its
    gradient [G, n, W]; total [G N, W]: zeros, before and after.
    """
    total.index_put_((index,), grad.flatten(0, 1), accumulate=True)
    grad = total.index_select(0, index).view(grad.shape)  # an id met twice moves once, by the sum
    total.index_fill_(0, index, 0.0)
    adam_(*found.chunk(3, 2), grad, *options)
    table.index_copy_(0, index, found.flatten(0, 1))


@functools.lru_cache(maxsize=None)  # a compiled step serves all stacks of its shape
def functions_of(options, dropout, is_compiled):
    """A model as functions of G copies' parameters: the model, `logits`, and twice the pair (a step of the
    parameters, Adam's rule), for full batches, compiled if so wished, and for a batch cut short.
    """
    model = build(*options)
    named = dict(model.named_parameters())
    sizes = [value.numel() for value in named.values()]

    def logits(flat, rows, buffers, *vectors, keep=None):
        """flat [D], the parameters one behind the other -> logits [B]"""
        parts = dict(zip(named, flat.split(sizes)))
        parameters = {key: part.view(named[key].shape) for key, part in parts.items()}
        return functional_call(model, (parameters, buffers), (rows, keep, *vectors))

    def loss(flat, rows, buffers, keep, label, *vectors):
        keep = keep.to(rows.dtype) / (1 - dropout)
        logit = logits(flat, rows, buffers, *vectors, keep=keep)
        return F.binary_cross_entropy_with_logits(logit, label)  # eq. 9

    def step_models_(flat, mean, square, lr, net_decay, step, rows, buffers, keep, seed_of, *inputs):
        """One Adam step of the parameters [G, D], in place -> gradient of the rows [G, B, F, W]"""
        gradient = vmap(torch.func.grad(loss, argnums=(0, 1)))
        grad, rows_grad = gradient(flat, rows, buffers, keep[seed_of], *inputs)
        adam_(flat, mean, square, grad, lr, net_decay, step)
        return rows_grad

    short = full = step_models_, adam_
    if is_compiled:
        torch._dynamo.config.recompile_limit = 10_000  # one per model and shape is no sign of trouble
        full = torch.compile(step_models_, dynamic=False), torch.compile(adam_, dynamic=True)
    return model, vmap(logits), full, short


class Stack:
    """G models of one kind side by side, and their tables; `options` as for `build`.

    Its state is a dict of tensors [G, …]: `flat`, the parameters, one behind the other, and Adam's averages
    of them; `table` [G, N, 3 W], the embeddings and Adam's averages; `rest` [G, N] (see rest_of); batch
    norm's statistics; the members' `fields`, `lr`, `weight_decay` and `net_decay`.
    """

    def __init__(self, options, members, rows, batch_size, dropout=0.0, is_compiled=False):
        self.model, self.logits, self.full, self.short = functions_of(options, dropout, is_compiled)
        self.device, self.width, self.steps = rows.ids["train"].device, self.model.width, 0
        drawn = [self.draw(options, member, rows.ids["train"][member.fields],
                           rows.num_rows[member.fields], max(rows.num_rows)) for member in members]
        state = {key: torch.stack([one[key] for one in drawn]) for key in drawn[0]}
        state |= {key: torch.zeros_like(state["flat"]) for key in ("mean", "square")}
        state |= {key: torch.tensor([getattr(member, key) for member in members])[:, None]
                  for key in ("fields", "lr", "weight_decay", "net_decay")}
        state["rest"] = torch.stack([self.rest_of(rows, member.fields, max(rows.num_rows), batch_size)
                                     for member in members])
        self.state = {key: value.to(self.device) for key, value in state.items()}
        self.total = torch.zeros_like(self.tables()[:, :self.width])

    def draw(self, options, member, ids, num_rows, most):
        """One member's start; it does not depend on the other members.

        The standard deviation of an id that n of the train rows have is start · n / (n + 100): products of
        small embeddings start on a saddle, and codes, which thousands share, must leave it; but the start of
        a rare id is noise that its few rows never wash out (0.08 of AUC on sparse data), and an unknown one
        tells nothing.
        """
        torch.manual_seed(member.seed)
        model = build(*options)
        table = torch.zeros(most, 3 * self.width)
        met = ids.flatten().bincount(minlength=num_rows).cpu()
        scale = member.start * met / (met + 100)
        table[:num_rows, :self.width] = scale[:, None] * torch.randn(num_rows, self.width)
        if model.first_order:
            table[:, self.width - 1] = 0.0
        return {"flat": parameters_to_vector(model.parameters()).detach(), "table": table,
                **dict(model.named_buffers())}

    def rest_of(self, rows, fields, most, batch_size):
        """How many steps pass, on average, from one batch that meets a row of the table to the next: [N]

        A penalty that every step should bring, but that moves the rows of the batch only, is as many times
        as large there: or rare ids, which have the least to say, would be the least penalised.
        """
        ids = rows.ids["train"][fields]
        met = ids.flatten().bincount(minlength=most).cpu()
        return (len(ids) / (met.clamp(min=1) * batch_size)).clamp(min=1) * (met > 0) + 1.0 * (met == 0)

    def keep(self, members):
        """Drop all but these members [bool G]."""
        self.state = {key: value[members] for key, value in self.state.items()}
        self.total = torch.zeros_like(self.tables()[:, :self.width])

    def buffers(self):
        """Batch norm's running statistics, where a model has any: dict of tensors [G, …]"""
        return {key: self.state[key] for key, _ in self.model.named_buffers()}

    def tables(self):
        """The members' tables one behind the other [G N, 3 W]"""
        return self.state["table"].view(-1, 3 * self.width)

    def index(self, ids):
        """ids [G, B, F] of the members' own tables -> rows of `tables` [G B F]"""
        first = torch.arange(len(ids), device=self.device) * self.state["table"].shape[1]
        return (ids + first[:, None, None]).flatten()

    def train_step(self, ids, keep, seed_of, label, vectors, is_full):
        """ids [G, B, F], keep [S, B, num_units], label [G, B], vectors a list of [G, B, ΣC] or empty"""
        step_models_, adam_ = self.full if is_full else self.short
        state, index = self.state, self.index(ids)
        self.steps += 1
        lr, step = state["lr"], torch.tensor(float(self.steps), device=self.device)
        found = self.tables().index_select(0, index).view(len(ids), -1, 3 * self.width)  # [G, B F, 3 W]
        rows = found[..., :self.width].unflatten(1, ids.shape[1:])  # [G, B, F, W]
        grad = step_models_(state["flat"], state["mean"], state["square"], lr, state["net_decay"], step,
                            rows, self.buffers(), keep, seed_of, label, *vectors)
        rest = state["rest"].flatten().index_select(0, index).view(len(ids), -1, 1)  # [G, B F, 1]
        step_rows_(adam_, self.tables(), self.total, index, found, grad.flatten(1, 2), lr[..., None],
                   state["weight_decay"][..., None] * rest, step)

    @torch.no_grad()
    def predict(self, rows, split, at_once=2**21):
        """Click probabilities of a split's rows: float64 numpy [G, n]"""
        self.model.eval()
        ids, state, found = rows.ids[split], self.state, []
        size = max(1, at_once // (len(state["flat"]) * ids.shape[2] * self.width))
        for part in torch.arange(ids.shape[1], device=self.device).split(size):
            of_part = ids[state["fields"], part]  # [G, b, F]
            read = self.tables()[self.index(of_part), :self.width].unflatten(0, of_part.shape)
            vectors = rows.vectors_of(split, part.expand(len(read), -1))
            found.append(self.logits(state["flat"], read, self.buffers(), *vectors).sigmoid())
        return torch.cat(found, 1).double().cpu().numpy()


@torch.no_grad()
def train_stack(args, name, members, rows, is_compiled=False):
    """Train the members side by side: their figures on valid at the best epoch, and a stack of these weights.

    Every member sees the train rows in the order of its seed, with the noise of its seed: whatever else it
    reads, and whoever is trained beside it. A member that makes no progress for `--patience` epochs is done,
    even where its compiled companions keep it in the stack. A step is that of the member alone to 1e-6; over
    some hundred steps such roundings grow, and may let another epoch be the best.
    """
    options = name, rows.ids["train"].shape[2] + len(rows.dims), args.field_dim, args.layers, \
        tuple(args.hidden), rows.dims
    stack = Stack(options, members, rows, args.batch_size, args.dropout, is_compiled)
    best = [{"valid_logloss": float("inf"), "best_epoch": 0} for _ in members]
    saved = {key: value.clone() for key, value in stack.state.items()}
    running, done = np.arange(len(members)), np.zeros(len(members), dtype=bool)
    seeds = sorted({member.seed for member in members})
    seed_of = torch.tensor([seeds.index(member.seed) for member in members])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for epoch in range(1, args.epochs + 1):
        train_epoch(args, stack, rows, generators, seed_of[running])
        probabilities = stack.predict(rows, "valid")
        for place, member in enumerate(running):
            valid = logloss(rows.labels["valid"], probabilities[place])
            # nan, from a rate too high, is no progress
            if not done[member] and valid < best[member]["valid_logloss"]:
                auc = roc_auc_score(rows.labels["valid"], probabilities[place])
                best[member] = {"valid_logloss": valid, "valid_auc": auc, "best_epoch": epoch}
                for key, value in stack.state.items():
                    saved[key][member] = value[place]
        done |= np.array([epoch - one["best_epoch"] >= args.patience for one in best])
        if done.all():
            break
        if done[running].any() and not is_compiled:  # a compiled step holds for one G
            stack.keep(torch.from_numpy(~done[running]))
            running = running[~done[running]]
    stack.state = saved
    return best, stack


def train_epoch(args, stack, rows, generators, seed_of, steps_at_once=64):
    """One pass over the train rows; the batches are slices of what was gathered for many steps at once."""
    labels = torch.from_numpy(rows.labels["train"]).to(stack.state["flat"])
    fields, device = stack.state["fields"], stack.device
    stack.model.train()
    order = torch.stack([torch.randperm(len(labels), generator=generator) for generator in generators])
    for part in order.split(args.batch_size * steps_at_once, 1):  # [S, n]
        keep = torch.empty(*part.shape, stack.model.num_units, dtype=torch.bool)
        dropped = torch.empty(part.shape, dtype=torch.bool)
        for k, generator in enumerate(generators):
            keep[k].bernoulli_(1 - args.dropout, generator=generator)
            dropped[k].bernoulli_(args.id_dropout, generator=generator)
        keep, chosen, dropped = keep.to(device), part[seed_of].to(device), dropped[seed_of].to(device)
        ids = rows.ids["train"][fields, chosen]  # [G, n, F]
        if args.id_dropout:
            ids[..., 0].masked_fill_(dropped, rows.unknown)
        label, vectors = labels[chosen], rows.vectors_of("train", chosen)
        for first in range(0, part.shape[1], args.batch_size):
            batch = slice(first, first + args.batch_size)
            size = label[:, batch].shape[1]
            stack.train_step(ids[:, batch], keep[:, batch], seed_of, label[:, batch],
                             [part[:, batch] for part in vectors], size == args.batch_size)
