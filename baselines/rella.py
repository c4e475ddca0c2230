"""Baseline ReLLa: an LLM reads what a user liked and is asked if they will like one more item.

ReLLa (Lin et al., "ReLLa: Retrieval-enhanced Large Language Models for Lifelong Sequential Behavior
Comprehension in Recommendation", 2024) tells the LLM, for each target item, the K items of the user's
history that are nearest to the target in the LLM's hidden space (semantic user behaviour retrieval), with how
the user rated them, and asks if the user will like the target. The score is a softmax over the logits of the
answers Yes and No alone. Zero-shot takes the LLM as it is; few-shot tunes it on some train rows with LoRA (Hu
et al., 2022) of the query and value projections.

As in the paper: items' vectors are means of the LLM's last hidden states, compared by cosine; the two logits;
LoRA of rank 8 on q and v, trained by the LM loss of the answer's token at a rate that falls linearly.
What differs from the paper: vectors are centred instead of reduced by PCA; shots are told retrieved
histories only, not the latest ones as well; histories are train rows (a cold user's support rows) without
the target's own row, not what came before it; probabilities are calibrated on valid rows (Platt: two
numbers). LoRA is 30 lines here, because the package peft would be one more dependency for them.
The tiny LLM never saw Yes or No answer a question: its zero-shot scores are close to chance.

Training stops early on valid logloss. At most --test-rows test rows are scored, drawn at random (column
test_rows): compare them with rows of stage 4 only where these are all. A killed run continues.

Reads   interactions.parquet, items.parquet, users.parquet
Writes  baseline-rella.parquet: per (retrieval and shots, seed) rows (of train, that tuned it), test_rows,
        auc, logloss, valid figures (of the rows that calibrate), uncalibrated_auc, uncalibrated_logloss
        baselines/rella/: finished work, and the LLM where --llm is tiny

Example: python baselines/rella.py --llm tiny        (5 minutes on two cores)
  wrote runs/demo/baseline-rella.parquet: 4 rows | semantic zero-shot AUC 0.5… | semantic lora AUC 0.6…
"""

# ruff: noqa: E402
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/rella.py` finds userip/
import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import itertools
import time
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from common import logloss
from userip.artifacts import fail
from userip.baseline import (WORDS, Finished, baseline_parser, batches, capped, code_digests, encode_items,
                             figures_of, item_texts, load_baseline_llm, pad, pool_in_blocks, read_data,
                             refuse_unread, tell_of_cut, tokenize, write_baseline)
from userip.evidence import own_space
from userip.options import at_least, run_program, start_stage

OPENING, QUESTION = "The user's ratings:", "Will the user like {}? Answer Yes or No:"
SCORED_BLOCK = 256  # rows whose scores are one finished piece


def parse_args(argv=None):
    parser, add = baseline_parser(__doc__)
    add.data("--retrieval", nargs="+", choices=["semantic", "latest"], default=["semantic"],
             help="history items nearest to the target, or the latest ones; or both, one after the other")
    add.data("--num-items", type=at_least(1, at_most=1000), default=8, help="history items in a prompt, K")
    add.data("--test-rows", type=at_least(2), default=2000, help="test rows that are scored, at most")
    add.data("--valid-rows", type=at_least(2), default=1000,
             help="valid rows that stop training and calibrate, at most")
    add.method("--shots", type=at_least(0), default=1024, help="train rows that tune LoRA; 0: none")
    add.method("--rank", type=at_least(1, at_most=1000), default=8, help="of LoRA, r")
    add.method("--alpha", type=at_least(1e-6, float), default=16.0, help="LoRA's outputs times alpha / r")
    add.training("--lr", type=at_least(1e-12, float), default=1e-3, help="learning rate of AdamW")
    add.training("--batch-size", type=at_least(1), default=32, help="shots per step")
    add.training("--epochs", type=at_least(1), default=5, help="passes over the shots at most")
    add.training("--patience", type=at_least(1), default=2, help="stop after so many epochs without progress")
    args = parser.parse_args(argv)
    args.retrieval = list(dict.fromkeys(args.retrieval))
    has_shots = args.shots > 0, "--shots above 0"
    refuse_unread(parser, args, dict.fromkeys(
        ("rank", "alpha", "seeds", "lr", "batch_size", "epochs", "patience"), has_shots))
    return args


# ----------------------------------------------------------------------------------------------------------
# prompts
# ----------------------------------------------------------------------------------------------------------


def item_vectors(args, llm, data, finished):
    """Items in the LLM's hidden space, less the mean of train items, of length 1: float32 [M, D]; tokens"""
    vectors, num_tokens = encode_items(data, lambda texts: pool_in_blocks(args, llm, finished, texts))
    return F.normalize(vectors - vectors[torch.from_numpy(data.is_train_item)].mean(0), dim=1), num_tokens


def retrieve(history, rows, vectors, num_items, method):
    """The K rows of `history` that the LLM is told for each of `rows`, never the row itself: list of int64
    positions in `history`, the most useful (nearest or latest) last. history: sorted by user and time
    """
    user, item, index = history["user"].to_numpy(), history["item"].to_numpy(), history.index.to_numpy()
    first, last = (np.searchsorted(user, rows["user"], side) for side in ("left", "right"))
    chosen = []
    for begin, end, target, row in zip(first, last, rows["item"], rows.index):
        positions = np.arange(begin, end)
        positions = positions[index[positions] != row]
        if method == "semantic":
            similarity = vectors[item[positions]] @ vectors[target]
            positions = positions[np.argsort(similarity.numpy(), kind="stable")]
        chosen.append(positions[-num_items:])
    return chosen


def make_prompts(data, rows, chosen):
    """One text for each of `rows`: the chosen history with its ratings, and the question"""
    texts = [text.rstrip(".") for text in item_texts(data.items)]
    told = [f"{texts[item]} {WORDS[label]}."
            for item, label in zip(data.history["item"], data.history["label"])]
    return [" ".join([OPENING, *([told[index] for index in positions] or ["nothing."]),
                      QUESTION.format(texts[target])]) for positions, target in zip(chosen, rows["item"])]


def answer_tokens(tokenizer):
    """Ids of the first tokens in which " Yes" and " No" differ, and those that both have before it"""
    texts = [text[own_space(tokenizer):] for text in (" Yes", " No")]
    yes, no = tokenizer(texts, add_special_tokens=False).input_ids
    common = next((k for k, pair in enumerate(zip(yes, no)) if pair[0] != pair[1]), None)
    if common is None:
        fail("--llm: its tokenizer does not tell Yes from No; take another one")
    return yes[common], no[common], yes[:common]


def encode_prompts(llm, prompts):
    """Token ids of each prompt, up to where the answer's token follows: list of lists; the oldest are cut"""
    *_, common = answer_tokens(llm.tokenizer)
    return [ids + common for ids in tokenize(llm, prompts, llm.context - len(common) - 1)]


# ----------------------------------------------------------------------------------------------------------
# the LLM: two logits, LoRA
# ----------------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer with trained low-rank ones beside parts of its output (Hu et al., 2022):
    x [..., in] -> W x + alpha / r · B A x [..., out], B = 0 at the start. sizes: widths of the output's
    parts, of which those in `adapted` get an A and a B: GPT-2's joint layer of q, k and v is adapted in q, v.
    """

    def __init__(self, layer, in_dim, sizes, adapted, rank, alpha):
        super().__init__()
        self.layer, self.sizes, self.adapted, self.scale = layer, sizes, adapted, alpha / rank
        self.down = nn.ModuleList(nn.Linear(in_dim, rank, bias=False) for _ in adapted)  # A
        self.up = nn.ModuleList(nn.Linear(rank, sizes[part], bias=False) for part in adapted)  # B
        for up in self.up:
            nn.init.zeros_(up.weight)

    def forward(self, x):
        outputs = list(self.layer(x).split(self.sizes, -1))
        for part, down, up in zip(self.adapted, self.down, self.up):
            outputs[part] = outputs[part] + self.scale * up(down(x.float())).to(x.dtype)
        return torch.cat(outputs, -1)


def add_lora(model, rank, alpha, seed):
    """Put LoRA around the query and value projections, in place -> {name: trained weight}"""
    torch.manual_seed(seed)
    dim = model.config.hidden_size
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name in ("q_proj", "v_proj", "c_attn"):
                width = layer.nf if hasattr(layer, "nf") else layer.out_features
                sizes, adapted = ([dim] * 3, (0, 2)) if name == "c_attn" else ([width], (0,))
                setattr(module, name, LoRA(layer, dim, sizes, adapted, rank, alpha).to(model.device))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        fail(f"--shots: a {type(model).__name__} has no layers q_proj, v_proj or c_attn for LoRA: take an "
             f"LLM of the GPT-2 or Llama kind, or --shots 0")
    return trained


def remove_lora(model):
    """The LLM as it was loaded"""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, LoRA):
                setattr(module, name, layer.layer)


def answer_logits(llm, ids):
    """Logits [B, V] of the token behind each of B prompts, a list of lists of ids"""
    tokens, mask = pad(llm, ids)  # [B, T]
    states = llm.model.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state  # [B, T, D]
    last = states[torch.arange(len(ids)), mask.sum(1) - 1]  # [B, D]
    return llm.model.get_output_embeddings()(last).float()


@torch.no_grad()
def scores_of(llm, prompts, tokens_per_batch):
    """logit(Yes) - logit(No), whose sigmoid is the softmax over these two alone: float64 [R]; tokens read"""
    yes, no, _ = answer_tokens(llm.tokenizer)
    ids, scores = encode_prompts(llm, prompts), torch.zeros(len(prompts), dtype=torch.float64)
    for part in batches(ids, tokens_per_batch):
        logits = answer_logits(llm, [ids[index] for index in part])
        scores[part] = (logits[:, yes] - logits[:, no]).double().cpu()
    return scores, sum(map(len, ids))


def scores_in_blocks(args, llm, finished, key, prompts):
    """`scores_of`, block by block, so that a killed run goes on: numpy [R], tokens, seconds"""
    def score(block):
        started = time.time()
        return *scores_of(llm, block, args.tokens_per_batch), time.time() - started

    blocks = [prompts[first:first + SCORED_BLOCK] for first in range(0, len(prompts), SCORED_BLOCK)]
    parts = [finished.compute([key, "scores", block], lambda: score(block))
             for block in tqdm(blocks, desc="score", unit="row", unit_scale=SCORED_BLOCK, mininterval=2)]
    scores, num_tokens, seconds = zip(*parts)
    return torch.cat(scores).numpy(), sum(num_tokens), sum(seconds)


# ----------------------------------------------------------------------------------------------------------
# few-shot: LoRA on train rows
# ----------------------------------------------------------------------------------------------------------


def train_epoch(args, llm, trained, before, shots, seed):
    """One pass over the shots (ids, labels) -> weights and AdamW's averages. before: what the last one gave,
    or None; the LLM holds its weights. LM loss: cross-entropy of the answer's token over all the vocabulary.
    The rate falls linearly to 0 over all epochs.
    """
    epoch = before["epoch"] + 1 if before else 1
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, weight_decay=0.0)
    if before:
        optimizer.load_state_dict(before["optimizer"])
    yes, no, _ = answer_tokens(llm.tokenizer)
    ids, labels = shots
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    steps = order.split(args.batch_size)
    for number, step in enumerate(tqdm(steps, desc=f"epoch {epoch}", unit="step", mininterval=2)):
        share_done = (epoch - 1 + number / len(steps)) / args.epochs
        optimizer.param_groups[0]["lr"] = args.lr * (1 - share_done)
        optimizer.zero_grad()
        chosen = step.tolist()
        for part in batches([ids[index] for index in chosen], args.tokens_per_batch):
            rows = [chosen[index] for index in part]
            target = torch.tensor([yes if labels[row] else no for row in rows], device=llm.device)
            loss = F.cross_entropy(answer_logits(llm, [ids[row] for row in rows]), target, reduction="sum")
            (loss / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
    return {"epoch": epoch, "weights": {name: weight.detach().clone() for name, weight in trained.items()},
            "optimizer": optimizer.state_dict()}


@torch.no_grad()
def load(trained, state):
    for name, weight in trained.items():
        weight.copy_(state["weights"][name])


def tune(args, llm, finished, key, sets, seed):
    """Train LoRA until valid logloss stops falling; the LLM then has the best epoch's -> key of that epoch,
    tokens of the shots in all epochs

    sets: prompts and labels by name, of the shots as `train`, of `valid`
    """
    trained = add_lora(llm.model, args.rank, args.alpha, seed)
    shots = encode_prompts(llm, sets["train"].prompts), sets["train"].labels
    state, best = None, SimpleNamespace(loss=float("inf"), epoch=0, state=None)
    for epoch in range(1, args.epochs + 1):
        before = state
        state = finished.compute([key, "epoch", epoch],
                                 lambda: train_epoch(args, llm, trained, before, shots, seed))
        load(trained, state)
        valid, *_ = scores_in_blocks(args, llm, finished, [key, epoch], sets["valid"].prompts)
        loss = logloss(sets["valid"].labels, 1 / (1 + np.exp(-valid)))
        print(f"epoch {epoch:02d}/{args.epochs} | valid logloss {loss:.4f}", flush=True)
        if loss < best.loss:
            best = SimpleNamespace(loss=loss, epoch=epoch, state=state)
        if epoch - best.epoch >= args.patience:
            break
    if best.state is None:
        fail(f"LoRA diverged with --lr {args.lr:g}: no finite logloss on valid; lower it")
    load(trained, best.state)
    return [key, best.epoch], epoch * sum(map(len, shots[0]))


# ----------------------------------------------------------------------------------------------------------
# evaluate
# ----------------------------------------------------------------------------------------------------------


def platt(scores, labels):
    """Two numbers, fitted to valid rows: a function of scores [n] -> probabilities float64 [n]"""
    model = LogisticRegression(C=1e6).fit(scores[:, None], labels)
    return lambda scores: model.predict_proba(scores[:, None])[:, 1]


def evaluate(args, llm, finished, key, sets):
    """Score valid and test rows, calibrate on valid -> figures, seconds of the test rows, tokens of each"""
    (valid, _, _), (test, num_tokens, seconds) = (
        scores_in_blocks(args, llm, finished, key, sets[name].prompts) for name in ("valid", "test"))
    labels = {name: sets[name].labels for name in ("valid", "test")}
    calibrated = platt(valid, labels["valid"])
    row = {"test_rows": len(test), **figures_of(labels["test"], calibrated(test)),
           **figures_of(labels["valid"], calibrated(valid), "valid_"),
           **figures_of(labels["test"], 1 / (1 + np.exp(-test)), "uncalibrated_")}
    return row, seconds, num_tokens / len(test)


def draw_sets(args, data, vectors, method, shots, seed):
    """Prompts and labels of the rows that train, stop and calibrate, and are scored: {split: namespace}"""
    sets = {}
    limits = {"train": shots, "valid": args.valid_rows, "test": args.test_rows}
    for name, limit in limits.items():  # a seed draws shots of its own; all score the same rows
        rows = data.split[name]
        rows = rows.iloc[capped(len(rows), limit, seed if name == "train" else args.seed)]
        if name != "train" and rows["label"].nunique() < 2:
            fail(f"the {len(rows)} {name} rows that were drawn have one label only: raise --{name}-rows")
        chosen = retrieve(data.history, rows, vectors, args.num_items, method)
        sets[name] = SimpleNamespace(prompts=make_prompts(data, rows, chosen),
                                     labels=rows["label"].to_numpy())
    return sets


def main(args):
    start_stage(args)
    data = read_data(args)
    llm = load_baseline_llm(args, data, [QUESTION.format("it"), " Yes", " No", OPENING], "rella")
    finished = Finished(args, "rella", [
        data.digests, llm.digest, llm.device,
        code_digests("baselines/rella.py", "userip/baseline.py", "userip/evidence.py")])
    # what the weights of an epoch depend on; a piece of scores is named by its prompts, too
    decisive = {name: getattr(args, name) for name in (
        "num_items", "shots", "rank", "alpha", "lr", "batch_size", "epochs", "tokens_per_batch")}
    vectors, num_tokens, rows = None, 0, []
    if "semantic" in args.retrieval:
        vectors, num_tokens = item_vectors(args, llm, data, finished)
    encoding_seconds = finished.seconds
    seeds = range(args.seed, args.seed + args.seeds * (args.shots > 0))
    for method, (shots, seed) in itertools.product(args.retrieval, [
            (0, args.seed), *((args.shots, seed) for seed in seeds)]):
        before, sets = finished.seconds, draw_sets(args, data, vectors, method, shots, seed)
        if seed == args.seed and not shots:
            tell_of_cut(llm, sets["test"].prompts, 2, "lower --num-items")
        key, trained_tokens = [args.tokens_per_batch, "zero-shot"], 0
        if shots:
            key, trained_tokens = tune(args, llm, finished, [decisive, method, "lora", seed], sets, seed)
        row, seconds, tokens_per_row = evaluate(args, llm, finished, key, sets)
        of_items = (num_tokens, encoding_seconds, vectors.nbytes) if method == "semantic" else (0, 0.0, 0)
        # as if all test rows were scored
        all_tokens = of_items[0] + trained_tokens + tokens_per_row * len(data.split["test"])
        rows.append({
            "features": f"{method} {'lora' if shots else 'zero-shot'}", "seed": seed,
            "rows": len(sets["train"].prompts), **row, "tokens_per_user": all_tokens / data.num_users,
            "seconds": of_items[1] + finished.seconds - before,
            "milliseconds": 1000 * 10_000 * seconds / row["test_rows"],
            "bytes": of_items[2] + sum(weight.nbytes for weight in llm.model.parameters())})
        remove_lora(llm.model)
        print(f"{rows[-1]['features']}, seed {seed} | test auc {row['auc']:.4f} logloss {row['logloss']:.4f} "
              f"| {row['test_rows']:,} rows in {seconds:.1f}s", flush=True)
    write_baseline(args, "rella", data, rows)


if __name__ == "__main__":
    run_program(main, parse_args)
