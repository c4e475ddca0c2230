"""Baseline KAR: an LLM's knowledge of users and items as dense fields of a click model.

KAR (Xi et al., "Towards Open-World Recommendation with Knowledge Augmentation from Large Language Models",
2023) asks a frozen LLM what a user prefers, by their rated history, and what an item is like. An encoder
makes a vector of each answer, r_u and r_i. A hybrid-expert adaptor, trained with the click model, makes them
narrow: shared experts read both kinds, own experts read one, and a gate softmax(W r) weighs them. The click
model reads the result as dense fields beside the ids. The LLM runs offline, the adaptor online or in advance.

As in the paper: generated answers (--text generated), greedy; mean pool as encoding; shared and own experts
with softmax gates; adaptor and click model trained together on binary cross-entropy.
What differs from the paper: the LLM itself is the encoder; prompts are one sentence; vectors are
standardized by users and items of train rows; a train row's own rating is not in the prompt (--folds: r_u is
made without each fold of the rows, and a train row reads the one without its own); users beyond --max-users,
drawn at random, have the mean r_u; the click model is a DCN with stage 4's options, but for Adam, which
pulls the embeddings of all ids in every step. --text history encodes the prompt itself, without generation.

Sets of features: `none` (the DCN alone), `random` (the first --text's vectors, dealt to other users and
items: the control), and `generated` or `history`. Training stops early on valid logloss, the best epoch's
weights are restored, test is scored once. A killed run continues.

Reads   interactions.parquet, items.parquet, users.parquet
Writes  baseline-kar.parquet: per (features, seed) rows (of train), test_rows, auc, logloss, valid figures
        baselines/kar/: finished work, and the LLM where --llm is tiny

Example: python baselines/kar.py --llm tiny        (6 minutes on two cores)
  wrote runs/demo/baseline-kar.parquet: 9 rows | none AUC 0.6662 … | random AUC 0.6650 … | generated …
"""

# ruff: noqa: E402
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/kar.py` finds userip/
import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import copy
import itertools

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import DCN, logloss
from userip.artifacts import fail
from userip.baseline import (SPLITS, WORDS, Finished, answer, baseline_parser, capped, code_digests,
                             encode_items, figures_of, load_baseline_llm, pool_in_blocks, read_data,
                             refuse_beyond_context, refuse_unread, tell_of_cut, write_baseline)
from userip.ctr_training import table_rows
from userip.evidence import assign_folds
from userip.options import at_least, run_program, start_stage
from userip.serving import serving_table, time_modes

# as in stage 4: width E of embeddings, cross layers, MLP, dropout, L2 penalty and start of the embeddings
FIELD_DIM, LAYERS, HIDDEN, DROPOUT, WEIGHT_DECAY, START = 8, 3, (16, 16), 0.2, 3e-3, 0.5
USER_QUESTION = "Considering category, brand and price, the user prefers"
ITEM_QUESTION = "The item is"
BLOCK = 32  # prompts that are answered side by side
BANK_SIZES = 5, 4  # codes of two profiles and "unknown", as stage 3 makes them, for the comparison of costs


def parse_args(argv=None):
    parser, add = baseline_parser(__doc__)
    add.data("--max-history", type=at_least(1), default=20, help="latest rated items of a user in the prompt")
    add.data("--folds", type=at_least(2, at_most=100), default=5,
             help="r_u is made without each of so many folds of the train rows, too")
    add.data("--max-users", type=at_least(1), help="users that the LLM writes about, at most (default: all)")
    add.method("--text", nargs="+", choices=["generated", "history"], default=["generated"],
               help="encode what the LLM answers, the prompt itself, or each in turn")
    add.method("--new-tokens", type=at_least(1, at_most=1000), default=24, help="of an answer, at most")
    add.method("--shared-experts", type=at_least(1, at_most=100), default=2, help="that read r_u and r_i")
    add.method("--own-experts", type=at_least(1, at_most=100), default=2, help="of r_u, and of r_i")
    add.method("--expert-dim", type=at_least(1, at_most=4096), default=16, help="width of an expert's output")
    add.method("--id-dropout", type=at_least(0, float, 0.99), default=0.0,
               help="share of users, or of items on a cold-item split, that are unknown in training")
    add.training("--lr", type=at_least(1e-12, float), default=0.005, help="learning rate of Adam")
    add.training("--batch-size", type=at_least(1), default=512, help="rows per step")
    add.training("--epochs", type=at_least(1), default=50, help="passes over the train rows at most")
    add.training("--patience", type=at_least(1), default=6, help="stop after so many epochs without progress")
    args = parser.parse_args(argv)
    args.text = list(dict.fromkeys(args.text))
    refuse_unread(parser, args, {"new_tokens": ("generated" in args.text, "--text generated")})
    return args


# ----------------------------------------------------------------------------------------------------------
# texts: prompts, answers, vectors
# ----------------------------------------------------------------------------------------------------------


def user_prompts(args, data, rows):
    """What each of N users liked and disliked among `rows`, their latest ones: list of N texts"""
    rows = rows.groupby("user").tail(args.max_history)  # sorted by user and time
    titles = data.items["title"].to_numpy()[rows["item"]]
    lists = pd.Series(titles, index=rows.index).groupby([rows["user"], rows["label"]]).agg("; ".join)
    parts = [f"The user {word}: {{}}." for word in WORDS[::-1]]
    named = {label: lists.xs(label, level=1) if label in lists.index.levels[1] else {} for label in (0, 1)}
    return [" ".join(part.format(named[label].get(user, "nothing")) for part, label in zip(parts, (1, 0)))
            for user in range(data.num_users)]


def answers(args, llm, finished, asked):
    """The LLM's answers, one per text that is asked, and the tokens that it read or wrote"""
    blocks = [asked[first:first + BLOCK] for first in range(0, len(asked), BLOCK)]
    sizes = args.new_tokens, args.tokens_per_batch
    parts = [finished.compute([llm.digest, "answer", llm.device, *sizes, block],
                              lambda: answer(llm, block, *sizes))
             for block in tqdm(blocks, desc="answer", unit="text", unit_scale=BLOCK, mininterval=2)]
    return [text for texts, _ in parts for text in texts], sum(count for _, count in parts)


def encode(args, llm, finished, prompts, question):
    """Prompts, some alike, each answered if there is a question, and encoded once: float32 [R, D], tokens"""
    unique = list(dict.fromkeys(prompts))
    asked = [f"{prompt} {question}".rstrip() for prompt in unique]
    tell_of_cut(llm, asked, args.new_tokens * bool(question), "take less (--max-history)")
    texts, num_written = answers(args, llm, finished, asked) if question else (unique, 0)
    vectors, num_read = pool_in_blocks(args, llm, finished, texts)
    index = {text: number for number, text in enumerate(unique)}
    return vectors[[index[prompt] for prompt in prompts]], num_written + num_read


def standardized(vectors, is_fitted):
    """vectors [R, D] less the mean, over the deviation of those that are fitted, bool [R]"""
    fitted = vectors[is_fitted]
    return (vectors - fitted.mean(0)) / fitted.std(0, correction=0).clamp(min=1e-6)


def knowledge(args, llm, data, finished, text):
    """r_u float32 [F + 1, N, D], without each fold and, last, with all rows; r_i [M, D]; the fold of each
    train row int64 [n]; tokens per user. text: generated or history
    """
    user_question, item_question = (USER_QUESTION, ITEM_QUESTION) if text == "generated" else ("", "")
    train, history = data.split["train"], data.history
    fold = pd.Series(assign_folds(train, args.folds, args.seed), index=train.index)
    fold_of_row = fold.reindex(history.index, fill_value=-1)
    is_warm, is_train_item = torch.from_numpy(data.is_warm), torch.from_numpy(data.is_train_item)
    chosen = capped(data.num_users, args.max_users, args.seed)
    if not data.is_warm[chosen].any():
        fail(f"--max-users {args.max_users}: none of those drawn has a train row: take more")
    prompts = [texts[user] for texts in (user_prompts(args, data, history[fold_of_row != left_out])
                                         for left_out in range(args.folds + 1)) for user in chosen]
    read, num_tokens = encode(args, llm, finished, prompts, user_question)
    read = standardized(read, is_warm[chosen].repeat(args.folds + 1))  # [(F + 1) n, D] of n chosen users
    users = torch.zeros(args.folds + 1, data.num_users, read.shape[1])  # 0, the mean, of all others
    users[:, chosen] = read.unflatten(0, (args.folds + 1, -1))
    items, count = encode_items(data, lambda texts: encode(args, llm, finished, texts, item_question))
    tokens_per_user = num_tokens / len(chosen) + count / data.num_users
    return users, standardized(items, is_train_item), fold.to_numpy(), tokens_per_user


# ----------------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """n experts side by side, each a network of one hidden layer: r [B, D] -> [B, n, q]"""

    def __init__(self, num, dim, expert_dim, hidden=32):
        super().__init__()
        self.first, self.dropout = nn.Linear(dim, num * hidden), nn.Dropout(DROPOUT)
        # outputs start small: beside large ones the embeddings of ids do not leave their saddle point
        self.second = nn.Parameter(0.1 * torch.randn(num, hidden, expert_dim) / hidden**0.5)

    def forward(self, r):
        hidden = self.dropout(self.first(r).relu()).unflatten(1, (len(self.second), -1))  # [B, n, H]
        return torch.einsum("bnh,nhq->bnq", hidden, self.second)


class HybridExperts(nn.Module):
    """r_u, r_i [B, D] -> [B, q] each: Σ_e softmax(W r)_e E_e(r), e a shared expert or one of the kind"""

    def __init__(self, dim, num_shared, num_own, expert_dim):
        super().__init__()
        self.shared = Experts(num_shared, dim, expert_dim)
        self.own = nn.ModuleList(Experts(num_own, dim, expert_dim) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(dim, num_shared + num_own, bias=False) for _ in range(2))

    def adapt(self, kind, r):
        """kind 0: r_u, 1: r_i"""
        gate = self.gates[kind](r).softmax(1)  # [B, S + O]
        outputs = torch.cat([self.shared(r), self.own[kind](r)], 1)  # [B, S + O, q]
        return (gate[:, :, None] * outputs).sum(1)

    def forward(self, r_u, r_i):
        return self.adapt(0, r_u), self.adapt(1, r_i)


class KAR(nn.Module):
    """Ids [B, 2] of one embedding table and, with experts, r_u and r_i [B, D] -> logits [B] of a DCN"""

    def __init__(self, deviation, experts=None, expert_dim=0):
        """deviation [rows of the table]: at which each id's embedding starts, see `Stack.start`"""
        super().__init__()
        self.table = nn.Embedding.from_pretrained(
            deviation[:, None] * torch.randn(len(deviation), FIELD_DIM), freeze=False)
        self.experts = experts
        self.dcn = DCN(2 * FIELD_DIM + 2 * expert_dim, 1, LAYERS, HIDDEN, DROPOUT)  # x_0 one number a field

    def forward(self, ids, *vectors):
        adapted = self.experts(*vectors) if self.experts else ()
        return self.dcn(torch.cat([self.table(ids).flatten(1), *adapted], 1))


# ----------------------------------------------------------------------------------------------------------
# train and evaluate
# ----------------------------------------------------------------------------------------------------------


class Reader:
    """What the rows of each split read: ids, and of r_u and r_i what they are given"""

    def __init__(self, data, vectors, device):
        """vectors: () or r_u [F + 1, N, D], r_i [M, D], fold of each train row [n]"""
        split = {name: data.split[name] for name in SPLITS}
        nothing = {name: np.zeros((len(frame), 0), dtype=np.int64) for name, frame in split.items()}
        ids, self.num_rows, self.unknown = table_rows(split, nothing, [], data.num_users, data.num_items,
                                                      data.dropped)
        self.ids = {name: part.to(device) for name, part in ids.items()}
        self.users, self.items = (part.to(device) for part in vectors[:2]) if vectors else (None, None)
        self.index = {name: [torch.tensor(frame[key].to_numpy(), device=device) for key in ("user", "item")]
                      for name, frame in split.items()}
        last = len(vectors[0]) - 1 if vectors else 0  # the vectors with all rows
        self.fold = {name: torch.full((len(frame),), last, device=device) for name, frame in split.items()}
        if vectors:
            self.fold["train"] = torch.tensor(vectors[2], device=device)

    def read(self, name, rows):
        """rows int64 [B] of a split -> ids [B, 2], and r_u, r_i [B, D] if there are any"""
        if self.users is None:
            return self.ids[name][rows], ()
        user, item = (index[rows] for index in self.index[name])
        return self.ids[name][rows], (self.users[self.fold[name][rows], user], self.items[item])


@torch.no_grad()
def predict(model, reader, name):
    """Probabilities of a split's rows, float64 numpy [n]"""
    model.eval()
    parts = [model(ids, *vectors).sigmoid() for ids, vectors in (
        reader.read(name, rows) for rows in torch.arange(len(reader.ids[name])).split(2**14))]
    return torch.cat(parts).double().cpu().numpy()


def start_model(args, reader, seed):
    """The model before its first step; ids of few rows start near 0, as in `Stack.start`"""
    torch.manual_seed(seed)
    dim = 0 if reader.users is None else args.expert_dim
    sizes = args.shared_experts, args.own_experts, dim
    experts = HybridExperts(reader.users.shape[2], *sizes) if dim else None
    count = reader.ids["train"].flatten().bincount(minlength=reader.num_rows).cpu()
    return KAR(START * count / (count + 100), experts, dim).to(reader.ids["train"].device)


def train(args, data, vectors, seed):
    """Train one model -> {"row": its figures, "state": its weights}"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = Reader(data, vectors, device)
    model, generator = start_model(args, reader, seed), torch.Generator().manual_seed(seed)
    labels = torch.tensor(data.labels["train"], dtype=torch.float32, device=device)
    others = [weight for name, weight in model.named_parameters() if name != "table.weight"]
    optimizer = torch.optim.Adam([{"params": [model.table.weight], "weight_decay": WEIGHT_DECAY},
                                  {"params": others}], lr=args.lr)
    best, state, best_epoch = float("inf"), None, 0
    for epoch in range(1, args.epochs + 1):
        model.train()
        order = torch.randperm(len(labels), generator=generator)
        is_dropped = torch.rand(len(labels), generator=generator) < args.id_dropout
        for rows in order.split(args.batch_size):
            ids, read = reader.read("train", rows)
            if args.id_dropout:
                ids[is_dropped[rows].to(device), data.dropped] = reader.unknown  # of a copy
            loss = F.binary_cross_entropy_with_logits(model(ids, *read), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss = logloss(data.labels["valid"], predict(model, reader, "valid"))
        if loss < best:
            best, state, best_epoch = loss, copy.deepcopy(model.state_dict()), epoch
        if epoch - best_epoch >= args.patience:
            break
    if state is None:
        fail(f"no finite logloss on valid with --lr {args.lr:g}: lower it")
    model.load_state_dict(state)
    row = {"seed": seed, "rows": len(labels), "test_rows": len(data.labels["test"]), "best_epoch": best_epoch}
    for name, prefix in (("test", ""), ("valid", "valid_")):
        row |= figures_of(data.labels[name], predict(model, reader, name), prefix)
    return {"row": row, "state": state}


def dealt(data, vectors, seed):
    """The control: users exchange their r_u, items their r_i, those of train rows among themselves"""
    users, items, fold = vectors
    rng, orders = np.random.default_rng([seed, 5]), []
    for is_warm in (data.is_warm, data.is_train_item):
        order = np.arange(len(is_warm))
        for group in (is_warm, ~is_warm):
            order[group] = rng.permutation(order[group])
        orders.append(order)
    return users[:, orders[0]], items[orders[1]], fold


# ----------------------------------------------------------------------------------------------------------
# serving
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def serving(args, users, items, rounds=((1, 300), (10_000, 30))):
    """Seconds per 10,000 rows and bytes held of the DCN alone, with a bank of codes, and of KAR with the
    adaptor online and in advance; random weights. users, items: r_u [N, D], r_i [M, D]
    """
    torch.manual_seed(0)
    users, items, width = users.cpu(), items.cpu(), 2 * FIELD_DIM
    user_table, item_table = (torch.randn(len(part), FIELD_DIM) for part in (users, items))
    code_tables = [torch.randn(size, FIELD_DIM) for size in BANK_SIZES]
    codes = torch.stack([torch.randint(size, (len(users),)) for size in BANK_SIZES], 1).to(torch.uint8)
    plain, banked, adapted = (DCN(width + more, 1, LAYERS, HIDDEN).eval() for more in (
        0, 2 * FIELD_DIM, 2 * args.expert_dim))
    experts = HybridExperts(users.shape[1], args.shared_experts, args.own_experts, args.expert_dim).eval()
    stored = [torch.cat([experts.adapt(kind, block) for block in part.split(4096)])
              for kind, part in enumerate((users, items))]
    held = [user_table, item_table]
    read = lambda user, item, pair: [pair[0].index_select(0, user), pair[1].index_select(0, item)]
    join = lambda user, item, *parts: torch.cat([*read(user, item, held), *parts], 1)
    bank = lambda own: [table.index_select(0, own[:, k].int()) for k, table in enumerate(code_tables)]
    modes = {
        "DCN": (lambda user, item: plain(join(user, item)), [*held, *plain.parameters()]),
        "DCN + bank": (lambda user, item: banked(join(user, item, *bank(codes.index_select(0, user)))),
                       [*held, *banked.parameters(), *code_tables, codes]),
        "DCN + KAR, adaptor online": (
            lambda user, item: adapted(join(user, item, *experts(*read(user, item, (users, items))))),
            [*held, *adapted.parameters(), *experts.parameters(), users, items]),
        "DCN + KAR, adapted in advance": (
            lambda user, item: adapted(join(user, item, *read(user, item, stored))),
            [*held, *adapted.parameters(), *stored])}
    return time_modes(modes, (len(users), len(items)), rounds)


def print_serving(figures):
    """The costs as in table 6, and what the bank saves, beside what is said of the paper"""
    print("\n".join(serving_table(figures)))
    for name in list(figures)[2:]:
        time_saved, memory_saved = (1 - figures["DCN + bank"][key] / figures[name][key]
                                    for key in ("median_10000", "megabytes"))
        print(f"DCN + bank against {name}, batches of 10,000: {time_saved:.0%} less time, {memory_saved:.0%} "
              f"less memory (said of the paper: 52% and 37%; its seconds, 1.21 against 4.78, are 75% less)")


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def main(args):
    start_stage(args)
    data = read_data(args)
    llm = load_baseline_llm(args, data, [USER_QUESTION, ITEM_QUESTION, "The user liked:"], "kar")
    refuse_beyond_context(llm, [USER_QUESTION], args.new_tokens, f"--new-tokens {args.new_tokens}")
    finished = Finished(args, "kar", code_digests("userip/baseline.py"))
    decisive = {key: option for key, option in vars(args).items() if key not in ("run_dir", "seeds", "text")}
    decisive |= data.digests | {"llm": llm.digest, "device": llm.device} | code_digests(
        "baselines/kar.py", "common.py", "userip/baseline.py", "userip/ctr_training.py", "userip/evidence.py")
    vectors, costs, rows = {}, {"none": {"tokens_per_user": 0.0, "seconds": 0.0}}, []
    for text in args.text:
        before = finished.seconds
        *vectors[text], num_tokens = knowledge(args, llm, data, finished, text)
        costs[text] = {"tokens_per_user": num_tokens, "seconds": finished.seconds - before}
        users, items, _ = vectors[text]
        print(f"{text}: r_u {[*users.shape]}, {num_tokens:,.0f} tokens of the LLM per user")
    costs["random"] = costs[args.text[0]]
    figures = serving(args, users[-1], items)
    for features, cost in costs.items():
        mode = figures["DCN" if features == "none" else "DCN + KAR, adaptor online"]
        cost |= {"milliseconds": 1000 * mode["median_10000"], "bytes": mode["megabytes"] * 2**20}
    for features, seed in itertools.product(["none", "random", *args.text],
                                            range(args.seed, args.seed + args.seeds)):
        read = () if features == "none" else vectors.get(features) or dealt(data, vectors[args.text[0]], seed)
        before = finished.seconds
        told = args.text[0] if features == "random" else ""  # whose vectors are dealt
        trained = finished.compute([decisive, features, told, seed],
                                   lambda: train(args, data, read, seed))
        seconds = costs[features]["seconds"] + finished.seconds - before
        rows.append({"features": features} | trained["row"] | costs[features] | {"seconds": seconds})
        print(f"{features}, seed {seed} | valid auc {rows[-1]['valid_auc']:.4f} logloss "
              f"{rows[-1]['valid_logloss']:.4f} | epoch {rows[-1]['best_epoch']} | "
              f"{rows[-1]['seconds']:.1f}s", flush=True)
    print_serving(figures)
    write_baseline(args, "kar", data, rows, modes=figures)


if __name__ == "__main__":
    run_program(main, parse_args)
