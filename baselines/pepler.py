"""Baseline PEPLER: a user and an item as one soft token each before a review; a frozen LLM; a rating head.

As in the paper (Li, Zhang and Chen, Personalized Prompt Learning for Explainable Recommendation, 2023, with
continuous prompts), the sequence is [u] [i] and the words that explain the recommendation. The vectors u and
i are trained by the language model loss on the words, and by a recommendation loss, the regularizer: a rating
is foretold from the same two vectors, by --head mf, <u, i>, or --head mlp, MLP([u ; i]). Words are the first
sentence of the review; where the data have no reviews, the item's text. Explanations of test rows are
generated greedily. Valid rows stop the training (logloss), test rows are scored once.

What differs from the paper: the recommendation loss is binary cross-entropy on the label, not the squared
error of the rating, since CTR models are compared here. The LLM stays frozen; the paper tunes it, too, once
u and i have settled. Only --text-rows rows an epoch have a language model loss, all rows the other loss. A
user or an item without a train row has the mean vector of the others. --text-weight 0 is the control: the
same head and vectors, no LLM.

Reads   interactions.parquet, items.parquet, users.parquet
Writes  baseline-pepler.parquet: features (the head), seed, auc, logloss, valid figures; where there are
        reviews, bleu4, rouge1, rouge2, rougeL, distinct1, distinct2, usr (nete: fmr) of the explanations
        pepler.csv: user, item, written and generated text of the first head and seed
        baselines/: the tiny LLM (one for PEPLER and PeaPOD), and each training's state

Example: python baselines/pepler.py        (about 12 minutes on two cores, estimated)
  wrote runs/demo/baseline-pepler.parquet: 6 rows | mlp AUC 0.6561 logloss 0.6313 | mf AUC …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/pepler.py` finds userip/

import userip  # noqa: F401, E402  (first: Ctrl-C ends in one line while the others load)
import copy
import functools
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from common import MLP, logloss
from userip.artifacts import check_finite, whole_file
from userip.baseline import (Finished, baseline_parser, code_digests, figures_of, item_texts,
                             load_baseline_llm, read_data, refuse_unread, write_baseline)
from userip.epochs import train_epochs
from userip.explanations import TASKS, explain, read_reviews, text_nll, text_tokens
from userip.options import at_least, run_program, start_stage
from userip.serving import time_modes
from userip.text_metrics import text_figures

CODE = "baselines/pepler.py", "common.py", *(f"userip/{room}.py" for room in (
    "baseline", "epochs", "evidence", "explanations", "prompt"))
WEIGHT_DECAY = {"mlp": 1.0, "mf": 0.3}  # chosen on valid rows of planted data


def parse_args(argv=None):
    parser, add = baseline_parser(__doc__)
    add.data("--text-rows", type=at_least(1), default=1000, help="train rows an epoch whose text is read")
    add.data("--max-texts", type=at_least(1), default=500, help="test rows that are explained")
    add.method("--head", nargs="+", choices=("mlp", "mf"), default=["mlp", "mf"],
               help="the rating: MLP([u ; i]) or <u, i>")
    add.method("--hidden", type=at_least(1, at_most=100_000), nargs="+", default=[64],
               help="widths of the MLP")
    add.method("--text-weight", type=at_least(0, float), default=0.1, help="weight of the LM loss; 0: none")
    add.training("--epochs", type=at_least(1), default=100, help="passes over the train rows at most")
    add.training("--patience", type=at_least(1), default=3, help="stop after so many epochs without progress")
    add.training("--lr", type=at_least(1e-12, float), default=0.01, help="learning rate of AdamW")
    add.training("--weight-decay", type=at_least(0, float), help="of AdamW (default: mlp 1.0, mf 0.3)")
    add.training("--batch-size", type=at_least(1), default=512, help="rows per step")
    args = parser.parse_args(argv)
    args.head = list(dict.fromkeys(args.head))
    has_text = (args.text_weight > 0, "--text-weight above 0")
    refuse_unread(parser, args, {
        "hidden": ("mlp" in args.head, "--head mlp"), "text_rows": has_text, "max_texts": has_text})
    return args


# ----------------------------------------------------------------------------------------------------------
# model
# ----------------------------------------------------------------------------------------------------------


class PEPLER(nn.Module):
    """head: mlp or mf; is_known: bool [N], bool [M], who has train rows; vectors are in units of `scale`, the
    deviation of the LLM's embeddings
    """

    def __init__(self, head, is_known, width, scale, hidden):
        super().__init__()
        self.scale = scale
        self.user, self.item = (nn.Parameter(torch.randn(len(known), width)) for known in is_known)
        self.register_buffer("user_known", is_known[0])
        self.register_buffer("item_known", is_known[1])
        self.bias = nn.Parameter(torch.zeros(()))
        self.head = head
        if head == "mlp":
            self.mlp, self.out = MLP(2 * width, hidden), nn.Linear(hidden[-1], 1)

    @torch.no_grad()
    def fill(self):
        """Who has no train row gets the mean vector of those who have one; no gradient reaches them."""
        for table, is_known in ((self.user, self.user_known), (self.item, self.item_known)):
            table[~is_known] = table[is_known].mean(0)

    def vectors(self, user, item):
        """u, i of rows [B] -> [B, D], [B, D]"""
        return self.scale * self.user[user], self.scale * self.item[item]

    def prefix(self, bos, user, item):
        """BOS, u, i: embeddings [B, L, D]"""
        soft = torch.stack(self.vectors(user, item), 1)
        return torch.cat([bos.expand(len(soft), -1, -1), soft], 1)

    def forward(self, user, item):
        """user, item [B] -> logits [B]"""
        u, i = self.vectors(user, item)
        if self.head == "mf":
            return (u * i).sum(1) / self.scale + self.bias
        return self.out(self.mlp(torch.cat([u, i], 1) / self.scale)).squeeze(1) + self.bias


# ----------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------


def batch_loss(args, model, run, rows, num_texts):
    """BCE of these train rows [B], LM loss of the first num_texts of them -> loss [], both parts [2]"""
    user, item = run.ids["train"][rows].T
    rec_loss = F.binary_cross_entropy_with_logits(model(user, item), run.labels["train"][rows])
    text_loss = rec_loss.new_zeros(())
    if num_texts:
        texts = [run.texts[row] for row in rows[:num_texts]]
        prefix = model.prefix(run.bos, user[:num_texts], item[:num_texts])
        text_loss = text_nll(run.llm, prefix, *text_tokens(run.llm, texts)).mean()
    parts = torch.tensor([rec_loss.item(), text_loss.item()])
    return rec_loss + args.text_weight * text_loss, parts


def num_texts_of_epoch(args, run):
    """So many of an epoch's train rows have their text read, too"""
    return min(args.text_rows, len(run.texts)) if args.text_weight else 0


def train_epoch(args, model, run, optimizer, generator):
    """One pass over the train rows in random order -> mean losses by name"""
    num_rows, num_texts, sums = len(run.labels["train"]), num_texts_of_epoch(args, run), torch.zeros(2)
    for first, rows in zip(range(0, num_rows, args.batch_size),
                           torch.randperm(num_rows, generator=generator).split(args.batch_size)):
        before, after = (num_texts * done // num_rows for done in (first, first + len(rows)))
        loss, parts = batch_loss(args, model, run, rows, after - before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += parts * torch.tensor([len(rows) / num_rows, (after - before) / max(1, num_texts)])
    model.fill()
    check_finite(sums, "the losses", "lower --lr")
    return dict(zip(("recommendation", "text"), sums.tolist()))


@torch.no_grad()
def probabilities(model, run, split):
    """P(label 1) of the rows of a split: float64 [n]"""
    return torch.sigmoid(model(*run.ids[split].T)).double().cpu().numpy()


def train(args, run, head, seed):
    """Train until the valid logloss does not fall -> the best epoch's model, number of epochs"""
    torch.manual_seed(seed)
    model = PEPLER(head, run.is_known, run.width, run.scale, args.hidden).to(run.llm.device)
    valid_labels = run.labels["valid"].cpu().numpy()

    def epoch(optimizer, generator):
        losses = train_epoch(args, model, run, optimizer, generator)
        return losses, logloss(valid_labels, probabilities(model, run, "valid"))

    decay = WEIGHT_DECAY[head] if args.weight_decay is None else args.weight_decay
    options = SimpleNamespace(**vars(args) | {"weight_decay": decay})
    return train_epochs(options, run.finished, [head, seed], model, epoch)


# ----------------------------------------------------------------------------------------------------------
# evaluate
# ----------------------------------------------------------------------------------------------------------


def write_texts(args, run, texts):
    """RUN_DIR/pepler.csv: what was generated beside what was written"""
    table = run.explained[["user", "item"]].assign(written=run.sentences[run.explained.index],
                                                   generated=texts)
    with whole_file(Path(args.run_dir) / "pepler.csv") as file:
        file.write(table.to_csv(index=False).encode())


@torch.no_grad()
def costs(args, run, model, num_epochs):
    """Milliseconds of the head per 10,000 rows on a CPU, bytes of what it holds, tokens per user that the LLM
    reads in so many epochs of training, BOS, u and i included, not the EOS: at serving there is no LLM
    """
    num_tokens = 0
    if args.text_weight:
        num_tokens = int(text_tokens(run.llm, run.texts)[1].sum()) + len(run.texts) * (1 + run.bos.shape[0])
        num_tokens *= num_epochs * num_texts_of_epoch(args, run) / len(run.texts)
    served = copy.deepcopy(model).cpu()
    modes = {"head": (served, [*served.parameters()])}
    figures = time_modes(modes, [len(known) for known in run.is_known], rounds=((10_000, 30),))["head"]
    return {"milliseconds": 1000 * figures["median_10000"], "bytes": figures["megabytes"] * 2**20,
            "tokens_per_user": num_tokens / len(run.is_known[0])}


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def set_up(args, data):
    """What all heads share -> the run, a namespace: llm, ids int64 [n, 2] and labels float32 [n] by split,
    texts of the train rows, test rows to explain
    """
    train, (sentences, told, explained) = data.split["train"], read_reviews(args, data)
    llm = load_baseline_llm(args, data, TASKS, "peapod", told)  # one tiny LLM for both
    embed = llm.model.get_input_embeddings()
    start = [] if llm.tokenizer.bos_token_id is None else [llm.tokenizer.bos_token_id]
    items = item_texts(data.items)
    texts = sentences[train.index].where(sentences[train.index] != "", train["item"].map(items.__getitem__))
    options = {name: value for name, value in vars(args).items()
               if name not in ("run_dir", "head", "seed", "seeds", "epochs", "patience", "max_texts",
                               "tokens_per_batch", "dtype")}
    finished = Finished(args, "pepler", [options, data.digests, llm.digest, llm.device, code_digests(*CODE)])
    ids = {name: torch.tensor(data.split[name][["user", "item"]].to_numpy(), device=llm.device)
           for name in data.labels}
    is_known = [torch.tensor(mask, device=llm.device) for mask in (data.is_warm, data.is_train_item)]
    return SimpleNamespace(
        llm=llm, finished=finished, ids=ids, is_known=is_known, texts=texts.tolist(), sentences=sentences,
        labels={name: torch.tensor(label, device=llm.device).float() for name, label in data.labels.items()},
        explained=explained,
        width=embed.embedding_dim, scale=float(embed.weight.float().square().mean().sqrt()),
        bos=embed(torch.tensor(start, dtype=torch.long, device=llm.device)).detach().float())


def main(args):
    start_stage(args)
    data = read_data(args)
    run = set_up(args, data)
    rows = []
    for head in args.head:
        for seed in range(args.seed, args.seed + args.seeds):
            before = run.finished.seconds
            model, num_epochs = train(args, run, head, seed)
            valid, test = (probabilities(model, run, split) for split in ("valid", "test"))
            rows.append({"features": head if args.text_weight else f"{head} without text", "seed": seed,
                         "rows": len(run.texts), "test_rows": len(test),
                         **figures_of(data.labels["valid"], valid, "valid_"),
                         **figures_of(data.labels["test"], test)})
            if len(run.explained) and args.text_weight:
                with torch.no_grad():
                    texts = explain(run.llm, functools.partial(model.prefix, run.bos), run.explained,
                                    max(1, args.tokens_per_batch // 32))
                rows[-1] |= text_figures(texts, run.sentences[run.explained.index],
                                         run.explained.get("feature"))
                if (head, seed) == (args.head[0], args.seed):
                    write_texts(args, run, texts)
            rows[-1] |= costs(args, run, model, num_epochs)
            rows[-1]["seconds"] = run.finished.seconds - before
    write_baseline(args, "pepler", data, rows)


if __name__ == "__main__":
    run_program(main, parse_args)
