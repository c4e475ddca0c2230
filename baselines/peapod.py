"""Baseline PeaPOD: a user's soft prompt from a shared pool, before a frozen LLM that ranks and explains.

As in the paper's abstract (PErsonAlized PrOmpt Distillation), a shared set of prompts is weighted by the
user's interests, and the weighted sum is the user's soft prompt: θ_u = Σ_m a_m(u) p_m, a = softmax(W v_u).
Interests v_u are the user's vector of a probabilistic matrix factorization (PMF) of the train ratings. One
soft prompt serves three tasks, which are trained together by the language model loss on train rows:
  sequential   "[θ_u] The user has bought <item> <item> …": the next item among all; leave one out
  top-n        "[θ_u] The user likes": the user's items; the target among 99 sampled ones
  explanation  "[θ_u] <item> The user says": the first sentence of the review, where there are reviews
--variant neighbours: attention over the PMF vectors of the 20 nearest other users makes three soft tokens.
--variant shared: one prompt for all users, the control against which a personalized prompt counts.
Valid rows stop the training. Test rows, the last one of each user, choose nothing.

What differs from the paper: of it only the abstract was at hand. Items are tokens of their own: the mean
embedding of the item's text and a trained offset, so that all items are ranked in one forward pass,
without generation; an item without a train row has no text. Training starts at `most popular`, and weight
decay pulls back to it. The LLM is frozen and decoder-only. A prompt names no candidates, and the user's last
--max-history items. RUN_DIR/peapod is a run whose profiles stages 3 and 4 read as those of stage 2. Train
rows read profiles of ratings without their own fold, and in training a target's interests leave out its fold.

Reads   interactions.parquet, items.parquet, users.parquet
Writes  peapod.parquet: model, task, seed, users, hr@1 … ndcg@10, bleu4 … usr (nete: fmr), tokens_per_user
        that the LLM read in training, seconds of training; references have no seed and no costs
        peapod/: the run's interactions, items, users and profiles.pt of the first variant
        baselines/: the tiny LLM (one for PEPLER and PeaPOD), and each training's state

Example: python baselines/peapod.py --llm tiny --tiny-steps 100        (7 minutes in one thread)
  wrote … and runs/demo/peapod.parquet: 12 rows | sequential NDCG@10 item-kNN 0.0450, pool 0.0411, …
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python baselines/peapod.py` finds userip/

import userip  # noqa: F401, E402  (first: Ctrl-C ends in one line while the others load)
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import nn

from common import with_interval
from userip.artifacts import check_finite, write_artifact
from userip.baseline import (INPUTS, Finished, baseline_parser, code_digests, item_texts, load_baseline_llm,
                             read_data, refuse_beyond_context, refuse_unread)
from userip.epochs import train_epochs
from userip.evidence import own_space
from userip.explanations import (EXPLAIN, MAX_TOKENS, SEQUENTIAL, TASKS, TOP_N, explain, explanation_rows,
                                 item_review_row, read_reviews, text_nll, text_tokens)
from userip.heldout import interval
from userip.llm import tiny_stamp
from userip.options import at_least, run_program, start_stage
from userip.pmf import NUM_FOLDS, PROMPTS, factorize
from userip.ranking import (count_matrix, cut_sequences, leave_one_out, pad_items, ranking_figures, ranks,
                            reference_rows, sampled_ranks)

CODE = "baselines/peapod.py", *(f"userip/{room}.py" for room in (
    "baseline", "evidence", "ranking", "explanations", "pmf", "prompt", "epochs"))


def parse_args(argv=None):
    parser, add = baseline_parser(__doc__)
    add.data("--max-users", type=at_least(1), default=5000, help="users who are ranked, of valid and of test")
    add.data("--max-texts", type=at_least(1), default=500, help="test rows that are explained")
    add.data("--max-history", type=at_least(1), default=20, help="items of a user in one prompt")
    add.method("--variant", nargs="+", choices=PROMPTS, default=["pool", "neighbours", "shared"],
               help="how a soft prompt is made; the first one's profiles are written")
    add.method("--pool", type=at_least(2, at_most=10_000), default=10, help="prompts of the pool")
    add.method("--soft-tokens", type=at_least(1, at_most=1000), default=3, help="soft tokens of a user, S")
    add.method("--rank", type=at_least(1, at_most=1000), default=16, help="PMF: width of a vector, C")
    add.method("--penalty", type=at_least(1e-6, float), default=5.0, help="PMF: penalty of vectors, λ")
    add.training("--epochs", type=at_least(1), default=30, help="epochs at most")
    add.training("--prompts", type=at_least(1), default=2000, help="prompts of each task in an epoch at most")
    add.training("--patience", type=at_least(1), default=6, help="stop after so many epochs without progress")
    add.training("--lr", type=at_least(1e-12, float), default=0.02,
                 help="learning rate of AdamW; falls linearly to 0 over the epochs")
    add.training("--weight-decay", type=at_least(0, float), default=0.1, help="weight decay of AdamW")
    add.training("--batch-size", type=at_least(1), default=64, help="prompts per step")
    parser.set_defaults(seeds=1)  # a training takes minutes
    args = parser.parse_args(argv)
    args.variant = list(dict.fromkeys(args.variant))
    if args.variant[0] == "shared" and len(args.variant) > 1:
        parser.error("--variant: the first one's profiles are written, and shared has one for all users: put "
                     "it behind another")
    has_interests = (args.variant != ["shared"], "--variant pool or neighbours")
    refuse_unread(parser, args, {
        "pool": ("pool" in args.variant, "--variant pool"), "rank": has_interests, "penalty": has_interests})
    return args


# ----------------------------------------------------------------------------------------------------------
# model: the user's soft prompt, items as tokens, the prompts of the three tasks
# ----------------------------------------------------------------------------------------------------------


class PeaPOD(nn.Module):
    """prompt: one of PROMPTS; item_text [M, D], the mean embedding of a title; share [M] of the train rows"""

    def __init__(self, prompt, item_text, share, scale):
        super().__init__()
        self.prompt, self.scale = prompt, scale
        self.register_buffer("item_text", item_text)
        self.offset = nn.Parameter(torch.zeros_like(item_text))
        self.register_buffer("popularity", share.log())
        self.gain = nn.Parameter(torch.zeros(()))  # of what the LLM says: at the start nothing

    def soft(self, run, users, fold=-1):
        """θ of users [B] -> [B, S D]"""
        return self.soft_of(run, run.pmf.vectors[fold, users], run.pmf.nearest[fold, users])

    def soft_of(self, run, vectors, nearest):
        """θ of vectors [B, C] and the nearest users [B, 20] -> [B, S D]"""
        neighbours = run.pmf.vectors[-1, nearest]  # [B, 20, C]
        return self.scale * self.prompt(*(part.to(self.gain.device) for part in (vectors, neighbours)))

    def items(self):
        return self.item_text + self.scale * self.offset  # [M, D], both the input and the output embeddings

    def hidden(self, run, soft, task, items):
        """States that predict each of items [B, T] and the one behind: soft [B, S D] -> [B, T + 1, D]"""
        prefix = self.prefix(run, soft, task)
        embeddings = torch.cat([prefix, self.items()[items]], 1).to(run.llm.model.dtype)
        states = run.llm.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return states[:, prefix.shape[1] - 1:].float()

    def prefix(self, run, soft, task, items=None):
        """BOS, soft tokens, maybe one item [B], text of the task: embeddings [B, L, D]"""
        every = lambda embedding: embedding.expand(len(soft), -1, -1)
        width = self.item_text.shape[1]
        parts = [every(run.bos), soft.view(len(soft), soft.shape[1] // width, width)]
        if items is not None:
            parts.append(self.items()[items][:, None])
        return torch.cat([*parts, every(run.task_text[task])], 1)

    def log_probabilities(self, hidden):  # [..., D] -> [..., M]
        # no bias is trained beside the shares: AdamW would move that of every item, rare ones by noise
        return (self.gain * hidden @ self.items().T + self.popularity).log_softmax(-1)


# ----------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------


def sequential_loss(model, run, index, fold):
    """-log P of the items of this fold in these sequences, in the mean over them; interests without it"""
    items, is_item = pad_items([run.sequences[i] for i in index])
    folds, _ = pad_items([run.sequence_fold[i] for i in index])
    is_asked = is_item & (folds == fold)
    soft = model.soft(run, run.sequence_user[index], fold)
    hidden = model.hidden(run, soft, SEQUENTIAL, items)[:, :-1]  # [B, T, D]
    log_p = model.log_probabilities(hidden[is_asked])  # [items, M]
    return -log_p.gather(1, items[is_asked][:, None].to(log_p.device)).sum() / is_asked.sum().clamp(min=1)


def top_n_loss(model, run, index, fold):
    """-log P of a user's items of this fold, no history, in the mean over users who have one; interests
    without it
    """
    users = run.warm[index]
    soft = model.soft(run, users, fold)
    hidden = model.hidden(run, soft, TOP_N, torch.zeros(len(users), 0, dtype=torch.long))
    log_p = model.log_probabilities(hidden[:, 0])  # [B, M]
    counts = torch.tensor(run.fold_matrix[fold][users.numpy()].toarray(), dtype=log_p.dtype)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -(share.to(log_p.device) * log_p).sum() / (share.sum() + 1e-9)


def explanation_loss(model, run, index, fold):
    """-log P of each token of these train rows' sentences, in the mean over tokens; interests without the
    row's own fold
    """
    soft = model.soft(run, run.text_user[index], run.text_fold[index])
    prefix = model.prefix(run, soft, EXPLAIN, run.text_item[index])
    ids, is_scored = text_tokens(run.llm, [run.texts[i] for i in index])
    return text_nll(run.llm, prefix, ids, is_scored).mean()


@torch.no_grad()
def target_log_probabilities(args, model, run, targets, soft):
    """soft [B, S D] -> by blocks of targets: indices [n], log P of all items after each one's history, and
    without one, float32 [n, M]
    """
    block = max(1, args.tokens_per_batch // (2 * args.max_history))
    for index in torch.arange(len(targets.user)).split(block):
        items, is_item = pad_items([targets.histories[i][-args.max_history:] for i in index])
        last = torch.arange(len(index)), is_item.sum(1)
        hidden = model.hidden(run, soft[index], SEQUENTIAL, items)[last]
        blind = model.hidden(run, soft[index], TOP_N, items[:, :0])[:, 0]
        yield index, *(model.log_probabilities(part).cpu() for part in (hidden, blind))


def target_nll(args, model, run, targets, soft):
    """-log P of each target after its history, and without one: float32 [B, 2]"""
    item = torch.tensor(targets.item)
    return torch.cat([torch.stack([-log_p.gather(1, item[index, None])[:, 0] for log_p in both], 1)
                      for index, *both in target_log_probabilities(args, model, run, targets, soft)])


def train_epoch(args, run, model, optimizer, generator):
    """Sequences, users and texts, at most --prompts of each, in random order -> mean loss by task

    A step's interests leave out a fold of the train rows, and its targets are of this fold.
    """
    sizes = {sequential_loss: len(run.sequences), top_n_loss: len(run.warm), explanation_loss: len(run.texts)}
    steps = [(task, index) for task, size in sizes.items() if size
             for index in torch.randperm(size, generator=generator)[:args.prompts].split(args.batch_size)]
    losses = {}
    for step in torch.randperm(len(steps), generator=generator):
        task, index = steps[step]
        loss = task(model, run, index, int(torch.randint(NUM_FOLDS, (), generator=generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.setdefault(task.__name__.removesuffix("_loss"), []).append(loss.item())
    means = {name: float(np.mean(part)) for name, part in losses.items()}
    check_finite(torch.tensor(list(means.values())), "the losses", "lower --lr")
    return means


def train(args, run, variant, seed):
    """Train a model until the valid targets of both tasks are not more likely -> the best epoch's model, how
    many epochs there were
    """
    torch.manual_seed(seed)
    num_prompts = 1 if variant == "shared" else args.pool
    prompt = PROMPTS[variant](args.rank, num_prompts, args.soft_tokens, run.item_text.shape[1])
    model = PeaPOD(prompt, run.item_text, run.share, run.scale).to(run.llm.device)
    valid_users = torch.tensor(run.valid.user)

    def epoch(optimizer, generator):
        losses = train_epoch(args, run, model, optimizer, generator)
        with torch.no_grad():
            valid = target_nll(args, model, run, run.valid, model.soft(run, valid_users)).mean(0)  # [2]
        return losses, float(valid.sum())

    return train_epochs(args, run.finished, [variant, seed], model, epoch, rate_falls=True)


def tokens_per_user(args, run, num_epochs):
    """Tokens that the LLM reads in so many epochs of training, per user: BOS, soft tokens, items and words"""
    lengths = {SEQUENTIAL: [len(items) for items in run.sequences], TOP_N: [0] * len(run.warm),
               EXPLAIN: text_tokens(run.llm, run.texts)[1].sum(1).tolist() if run.texts else []}
    count = 0
    for task, parts in lengths.items():
        prefix = len(run.bos) + args.soft_tokens + len(run.task_text[task])
        count += min(1, args.prompts / max(1, len(parts))) * (sum(parts) + prefix * len(parts))
    return num_epochs * count / len(run.pmf.nearest[-1])  # of N users


# ----------------------------------------------------------------------------------------------------------
# evaluate: ranks of test targets, explanations of test rows, what the soft prompt adds
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(args, run, model, variant, seed):
    """Rows of figures of the test targets and texts: a list of dicts"""
    soft = model.soft(run, torch.tensor(run.test.user))
    both = zip(*target_log_probabilities(args, model, run, run.test, soft))
    sequential, top_n = (torch.cat(parts).numpy() for parts in list(both)[1:])  # [B, M]
    rank = {"sequential": ranks(sequential, run.test.item, run.test.own),
            "top-n": sampled_ranks(top_n, run.test)}
    rows = [{"model": variant, "task": task, "seed": seed, "users": len(part), **ranking_figures(part)}
            for task, part in rank.items()]
    if len(run.explained):
        prefix = lambda users, items: model.prefix(run, model.soft(run, users), EXPLAIN, items)
        texts = explain(run.llm, prefix, run.explained, args.batch_size)
        rows.append(explanation_rows(variant, seed, texts, run.explained, run.sentences))
    return rows


@torch.no_grad()
def heldout_nll(args, run, model):
    """Nats per test target (mean of both tasks) by soft prompt -> facts of profiles.pt's sidecar"""
    users = torch.tensor(run.test.user)
    own = model.soft(run, users)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(args.seed))
    softs = {"none": own[:, :0], "shared": own.mean(0).expand_as(own), "shuffled": own[order], "own": own}
    nll = {name: target_nll(args, model, run, run.test, soft).mean(1) for name, soft in softs.items()}
    facts = {name: float(part.mean()) for name, part in nll.items()}
    for name in ("shared", "shuffled"):
        facts[f"own_minus_{name}"] = [*interval(nll["own"] - nll[name], torch.ones(len(users)))]
    print("nats per test target: " + "  ".join(f"{name} {facts[name]:.4f}" for name in softs) + "".join(
        f" | own - {name} {with_interval(*facts[f'own_minus_{name}'])}" for name in ("shared", "shuffled")))
    return facts


# ----------------------------------------------------------------------------------------------------------
# profiles for stages 3 and 4; main
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def write_profiles(args, run, data, model):
    """RUN_DIR/peapod: links to the run's data, and θ of all users as profiles.pt, for 03_quantize.py

    Its noise is the covariance of θ when v_u is drawn from its posterior.
    """
    folder = Path(args.run_dir) / "peapod"
    folder.mkdir(exist_ok=True)
    for file in [*INPUTS, *(f"{name}.json" for name in INPUTS)]:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(Path("..") / file)
    users, shape = torch.arange(data.num_users), (NUM_FOLDS + 1, data.num_users, 1, -1)
    theta = torch.stack([model.soft(run, users, fold) for fold in range(NUM_FOLDS + 1)]).cpu()
    draw = torch.randn(run.pmf.vectors.shape[1:], generator=torch.Generator().manual_seed(args.seed))
    vectors = run.pmf.vectors[-1] + (run.pmf.deviation @ draw[..., None])[..., 0]  # [N, C]
    moved = model.soft_of(run, vectors, run.pmf.nearest[-1]).cpu()
    num_own = np.bincount(data.history["user"], minlength=data.num_users)
    in_fold = np.stack([np.bincount(data.split["train"]["user"][run.pmf.fold.numpy() == fold],
                                    minlength=data.num_users) for fold in range(NUM_FOLDS + 1)])
    tensors = {"profiles": theta.view(shape), "shared": theta[-1].mean(0)[None], "names": ["peapod"],
               "noise": torch.cov((moved - theta[-1]).T)[None], "gain": torch.ones(data.num_users, 1),
               "num_evidence": torch.tensor(num_own - in_fold)[..., None],
               "has_evidence": torch.tensor(num_own > 0), "fold": run.pmf.fold,
               "llm": run.llm.name, "texts": [TOP_N],
               "tiny_llm": tiny_stamp(folder.parent / "baselines/peapod") if run.llm.name == "tiny" else ""}
    options = SimpleNamespace(**vars(args) | {"run_dir": str(folder)})
    return write_artifact(options, "profiles.pt", tensors, INPUTS[:2], stage="baselines/peapod.py",
                          heldout_nll=heldout_nll(args, run, model))


def set_up(args, data):
    """What all variants share -> the run, a namespace: llm, pmf, sequences of train items and their users,
    targets, texts
    """
    train, (sentences, told, explained) = data.split["train"], read_reviews(args, data)
    has_text = sentences[train.index] != ""
    llm = load_baseline_llm(args, data, TASKS, "peapod", told)
    refuse_beyond_context(llm, TASKS, args.soft_tokens + args.max_history + MAX_TOKENS,
                          f"--soft-tokens {args.soft_tokens}, --max-history {args.max_history}")
    embeddings = llm.model.get_input_embeddings()
    embed = lambda text: embeddings(torch.tensor(llm.tokenizer(
        text, add_special_tokens=False)["input_ids"], device=llm.device)).detach().float()
    bos = llm.tokenizer.bos_token
    shift = own_space(llm.tokenizer)
    item_text = torch.stack([embed(f" {text}"[shift:]).mean(0) for text in item_texts(data.items)])  # [M, D]
    item_text[torch.from_numpy(~data.is_train_item)] = 0.0
    pmf = factorize(data, args.rank, args.penalty, args.seed)
    fold = pmf.fold.numpy()
    sequence_user, sequences, sequence_fold = cut_sequences(train, fold, args.max_history)
    share = np.bincount(train["item"], minlength=data.num_items) + 0.5
    valid, test = (leave_one_out(data.interactions, split, data.num_items, args.max_users, args.seed)
                   for split in ("valid", "test"))
    texts = train[has_text]
    options = {name: value for name, value in vars(args).items()
               if name not in ("run_dir", "variant", "seeds", "epochs", "patience", "max_texts",
                               "tokens_per_batch", "dtype")}
    finished = Finished(args, "peapod", [options, data.digests, llm.digest, llm.device, code_digests(*CODE)])
    return SimpleNamespace(
        llm=llm, pmf=pmf, finished=finished, sequences=sequences, sequence_user=sequence_user,
        sequence_fold=sequence_fold, warm=torch.tensor(np.unique(train["user"])),
        share=torch.tensor(share / share.sum()).float(),
        fold_matrix=[count_matrix(rows["user"], rows["item"], (data.num_users, data.num_items))
                     for rows in (train[fold == left_out] for left_out in range(NUM_FOLDS))],
        valid=valid, test=test, sentences=sentences, texts=sentences[texts.index].tolist(),
        explained=explained,
        text_user=torch.tensor(texts["user"].to_numpy()), text_item=torch.tensor(texts["item"].to_numpy()),
        text_fold=torch.tensor(fold[has_text]), item_text=item_text,
        scale=float(embeddings.weight.float().square().mean().sqrt()),
        bos=embed(bos) if bos else item_text[:0], task_text={text: embed(text) for text in TASKS})


def main(args):
    start_stage(args)
    started, data = time.time(), read_data(args)
    run = set_up(args, data)
    rows = reference_rows(data.interactions, run.test, data.num_items)
    print(f"valid targets by popularity: {-np.log(run.share.numpy()[run.valid.item]).mean():.4f} nats each")
    if len(run.explained):
        rows.append(item_review_row(data.split["train"], run.explained, run.sentences))
    for variant in args.variant:
        for seed in range(args.seed, args.seed + args.seeds):
            before = run.finished.seconds
            model, num_epochs = train(args, run, variant, seed)
            cost = {"tokens_per_user": tokens_per_user(args, run, num_epochs),
                    "seconds": run.finished.seconds - before}
            rows += [row | cost for row in evaluate(args, run, model, variant, seed)]
            if (variant, seed) == (args.variant[0], args.seed):
                profiles = write_profiles(args, run, data, model)
    table = pd.DataFrame(rows).assign(split_seed=data.split_seed)
    means = table.drop(columns="seed").groupby(["task", "model"], sort=False).mean().dropna(axis=1, how="all")
    print(means.to_string(float_format="{:.4f}".format))
    path = write_artifact(args, "peapod.parquet", table, INPUTS, seconds=time.time() - started)
    ndcg = means.loc["sequential", "ndcg@10"].sort_values(ascending=False, kind="stable")
    print(f"wrote {profiles} for stages 3 and 4, and {path}: {len(table)} rows | sequential NDCG@10 "
          + ", ".join(f"{name} {value:.4f}" for name, value in ndcg.items()))


if __name__ == "__main__":
    run_program(main, parse_args)
