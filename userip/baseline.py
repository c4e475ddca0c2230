"""What the scripts of baselines/ share: options, the split of stage 1, the LLM, finished work, their rows.

Only train rows, and a cold user's support rows for that user, are evidence. Valid rows stop the training and
calibrate; test rows are scored once. A baseline's tiny LLM lies in RUN_DIR/baselines, apart from stage 2's:
it is pretrained on the train rows with their ratings, also those that a prompt leaves out.
"""

import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from common import logloss
from userip.artifacts import fail, read_artifacts, read_sidecar, sha256_of, whole_file, write_artifact
from userip.evidence import FIELDS, item_pieces, join
from userip.llm import choose_llm, load_llm, make_tiny_llm, mix, multiplies_bfloat16
from userip.options import at_least, refuse_without_effect, stage_parser
from userip.progress import digest_of_weights
from userip.setup import SMALL_LLM

INPUTS = ["interactions.parquet", "items.parquet", "users.parquet"]
SPLITS = "train", "valid", "test"
WORDS = "disliked", "liked"  # how a label 0 or 1 is said
ROOT = Path(__file__).resolve().parent.parent


def baseline_parser(doc):
    """The parser of a baseline with the options that all have, and `add`, as `stage_parser`"""
    parser, add = stage_parser(doc)
    add.method("--llm", default="auto", help="hub name, folder, GGUF, tiny; auto: Llama-2-7B, GPT-2 or tiny")
    add.training("--seed", type=at_least(0), default=0, help="first of the seeds; seed of the tiny LLM")
    add.training("--seeds", type=at_least(1, at_most=10_000), default=3, help="seeds of what is trained")
    add.training("--tiny-steps", type=at_least(1), default=400, help="tiny: steps of its pretraining")
    add.machine("--dtype", choices=["auto", "float32", "mixed"], default="auto",
                help="mixed: products in bfloat16 (auto: for large LLMs on CPUs that have it; CUDA bfloat16)")
    add.machine("--tokens-per-batch", type=at_least(16), default=4096,
                help="tokens per forward pass (PEPLER, PeaPOD: without gradients)")
    return parser, add


def refuse_unread(parser, args, conditions):
    """`refuse_without_effect`, and what no baseline reads: --tiny-steps of another LLM"""
    has_tiny = args.llm in ("auto", "tiny"), "--llm tiny"
    refuse_without_effect(parser, args, {**conditions, "tiny_steps": has_tiny})


def read_data(args):
    """Stage 1's artifacts -> a namespace: interactions, items, users; split, frames by name, and labels int8
    [n] of train, valid, test; history, the rows that are evidence (train, and cold users' support), by user
    and time; num_users, num_items; is_warm bool [N], is_train_item bool [M], which have train rows;
    dropped, the field of ids whose --id-dropout makes ready for cold ones (0 user, 1 item); split_seed,
    digests of the files
    """
    interactions, items, users = read_artifacts(args, *INPUTS)
    split = {name: interactions[interactions["split"] == name] for name in (*SPLITS, "support")}
    for name in SPLITS:
        if split[name]["label"].nunique() < 2:
            fail(f"the {name} rows of {args.run_dir}/interactions.parquet have one label only, so AUC is "
                 f"undefined: choose another --threshold in stage 1")
    prepared = read_sidecar(args, "interactions.parquet")
    has_train_rows = lambda key, size: np.bincount(split["train"][key], minlength=size) > 0
    return SimpleNamespace(
        interactions=interactions, items=items, users=users, split=split,
        labels={name: split[name]["label"].to_numpy(copy=True) for name in SPLITS},
        history=interactions[interactions["split"].isin(["train", "support"])],
        num_users=len(users), num_items=len(items), is_warm=has_train_rows("user", len(users)),
        is_train_item=has_train_rows("item", len(items)),
        dropped=int(prepared.get("split") == "cold-item"),
        split_seed=prepared.get("split_seed", prepared["seed"]),
        digests={name: sha256_of(Path(args.run_dir) / name) for name in INPUTS})


def item_texts(items):
    """Each item in words, such as "Hiking: Rustic Boots One by Frugo for $22.": list of M texts"""
    return [join(item_pieces(item, FIELDS[:4])).strip() for item in items.itertuples()]


def encode_items(data, encode):
    """What encode(list of texts) gives, vectors [R, D] and a number of tokens, of all items: float32 [M, D],
    tokens. Texts of items without train rows do not even share a batch with the others.
    """
    texts, vectors, num_tokens = np.array(item_texts(data.items), dtype=object), None, 0
    for part in (data.is_train_item, ~data.is_train_item):
        encoded, count = encode(texts[part].tolist())
        vectors = torch.zeros(data.num_items, encoded.shape[1]) if vectors is None else vectors
        vectors[torch.from_numpy(part)], num_tokens = encoded, num_tokens + count
    return vectors, num_tokens


def load_baseline_llm(args, data, prompt_texts, name="", reviews=None):
    """The frozen LLM -> a namespace: name, model, tokenizer, device, context (tokens), digest of its weights
    and arithmetic.
    name: the folder in RUN_DIR/baselines that holds the tiny LLM

    tiny is pretrained on train rows, "<item> liked." or "disliked.", in random order by user; prompt_texts:
    texts of the baseline's prompts, whose words become tokens, the last one before each user's items;
    reviews: of each train row a text to read behind it.
    """
    source = args.llm
    if source == "auto":
        source, reason = choose_llm()
        print(f"--llm auto: {source}, because {reason}")
    folder = SimpleNamespace(run_dir=Path(args.run_dir) / "baselines" / name, tiny_steps=args.tiny_steps,
                             seed=args.seed)
    if source == "tiny":
        texts, train = item_texts(data.items), data.split["train"]
        reviews = reviews or [""] * len(train)
        rated = pd.Series([f" {texts[item].rstrip('.')} {WORDS[label]}.{review}" for item, label, review
                           in zip(train["item"], train["label"], reviews)], index=train.index)
        make_tiny_llm(folder, rated.groupby(train["user"]).agg(list).tolist(), list(prompt_texts))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_half = args.dtype == "auto" and device == "cuda"
    model, tokenizer = load_llm(folder, source, device, torch.bfloat16 if is_half else torch.float32)
    size = sum(weight.numel() for weight in model.parameters())
    is_mixed = args.dtype == "mixed" or (args.dtype == "auto" and not is_half and size >= SMALL_LLM
                                         and multiplies_bfloat16())
    if is_mixed:
        mix(model)
    print(f"LLM {source}: {size:,} parameters, {'mixed' if is_mixed else model.dtype} on {device}")
    context = getattr(model.config, "max_position_embeddings", None) or 2048
    return SimpleNamespace(name=source, model=model, tokenizer=tokenizer, device=device, context=context,
                           digest=f"{digest_of_weights(model)} {'mixed' if is_mixed else model.dtype}")


class Finished:
    """Finished pieces of work, RUN_DIR/baselines/NAME/DIGEST.pt: a killed run goes on, and a run with other
    options reuses what these do not change. A piece is named by the digest of all that decides it: `facts`
    (the LLM, code, inputs, …) and its key. seconds: what the pieces took when they were computed.
    """

    def __init__(self, args, name, facts):
        self.folder, self.facts, self.seconds = Path(args.run_dir) / "baselines" / name, facts, 0.0
        self.counted = set()  # pieces whose seconds are in the sum

    def path(self, key):
        decisive = json.dumps([self.facts, key, torch.__version__, version("transformers")], sort_keys=True)
        return self.folder / f"{hashlib.sha256(decisive.encode()).hexdigest()}.pt"

    def read(self, key):
        """The piece of this key (tensors and plain values), None if there is none"""
        path = self.path(key)
        try:
            return torch.load(path, weights_only=True) if path.is_file() else None
        except Exception as error:  # what a damaged pickle raises may be anything
            fail(f"{path} is no finished piece of a run ({type(error).__name__}): delete it")

    def write(self, key, value):
        with whole_file(self.path(key)) as file:
            torch.save(value, file)

    def compute(self, key, function):
        """What function() returns, computed once"""
        piece = self.read(key)
        if piece is None:
            started = time.time()
            self.write(key, {"value": function(), "seconds": time.time() - started})
            piece = self.read(key)
        if (path := self.path(key)) not in self.counted:
            self.counted.add(path)
            self.seconds += piece["seconds"]
        return piece["value"]


def code_digests(*files):
    """Digests of code that decides what is trained: {file: digest}; other code trains again"""
    return {file: sha256_of(ROOT / file) for file in files}


def tokenize(llm, texts, max_tokens):
    """The last `max_tokens` tokens of each text, behind a BOS if the LLM has one: lists of ids, not empty"""
    start = [] if llm.tokenizer.bos_token_id is None else [llm.tokenizer.bos_token_id]
    ids = llm.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else []
    return [start + one[-max(1, max_tokens - len(start)):] or [0] for one in ids]


def tell_of_cut(llm, prompts, num_more, advice):
    """Say how many prompts, with so many tokens more, are longer than what the LLM reads"""
    lengths = [len(ids) + num_more for ids in tokenize(llm, prompts, sys.maxsize)]
    if num_cut := sum(length > llm.context for length in lengths):
        print(f"{num_cut:,} of {len(prompts):,} prompts are longer than the {llm.context:,} tokens that the "
              f"LLM reads and lose their beginning: {advice}")


def refuse_beyond_context(llm, texts, num_more, options):
    """The longest of these texts and so many tokens more, which the options ask for, must fit into the LLM"""
    num_tokens = max(map(len, tokenize(llm, texts, llm.context))) + num_more
    if num_tokens > llm.context:
        fail(f"{options}: a prompt may then need {num_tokens:,} tokens, but the LLM reads {llm.context:,} at "
             f"most: take less")


def batches(ids, tokens_per_batch):
    """Indices of texts in batches of like length, at most so many tokens with pads: list of lists"""
    parts, part = [], []
    for index in sorted(range(len(ids)), key=lambda index: -len(ids[index])):  # the first one is the longest
        if part and len(ids[part[0]]) * (len(part) + 1) > tokens_per_batch:
            parts, part = [*parts, part], []
        part.append(index)
    return parts + [part] * bool(part)


def pad(llm, ids, on_left=False):
    """Lists of ids -> ids int64 [B, T], mask bool [B, T], False at pads (on the right by default)"""
    length = max(map(len, ids))
    rows = [[0] * (length - len(one)) + one if on_left else one + [0] * (length - len(one)) for one in ids]
    count = torch.tensor([len(one) for one in ids])[:, None]
    position = torch.arange(length)
    mask = position >= length - count if on_left else position < count
    return torch.tensor(rows).to(llm.device), mask.to(llm.device)


@torch.no_grad()
def answer(llm, prompts, num_tokens, tokens_per_batch):
    """Greedy answers to prompts: list of texts, int number of tokens that were read or written"""
    ids, end = tokenize(llm, prompts, llm.context - num_tokens), llm.tokenizer.eos_token_id
    texts, count = [""] * len(ids), sum(map(len, ids))
    for part in batches(ids, tokens_per_batch):
        tokens, mask = pad(llm, [ids[index] for index in part], on_left=True)  # [B, T]
        written = llm.model.generate(input_ids=tokens, attention_mask=mask.long(), max_new_tokens=num_tokens,
                                     do_sample=False, pad_token_id=end if end is not None else 0)
        written = written[:, tokens.shape[1]:]  # [B, num_tokens]
        for index, one in zip(part, written.tolist()):
            one = one[:one.index(end) + 1] if end in one else one  # pads follow the end
            texts[index], count = llm.tokenizer.decode(one, skip_special_tokens=True), count + len(one)
    return texts, count


@torch.no_grad()
def mean_pool(llm, texts, tokens_per_batch):
    """Mean of the LLM's last hidden states over a text's tokens: float32 [R, D], int number of tokens read"""
    ids = tokenize(llm, texts, llm.context)
    pooled = torch.zeros(len(ids), llm.model.config.hidden_size)
    for part in batches(ids, tokens_per_batch):
        tokens, mask = pad(llm, [ids[index] for index in part])
        states = llm.model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        pooled[part] = ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu()  # [B, T, D]
    return pooled, sum(map(len, ids))


def pool_in_blocks(args, llm, finished, texts, block_size=512):
    """mean_pool of many texts, block by block, so that a killed run goes on: [R, D], number of tokens"""
    blocks = [texts[first:first + block_size] for first in range(0, len(texts), block_size)]
    pooled = [finished.compute([llm.digest, "mean pool", llm.device, args.tokens_per_batch, block],
                               lambda: mean_pool(llm, block, args.tokens_per_batch))
              for block in tqdm(blocks, desc="encode", unit="text", unit_scale=block_size, mininterval=2)]
    vectors = [part for part, _ in pooled] or [torch.zeros(0, llm.model.config.hidden_size)]
    return torch.cat(vectors), sum(count for _, count in pooled)


def figures_of(labels, probabilities, prefix=""):
    """{"auc": …, "logloss": …} of probabilities [n], float64"""
    return {f"{prefix}auc": float(roc_auc_score(labels, probabilities)),
            f"{prefix}logloss": logloss(labels, probabilities)}


def write_baseline(args, name, data, rows, **facts):
    """Write RUN_DIR/baseline-NAME.parquet and print its means. rows: dicts of features, seed, rows (of train
    that trained), test_rows (that were scored), auc, logloss, valid_auc, valid_logloss; seconds (of training
    and of the LLM), tokens_per_user that the LLM read or wrote; of serving milliseconds per 10,000 rows and
    bytes held. facts: for the sidecar
    """
    options = json.dumps({key: option for key, option in vars(args).items() if key != "run_dir"},
                         sort_keys=True, default=str)
    results = pd.DataFrame([{"model": name, "split_seed": data.split_seed} | row for row in rows])
    means = results.groupby("features", sort=False)[["auc", "logloss"]].mean()
    print(results.to_string(index=False, float_format="{:.4f}".format))
    path = write_artifact(args, f"baseline-{name}.parquet", results.assign(options=options), INPUTS, **facts)
    shown = " | ".join(f"{features} AUC {row.auc:.4f} logloss {row.logloss:.4f}"
                       for features, row in zip(means.index, means.itertuples()))
    print(f"wrote {path}: {len(results)} rows | {shown}; `python 04_train_ctr.py` shows them in results.md")


def capped(rows, limit, seed):
    """At most `limit` of n rows, drawn at random, in their order: int64 indices"""
    chosen = np.random.default_rng([seed, 7]).permutation(rows)[:limit]
    return np.sort(chosen)
