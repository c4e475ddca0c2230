"""Training: G click models of one kind side by side as one stack, each as if it were trained alone.

A stack looks up the embedding rows that a batch needs, runs one vectorised step of all its models, and
updates only those rows. Small models cost mostly overhead, so G of them take little longer than one. A
member's step is that of the model alone to 1e-6; over hundreds of steps such rounding differences grow.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from common import logloss
from userip.ctr_models import build


class Member(NamedTuple):  # one model of a stack
    fields: int  # index of its set of fields in Rows.ids
    seed: int  # of start, batches and dropout
    lr: float
    weight_decay: float  # L2 penalty of the embeddings
    start: float = 0.5  # standard deviation at which embeddings of frequent ids begin


CHOICES = Member._fields[2:]  # what --tune chooses


class Rows(NamedTuple):
    """What the models read; the last fields may be vectors, and behind them numbers, not ids."""

    ids: dict  # by split int64 [U, n, F] for U sets of fields: rows of a table that all fields of a set share
    labels: dict  # by split, numpy [n]
    num_rows: list  # rows of the table, by set
    unknown: int = 0  # the row of an unknown user, or item
    dropped: int = 0  # the field whose ids --id-dropout makes unknown: 0 user, 1 item
    vectors: torch.Tensor | None = None  # [N, ΣC]
    dims: tuple = ()  # C of each, 1 of a number
    users: dict | None = None  # by split, the row of `vectors` that each row reads [n]
    numbers: dict | None = None  # by split float32 [U, n, C] for U sets of fields

    def read_vectors(self, split, rows, fields):
        """rows of the split [G, B], index of each model's set of fields [G, 1] -> a list of their vectors and
        numbers [G, B, ΣC]; an empty one without
        """
        parts = [] if self.vectors is None else [self.vectors[self.users[split][rows]]]
        parts += [] if self.numbers is None else [self.numbers[split][fields, rows]]
        return [torch.cat(parts, 2)] if parts else []


def table_rows(split, fields, sizes, num_users, num_items, dropped=None):
    """User, item and further `fields` {split: int64 [n, P]} of `sizes` as rows of one table (eq. 8): {split:
    int64 [n, 2 + P]}, rows of the table, and the row of an unknown user, or if the ids that are dropped are
    those of field 1, of an unknown item. Users without a train row share one, and so do such items.
    """
    is_warm, is_warm_item = (np.bincount(split["train"][key], minlength=size) > 0
                             for key, size in (("user", num_users), ("item", num_items)))
    user_id = np.where(is_warm, np.arange(num_users), num_users)
    first_cold = int(is_warm_item.argmin())  # its row is theirs
    item_id = np.where(is_warm_item, np.arange(num_items), first_cold)
    num_users += dropped == 0 or not is_warm.all()
    first = np.cumsum([0, num_users, num_items, *sizes])
    ids = {name: torch.from_numpy(np.column_stack([user_id[frame["user"]], item_id[frame["item"]],
                                                   fields[name]]) + first[:-1])
           for name, frame in split.items()}
    return ids, int(first[-1]), num_users + first_cold if dropped == 1 else num_users - 1


def adam_(averages, grad, lr, step, penalty=None):
    """One step of Adam (Kingma and Ba, 2015) in place: averages = weight, mean, square; penalty: L2 factor"""
    weight, mean, square = averages
    grad = grad if penalty is None else grad + penalty * weight
    mean.lerp_(grad, 0.1)
    square.lerp_(grad * grad, 0.001)
    weight.sub_(lr * mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8))


@functools.cache  # a compiled step serves all stacks of its shape
def _functions(options, dropout, is_compiled):
    """A model, its logits for G copies, {is the batch full, so compiled: (the models' step, Adam's step)}"""
    model = build(*options)
    named = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in named.values()]

    def logits(flat, rows, buffers, *vectors, keep=None):
        """flat [D], the parameters one behind the other; rows [B, F, W] -> logits [B]"""
        parameters = {key: part.view(named[key].shape) for key, part in zip(named, flat.split(sizes))}
        return functional_call(model, (parameters, buffers), (rows, keep, *vectors))

    def loss(flat, rows, buffers, keep, label, *vectors):
        logit = logits(flat, rows, buffers, *vectors, keep=keep.to(rows.dtype) / (1 - dropout))
        return F.binary_cross_entropy_with_logits(logit, label)  # eq. 9

    def step_models_(averages, rows, buffers, inputs, lr, step):
        """One Adam step of the parameters [G, D], in place -> gradient of the rows [G, B, F, W]"""
        grad, rows_grad = vmap(torch.func.grad(loss, argnums=(0, 1)))(averages[0], rows, buffers, *inputs)
        adam_(averages, grad, lr, step)
        return rows_grad

    steps = dict.fromkeys((False, True), (step_models_, adam_))
    if is_compiled:
        torch._dynamo.config.recompile_limit = 10_000  # one per model and shape is expected
        steps[True] = torch.compile(step_models_, dynamic=False), torch.compile(adam_, dynamic=True)
    return model, vmap(logits), steps


class Stack:
    """G models of one kind side by side; `options` as for `build`. state, a dict of tensors [G, …]: `flat`
    [G, D], the parameters one behind the other, and Adam's averages of them, `mean` and `square`; `table`
    [G, num_rows, 3 W], the embeddings and Adam's averages; batch norm's statistics; options of the members
    """

    def __init__(self, options, members, rows, batch_size, dropout=0.0, is_compiled=False):
        self.model, self.logits, self.steps = _functions(options, dropout, is_compiled)
        self.device, self.width = rows.ids["train"].device, self.model.width
        self.batch_size, self.num_steps = batch_size, 0
        starts = [self.start(options, member, rows) for member in members]
        self.set_state({key: torch.stack([start[key] for start in starts]).to(self.device)
                        for key in starts[0]})

    def set_state(self, state):
        self.state = state
        self.tables = state["table"].view(-1, 3 * self.width)  # one behind the other [G num_rows, 3 W]
        self.total = torch.zeros_like(self.tables[:, :self.width])  # gradients summed by row
        self.buffers = {key: state[key] for key, _ in self.model.named_buffers()}  # of batch norm

    def start(self, options, member, rows):
        """One member's state before the first step, whatever the other members are.

        An id of n train rows starts with deviation start · n / (n + 100): products of small embeddings start
        on a saddle, which codes must leave, but the start of a rare id is noise that its few rows never wash
        out (0.08 of AUC on sparse data). interval: mean steps between two batches that have the id. The L2
        penalty is due in every step, but only rows of the batch move: there it is as many times as large.
        """
        ids, num_rows = rows.ids["train"][member.fields], rows.num_rows[member.fields]
        count = ids.flatten().bincount(minlength=max(rows.num_rows)).cpu()  # train rows of each id
        torch.manual_seed(member.seed)
        model = build(*options)
        table = torch.zeros(len(count), 3 * self.width)
        deviation = member.start * count / (count + 100)
        table[:num_rows, :self.width] = deviation[:num_rows, None] * torch.randn(num_rows, self.width)
        if model.first_order:
            table[:, self.width - 1] = 0.0
        interval = (len(ids) / (count * self.batch_size)).clamp(min=1).nan_to_num(posinf=1.0)
        flat = parameters_to_vector(model.parameters()).detach()
        numbers = {key: torch.tensor([getattr(member, key)]) for key in ("fields", "lr", "weight_decay")}
        return {"flat": flat, "mean": torch.zeros_like(flat), "square": torch.zeros_like(flat),
                "table": table, "interval": interval, **numbers, **dict(model.named_buffers())}

    def index(self, ids):
        """ids [G, B, F] of the members' own tables -> rows of `tables` [G B F]"""
        first = torch.arange(len(ids), device=self.device) * self.state["table"].shape[1]
        return (ids + first[:, None, None]).flatten()

    def train_step(self, ids, *inputs):
        """Adam on the parameters, and on the embedding rows of the batch; all other rows stay as they are.

        ids [G, B, F]; inputs: units that dropout keeps bool [G, B, num_units], labels [G, B], vectors if any
        """
        step_models_, adam_ = self.steps[ids.shape[1] == self.batch_size]
        state, index, num_models = self.state, self.index(ids), len(ids)
        self.num_steps += 1
        lr, step = state["lr"], torch.tensor(float(self.num_steps), device=self.device)
        read = self.tables.index_select(0, index).view(num_models, -1, 3 * self.width)  # [G, B F, 3 W]
        rows = read[..., :self.width].unflatten(1, ids.shape[1:])  # [G, B, F, W]
        averages = state["flat"], state["mean"], state["square"]
        grad = step_models_(averages, rows, self.buffers, inputs, lr, step)
        self.total.index_put_((index,), grad.flatten(0, 2), accumulate=True)
        # an id that the batch has twice moves once, by the sum
        grad = self.total.index_select(0, index).view(num_models, -1, self.width)
        self.total.index_fill_(0, index, 0.0)
        interval = state["interval"].flatten().index_select(0, index).view(num_models, -1, 1)  # [G, B F, 1]
        adam_(read.chunk(3, 2), grad, lr[..., None], step, state["weight_decay"][..., None] * interval)
        self.tables.index_copy_(0, index, read.flatten(0, 1))

    @torch.no_grad()
    def predict(self, rows, split, max_numbers=2**21):
        """Click probabilities of a split's rows: float64 numpy [G, n]; max_numbers: looked up at once"""
        self.model.eval()
        ids, state, parts = rows.ids[split], self.state, []
        size = max(1, max_numbers // (len(state["flat"]) * ids.shape[2] * self.width))
        for part in torch.arange(ids.shape[1], device=self.device).split(size):
            part_ids = ids[state["fields"], part]  # [G, b, F]
            read = self.tables[self.index(part_ids), :self.width].unflatten(0, part_ids.shape)
            vectors = rows.read_vectors(split, part.expand(len(read), -1), state["fields"])
            parts.append(self.logits(state["flat"], read, self.buffers, *vectors).sigmoid())
        return torch.cat(parts, 1).double().cpu().numpy()


@torch.no_grad()
def train_stack(args, name, members, rows, is_compiled=False):
    """Train side by side with stage 4's options: figures on valid at each one's best epoch, a stack of these
    weights. Order of rows and dropout are those of a member's seed, whatever is trained beside it. A member
    without progress for `--patience` epochs is done, even where compiled companions keep it in the stack.
    """
    options = (name, rows.ids["train"].shape[2] + len(rows.dims), args.field_dim, args.layers,
               tuple(args.hidden), rows.dims)
    stack = Stack(options, members, rows, args.batch_size, args.dropout, is_compiled)
    best = [{"valid_logloss": float("inf"), "best_epoch": 0} for _ in members]
    saved = {key: part.clone() for key, part in stack.state.items()}
    running, is_done = np.arange(len(members)), np.zeros(len(members), dtype=bool)
    seeds = sorted({member.seed for member in members})
    seed_index = torch.tensor([seeds.index(member.seed) for member in members])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for epoch in range(1, args.epochs + 1):
        train_epoch(args, stack, rows, generators, seed_index[running])
        for index, (member, probabilities) in enumerate(zip(running, stack.predict(rows, "valid"))):
            valid = logloss(rows.labels["valid"], probabilities)
            # nan, from a rate too high, is no progress
            if not is_done[member] and valid < best[member]["valid_logloss"]:
                auc = roc_auc_score(rows.labels["valid"], probabilities)
                best[member] = {"valid_logloss": valid, "valid_auc": auc, "best_epoch": epoch}
                for key, part in stack.state.items():
                    saved[key][member] = part[index]
        is_done |= np.array([epoch - one["best_epoch"] >= args.patience for one in best])
        if is_done.all():
            break
        if is_done[running].any() and not is_compiled:  # a compiled step holds for one G
            goes_on = ~is_done[running]
            stack.set_state({key: part[torch.from_numpy(goes_on)] for key, part in stack.state.items()})
            running = running[goes_on]
    stack.set_state(saved)
    return best, stack


def train_epoch(args, stack, rows, generators, seed_index, num_steps=64):
    """One pass over the train rows; generators: one for each of S seeds; seed_index [G]: each member's"""
    labels = torch.from_numpy(rows.labels["train"]).to(stack.state["flat"])
    fields, device = stack.state["fields"], stack.device
    stack.model.train()
    order = torch.stack([torch.randperm(len(labels), generator=generator) for generator in generators])
    for part in order.split(args.batch_size * num_steps, 1):  # [S, n], num_steps batches at once
        keep = torch.empty(*part.shape, stack.model.num_units, dtype=torch.bool)
        is_dropped = torch.empty(part.shape, dtype=torch.bool)
        for k, generator in enumerate(generators):
            keep[k].bernoulli_(1 - args.dropout, generator=generator)
            is_dropped[k].bernoulli_(args.id_dropout, generator=generator)
        chosen, keep = part[seed_index].to(device), keep.to(device)[seed_index]  # [G, n], [G, n, num_units]
        ids = rows.ids["train"][fields, chosen]  # [G, n, F]
        if args.id_dropout:
            ids[..., rows.dropped].masked_fill_(is_dropped[seed_index].to(device), rows.unknown)
        inputs = ids, keep, labels[chosen], *rows.read_vectors("train", chosen, fields)
        for batch in zip(*(tensor.split(args.batch_size, 1) for tensor in inputs)):
            stack.train_step(*batch)
