"""Table 6: seconds per 10,000 rows of a DCN that serves without codes, with the bank, vectors, or taste."""

import time

import numpy as np
import torch

from userip.ctr_models import build
from userip.ctr_report import markdown
from userip.taste import NUM_COORDINATES


class FoldedDCN:
    """A DCN ready to serve: users and items keep the few numbers that it reads of them, the bank folded in.

    By induction x_l = α_l x_0 + β_l with β_l = b_0 + … + b_{l-1}, α_{l+1} = α_l (1 + w_lᵀ x_0) + w_lᵀ β_l. So
    of x_0 the model reads only w_lᵀ x_0 [L], the head's part [1] and the MLP's first layer [H]. These are
    sums over the fields; the parts of a user and of the user's codes are added in advance, and so are those
    of an item and of the item's codes.
    """

    def __init__(self, net, tables, codes, item_codes):
        """net: common.DCN; tables: embeddings [n_f, E] of user, item, the users' codes, the items' codes;
        codes int64 [N, P], item_codes int64 [M, P']
        """
        first, *self.layers = net.mlp.layers
        input_dim = net.weights.shape[1]
        maps = torch.cat([net.weights, net.head.weight[:, :input_dim], first.weight])  # [L + 1 + H, X]
        users, self.items, *code_parts = (table @ part.T for table, part in zip(tables, maps.split(
            [table.shape[1] for table in tables], 1)))
        parts = iter(code_parts)
        self.users = users + sum(next(parts)[code] for code in codes.T)  # [N, L + 1 + H]
        self.items = self.items + sum(next(parts)[code] for code in item_codes.T)  # [M, L + 1 + H]
        self.items[:, -len(first.bias):] += first.bias
        biases = torch.cat([torch.zeros(1, input_dim), net.biases.cumsum(0)])  # β_0 … β_L
        self.steps = (net.weights * biases[:-1]).sum(1).tolist()  # w_lᵀ β_l
        self.head = net.head.weight[0, input_dim:]
        self.constant = net.head.bias + biases[-1] @ net.head.weight[0, :input_dim]

    def __call__(self, user, item):
        """user and item int64 [B] -> logits [B]"""
        read = self.users.index_select(0, user) + self.items.index_select(0, item)
        num_layers, scale = len(self.steps), 1.0
        for k, step in enumerate(self.steps):
            scale = scale * (1 + read[:, k]) + step
        hidden = read[:, num_layers + 1:].relu()
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return torch.addmv(self.constant + scale * read[:, num_layers], hidden, self.head)


@torch.no_grad()
def serving_figures(args, codes, item_codes, code_sizes, vectors, rounds=((1, 1000), (10_000, 60))):
    """codes int64 [N, P], item_codes int64 [M, P'], code_sizes [P + P'], vectors [N, C] (the profiles),
    rounds: batch size, number of requests -> {mode of serving: megabytes held, median and p99 seconds per
    10,000 rows by batch size}, with random weights
    """
    torch.manual_seed(0)
    sizes = [len(codes), len(item_codes), *code_sizes]
    tables = [torch.randn(size, args.field_dim) for size in sizes]
    table, first = torch.cat(tables), torch.tensor([0, *sizes[:-1]]).cumsum(0)
    plain, with_bank, with_vectors, with_taste = (
        build("dcn", num_fields, args.field_dim, args.layers, args.hidden, dims).eval()
        for num_fields, dims in ((2, ()), (len(sizes), ()), (3, [vectors.shape[1]]), (3, [1])))
    taste, item_taste = (torch.randn(size, NUM_COORDINATES) for size in sizes[:2])
    bank, item_bank = (part.to(torch.uint8 if max(code_sizes) < 256 else torch.int32)
                       for part in (codes, item_codes))
    folded = FoldedDCN(plain, tables[:2], codes[:, :0], item_codes[:, :0])
    folded_bank = FoldedDCN(with_bank, tables, codes, item_codes)

    def rows(user, item, *more):
        """user, item [B], more ids [B, P] -> rows of the table [B, F, E]"""
        ids = torch.cat([torch.stack([user, item], 1), *more], 1)
        return table.index_select(0, (ids + first[:ids.shape[1]]).flatten()).view(*ids.shape, -1)

    modes = {  # function of user and item [B] -> logits [B], and the tensors that it holds
        "DCN": (lambda user, item: plain(rows(user, item)), [*tables[:2], *plain.parameters()]),
        "DCN + bank": (lambda user, item: with_bank(rows(user, item, bank[user], item_bank[item])),
                       [*tables, *with_bank.parameters(), bank, item_bank]),
        "DCN + vectors": (lambda user, item: with_vectors(rows(user, item), None, vectors[user]),
                          [*tables[:2], *with_vectors.parameters(), vectors]),
        "DCN + taste": (lambda user, item: with_taste(rows(user, item), None, torch.linalg.vecdot(
            taste[user], item_taste[item])[:, None]),
                        [*tables[:2], *with_taste.parameters(), taste, item_taste]),
        "DCN, folded": (folded, [folded.users, folded.items]),
        "DCN + bank, folded": (folded_bank, [folded_bank.users, folded_bank.items])}
    return time_modes(modes, (len(codes), len(item_codes)), rounds)


@torch.no_grad()
def time_modes(modes, limits, rounds=((1, 1000), (10_000, 60))):
    """modes {name: (function of user and item [B] -> logits [B], tensors held)}, numbers of users and items
    -> figures as `serving_figures`
    """
    figures = {name: {"megabytes": sum(part.nbytes for part in held) / 2**20}
               for name, (_, held) in modes.items()}
    for size, num_rounds in rounds:
        taken = {name: [] for name in modes}
        for _ in range(num_rounds):
            user, item = (torch.randint(limit, (size,)) for limit in limits)
            for name, (serve, _) in modes.items():
                started = time.perf_counter()
                serve(user, item).sigmoid()
                taken[name].append((time.perf_counter() - started) * 10_000 / size)
        for name, seconds in taken.items():  # the first ones warm the caches
            median, p99 = np.quantile(seconds[num_rounds // 10:], [0.5, 0.99])
            figures[name] |= {f"median_{size}": median, f"p99_{size}": p99}
    return figures


def serving_table(figures):
    """Table 6 as a list of lines"""
    columns = {"median_1": "batch 1: median", "p99_1": "p99", "median_10000": "batch 10,000: median",
               "p99_10000": "p99"}
    lines = [[name, *(f"{row[column]:.4f}" for column in columns),
              f"{row['median_10000'] / figures['DCN']['median_10000']:.2f}", f"{row['megabytes']:.2f}"]
             for name, row in figures.items()]
    return ["Table 6: seconds per 10,000 rows, random weights, "
            f"{torch.get_num_threads()} threads; the paper: DCN 0.93, UserIP + DCN 1.21, KAR + DCN 4.78.", "",
            *markdown(["mode of serving", *columns.values(), "ratio to DCN", "held (MB)"], lines)]
