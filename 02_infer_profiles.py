"""Stage 2 of 5: infer latent profiles as soft tokens in a frozen LLM's prompt.

The prompt of user u is "This user's hobby is [θ] his background is [θ] The user has bought" and then what he
had (paper, section 2.3, eq. 3). The LLM is frozen; only the θ are fitted, to make the user's behaviour likely
(eq. 4), under the mask of Fig. 4. `--method score` (default) fits one θ̄ for all, takes the score (the
gradient of the log-likelihood at θ̄) of each catalogue item once, and moves each user along the whitened sum
of his items' scores: the cost grows with the catalogue, not with the users. `--method gradient` is the
paper's: AdamW on each user's own θ. `--route` lets each field of an item tell of its own profile only;
`--ratings` tells how it was rated, too. Evidence with labels must not tell a train row its own: `--folds F`
infers each user F times more, without each fold. Only train rows are evidence (and a cold user's support
rows, of his own profile); half of the users' validation rows choose step lengths, the other half report.
`--prior` pulls each user to his codeword instead of θ̄ (eq. 7). `--paper` = the paper's text, `--released` =
the released code's recipe. `--only-users` places new users by what the run has fitted. Finished work is on
disk, so that a killed run goes on where it stood; blocks of users are dealt to the processes of torchrun.

Reads   interactions.parquet, items.parquet; with --prior codebook.pt; with --only-users a table, profiles.pt
        and, of a run with --method score, scores.pt
Writes  profiles.pt: profiles float32 [N, P, S D] ([F + 1, N, P, S D] with folds, the last with all evidence),
        shared float32 [P, S D] (θ̄), noise float32 [P, S D, S D] (covariance of gain · (θ - θ̄) if users did
        not differ), gain float32 [N, P], num_evidence int64 [N, P] ([F + 1, N, P]), has_evidence bool [N],
        names, texts, llm; with folds fold int64 [train rows]; with --prior the codebook that it was
        scores.pt: with --method score all that a new user's profile needs
        new_profiles.pt: with --only-users profiles [N', P, S D], user_id, num_evidence, has_evidence, names
        tiny_llm/: the LLM, where --llm is tiny; progress/: finished work, until the run is done

Example: python 02_infer_profiles.py        (2 minutes on two cores, half of it to pretrain the tiny LLM)
  wrote runs/demo/profiles.pt: 1,975 users x 2 profiles x 128 | held-out NLL own 1.3615, shared 1.3681
"""

import csv
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from scipy import sparse
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common import (at_least, fail, fig4_mask, load_llm, options_text, parse_with_presets,
                    read_artifacts, read_sidecar, sha256_of, stage_parser, start_stage, whole_file,
                    write_artifact)

FIELDS = ("title", "category", "brand", "price", "rating", "review")
DEFAULT_PROFILES = ["hobby=This user's hobby is", "background=his background is"]
DEFAULT_ROUTE = ["title+category", "brand+price"]
JUDGEMENT = "judgement=his judgement is"  # a third profile, told by ratings
TARGET = re.compile(r" ?\{(title|category|brand|price)\}")  # in a profile's text: of the item that is told
PAPER = {"method": "gradient", "evidence": "history", "route": ["none"], "start": "random", "lr": 0.001,
         "steps": 10, "pull": 0.0, "stop": "none", "field_weights": "none"}
RELEASED = {"method": "gradient", "evidence": "review", "route": ["none"], "mask": "causal",
            "start": "random", "init": "uniform", "lr": 0.01, "steps": 10, "pull": 0.0, "stop": "none",
            "field_weights": "none", "batch_size": 8,
            "task_text": "The user says", "profiles": ["likes=The user likes {brand}",
                                                       "level=The consumption level of this user is {price}"]}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of everything random in this stage")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--released", action="store_true", help="the released code's recipe: " + options_text(RELEASED))
    add("--llm", default="auto", help="hub name, folder, tiny, or auto: Llama-2-7B, GPT-2, tiny, as at hand")
    add("--profiles", nargs="+", default=DEFAULT_PROFILES, metavar="NAME=TEXT",
        help="names N_k, their texts; with --mask causal {title}, {category}, {brand}, {price} in a text "
             "stand for those of the item that is told behind it, as in the released code")
    add("--task-text", default="The user has bought", help="task text D before the evidence")
    add("--method", choices=["score", "gradient"], default="score", help="natural gradient, or AdamW by user")
    add("--evidence", choices=["items", "history", "review"], default="items",
        help="each item alone, a user's items as one sequence (gradient only), or his reviews")
    add("--ratings", choices=["none", "liked", "stars"], nargs="?", const="liked", default="none",
        help="tell how the user rated an item, too: liked or disliked, or in stars "
             "(a third profile reads it)")
    add("--folds", type=at_least(0), default=None, metavar="F",
        help="infer also without each of F folds of the train rows (default: 5 with --ratings, else 0)")
    add("--route", nargs="+", default=None, metavar="FIELDS",
        help="fields per profile (default of two: title+category brand+price; rating to a third); none = all")
    add("--mask", choices=["fig4", "causal"], default="fig4", help="Fig. 4, or plain causal for the ablation")
    add("--soft-tokens", type=at_least(1), default=1, metavar="S", help="soft tokens per profile, S")
    add("--rank", type=at_least(1), default=16, metavar="R",
        help="score: directions of a profile's S · D in which users may differ")
    add("--init", choices=["random", "names", "vocab", "uniform"], default="random",
        help="first soft tokens: normal, the name's own embedding, words at random, U(-.1, .1)")
    add("--prior", type=Path, metavar="CODEBOOK",
        help="codebook.pt of this run: pull each user to his codeword (eq. 7) instead of θ̄; a round of EM")
    add("--only-users", type=Path, metavar="FILE",
        help="infer new users from a table user_id, item_id (and rating) with what the run has fitted: "
             "no LLM runs, unless the run was by gradient")
    add("--review-tokens", type=at_least(1), default=15, help="tokens of a review's first sentence at most")
    add("--max-history", type=at_least(1), default=20, help="latest items of a user in one history")
    add("--start", choices=["shared", "random"], default="shared", help="gradient: start at θ̄, or at random")
    add("--steps", type=at_least(1), default=40, help="gradient: AdamW steps per user at most")
    add("--lr", type=at_least(0, float), help="gradient: learning rate (default: 0.1 of embeddings' scale)")
    add("--pull", type=at_least(0, float), default=None,
        help="pull back to θ̄: a prior that weighs like so many items "
             "(default: score estimates, gradient 10)")
    add("--stop", choices=["heldout", "none"], default="heldout", help="gradient: steps by held-out, or all")
    add("--field-weights", choices=["noise", "none"], default="noise", help="equal noise, or sum as they are")
    add("--shared-steps", type=at_least(1), default=100, help="minibatch steps that fit the shared θ̄")
    add("--map-steps", type=at_least(1), default=150, help="score: minibatch steps that fit the map to θ")
    add("--tiny-steps", type=at_least(1), default=400, help="tiny: steps of its pretraining")
    add("--batch-size", type=at_least(1), help="gradient: users per block (default 128, with CUDA 1024)")
    add("--tokens-per-batch", type=at_least(1),
        help="tokens per forward pass, prompt included (default: what memory holds; without CUDA 4096 at "
             "most)")
    add("--estimate", action="store_true",
        help="measure a few batches, tell tokens, FLOPs, memory and time of the run, and stop")
    add("--heldout", type=at_least(2), default=3000, help="validation rows to measure the NLL on, at most")
    args = parse_with_presets(parser, argv, paper=PAPER, released=RELEASED)
    if args.paper and args.released:
        parser.error("--paper and --released are two recipes: choose one")
    if args.only_users:
        given = [name for name in vars(args) if name not in ("run_dir", "only_users")
                 and getattr(args, name) != parser.get_default(name)]
        if given:
            parser.error(f"--only-users takes all options from the run: leave out "
                         f"--{given[0].replace('_', '-')}")
        return args
    if args.method == "score" and args.pull == 0:
        parser.error("--pull 0 leaves users without evidence nowhere: --method score needs a pull above 0")
    if args.lr == 0:
        parser.error("--lr must be above 0")
    check_evidence(parser, args)
    check_profiles(parser, args)
    return args


def check_evidence(parser, args):
    """Refuse evidence and folds that contradict each other; the profiles that --ratings adds."""
    if args.method == "score" and args.evidence == "history":
        parser.error("--evidence history needs --method gradient: a history's score is no sum over items")
    has_ratings = args.ratings != "none"
    if has_ratings and args.evidence == "review":
        parser.error("--ratings go with items: leave out --evidence review")
    if has_ratings and args.profiles == DEFAULT_PROFILES and args.route is None:
        args.profiles, args.route = [*DEFAULT_PROFILES, JUDGEMENT], [*DEFAULT_ROUTE, "rating"]
    args.folds = (5 if has_ratings else 0) if args.folds is None else args.folds
    if args.folds == 1:
        parser.error("--folds 1 leaves no evidence: 0 for none, or 2 and more")
    if not args.task_text.strip():
        parser.error("--task-text must hold a word: its last token predicts the first evidence token")


def check_profiles(parser, args):
    """Refuse names and routes that make no sense; the default route."""
    if any("=" not in text or not all(text.split("=", 1)) for text in args.profiles):
        parser.error(f"--profiles takes NAME=TEXT, such as {DEFAULT_PROFILES[0]!r}, not {args.profiles}")
    names = [text.split("=", 1)[0] for text in args.profiles]
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        parser.error(f"--profiles: the names {names} must differ and be words of letters, digits and _")
    if {"user", "user_id"} & set(names):
        parser.error("--profiles: user and user_id are columns of the feature bank; take another name")
    if unknown := re.findall(r"{[^}]*}", TARGET.sub("", " ".join(args.profiles))):
        parser.error(f"--profiles: {unknown[0]} stands for nothing; {{title}}, {{category}}, {{brand}} and "
                     f"{{price}} do")
    has_target = any(TARGET.search(text) for text in args.profiles)
    if has_target and (args.mask != "causal" or args.evidence == "history"):
        parser.error("--profiles: a text with an item's {title}, {category}, {brand} or {price} needs "
                     "--mask causal and one item at a time: --evidence items or review")
    if args.route is None:
        is_default = len(names) == len(DEFAULT_ROUTE) and args.evidence != "review"
        args.route = DEFAULT_ROUTE if is_default else ["none"]
    if args.route != ["none"]:
        has_ratings = args.ratings != "none"
        known = {*FIELDS[:4], *["rating"] * has_ratings}
        asked = set("+".join(args.route).split("+"))
        if len(args.route) != len(names) or asked - known:
            typed = ", ".join(sorted(asked - known)) if asked - known else f"{len(args.route)} lists"
            parser.error(f"--route ({typed}) takes one list of fields out of "
                         f"{'+'.join(f for f in FIELDS if f in known)} "
                         f"for each of {len(names)} profiles, or none"
                         + "; rating needs --ratings" * ("rating" in asked - known))
        if args.evidence == "review":
            parser.error("--evidence review tells all profiles the same: --route none")
        if has_ratings and "rating" not in asked:
            parser.error("--ratings are told to no profile: name rating in --route")


# ----------------------------------------------------------------------------------------------------------
# evidence: what users had, as streams of tokens of which each knows the field it comes from
# ----------------------------------------------------------------------------------------------------------

# ids, field [R, T] int64 (index in FIELDS of what is told; -1 = context or pad), length [R] int64; target
# int64 [R, A] or None: tokens of the item in the profiles' texts (see TARGET), -1 = none; part int64 [R, T]
# or None: which of the texts that share a row a token belongs to (see side_by_side)
Texts = namedtuple("Texts", "ids field length target part", defaults=[None, None])
# fields it tells; sees bool [P]: the θ it may read; texts by row: item · num_verdicts + verdict, or (reviews)
# by interaction
Stream = namedtuple("Stream", "fields sees num_verdicts texts")
Events = namedtuple("Events", "user item verdict place fold")  # rows of interactions, int64 [R] each
Pairs = namedtuple("Pairs", "user row")  # int64 [R] each: the texts of a stream that are evidence of a user


def verdicts_of(args, interactions, train):
    """How users rated, in words: int64 [rows], the words. Stars that no train row has become the nearest."""
    if args.ratings == "none":
        return np.zeros(len(interactions), dtype=np.int64), [""]
    if args.ratings == "liked":
        return interactions["label"].to_numpy().astype(np.int64), ["disliked", "liked"]
    stars = np.sort(train["rating"].unique())
    if len(stars) > 10:
        fail(f"--ratings stars: the train rows hold {len(stars)} different ratings, too many for a word "
             f"each: take --ratings liked")
    distance = np.abs(interactions["rating"].to_numpy()[:, None] - stars)
    return distance.argmin(1), [f"rated {value:g}" for value in stars]


def folds_of(train, num_folds, seed):
    """A fold for each train row, a user's rows dealt out evenly: int64 [rows]; all -1 without folds"""
    if not num_folds:
        return np.full(len(train), -1)
    rng = np.random.default_rng([seed, 5])
    order = rng.permutation(len(train))
    user = train["user"].to_numpy()[order]
    turn = (pd.Series(user).groupby(user).cumcount().to_numpy()
            + rng.integers(num_folds, size=user.max() + 1)[user])
    fold = np.empty(len(train), dtype=np.int64)
    fold[order] = turn % num_folds
    return fold


def events_of(interactions, rows, verdict, fold=None):
    """Those rows of interactions (bool [rows]) as Events; fold [R] (default: -1, in no fold)"""
    place = np.flatnonzero(rows)
    fold = np.full(len(place), -1) if fold is None else fold
    columns = (interactions["user"].to_numpy()[place], interactions["item"].to_numpy()[place], verdict[place])
    return Events(*(torch.tensor(column) for column in (*columns, place, fold)))


def select(events, mask):
    return type(events)(*(column[mask] for column in events))


def is_known(value):
    return value is not None and value == value and str(value).strip() not in ("", "<NA>")


def price_of(item):
    """Two digits of it, or nothing: the LLM would spend its likelihood on cents."""
    return f"{float(f'{item.price:.2g}'):g}" if is_known(item.price) else ""


def pieces_of(item, fields, verdict=""):
    """Those fields of an item as (field, text) pieces: " Hiking: Rustic Boots One by Frugo for $22 liked."

    A missing field is left out. A rating without its title says nothing: the title then stands there as
    `context`, read but not told.
    """
    price = price_of(item)
    texts = {"category": f" {item.category}:" if is_known(item.category) else "", "title": f" {item.title}",
             "brand": f" by {item.brand}" if is_known(item.brand) else "",
             "price": price and f" for ${price}", "rating": verdict and f" {verdict}"}
    shown = (*fields, "title") if "rating" in fields else fields
    pieces = [(field if field in fields else "context", text) for field, text in texts.items()
              if field in shown and text]
    return pieces[:-1] + [(field, text.rstrip(":") + ".") for field, text in pieces[-1:]]


def text_of(pieces):
    return "".join(text for _, text in pieces)


def tokenize(tokenizer, rows, most=None):
    """rows: lists of (field, text) pieces, maybe empty -> Texts of `most` tokens at most, padded right: later
    tokens are not seen.
    """
    # a tokenizer of the Llama kind puts its own space before a text; GPT-2's needs it there
    first_token = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    shift = 1 if first_token.startswith("▁") else 0
    index = {field: place for place, field in enumerate(FIELDS)}
    ids, field = [], []
    for pieces in rows:
        encoded = tokenizer(text_of(pieces)[shift:], add_special_tokens=False, return_offsets_mapping=True)
        last_letter = np.array([end for _, end in encoded["offset_mapping"]], dtype=int)[:most] + shift
        ends = np.cumsum([len(text) for _, text in pieces])
        piece = np.searchsorted(ends, last_letter)  # a token belongs where it ends
        piece = piece.clip(max=max(len(pieces) - 1, 0))
        ids.append(torch.tensor(encoded["input_ids"][:most], dtype=torch.long))
        field.append(torch.tensor([index.get(pieces[p][0], -1) for p in piece], dtype=torch.long))
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return Texts(pad(ids, 0), pad(field, -1), torch.tensor([len(row) for row in ids]))


def targets_of(tokenizer, name_texts, items):
    """What the placeholders in the profiles' texts stand for, in order: int64 [M, A_i] each, -1 = pad"""
    targets = []
    for field in [field for text in name_texts for field in TARGET.findall(text)]:
        value_of = price_of if field == "price" else lambda item, name=field: getattr(item, name)
        texts = tokenize(tokenizer, [[("context", f" {value_of(item)}")] if is_known(value_of(item)) else []
                                     for item in items.itertuples()])
        is_pad = torch.arange(texts.ids.shape[1]) >= texts.length[:, None]
        targets.append(texts.ids.masked_fill(is_pad, -1))
    return targets


def tell(args, tokenizer, streams, pieces, targets, interactions, items):
    """The streams with their texts, and in these the tokens of the items that the profiles' texts name"""
    most, told = args.review_tokens if args.evidence == "review" else None, []
    for stream, of_row in zip(streams, pieces):
        texts = tokenize(tokenizer, of_row, most)
        if targets:
            item = (torch.tensor(interactions["item"].to_numpy()) if "review" in stream.fields else
                    torch.arange(len(items)).repeat_interleave(stream.num_verdicts))
            texts = texts._replace(target=torch.cat(targets, 1)[item])
        told.append(stream._replace(texts=texts))
    return told


def routes_of(args, items, names):
    """Which fields tell of which profile: list of (fields, sees bool [P]), one per distinct set of fields.

    # differs from the paper: each set is a text of its own, and reads only its own profiles. In one text, the
    # brand's tokens would see title tokens that saw θ_hobby, and θ_background would learn what titles tell.
    A profile none of whose fields the data hold is told all fields: better than nothing, and said.
    """
    everyone = torch.ones(len(names), dtype=torch.bool)
    if args.evidence == "review":
        return [(("review",), everyone)]
    known = [field for field in FIELDS[:4] if items[field].notna().any()]
    rating = ["rating"] * (args.ratings != "none")
    routes = {}
    for index, name in enumerate(names):
        asked = FIELDS if args.route == ["none"] else args.route[index].split("+")
        fields = tuple(field for field in known + rating if field in asked)
        if not fields:
            print(f"route: the data hold no {' or '.join(asked)}, so {name} reads {'+'.join(known)}")
            fields = tuple(known)
        routes.setdefault(fields, torch.zeros(len(names), dtype=torch.bool))[index] = True
    return list(routes.items())


def first_sentences(run_dir, may_tell):
    """The first sentence of each review as pieces; none where the row may not be told (bool [rows])."""
    path = Path(run_dir) / "interactions.parquet"
    reviews = pd.read_parquet(path, columns=["review"])["review"]
    if not reviews[may_tell].notna().any():
        fail(f"--evidence review: {path} holds no reviews; take --evidence items")
    first = [re.split(r"(?<=[.!?])\s", text.strip())[0] if told and isinstance(text, str) else ""
             for text, told in zip(reviews, may_tell)]
    return [[("review", f" {text}")] if text else [] for text in first]


def streams_of(args, routes, interactions, items, words):
    """A stream for each route, its texts not made yet, and for each the (field, text) pieces of its rows.

    words: of the verdicts. Items that only test rows have stay untold, and so do test rows' reviews.
    """
    may_tell = interactions["split"].isin(["train", "valid", "support"])
    told = set(interactions.loc[may_tell, "item"])
    streams, pieces = [], []
    for fields, sees in routes:
        verdicts = words if "rating" in fields else [""]
        streams.append(Stream(fields, sees, len(verdicts), None))
        pieces.append(first_sentences(args.run_dir, may_tell) if fields == ("review",) else
                      [pieces_of(item, fields, verdict) if item.item in told else []
                       for item in items.itertuples() for verdict in verdicts])
    return streams, pieces


def rows_of(stream, events):
    """Which text of the stream an event is: int64 [R]"""
    if "review" in stream.fields:
        return events.place
    return events.item * stream.num_verdicts + (events.verdict if stream.num_verdicts > 1 else 0)


def told_of(texts):
    """How many tokens of each text are told, context and pads left out: int64 [R]"""
    return (texts.field >= 0).sum(1)


def cut(texts, rows):
    """Those rows of texts, without the columns that are padding in all of them."""
    length = int(texts.length[rows].max())
    target = None if texts.target is None else texts.target[rows]
    part = None if texts.part is None else texts.part[rows, :length]
    return Texts(texts.ids[rows, :length], texts.field[rows, :length], texts.length[rows], target, part)


ROW = 128  # tokens of texts that stand side by side, at most


def side_by_side(texts, owner, most):
    """The texts [R] of a user one behind the other in as few rows as `most` tokens each allow (a longer text
    has a row of its own): Texts [R'] with `part`, and whose each row is [R']. owner [R]: sorted.

    Each is read as if it were alone (Prompt.hidden_of_text), but what stands before a text, names, θ and
    task, is joined to it once a row, and attention works on pieces that are worth its while.
    """
    row, start = [], []  # of each text: its row, and where it begins there
    end, before = 0, None
    for user, tokens in zip(owner.tolist(), texts.length.tolist()):
        goes_on = user == before and end + tokens <= most
        row.append((row[-1] if row else -1) + (not goes_on))
        start.append(end if goes_on else 0)
        end, before = start[-1] + tokens, user
    row, start, step = torch.tensor(row), torch.tensor(start), torch.arange(texts.ids.shape[1])
    is_token = step < texts.length[:, None]
    flat = lambda value: value.expand_as(is_token)[is_token]
    place = flat(row[:, None]), flat(start[:, None] + step)
    length = torch.zeros(int(row[-1]) + 1, dtype=torch.long).index_add_(0, row, texts.length)
    size = len(length), int(length.max())
    spread = lambda value, pad: torch.full(size, pad).index_put_(place, flat(value))
    part = spread(torch.arange(len(row))[:, None], -1)
    return (Texts(spread(texts.ids, 0), spread(texts.field, -1), length, part=part),
            torch.empty_like(length).index_put_((row,), owner))


def batches(prompt, texts, rows, max_tokens, least=0.85):
    """Split rows [R] into batches of texts of about equal length, longest first: yields places in `rows`.

    A batch ends at max_tokens, or, once it has enough of them to keep the machine busy, before texts shorter
    than `least` of its longest: what is padded away costs more than a small batch.
    """
    enough = 4096 if prompt.device.type == "cuda" else 256
    lengths = texts.length[rows]
    order, start = torch.argsort(lengths, descending=True, stable=True), 0
    ordered = lengths[order]
    while start < len(order):
        longest = int(ordered[start])
        size = max(1, max_tokens // (len(prompt.segment) + longest))
        alike = int(torch.searchsorted(-ordered, -least * longest, right=True)) - start
        size = min(size, max(alike, -(-enough // max(1, longest))))
        yield order[start:start + size]
        start += size


def evidence_of(args, tokenizer, streams, pieces, events):
    """What is evidence of the users of these events: a list of (stream, pairs), one per route.

    items, review: each alone, one text per row, so that p(H | θ) = Π p(item | θ) as in Fig. 2; history: the
    latest items of a user as one text, one text per user.
    """
    if args.evidence != "history":
        rows = [rows_of(stream, events) for stream in streams]
        has_text = [told_of(stream.texts)[row] > 0 for stream, row in zip(streams, rows)]
        return [(stream, Pairs(events.user[mask], row[mask]))
                for stream, row, mask in zip(streams, rows, has_text)]
    evidence = []
    for stream, of_row in zip(streams, pieces):
        frame = pd.DataFrame({"user": events.user.numpy(), "row": rows_of(stream, events).numpy()})
        latest = frame.groupby("user")["row"].agg(lambda rows: list(rows)[-args.max_history:])
        texts = tokenize(tokenizer, [sum((of_row[row] for row in history), []) for history in latest])
        user, has_text = torch.tensor(latest.index.to_numpy()), told_of(texts) > 0
        pairs = Pairs(user[has_text], torch.arange(len(user))[has_text])
        evidence.append((stream._replace(texts=texts), pairs))
    return evidence


class Evidence(NamedTuple):
    """Events sorted by user, to be had by blocks of users: histories are tokenized when they are needed."""

    events: Events
    first: torch.Tensor  # [N + 1]: where each user's events begin
    make: Callable  # events -> list of (stream, pairs)

    def of(self, first, last):
        """What is evidence of the users first … last - 1: a list of (stream, pairs)"""
        return self.make(Events(*(column[self.first[first]:self.first[last]] for column in self.events)))


def sorted_by_user(events, num_users):
    """Events in the order of users, stable, and where each user's begin: Events, int64 [N + 1]"""
    ordered = select(events, torch.argsort(events.user, stable=True))
    return ordered, torch.searchsorted(ordered.user, torch.arange(num_users + 1))


# ----------------------------------------------------------------------------------------------------------
# the prompt: profile blocks, task text, evidence; the frozen LLM's negative log-likelihood of the evidence
# ----------------------------------------------------------------------------------------------------------


class Keys(DynamicCache):
    """Keys and values of what stands before, in front of those that a forward pass makes.

    parts: one list per group of tokens, of (keys, values) [B or 1, heads, T, width] by layer. `made` takes
    those of the pass itself.
    """

    def __init__(self, config, *parts):
        super().__init__(config=config)
        self.parts, self.made = parts, []

    def get_seq_length(self, *_):
        return sum(part[0][0].shape[2] for part in self.parts)

    def update(self, keys, values, layer, *_, **__):
        self.made.append((keys, values))
        join = lambda place, own: torch.cat([*(part[layer][place].expand(len(own), -1, -1, -1)
                                               for part in self.parts), own], 2)
        return join(0, keys), join(1, values)


class HeadNLL(torch.autograd.Function):
    """-log softmax(hidden Wᵀ)[target]: hidden [R, D], head Linear to V, target [R] -> float32 [R]

    In chunks, so that no [R, V] is ever held; the gradient with respect to `hidden` is made on the way, none
    for the frozen head.
    """

    @staticmethod
    def forward(ctx, hidden, head, target):
        nll = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in torch.arange(len(hidden), device=hidden.device).split(CHUNK // head.out_features + 1):
            logits = head(hidden[rows]).float()  # [r, V]
            logits -= logits.amax(1, keepdim=True)
            mine = torch.arange(len(rows), device=rows.device), target[rows]
            of_target, share = logits[mine], logits.exp_()  # in place: each pass over [r, V] costs
            total = share.sum(1)
            nll[rows] = total.log() - of_target
            if gradient is not None:  # (softmax - one-hot) W; divided by the total where that is [r, D]
                share[mine] -= total
                gradient[rows] = (share.to(hidden.dtype) @ head.weight / total[:, None]).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, of_nll):
        return ctx.saved_tensors[0] * of_nll[:, None].to(ctx.saved_tensors[0].dtype), None, None


CHUNK = 2**25  # logits held at a time


class Prompt:
    """[N_1 θ_1 N_2 θ_2 … D] H (eq. 3) around a frozen LLM, with the mask of Fig. 4; S soft tokens per θ_k.

    Under that mask no θ reaches the names nor the task text but its last token: their keys and values are
    made once. Those of a user's θ are made once for all his texts. room: tokens of each TARGET in name_texts,
    at most, in their order.
    """

    def __init__(self, model, tokenizer, names, name_texts, task_text, num_soft=1, mask="fig4", room=()):
        self.names, self.num_soft, self.mask = names, num_soft, mask
        self.model, self.device, self.num_profiles = model, model.device, len(name_texts)
        self.body, self.head = model.base_model, model.get_output_embeddings()
        # every stream that starts blind begins as the LLM was trained to begin: with its BOS, if it has one
        bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        plain = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        room, blocks = iter(room), []
        for text in name_texts:
            opening, *rest = (plain(part) for part in TARGET.split(text)[::2])
            target = [token for part in rest for token in [*[-1] * next(room), *part]]  # -1: an item's place
            blocks.append([*bos, *opening, *target, *[0] * num_soft])  # 0: a soft token's place
        blocks.append([*bos, *plain(task_text)])
        # differs from the paper: positions start anew in each profile block, so that a profile cannot even
        # tell how long the other's name is; the task text goes on behind the longest block
        starts = [0] * len(name_texts) + [max(map(len, blocks[:-1]))]
        if mask == "causal":  # one text like any other: the bos once, positions in a row
            blocks = [blocks[0], *(block[len(bos):] for block in blocks[1:])]
            starts = np.cumsum([0, *map(len, blocks[:-1])]).tolist()
        as_tensor = lambda rows: torch.tensor([value for row in rows for value in row], device=self.device)
        self.segment = as_tensor([index] * len(block) for index, block in enumerate(blocks))  # [L]
        spans = [range(start, start + len(block)) for start, block in zip(starts, blocks)]
        self.position = as_tensor(spans)  # [L]
        ends = np.cumsum([len(block) for block in blocks[:-1]])
        self.soft_places = as_tensor([range(end - num_soft, end) for end in ends.tolist()])  # [P S]
        self.is_soft = torch.zeros_like(self.segment, dtype=torch.bool).index_fill(0, self.soft_places, True)
        self.embed, ids = model.get_input_embeddings(), as_tensor(blocks)
        self.target_places = (ids < 0).nonzero()[:, 0]  # [A]
        self.embedding = self.embed(ids.clamp(min=0)).detach()  # [L, D]
        self.name_embeddings = torch.stack([  # of the words that the profiles are named by [P, D]
            self.embed(torch.tensor(plain(f" {name}"), device=self.device)).mean(0).detach()
            for name in names])
        # per dimension: GPT-2 .14, Llama-2 .02
        self.scale = float(self.embed.weight.float().square().mean().sqrt())
        self.check_head()
        if mask == "fig4":
            self.fixed = (~self.is_soft).nonzero()[:-1, 0]  # names and task text but for its last token
            everyone = torch.ones(1, self.num_profiles, dtype=torch.bool, device=self.device)
            self.allowed = fig4_mask(self.segment, self.is_soft, everyone)[0, 0]  # [L, L]
            with torch.no_grad():
                self.fixed_keys = self.run(self.embedding[None, self.fixed], self.fixed, self.fixed)[1]

    def check_head(self):
        """Exit when the LLM does more to its last hidden states than multiply them by the head."""
        with torch.no_grad():
            embeddings = self.embedding[None]
            logits = self.model(inputs_embeds=embeddings, use_cache=False).logits
            mine = self.head(self.body(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
        if not torch.allclose(logits, mine, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            fail(f"--llm: a {type(self.model).__name__} changes its logits behind the head, which is not "
                 f"supported; take a LLM of the GPT-2 or Llama kind")

    def run(self, embeddings, places, keys, *parts):
        """Part of the prompt through the LLM: embeddings [B, T, D] of `places` [T], which may attend to the
        places `keys` [T'] as far as Fig. 4 allows -> hidden [B, T, D], keys and values by layer

        parts: the keys and values of all of `keys` but the last T, which are the places themselves.
        """
        mask = self.allowed[places][:, keys].expand(len(embeddings), 1, -1, -1)
        cache = Keys(self.model.config, *parts)
        hidden = self.body(inputs_embeds=embeddings, attention_mask=mask, use_cache=False,
                           position_ids=self.position[places][None], past_key_values=cache).last_hidden_state
        return hidden, cache.made

    def inputs(self, soft, ids, sees, target=None):
        """soft [B, P, S D], ids [B, T], sees [B, P], target [B, A] -> embeddings [B, L + T, D],
        mask [B, 1, L + T, L + T], positions [1 or B, L + T]"""
        (batch, num_tokens), start = ids.shape, int(self.position[-1]) + 1
        evidence = self.embed(ids)  # [B, T, D]
        soft = soft.to(evidence.dtype).reshape(batch, len(self.soft_places), -1)  # [B, P S, D]
        prefix = self.embedding.expand(batch, -1, -1).index_copy(1, self.soft_places, soft)
        segment = F.pad(self.segment, (0, num_tokens), value=self.num_profiles + 1)
        position = torch.cat([self.position, torch.arange(start, start + num_tokens, device=self.device)])
        mask = fig4_mask(segment, F.pad(self.is_soft, (0, num_tokens)), sees, self.mask == "causal")
        position = position[None]
        if target is not None:  # as if the places that this item leaves empty were not there
            is_there = torch.ones(batch, len(segment), dtype=torch.bool, device=self.device)
            is_there[:, self.target_places] = target >= 0
            prefix = prefix.index_copy(1, self.target_places, self.embed(target.clamp(min=0)))
            itself = torch.eye(len(segment), dtype=torch.bool, device=self.device)
            mask, position = mask & (is_there[:, None, None] | itself), (is_there.cumsum(1) - 1).clamp(min=0)
        return torch.cat([prefix, evidence], 1), mask, position

    def hidden_of_all(self, soft, ids, sees, owner, target=None):
        """The whole prompt for each text: what predicts its tokens, [B, T, D]; soft [U, P, S D], owner [B]"""
        embeddings, mask, position = self.inputs(soft[owner], ids, sees.expand(len(ids), -1), target)
        hidden = self.body(inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                           use_cache=False).last_hidden_state
        return hidden[:, len(self.segment) - 1:-1]

    def seen(self, sees):
        """The places of the θ that may be read: [P' S]"""
        return self.soft_places.view(self.num_profiles, self.num_soft)[sees].flatten()

    def keys_of(self, soft, sees):
        """Keys and values of the θ that may be read, soft [U, P, S D]: by layer, [U, heads, P' S, width]

        An empty list where none is read, or where they cannot be made apart (plain causal mask).
        """
        sees, soft = sees.to(self.device), soft.to(self.device)
        if self.mask != "fig4" or not sees.any():
            return []
        seen = self.seen(sees)
        theta = soft[:, sees].to(self.embedding.dtype).reshape(len(soft), len(seen), -1)
        return self.run(theta, seen, torch.cat([self.fixed, seen]), self.fixed_keys)[1]

    def hidden_of_text(self, soft, ids, sees, owner, keys=None, part=None):
        """The same under the mask of Fig. 4, without doing twice what many texts share; keys: of keys_of

        part [B, T]: the texts of a row that holds several; none sees another, and each begins where one that
        is alone does.
        """
        keys = self.keys_of(soft, sees) if keys is None else keys
        before, parts = torch.cat([self.fixed, self.seen(sees)]), [self.fixed_keys]
        if keys:
            parts.append([tuple(part.index_select(0, owner) for part in layer) for layer in keys])
        part = torch.zeros_like(ids[:1]) if part is None else part  # [1 or B, T], -1 at pads
        step = torch.arange(ids.shape[1], device=self.device)
        is_first = part != F.pad(part[:, :-1], (1, 0), value=-2)
        place = step - torch.where(is_first, step, 0).cummax(1).values  # of a token in its text [1 or B, T]
        # the last task token predicts the first of a text, and each of the text the next
        read = torch.where(is_first[..., None], self.embedding[-1], self.embed(F.pad(ids[:, :-1], (1, 0))))
        mask = (part[:, :, None] == part[:, None, :]) & (step[:, None] >= step)  # [1 or B, T, T]
        mask = F.pad(mask, (len(before), 0), value=True)[:, None].expand(len(ids), -1, -1, -1)
        return self.body(inputs_embeds=read, attention_mask=mask, position_ids=self.position[-1] + place,
                         past_key_values=Keys(self.model.config, *parts), use_cache=False).last_hidden_state

    def nll(self, soft, texts, sees, owner=None, keys=None):
        """-log P(h_t | h_<t, N, θ, D) per evidence token (eq. 4): soft [U, P, S D], texts [B, T], sees [P],
        whose each text is, owner [B] (default: one after the other, or all of the only one) -> float32 [B, T]

        0 at pads and context: logits are made only where evidence is predicted. keys: those of `soft`, where
        they are made already.
        """
        ids, field, sees = texts.ids.to(self.device), texts.field.to(self.device), sees.to(self.device)
        if owner is None:
            owner = torch.arange(len(ids), device=self.device).clamp(max=len(soft) - 1)
        soft, told = soft.to(self.device), field >= 0
        if self.mask == "fig4":
            part = None if texts.part is None else texts.part.to(self.device)
            hidden = self.hidden_of_text(soft, ids, sees, owner, keys, part)
        else:
            target = None if texts.target is None else texts.target.to(self.device)
            hidden = self.hidden_of_all(soft, ids, sees, owner, target)
        nll = torch.zeros(ids.shape, device=self.device)
        return nll.masked_scatter(told, HeadNLL.apply(hidden[told], self.head, ids[told]))

    def check_context(self, lengths, what, cure):
        """Exit when a text with its prompt is longer than the LLM's context: lengths [R] in tokens"""
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        needed = int(self.position[-1]) + 1 + lengths
        if needed.max() > limit:
            fail(f"{what} {int(needed.argmax())} needs {int(needed.max()):,} tokens with its prompt, "
                 f"but the LLM reads {limit:,} at most: {cure}")


# ----------------------------------------------------------------------------------------------------------
# the LLM: named, found, or made on the spot
# ----------------------------------------------------------------------------------------------------------


def choose_llm():
    """--llm auto: Llama-2-7B with CUDA and its weights here, else GPT-2 if here or reachable, else tiny."""
    llama = "meta-llama/Llama-2-7b-hf"
    is_here = lambda repository, file: isinstance(try_to_load_from_cache(repository, file), str)
    index_files = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    if torch.cuda.is_available() and any(is_here(llama, file) for file in index_files):
        return llama, "CUDA and its weights are on this machine"
    if is_here("gpt2", "model.safetensors"):
        return "gpt2", "its weights are on this machine"
    if not HF_HUB_OFFLINE:
        host = ENDPOINT.split("://")[-1].split("/")[0]
        name, _, port = host.partition(":")
        try:
            socket.create_connection((name, int(port or 443)), timeout=3).close()
            return "gpt2", f"it can be fetched from {host}"
        except OSError:
            pass
    return "tiny", ("no other LLM is on this machine and the model hub cannot be reached; "
                    "it is pretrained on the train items")


TINY_STAMP = "tiny_llm/made_from.txt"  # the digest of what the tiny LLM was made from
TINY = {"batch": 24, "length": 96, "lr": 2e-3, "width": 128, "layers": 4, "vocabulary": 2048, "context": 512}


def pretrain_tiny(folder, histories, name_texts, task_text, num_steps, seed):
    """A 4-layer GPT-2 of width 128, pretrained on the train items' texts -> loss by step

    histories: lists of texts, of a user each. It reads a user's items in random order, so that it learns what
    goes with what, as a large LLM knows from the world; random offsets train all positions. About a minute on
    two cores.
    """
    rng = np.random.default_rng([seed, 3])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [text for history in histories for text in history]
    corpus += (1 + len(corpus) // 50) * [*name_texts, task_text]  # often enough to become whole words
    trainer = trainers.BpeTrainer(vocab_size=TINY["vocabulary"], min_frequency=5, show_progress=False,
                                  special_tokens=["<|endoftext|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>",
                                        eos_token="<|endoftext|>")
    known = {text: tokenizer(text).input_ids for text in sorted(set(corpus))}
    opening = [tokenizer.bos_token_id, *tokenizer(task_text).input_ids]

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=TINY["context"], n_embd=TINY["width"],
                        n_layer=TINY["layers"], n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY["lr"], weight_decay=0.01, betas=(0.9, 0.95),
                                  fused=True)
    rise = min(0.9, max(0.1, 1.5 / num_steps))  # share of the steps; one that is no step would divide by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY["lr"], total_steps=num_steps,
                                                   pct_start=rise)
    size, stream, curve = TINY["batch"] * TINY["length"], [], []
    bar = tqdm(range(num_steps), desc="pretrain tiny", unit="step", mininterval=2)
    for step in bar:
        while len(stream) < size:
            for user in rng.permutation(len(histories)):
                order = rng.permutation(len(histories[user]))
                stream += opening + [token for index in order for token in known[histories[user][index]]]
        tokens = torch.tensor(stream[:size]).view(TINY["batch"], TINY["length"])
        del stream[:size]
        offset = torch.from_numpy(rng.integers(TINY["context"] - TINY["length"], size=(TINY["batch"], 1)))
        logits = model(tokens, position_ids=offset + torch.arange(TINY["length"])).logits  # [B, T, V]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if step % 50 == 49:
            bar.set_postfix(loss=f"{curve[-1]:.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return curve


def make_tiny_llm(args, train, streams, pieces, name_texts):
    """run_dir/tiny_llm, made from this run's train rows; kept when the same texts and seed made it before.

    pieces: for each stream those of its rows; the LLM reads what users had as the prompts will tell it.
    """
    histories = []
    for stream, of_row in zip(streams, pieces):
        frame = pd.DataFrame({"user": train.user.numpy(), "row": rows_of(stream, train).numpy()})
        histories += [[text_of(of_row[row]) for row in rows if of_row[row]]
                      for rows in frame.groupby("user")["row"].agg(list)]
    recipe = json.dumps([histories, name_texts, args.task_text, args.tiny_steps, args.seed, TINY])
    made_from = hashlib.sha256(recipe.encode()).hexdigest()
    folder = Path(args.run_dir) / "tiny_llm"
    stamp = folder / "made_from.txt"
    if stamp.exists() and stamp.read_text() == made_from:
        print(f"tiny LLM: {folder} was made from the same texts, kept")
        return
    started = time.time()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        curve = pretrain_tiny(temporary, histories, name_texts, args.task_text, args.tiny_steps, args.seed)
        (temporary / "curve.json").write_text(json.dumps(curve))
        (temporary / stamp.name).write_text(made_from)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"cannot write {folder}: {error.strerror}; free some space or choose another --run-dir")
    print(f"tiny LLM: pretrained on {len(train.user):,} train interactions in {time.time() - started:.0f} s, "
          f"loss {curve[-1]:.3f}")


# ----------------------------------------------------------------------------------------------------------
# nothing lost: finished work is on disk; work shared by processes (torchrun); memory that does not suffice
# ----------------------------------------------------------------------------------------------------------


def join_processes():
    """Rank and number of processes; with several (torchrun) only the first one speaks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they wait for each other, no more
        if rank:
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return rank, world


def lock(run_dir):
    """Two processes on one run directory would spoil each other's files: the second is refused."""
    path = Path(run_dir) / ".lock"
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system however the process ends
    except OSError:
        fail(f"another process works on {run_dir} ({path} is locked): wait for it, or take another --run-dir")
    return file


class Progress:
    """Finished pieces of a run in RUN_DIR/progress, so that a killed one goes on where it stood.

    recipe: all that decides the numbers (options, inputs, LLM, versions); pieces of another one are thrown
    away. The generator goes on behind a piece that was found as if it had just been made. Of several
    processes the first makes what all need; blocks are dealt out. Short of memory, a piece is begun again
    with half the tokens per batch.
    """

    def __init__(self, args, recipe, generator, rank=0, world=1):
        self.args, self.generator, self.rank, self.world = args, generator, rank, world
        self.folder, manifest = Path(args.run_dir) / "progress", Path(args.run_dir) / "progress/recipe.json"
        if rank == 0:
            recipe = json.loads(json.dumps(recipe, default=str))
            before = json.loads(manifest.read_text()) if manifest.exists() else None
            if before and (changed := [key for key in recipe if recipe[key] != before["recipe"].get(key)]):
                print(f"unfinished work in {self.folder} had another {changed[0]} "
                      f"({before['recipe'].get(changed[0])}, now {recipe[changed[0]]}): it starts anew")
                before = None
            if before:
                args.tokens_per_batch = before["tokens_per_batch"]
                done = len(list(self.folder.glob("*.pt")))
                print(f"going on with the unfinished run in {self.folder}: {done} pieces are done")
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                told = {"recipe": recipe, "tokens_per_batch": args.tokens_per_batch}
                with whole_file(manifest) as file:
                    file.write(json.dumps(told).encode())
        self.wait()
        args.tokens_per_batch = json.loads(manifest.read_text())["tokens_per_batch"]

    def wait(self):
        if self.world > 1:
            dist.barrier()

    def path(self, name):
        return self.folder / f"{name}.pt"

    def read(self, name):
        return torch.load(self.path(name), weights_only=True)["value"]

    def write(self, name, make):
        """The piece made and written, unless it is there."""
        if self.path(name).exists():
            return
        piece = {"value": self.with_less_memory(make), "generator": self.generator.get_state()}
        with whole_file(self.path(name)) as file:
            torch.save(piece, file)

    def with_less_memory(self, make):
        """make(); when memory does not suffice, again with half the tokens per batch."""
        while True:
            state = self.generator.get_state()
            try:
                return make()
            except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
                if not re.search(r"out of memory|not enough memory|can't allocate", str(error), re.I):
                    raise
                self.args.tokens_per_batch //= 2
            if self.args.tokens_per_batch < 16:
                fail("memory does not suffice for 16 tokens: take a smaller LLM or a larger machine")
            print(f"out of memory: going on with --tokens-per-batch {self.args.tokens_per_batch}")
            self.generator.set_state(state)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def keep(self, name, make):
        """What make() returns, made once, by the first process"""
        if self.rank == 0:
            self.write(name, make)
        self.wait()
        piece = torch.load(self.path(name), weights_only=True)
        self.generator.set_state(piece["generator"])
        return piece["value"]

    def keep_blocks(self, name, num, make):
        """make(i) for each of `num` blocks, dealt to the processes; to be read as name-i"""
        for index in range(self.rank, num, self.world):
            self.write(f"{name}-{index}", functools.partial(make, index))
        self.wait()

    def clear(self):
        self.wait()
        if self.rank == 0:
            shutil.rmtree(self.folder)


def recipe_of(args, prompt, inputs):
    """All that decides the numbers of a run: options, digests of inputs and LLM, versions, device."""
    digest = hashlib.sha256()
    for name, value in prompt.model.named_parameters():  # a sample of each is enough to tell two LLMs apart
        sample = value.flatten()[::max(1, value.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    options = {f"--{key.replace('_', '-')}": value for key, value in vars(args).items()
               if key not in ("run_dir", "estimate")}
    digests = {name: sha256_of(Path(args.run_dir) / name) for name in inputs}
    return options | digests | {"LLM": digest.hexdigest(), "torch": torch.__version__,
                                "transformers": transformers.__version__, "device": str(prompt.device)}


class Profiles(NamedTuple):
    """Profiles [F + 1, N, P, S D] that need not fit into memory: of(fold, users [U]) -> [U, P, S D]"""

    shape: tuple
    of: Callable

    def last(self, users):
        """Those with all evidence"""
        return self.of(self.shape[0] - 1, users)

    def blocks(self, size=2**12):
        for fold in range(self.shape[0]):
            for users in torch.arange(self.shape[1]).split(size):
                yield self.of(fold, users)

    def all(self):
        return torch.cat(list(self.blocks())).view(self.shape)


# ----------------------------------------------------------------------------------------------------------
# the score: what all users share, and one step from it
# ----------------------------------------------------------------------------------------------------------


def first_soft(args, prompt, num, generator):
    """Soft tokens to start from: [num, P, S D]"""
    shape = num, prompt.num_profiles, prompt.num_soft, prompt.embedding.shape[1]
    if args.init == "random":  # at the scale of the LLM's embeddings
        soft = prompt.scale * torch.randn(shape, generator=generator)
    elif args.init == "uniform":
        soft = 0.2 * torch.rand(shape, generator=generator) - 0.1
    elif args.init == "vocab":
        table = prompt.embed.weight.detach().float().cpu()
        soft = table[torch.randint(len(table), shape[:3], generator=generator)]
    else:  # the word that the profile is named by, the same for all users
        soft = prompt.name_embeddings[:, None].float().cpu().expand(shape)
    return soft.flatten(2)


def start_of(args, prompt, shared, users):
    """Where the θ of those users [U] leave from: θ̄, or a random point, each user's own -> [U, P, S D]"""
    if args.start == "shared":
        return shared.expand(len(users), -1, -1)
    seeds = [[args.seed, 7, user] for user in users.tolist()]  # the same in whatever block he is
    generators = [torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
                  for seed in seeds]
    return torch.cat([first_soft(args, prompt, 1, generator) for generator in generators])


def weighted_nll(prompt, soft, stream, rows, weights, owner=None, keys=None):
    """Loss of those rows of a stream, tokens weighted by field (see field_weights): soft [U, P, S D], owner
    [B], keys (see Prompt.nll) -> []
    """
    texts = cut(stream.texts, rows)
    weights = F.pad(weights, (0, 1))  # the field -1 of context and pads takes the last, 0
    weight = weights[texts.field].to(prompt.device)  # [B, T]
    return (prompt.nll(soft, texts, stream.sees, owner, keys) * weight).sum()


def fit_shared(args, prompt, evidence, weights, generator, batch_size=64):
    """One θ̄ for all users, by Adam on minibatches of their evidence -> float32 [P, S D], nats per row by
    step
    """
    soft = first_soft(args, prompt, 1, generator).to(prompt.device).requires_grad_()
    optimizer = torch.optim.Adam([soft], lr=0.3 * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.shared_steps)
    curve = []
    for _ in tqdm(range(args.shared_steps), desc="shared start", unit="step", mininterval=2):
        optimizer.zero_grad()
        curve.append(0.0)
        for stream, pairs in evidence:
            rows = pairs.row[torch.randint(len(pairs.row), (batch_size,), generator=generator)]
            for index in batches(prompt, stream.texts, rows, args.tokens_per_batch):
                loss = weighted_nll(prompt, soft, stream, rows[index], weights)
                (loss / batch_size).backward()
                curve[-1] += loss.item() / batch_size
        optimizer.step()
        schedule.step()
    return soft.detach()[0].float().cpu(), curve


def scores_of(prompt, stream, rows, shared, weights, max_tokens):
    """g_r = ∇_θ log P(text r | θ) at θ̄, one backward pass per text: rows [R] -> float32 [R, P, S D]"""
    scores = torch.empty(len(rows), *shared.shape)
    for index in batches(prompt, stream.texts, rows, max_tokens):
        soft = shared.expand(len(index), -1, -1).to(prompt.device).requires_grad_()
        loss = weighted_nll(prompt, soft, stream, rows[index], weights)
        scores[index] = -torch.autograd.grad(loss, soft)[0].float().cpu()
    return scores


def scores_in_blocks(args, prompt, stream, rows, shared, weights, progress, name, size=2048):
    """The same for many texts, a block at a time, each on disk when it is done"""
    blocks = rows.split(size)
    with tqdm(total=len(rows), desc=name, unit="text", mininterval=2) as bar:

        def make(index):
            found = scores_of(prompt, stream, blocks[index], shared, weights, args.tokens_per_batch)
            bar.update(len(found))
            return found[:, stream.sees].clone()

        progress.keep_blocks(name, len(blocks), make)
    scores = torch.zeros(len(rows), *shared.shape)
    for index, part in enumerate(scores.split(size)):
        part[:, stream.sees] = progress.read(f"{name}-{index}")
    return scores


def field_weights(args, prompt, streams, counts, shared, generator, num_sample=512):
    """Bring every field to the same noise: 1 / (root mean square of its score at θ̄ over a sample of texts)
    -> [len(FIELDS)]. counts: for each stream how often train rows tell a text [R].

    # differs from the paper: fields speak at volumes of their own, which depend on the LLM and say nothing
    # about what they tell: a title's score has more variance than a category's and knows less of the hobby.
    # In a plain sum the loudest field drowns the others.
    """
    weights = torch.zeros(len(FIELDS))
    for stream, count in zip(streams, counts):
        told = (count * told_of(stream.texts)).nonzero()[:, 0]
        rows = told[torch.randperm(len(told), generator=generator)[:num_sample]]
        for field in stream.fields:
            scores = scores_of(prompt, stream, rows, shared, only(field), args.tokens_per_batch)
            noise = (scores - scores.mean(0)).square().sum((1, 2)).mean()
            weights[FIELDS.index(field)] = noise.clamp(min=1e-20).rsqrt()
    told = [f"{field} {weight:.3g}" for field, weight in zip(FIELDS, weights) if weight]
    print("field weights: " + "  ".join(told))
    return weights


def only(field):
    """Weight 1 for one field, 0 for all others: [len(FIELDS)]"""
    return F.one_hot(torch.tensor(FIELDS.index(field)), len(FIELDS)).float()


def audience(count, weight=3.0):
    """How the others rated an item: count [M, L] of its verdicts in train rows -> share [M, L, L] for
    somebody who gave the verdict of axis 1 and is one of them, and share [M, L] for a stranger.

    An item that few have rated is judged as all items are: the prior weighs like `weight` votes.
    """
    prior = (count.sum(0) + 1) / (count + 0.0).sum().add(count.shape[1])
    with_prior = count + weight * prior  # [M, L]
    strangers = with_prior / with_prior.sum(1, keepdim=True)
    others = (with_prior[:, None] - torch.eye(count.shape[1])).clamp(min=0)
    return others / others.sum(2, keepdim=True), strangers


def information_of(scores_of, stream, count, known, shared, weights, shrinkage=1e-3):
    """Centred scores of the texts of a stream, and their covariance, the noise: dict of k -> (own [R, D],
    strangers' [R, D], which were taken [R], noise [D, D]), k the profiles that the stream tells of.

    scores_of(rows, weights, name): scores of texts; count [R]: how often train rows tell a text; known bool
    [R]: its score is needed. What item a user had is
    centred by popularity; how he rated it, by how the others rated it, so that what remains is the user's
    own: train rows without his own vote. If users did not differ, a user's n rows would be n draws, and the
    sum of their scores would have n times the noise. It is also the Fisher information that one row brings.
    """
    rows = (known & (told_of(stream.texts) > 0)).nonzero()[:, 0]
    is_rating = only("rating").bool()
    share = (count[rows] / count[rows].sum()).double()[:, None]
    parts = []
    for mask in (~is_rating, is_rating):
        part = torch.zeros(len(count), *shared.shape)
        if any(mask[FIELDS.index(field)] for field in stream.fields):
            what = "+".join(field for field in stream.fields if mask[FIELDS.index(field)])
            part[rows] = scores_of(rows, weights * mask, f"scores-{what}")
        parts.append(part)
    of_item, of_verdict = parts
    shares = audience(count.view(-1, stream.num_verdicts))
    result = {}
    for k in stream.sees.nonzero()[:, 0].tolist():
        mean = (share * of_item[rows, k].double()).sum(0)
        centred = torch.zeros(len(count), shared.shape[1], dtype=torch.float64)
        centred[rows] = of_item[rows, k].double() - mean
        own = strangers = centred
        if stream.num_verdicts > 1:
            by_item = of_verdict[:, k].double().view(-1, stream.num_verdicts, shared.shape[1])  # [M, L, D]
            own = own + (by_item - shares[0].double() @ by_item).flatten(0, 1)
            strangers = strangers + (by_item - shares[1].double()[:, None] @ by_item).flatten(0, 1)
        covariance = (share * own[rows]).T @ own[rows]
        ridge = shrinkage * covariance.diagonal().mean().clamp(min=1e-20)
        is_known = torch.zeros(len(count), dtype=torch.bool).index_fill(0, rows, True)
        noise = (covariance + ridge * torch.eye(len(covariance))).float()
        result[k] = own.float(), strangers.float(), is_known, noise
    return result


def incidence_of(user, row, num_users, num_rows):
    """How often each user has each row, in the order of rows: sparse [N, R]

    So a user's sum over his rows has the same bits whoever else is in it.
    """
    incidence = sparse.coo_matrix((np.ones(len(user)), (user.numpy(), row.numpy())),
                                  shape=(num_users, num_rows)).tocsr()
    incidence.sum_duplicates()
    return incidence


def sum_by_user(user, row, of_row, num_users):
    """Σ of a user's texts: user, row int64 [R], of_row [R', C] -> float64 [N, C], one sparse product"""
    return torch.from_numpy(incidence_of(user, row, num_users, len(of_row)) @ of_row.double().numpy())


def project_scores(incidence, tables, count, noise, is_warm, rank, block=2**12):
    """Whiten scores by the noise and keep the directions in which the warm users (is_warm [N]) differ most.

    incidence sparse [N, R] and tables [R, D]: users' sums of scores; count [N] texts, noise [D, D] ->
    projection [D, C], eigenvalues [C]. A whitened sum over n texts has variance n in every direction if users
    do not differ; an eigenvalue λ above 1 tells how far they do. Sums are made by blocks of users.
    """
    values, vectors = torch.linalg.eigh(noise.double())
    whiten = vectors * values.rsqrt() @ vectors.T  # Σ^-½
    table = (tables.double() @ whiten).numpy()
    users = (is_warm & (count > 0)).nonzero()[:, 0]
    moment, mean = torch.zeros_like(whiten), torch.zeros(len(whiten), dtype=torch.float64)
    for some in users.split(block):
        z = torch.from_numpy(incidence[some.numpy()] @ table) / count[some].double().sqrt()[:, None]
        moment += z.T @ z
        mean += z.sum(0)
    mean /= len(users)
    covariance = (moment - len(users) * torch.outer(mean, mean)) / (len(users) - 1)
    eigenvalues, directions = torch.linalg.eigh(covariance)
    return whiten @ directions.flip(1)[:, :rank], eigenvalues.flip(0)[:rank]


# Users and rows in the few directions of the scores in which users differ. For each profile k: stream, its
# place in `streams`; own and strangers' float32 [R, C], what a row adds for a user of the train rows, for
# others; known bool [R]: its score was taken; pull, the prior's weight in rows
Coordinates = namedtuple("Coordinates", "stream own strangers known pull")


def told_by(stream, events, is_warm, num_users):
    """Which texts a stream tells of whom, sparse [N, 2 R], and how many [N]

    The first half is for users with train rows (is_warm [N]), the second for others.
    """
    row = rows_of(stream, events)
    told = told_of(stream.texts)[row] > 0
    num_rows = len(stream.texts.ids)
    row = torch.where(is_warm[events.user], row, row + num_rows)[told]
    count = torch.bincount(events.user[told], minlength=num_users).float()
    return incidence_of(events.user[told], row, num_users, 2 * num_rows), count


def totals_of(coordinates, streams, events, is_warm):
    """Σ over a user's rows, and how many: float32 [N, P, C], [N, P]"""
    told = [told_by(stream, events, is_warm, len(is_warm)) for stream in streams]
    tables = [torch.cat([at.own, at.strangers]).double().numpy() for at in coordinates]
    totals = [torch.from_numpy(told[at.stream][0] @ table).float() for at, table in zip(coordinates, tables)]
    return torch.stack(totals, 1), torch.stack([told[at.stream][1] for at in coordinates], 1)


def coordinates_of(args, prompt, streams, information, events, is_warm):
    """The coordinates of all profiles (see project_scores): list of Coordinates

    What is estimated over users, is so over warm ones (is_warm [N]: with train rows): cold ones are only
    placed.
    """
    result = []
    for k in range(prompt.num_profiles):
        place = next(index for index, stream in enumerate(streams) if stream.sees[k])
        own, strangers, known, noise = information[place][k]
        incidence, count = told_by(streams[place], events, is_warm, len(is_warm))
        tables = torch.cat([own, strangers])
        projection, eigenvalues = project_scores(incidence, tables, count, noise, is_warm, args.rank)
        # λ = 1 + n · (variance between users): the prior of that variance weighs as much as n / (λ - 1) items
        edge = (1 + math.sqrt(len(noise) / int(is_warm.sum()))) ** 2  # of pure noise (Marchenko and Pastur)
        excess = float(eigenvalues[eigenvalues > edge].mean()) - 1 if (eigenvalues > edge).any() else 0.1
        pull = float(count[is_warm].mean()) / excess if args.pull is None else args.pull
        result.append(Coordinates(place, *((part.double() @ projection).float() for part in (own, strangers)),
                                  known, pull))
        leading = " ".join(f"{value:.2f}" for value in eigenvalues[:8])
        print(f"{prompt.names[k]}: pull {pull:.1f} items; "
              f"eigenvalues of the whitened scores (noise 1, its edge {edge:.2f}): {leading}")
    return result


def fit_map(args, prompt, streams, train, shared, coordinates, is_warm, generator, batch_size=64):
    """The map B [P, C, D] from coordinates to soft tokens, one for all users, by Adam on their train rows.

    Minimises -log P(row | θ̄ + B y_u) with the row itself left out of y_u: a profile must foretell others.
    """
    total, count = totals_of(coordinates, streams, train, is_warm)
    pull = torch.tensor([at.pull for at in coordinates])
    y = total / (count + pull)[:, :, None]
    unit = y[is_warm].square().mean((0, 2)).sqrt().clamp(min=1e-6)
    shape = len(shared), total.shape[2], shared.shape[1]
    lift = torch.zeros(shape, device=prompt.device, requires_grad=True)
    optimizer = torch.optim.Adam([lift], lr=0.1 * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.map_steps)
    ones = torch.ones(len(FIELDS))
    for _ in tqdm(range(args.map_steps), desc="map to soft tokens", unit="step", mininterval=2):
        optimizer.zero_grad()
        for place, stream in enumerate(streams):
            row = rows_of(stream, train)
            told = (told_of(stream.texts)[row] > 0).nonzero()[:, 0]
            chosen = told[torch.randint(len(told), (batch_size,), generator=generator)]
            row, user = row[chosen], train.user[chosen]
            left = torch.stack([at.own[row] if at.stream == place else torch.zeros(batch_size, shape[1])
                                for at in coordinates], 1)  # [B, P, C]
            is_mine = torch.tensor([float(at.stream == place) for at in coordinates])
            y = (total[user] - left) / (count[user] - is_mine + pull).clamp(min=1e-6)[:, :, None]
            y = y / unit[:, None]
            for index in batches(prompt, stream.texts, row, args.tokens_per_batch):
                step = torch.einsum("bpc,pcd->bpd", y[index].to(prompt.device), lift)
                soft = shared.to(prompt.device) + step
                (weighted_nll(prompt, soft, stream, row[index], ones) / batch_size).backward()
        optimizer.step()
        schedule.step()
    return lift.detach().cpu() / unit[:, None, None]


def place_users(total, count, pull, lift):
    """θ_u - θ̄ = B y_u with y_u = Σ_i g_i / (n_u + pull): total [N, P, C], count [N, P], pull [P], lift
    [P, C, D] -> [N, P, D]. Sums by hand: a user gets the same bits in any company.
    """
    y = total / (count + pull)[:, :, None]  # [N, P, C]
    step = torch.zeros(*total.shape[:2], lift.shape[2])
    for c in range(y.shape[2]):
        step += y[:, :, c, None] * lift[:, c]
    return step


def infer_by_score(args, prompt, streams, train, own, coordinates, shared, tune, is_warm, prior, progress):
    """One step from θ̄ for all users at once: Profiles, what anybody's needs (dict).

    θ_u = θ̄ + length · B y_u with y_u = Σ_i g_i / (n_u + pull), whitened: a natural-gradient step, shrunk by
    a prior. With folds, the sum leaves out each fold in turn; the last profile has all of it. With a codebook
    as prior, y_u = (Σ_i g_i + pull · y_c) / (n_u + pull): the E step takes the codeword c nearest to the
    user's plain mean, the M step pulls to it (eq. 7).
    # differs from the paper: B is not the inverse Fisher information but fitted (fit_map). Between users the
    # LLM is far from linear: the plain natural-gradient step made held-out items less likely than θ̄ at every
    # length tried.
    """
    pull = torch.tensor([at.pull for at in coordinates])
    lift = progress.keep("map", lambda: fit_map(args, prompt, streams, train, shared, coordinates, is_warm,
                                                progress.generator))
    kept = [*(select(own, own.fold != left_out) for left_out in range(args.folds)), own]
    sums = [totals_of(coordinates, streams, events, is_warm) for events in kept]
    step = place_users(*(part[tune.user] for part in sums[-1]), pull, lift)
    length = progress.keep("length", lambda: choose_length(args, prompt, streams, step, shared, tune))
    lift = length[:, None, None] * lift
    centers = [center_coordinates(part, shared[k], lift[k]) for k, part in enumerate(prior)]

    def profiles_of(fold, users):
        total, count = (part[users] for part in sums[fold])
        total = total + pull[:, None] * nearest_centers(total, count, centers)
        return shared + place_users(total, count, pull, lift)

    needs = {"shared": shared, "lift": lift, "pull": pull, "told": [at.known for at in coordinates],
             "tables": [at.strangers for at in coordinates],
             "num_verdicts": [streams[at.stream].num_verdicts for at in coordinates]}
    return Profiles((args.folds + 1, len(is_warm), *shared.shape), profiles_of), needs


# ----------------------------------------------------------------------------------------------------------
# the codebook as a prior (eq. 7): EM, a round per turn of stages 2 and 3
# ----------------------------------------------------------------------------------------------------------


def read_codebook(args):
    """codebook.pt, which --prior names: by profile; an empty dict without --prior"""
    if not args.prior:
        return {}
    if args.prior.resolve() != (Path(args.run_dir) / "codebook.pt").resolve():
        fail(f"--prior {args.prior}: give the codebook of this run, {Path(args.run_dir) / 'codebook.pt'}")
    return read_artifacts(args, "codebook.pt")[0]


def prior_of(args, codebook, names, shared):
    """The codebook as a prior: per profile transform T [D, C'], codewords [K, C'], mean [D], θ̄ seen through
    T [C']; an empty list without --prior.
    """
    if not codebook:
        return []
    if list(codebook) != list(names):
        fail(f"--prior {args.prior} knows the profiles {', '.join(codebook)}, not {', '.join(names)}")
    prior = []
    for k, part in enumerate(codebook.values()):
        if len(part["transform"]) != shared.shape[1]:
            fail(f"--prior {args.prior} is of profiles {len(part['transform'])} wide, not {shared.shape[1]}: "
                 f"take the same --llm and --soft-tokens as before")
        transform = part["transform"]
        prior.append({"codebook": part["codebook"], "transform": transform, "mean": part["mean"],
                      "shared": (shared[k] - part["mean"]) @ transform})
    return prior


def center_coordinates(part, shared, lift):
    """Codewords in the coordinates of the score method: y_c [K, C] with θ̄ + y_c B nearest to codeword c"""
    return (part["codebook"] - part["shared"]) @ torch.linalg.pinv(lift @ part["transform"])


def nearest_centers(total, count, centers):
    """E step: y_c of the codeword nearest to a user's mean, total [N, P, C] / count [N, P] -> [N, P, C]

    Zero, that is θ̄, without a prior and for users without evidence.
    """
    result = torch.zeros_like(total)
    for k, center in enumerate(centers):
        # where codewords differ
        inside = torch.linalg.pinv(center - center.mean(0)) @ (center - center.mean(0))
        mean = total[:, k] / count[:, k].clamp(min=1)[:, None]
        nearest = torch.cdist(mean @ inside, center @ inside).argmin(1)
        result[:, k] = center[nearest] * (count[:, k] > 0)[:, None]
    return result


def anchors_of(part, shared, noise):
    """Codewords as soft tokens [K, S D]: of all θ that T maps to a codeword, the nearest to θ̄ in the noise's
    metric
    """
    inverse = torch.linalg.solve(noise, part["transform"])  # Σ^-1 T [D, C']
    lift = torch.linalg.solve(part["transform"].T @ inverse, inverse.T)  # [C', D], T maps it to the identity
    return shared + (part["codebook"] - part["shared"]) @ lift


def nearest_anchors(soft, prior, anchors):
    """E step of the gradient method: soft [B, P, S D] -> the codeword of each, as a soft token"""
    chosen = []
    for k, (part, anchor) in enumerate(zip(prior, anchors)):
        z = (soft[:, k].cpu() - part["mean"]) @ part["transform"]
        chosen.append(anchor[torch.cdist(z, part["codebook"]).argmin(1)])
    return torch.stack(chosen, 1).to(soft.device)


def prior_loss(profiles, prior, pull, noise):
    """Σ_u λ L_Q of eq. 7 in nats: pull/2 · squared distance to the nearest codeword, noise as unit -> []"""
    loss = torch.zeros(())
    for k, part in enumerate(prior):
        z = (profiles[:, k] - part["mean"]) @ part["transform"]
        unit = (part["transform"].T @ noise[k] @ part["transform"]).diagonal().mean()
        loss += pull[k] / 2 * torch.cdist(z, part["codebook"]).min(1).values.square().sum() / unit
    return loss


def descend(args, prompt, streams, train, profiles, prior, pull, noise, num_sample=3000):
    """The M step must not raise the objective (eq. 7): go from the last round's profiles to the new ones as
    far as it falls -> Profiles, (L_LM, λ L_Q) per train row

    L_LM is measured with the LLM on the same sample of train rows in every round.
    """
    path = Path(args.run_dir) / "profiles.pt"
    if not path.exists():
        return profiles, None
    before = torch.load(path, weights_only=True, mmap=True)["profiles"]
    before = before if before.dim() == 4 else before[None]
    if before.shape != profiles.shape:
        fail(f"--prior goes on from {path}, which has other profiles: run stage 2 without --prior first")
    sample = torch.randperm(len(train.user), generator=torch.Generator().manual_seed(args.seed))[:num_sample]
    events = select(train, sample)

    def between(length):
        blend = lambda old, new: old + length * (new - old)
        return Profiles(profiles.shape, lambda fold, users: blend(before[fold, users],
                                                                  profiles.of(fold, users)))

    objective = {}
    for length in (1.0, 0.5, 0.25, 0.0):
        nats, _ = heldout_nll(args, prompt, streams, between(length).last(events.user), events)
        of_prior = sum(float(prior_loss(between(length).last(users), prior, pull, noise))
                       for users in torch.arange(profiles.shape[1]).split(2**14))
        objective[length] = float(nats.sum() / len(sample)), of_prior / len(train.user)
    best = min(objective, key=lambda length: sum(objective[length]))
    told = lambda parts: f"L_LM {parts[0]:.4f} + prior {parts[1]:.4f} = {sum(parts):.4f}"
    print(f"objective (eq. 7) in nats per train row: before {told(objective[0.0])}; "
          f"after {told(objective[best])} ({best:g} of the way to the new profiles)")
    return between(best), objective[best]


# ----------------------------------------------------------------------------------------------------------
# the gradient: the paper's way, a block of users at a time
# ----------------------------------------------------------------------------------------------------------


def add_gradient(args, prompt, soft, stream, owner, weights):
    """soft.grad += ∇ of the loss of a stream's texts [R], owner [R]: whose each is; keys and values of each θ
    are made once for all batches.
    """
    keys = prompt.keys_of(soft, stream.sees)
    leaves = [tuple(part.detach().requires_grad_() for part in layer) for layer in keys]
    is_apart = prompt.mask == "fig4"
    for index in batches(prompt, stream.texts, torch.arange(len(owner)), args.tokens_per_batch):
        weighted_nll(prompt, soft, stream, index, weights, owner[index],
                     leaves if is_apart else None).backward()
    if leaves:
        flat = lambda layers: [part for layer in layers for part in layer]
        torch.autograd.backward(flat(keys), [leaf.grad for leaf in flat(leaves)])


def infer_by_gradient(args, prompt, evidence, weights, start, shared, noise, pull, num_steps, users, prior=(),
                      snapshots=()):
    """The paper's way (Algorithm 1, line 4): AdamW on the θ of a block of users [U] -> [U, P, S D]

    evidence: what is evidence of them; start [U, P, S D]: where each θ leaves from. The loss of a user is Σ
    -log P(evidence) + pull/2 (θ - θ̄)ᵀ Σ (θ - θ̄): the prior weighs as much as `pull` items. With a codebook
    as `prior`, θ̄ gives way to the codeword nearest at each step, seen as a soft token (eq. 7). With
    `snapshots` (S numbers of steps) the profiles after each of these come back instead, [S, U, P, S D].
    """
    anchors = [anchors_of(part, shared[k], noise[k]) for k, part in enumerate(prior)]
    shared, noise = shared.to(prompt.device), noise.to(prompt.device)
    place = torch.full((int(users.max()) + 1,), -1).index_put((users,), torch.arange(len(users)))
    work = []
    for stream, pairs in evidence:
        if len(pairs.row):
            texts, owner = cut(stream.texts, pairs.row), place[pairs.user]
            if prompt.mask == "fig4":
                texts, owner = side_by_side(texts, owner, min(ROW, args.tokens_per_batch))
            work.append((stream._replace(texts=texts), owner.to(prompt.device)))
    soft = start.clone().to(prompt.device).requires_grad_()
    # its state is the block's: users are independent
    optimizer = torch.optim.AdamW([soft], lr=args.lr or 0.1 * prompt.scale, weight_decay=0.0)
    history = []
    for step in range(1, num_steps + 1):
        anchor = nearest_anchors(soft.detach(), prior, anchors) if prior else shared
        soft.grad = pull * torch.einsum("bpd,pde->bpe", soft.detach() - anchor, noise).contiguous()
        for stream, owner in work:
            add_gradient(args, prompt, soft, stream, owner, weights)
        optimizer.step()
        if step in snapshots:
            history.append(soft.detach().float().cpu())
    return torch.stack(history) if snapshots else soft.detach().float().cpu()


def profiles_by_gradient(args, prompt, streams, by_fold, shared, weights, noise, pull, prior, tune, num_users,
                         progress):
    """Profiles by gradient, a block of users at a time, fold by fold, and after how many steps; finished
    blocks are on disk
    """
    num_steps = args.steps
    if args.stop == "heldout":
        num_steps = progress.keep("steps", lambda: choose_steps(args, prompt, streams, by_fold[-1], weights,
                                                                shared, noise, pull, tune))
    blocks, size = torch.arange(num_users).split(args.batch_size), args.batch_size
    name = lambda fold: f"fold-{fold}"
    with tqdm(total=len(by_fold) * num_users, desc="gradient", unit="user", mininterval=2) as bar:
        for fold, evidence in enumerate(by_fold):

            def make(index):
                users = blocks[index]
                first, last = int(users[0]), int(users[-1]) + 1
                found = infer_by_gradient(args, prompt, evidence.of(first, last), weights,
                                          start_of(args, prompt, shared, users), shared, noise, pull,
                                          num_steps, users, prior)
                bar.update(len(users))
                return found

            progress.keep_blocks(name(fold), len(blocks), make)

    def profiles_of(fold, users):
        result, block = torch.empty(len(users), *shared.shape), users // size
        for index in block.unique().tolist():
            mine = block == index
            result[mine] = progress.read(f"{name(fold)}-{index}")[users[mine] - index * size]
        return result

    return Profiles((len(by_fold), num_users, *shared.shape), profiles_of), num_steps


# ----------------------------------------------------------------------------------------------------------
# proof: held-out rows must be likelier under the user's own profile
# ----------------------------------------------------------------------------------------------------------


def heldout_nll(args, prompt, streams, profiles, events, blind=False):
    """NLL of held-out rows under a profile each: profiles [R, P, S D] -> nats, tokens [R, streams]"""
    nats, tokens = (torch.zeros(len(events.user), len(streams)) for _ in range(2))
    with torch.no_grad():
        for place, stream in enumerate(streams):
            rows = rows_of(stream, events)
            told = (told_of(stream.texts)[rows] > 0).nonzero()[:, 0]
            sees = torch.zeros_like(stream.sees) if blind else stream.sees
            for index in batches(prompt, stream.texts, rows[told], args.tokens_per_batch):
                texts = cut(stream.texts, rows[told[index]])
                nats[told[index], place] = prompt.nll(profiles[told[index]], texts, sees).sum(1).float().cpu()
                tokens[told[index], place] = told_of(texts).float()
    return nats, tokens


def interval(difference, tokens):
    """Mean difference per token and half its 95% interval: difference [R] in nats, tokens [R]"""
    mean = difference.sum() / tokens.sum()
    residual = difference - mean * tokens
    return float(mean), float(1.96 * residual.square().sum().sqrt() / tokens.sum())


def report_heldout(args, prompt, streams, profiles, shared, events, generator):
    """The four NLLs (nats per token) on held-out rows: no profile, shared, shuffled, own; prints them."""
    other = torch.randperm(profiles.shape[1], generator=generator)
    partner = torch.empty_like(other)
    partner[other] = other.roll(1)  # everybody gets the profile of somebody else
    everyone = shared.expand(len(events.user), -1, -1)
    told = {"none": everyone, "shared": everyone, "shuffled": profiles.last(partner[events.user]),
            "own": profiles.last(events.user)}
    nats, tokens = {}, None
    for name, soft in told.items():
        nats[name], tokens = heldout_nll(args, prompt, streams, soft, events, blind=name == "none")
    means = {name: float(values.sum() / tokens.sum()) for name, values in nats.items()}
    print(f"held-out NLL in nats per token ({len(events.user):,} validation rows that chose nothing): "
          + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    for name in ("shared", "shuffled"):
        mean, half = interval((nats["own"] - nats[name]).sum(1), tokens.sum(1))
        means[f"own_minus_{name}"] = [mean, half]
        warning = "  <- not shown: the profiles tell nothing that is sure about their users"
        parts = [interval((nats["own"] - nats[name])[:, place], tokens[:, place])
                 for place in range(len(streams))]
        by_route = "".join(f"  {'+'.join(stream.fields)} {part[0]:+.4f} ± {part[1]:.4f}"
                           for stream, part in zip(streams, parts) if len(streams) > 1)
        print(f"  own - {name}: {mean:+.4f} ± {half:.4f} (95%){'' if mean + half < 0 else warning}"
              + f" |{by_route}" * bool(by_route))
    return means


def choose_length(args, prompt, streams, step, shared, events, grid=(0.25, 0.5, 0.75, 1.0, 1.5)):
    """The step lengths [P] under which held-out rows are likeliest: step [R, P, S D], out of the grid"""
    totals = torch.stack([heldout_nll(args, prompt, streams, shared + length * step, events)[0]
                          .sum(0) for length in grid])  # [lengths, streams]
    best, chosen = torch.tensor(grid)[totals.argmin(0)], torch.ones(len(shared))
    for stream, length in zip(streams, best):
        chosen[stream.sees] = length
    told = ", ".join(f"{name} {length:g}" for name, length in zip(prompt.names, chosen.tolist()))
    print(f"step lengths chosen on {len(events.user):,} held-out rows: {told} (out of "
          f"{', '.join(map(str, grid))})")
    return chosen


def choose_steps(args, prompt, streams, evidence, weights, shared, noise, pull, events):
    """The number of AdamW steps under which held-out rows are likeliest, on 256 users with some at most."""
    pilot = events.user.unique()[:256]
    events = select(events, torch.isin(events.user, pilot))
    mine = evidence.make(select(evidence.events, torch.isin(evidence.events.user, pilot)))
    grid = (1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100)
    snapshots = sorted({step for step in grid if step < args.steps} | {args.steps})
    history = infer_by_gradient(args, prompt, mine, weights, start_of(args, prompt, shared, pilot), shared,
                                noise, pull, args.steps, pilot, snapshots=snapshots)
    place = torch.searchsorted(pilot, events.user)
    totals = [float(heldout_nll(args, prompt, streams, soft[place], events)[0].sum()) for soft in history]
    best = snapshots[int(np.argmin(totals))]
    print(f"steps chosen on {len(events.user):,} held-out rows of {len(pilot)} users: "
          f"{best} (out of {snapshots})")
    return best


# ----------------------------------------------------------------------------------------------------------
# before a long run: what fits into memory, what it will take
# ----------------------------------------------------------------------------------------------------------


def bytes_per_token(prompt):
    """What a token of a batch needs until backward has passed: about 22 numbers per layer and dimension"""
    layers = prompt.model.config.num_hidden_layers
    return 22 * prompt.embedding.shape[1] * layers * prompt.embedding.element_size()


def tokens_that_fit(prompt, share=0.8):
    """Tokens per batch that fill `share` of the free memory; on a CPU more than 4,096 gain nothing."""
    if prompt.device.type == "cuda":
        free, most = torch.cuda.mem_get_info()[0], 2**17
    else:
        free, most = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 4096
    return int(max(16, min(most, share * free / bytes_per_token(prompt))))


def estimate(args, prompt, streams, evidence, num_users):
    """Users, tokens, FLOPs, memory and time that the run will take on this machine, from a few batches."""
    events = evidence.events
    ones = torch.ones(len(FIELDS))
    shared = first_soft(args, prompt, 1, torch.Generator().manual_seed(args.seed))[0]
    tokens, seconds = 0, 0.0
    if args.method == "gradient":
        first = max(0, num_users // 2 - args.batch_size // 2)
        last = min(num_users, first + args.batch_size)
        some = evidence.of(first, last)
        noise = torch.zeros(len(shared), shared.shape[1], shared.shape[1])
        users, start = torch.arange(first, last), shared.expand(last - first, -1, -1)
        one_step = lambda: infer_by_gradient(args, prompt, some, ones, start, shared, noise, 0.0, 1, users)
        rows, passes = len(events.user), args.steps * (args.folds + 1)
        mine = sum(int(stream.texts.length[pairs.row].sum()) for stream, pairs in some)
        tokens = mine / max(1, int(evidence.first[last] - evidence.first[first])) * rows * passes
        measured = mine, timed(one_step)
        what = f"{args.steps} steps at most for each" + f", {args.folds + 1} times" * bool(args.folds)
    else:
        measured = 0, 0.0
        for stream in streams:
            rows = (told_of(stream.texts) > 0).nonzero()[:, 0]
            sample = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:512]]
            pass_over = lambda: scores_of(prompt, stream, sample, shared, ones, args.tokens_per_batch)
            measured = (measured[0] + int(stream.texts.length[sample].sum()), measured[1] + timed(pass_over))
            parts = 1 + (stream.num_verdicts > 1)  # of the item and of the verdict
            tokens += parts * int(stream.texts.length[rows].sum())
        what = "each text of the catalogue once; a user costs a sum"
    seconds = tokens * measured[1] / max(1, measured[0])
    body = sum(value.numel() for value in prompt.body.parameters()) - prompt.embed.weight.numel()
    flops = 4 * (body + prompt.head.weight.numel())  # forward and backward, without weight gradients
    weights = sum(value.numel() * value.element_size() for value in prompt.model.parameters())
    profiles = 4 * (args.folds + 1) * num_users * shared.numel()
    print(f"estimate: {num_users:,} users, {len(events.user):,} rows, {tokens:,.0f} tokens of evidence "
          f"({what})\n  {tokens * flops:.3g} FLOPs, {seconds:,.0f} s on {prompt.device}, as measured on "
          f"{measured[0]:,} tokens; to fit θ̄, {args.shared_steps} minibatches of 64 texts, and to report "
          f"come on top\n"
          f"  memory: weights {weights / 2**30:.2f} GiB, a batch of {args.tokens_per_batch:,} tokens "
          f"{args.tokens_per_batch * bytes_per_token(prompt) / 2**30:.2f} GiB; "
          f"disk: profiles.pt {profiles / 2**30:.2f} GiB")


def timed(work):
    """Seconds of its second call: the first one pays for what is only done once."""
    for _ in range(2):
        started = time.time()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.time() - started


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def heldout_rows(interactions, verdict, streams, limit, seed):
    """Validation rows with any text, half the users to choose with, half to report: two Events"""
    chosen = interactions[interactions["split"] == "valid"]
    chosen = chosen.sample(min(limit, len(chosen)), random_state=seed)
    events = events_of(interactions, interactions.index.isin(chosen.index), verdict)
    told = sum(told_of(stream.texts)[rows_of(stream, events)] for stream in streams) > 0
    return [select(events, told & (events.user % 2 == half)) for half in (0, 1)]


def parts_of(args, interactions, num_users):
    """Train rows as Events, those and cold users' support rows, who has train rows (bool [N]), verdicts.

    What a support row tells is evidence of its user's profile and of nothing else.
    """
    split = interactions["split"].to_numpy()
    train = interactions[split == "train"]
    verdict, words = verdicts_of(args, interactions, train)
    fold = np.full(len(interactions), -1)
    fold[split == "train"] = folds_of(train, args.folds, args.seed)
    is_own = np.isin(split, ["train", "support"])
    own = events_of(interactions, is_own, verdict, fold[is_own])
    is_train = torch.tensor((split == "train")[is_own])
    is_warm = torch.zeros(num_users, dtype=torch.bool)
    is_warm[torch.tensor(train["user"].unique())] = True
    if cold := len(own.user.unique()) - int(is_warm.sum()):
        print(f"{cold:,} users are known by support rows only: these move their own profile and nothing else")
    return select(own, is_train), own, is_warm, verdict, words


def evidence_counts(args, streams, events, num_users, num_profiles):
    """How many texts tell of a user's profile: int64 [N, P]; a history is one text"""
    count = torch.zeros(num_users, num_profiles, dtype=torch.long)
    for stream in streams:
        told = told_of(stream.texts)[rows_of(stream, events)] > 0
        of_user = torch.bincount(events.user[told], minlength=num_users)
        count += (of_user.clamp(max=1) if args.evidence == "history" else of_user)[:, None] * stream.sees
    return count


def read_new_users(args, words, items):
    """Rows of --only-users' table as item and verdict, int64 [R] each, whose they are, and the user ids."""
    read = pd.read_parquet if args.only_users.suffix == ".parquet" else functools.partial(
        pd.read_csv, sep=None, engine="python", dtype={"user_id": str, "item_id": str}, keep_default_na=False)
    try:
        table = read(args.only_users) if args.only_users.stat().st_size else ()
        if not len(table):
            raise ValueError("it holds no rows")
    except (OSError, ValueError, ImportError, csv.Error) as error:
        fail(f"--only-users {args.only_users}: {str(error).splitlines()[0]}; "
             f"give a table (csv, tsv, parquet) of user_id, item_id and, where ratings are told, rating")
    needed = ["user_id", "item_id", *["rating"] * (len(words) > 1)]
    if missing := [name for name in needed if name not in table]:
        fail(f"--only-users {args.only_users} has no column {missing[0]}; it needs {', '.join(needed)}")
    nameless = table["user_id"].isna() | (table["user_id"].astype(str).str.strip() == "")
    if nameless.any():
        fail(f"--only-users {args.only_users}: {int(nameless.sum())} of {len(table)} rows have no user_id")
    table = table.drop_duplicates(["user_id", "item_id"], keep="last")
    place = pd.Series(items["item"].to_numpy(), index=items["item_id"].astype(str))
    item = place.reindex(table["item_id"].astype(str)).to_numpy()
    user, user_ids = pd.factorize(table["user_id"].astype(str), sort=True)
    verdict = np.zeros(len(table), dtype=np.int64)
    if len(words) > 1:
        rating = pd.to_numeric(table["rating"], errors="coerce").to_numpy(dtype=float)
        if not np.isfinite(rating).all():
            strange = table["rating"][~np.isfinite(rating)]
            fail(f"--only-users {args.only_users}: {len(strange)} of {len(table)} rows have no number as "
                 f"rating, the first of them {str(strange.iloc[0])!r}")
        if words[-1] == "liked":
            threshold = read_sidecar(args, "interactions.parquet")["options"]["threshold"]
            verdict = (rating > threshold).astype(np.int64)
        else:
            stars = np.array([float(word.split()[-1]) for word in words])
            verdict = np.abs(rating[:, None] - stars).argmin(1)
    known = np.isfinite(item)
    if not known.all():
        print(f"{int((~known).sum())} of {len(table)} rows are left out, of items that the run does not know, "
              f"the first of them {str(table['item_id'][~known].iloc[0])!r}")
    as_tensor = lambda values: torch.tensor(values[known].astype(np.int64))
    return as_tensor(item), as_tensor(verdict), as_tensor(user), list(user_ids)


def new_by_score(args):
    """New users by scores.pt: a sparse sum each, the same bits as in the run itself, and no LLM.

    -> profiles [N', P, S D], count of texts that tell of them [N', P], user ids, rows of known items
    """
    needs, _, items = read_artifacts(args, "scores.pt", "profiles.pt", "items.parquet")
    item, verdict, user, user_ids = read_new_users(args, needs["words"], items)
    totals, counts = [], []
    for table, told, num_verdicts in zip(needs["tables"], needs["told"], needs["num_verdicts"]):
        row = item * num_verdicts + (verdict if num_verdicts > 1 else 0)
        mine = told[row]
        totals.append(sum_by_user(user[mine], row[mine], table, len(user_ids)).float())
        counts.append(torch.bincount(user[mine], minlength=len(user_ids)).float())
    total, count = torch.stack(totals, 1), torch.stack(counts, 1)
    profiles = needs["shared"] + place_users(total, count, needs["pull"], needs["lift"])
    return profiles, count.long(), user_ids, len(item)


def new_by_gradient(args, made):
    """The same by the run's AdamW steps from its θ̄; made: the sidecar of profiles.pt.

    One user after the other, so that his profile has the same bits in any company; in the run's blocks it
    differs by the order of sums. A random start is drawn for his id. A history is in the order of the table.
    """
    run = SimpleNamespace(**made["options"] | {"run_dir": args.run_dir, "only_users": args.only_users})
    stored, interactions, items = read_artifacts(args, "profiles.pt", "interactions.parquet", "items.parquet")
    train, _, _, _, words = parts_of(run, interactions, len(stored["has_evidence"]))
    run.llm, stamp = stored["llm"], Path(args.run_dir) / TINY_STAMP
    if run.llm == "tiny" and not (stamp.exists() and stamp.read_text() == stored["tiny_llm"]):
        fail(f"--only-users: {stamp.parent} is not the LLM that {args.run_dir}/profiles.pt was inferred "
             f"with: run stage 2 again")
    streams, make, prompt, _, names, _ = set_up(run, interactions, items, train, words)
    run.tokens_per_batch = tokens_that_fit(prompt)
    item, verdict, user, user_ids = read_new_users(args, words, items)
    nowhere = torch.full_like(item, -1)
    events, first = sorted_by_user(Events(user, item, verdict, nowhere, nowhere), len(user_ids))
    evidence = Evidence(events, first, make)
    weights = torch.tensor([made["field_weights"][field] for field in FIELDS])
    profiles = stored["shared"].repeat(len(user_ids), 1, 1)
    for place in tqdm(events.user.unique().tolist(), desc="new users", unit="user", mininterval=2):
        mine = evidence.of(place, place + 1)
        if not any(len(pairs.row) for _, pairs in mine):
            continue  # he stays at θ̄
        for stream, pairs in mine:
            prompt.check_context(stream.texts.length[pairs.row], f"new user {user_ids[place]}: his text",
                                 "give fewer of his rows")
        number = int.from_bytes(hashlib.sha256(user_ids[place].encode()).digest()[:7], "big")
        start = start_of(run, prompt, stored["shared"], torch.tensor([number]))
        profiles[place] = infer_by_gradient(run, prompt, mine, weights, start, stored["shared"],
                                            stored["noise"], made["pull"][0], made["num_steps"],
                                            torch.tensor([place]))[0]
    return profiles, evidence_counts(run, streams, events, len(user_ids), len(names)), user_ids, len(item)


def infer_only(args):
    """Profiles of new users, from what the run has fitted: nothing is trained but, by gradient, their θ."""
    made, locked = read_sidecar(args, "profiles.pt"), lock(args.run_dir)
    if made["options"]["prior"] or made["options"]["evidence"] == "review":
        what = "a round of EM (--prior)" if made["options"]["prior"] else "--evidence review"
        fail(f"--only-users: {args.run_dir}/profiles.pt is of {what}, which no table of items repeats: run "
             f"stages 2 and 3 without it")
    if made["options"]["method"] == "score":
        inputs = ["scores.pt", "items.parquet"]
        profiles, count, user_ids, num_rows = new_by_score(args)
    else:
        inputs = ["profiles.pt", "interactions.parquet", "items.parquet"]
        profiles, count, user_ids, num_rows = new_by_gradient(args, made)
    has_evidence = (count > 0).any(1)
    value = {"profiles": profiles, "user_id": user_ids, "num_evidence": count, "names": made["names"],
             "has_evidence": has_evidence}
    path = write_artifact(args, "new_profiles.pt", value, inputs, users=len(user_ids))
    print(f"wrote {path}: {len(user_ids):,} new users, {int(has_evidence.sum()):,} of them "
          f"with evidence among {num_rows:,} rows of items that the run knows")
    locked.close()


def load_prompt(args, train, streams, pieces, items, names, name_texts, rank=0):
    """The LLM, chosen, made or found, in its prompt: Prompt, tokenizer, the LLM's name, targets_of items"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm = args.llm
    if llm == "auto":
        llm, reason = choose_llm()
        print(f"--llm auto: {llm}, because {reason}")
    if llm == "tiny" and rank == 0:
        make_tiny_llm(args, train, streams, pieces, [TARGET.sub("", text) for text in name_texts])
    if dist.is_initialized():  # the others read what the first has made
        dist.barrier()
    model, tokenizer = load_llm(args, llm, device)
    targets = targets_of(tokenizer, name_texts, items)
    prompt = Prompt(model, tokenizer, names, name_texts, args.task_text, args.soft_tokens, args.mask,
                    [target.shape[1] for target in targets])
    print(f"LLM: {sum(p.numel() for p in model.parameters()):,} parameters, D {prompt.embedding.shape[1]}, "
          f"{prompt.scale:.3f} per dimension, {next(model.parameters()).dtype} on {device}; "
          f"prompt of {len(prompt.segment)} tokens")
    return prompt, tokenizer, llm, targets


def set_up(args, interactions, items, train, words, rank=0):
    """The LLM in its prompt and the texts that it is to read: streams, what makes evidence of events (see
    Evidence), Prompt, the LLM's name, the profiles' names, their texts
    """
    names, name_texts = zip(*(text.split("=", 1) for text in args.profiles))
    routes = routes_of(args, items.iloc[train.item.unique().numpy()], names)
    streams, pieces = streams_of(args, routes, interactions, items, words)
    told = interactions.loc[interactions["split"].isin(["train", "valid", "support"]), "item"]
    known = items.where(items["item"].isin(told))  # items that only test rows have stay untold
    prompt, tokenizer, llm, targets = load_prompt(args, train, streams, pieces, known, names, name_texts,
                                                  rank)
    streams = tell(args, tokenizer, streams, pieces, targets, interactions, items)
    make = functools.partial(evidence_of, args, tokenizer, streams, pieces)
    return streams, make, prompt, llm, names, name_texts


def check_lengths(args, prompt, streams, own):
    """Exit when a text and its prompt are longer than the LLM's context; say what histories leave out."""
    for stream in streams:
        prompt.check_context(stream.texts.length, "text",
                             "shorten it or take a LLM with a longer context")
        if args.evidence == "history":
            length = stream.texts.length[rows_of(stream, own)].numpy()
            of_user = pd.Series(length).groupby(own.user.numpy())
            latest = of_user.agg(lambda rows: rows[-args.max_history:].sum())
            prompt.check_context(torch.tensor(latest.to_numpy()), "history",
                                 "lower --max-history or take a LLM with a longer context")
    if args.evidence == "history":
        longer = int((torch.bincount(own.user) > args.max_history).sum())
        print(f"history: the latest {args.max_history} rows of each user; {longer:,} users had more")


def fit_common(args, prompt, streams, evidence, train, own, is_warm, progress):
    """What all users share: θ̄ [P, S D], field weights, information by stream, noise [P, S D, S D], and the
    curve of θ̄
    """
    generator, most = progress.generator, 4096
    warm = is_warm.nonzero()[:, 0]
    if args.evidence == "history":  # their texts are made for the purpose: not of all users
        warm = warm[torch.randperm(len(warm), generator=generator)[:most]]
    of_warm = lambda: evidence.make(select(evidence.events, torch.isin(evidence.events.user, warm)))
    counts, mentions = ([torch.bincount(rows_of(stream, events), minlength=len(stream.texts.ids)).float()
                         for stream in streams] for events in (train, own))
    weights = torch.ones(len(FIELDS))
    shared, curve = progress.keep("shared", lambda: fit_shared(args, prompt, of_warm(), weights, generator))
    if args.field_weights == "noise":
        weights = progress.keep("weights", lambda: field_weights(args, prompt, streams, counts, shared,
                                                                 generator))
    known = [(mention.view(-1, stream.num_verdicts).sum(1) > 0).repeat_interleave(stream.num_verdicts)
             for stream, mention in zip(streams, mentions)]  # an item's other verdicts are its audience's
    information = []
    for place, (stream, count, needed) in enumerate(zip(streams, counts, known)):
        scores = lambda rows, weights, name: scores_in_blocks(args, prompt, stream, rows, shared, weights,
                                                              progress, f"{name}-{place}")
        information.append(information_of(scores, stream, count, needed, shared, weights))
    noise = torch.stack([next(of_stream[k][-1] for of_stream in information if k in of_stream)
                         for k in range(prompt.num_profiles)])
    return shared, weights, information, noise, curve


def write_profiles(args, value, needs, words, inputs, facts, figures):
    """scores.pt (where there are any) and profiles.pt; without folds, profiles have no axis for them."""
    shape = value["profiles"].shape if args.folds else value["profiles"].shape[1:]
    value["profiles"] = SimpleNamespace(shape=shape, blocks=value["profiles"].blocks)
    if not args.folds:
        value["num_evidence"] = value["num_evidence"][0]
    if needs:
        write_artifact(args, "scores.pt", needs | {"names": value["names"], "words": words}, inputs, **facts)
        inputs = [*inputs, "scores.pt"]
    path = write_artifact(args, "profiles.pt", value, inputs, **facts, **figures)
    print(f"wrote {path}: {facts['users']:,} users x {len(value['names'])} profiles x "
          f"{shape[-1]} | held-out NLL own {figures['heldout_nll']['own']:.4f}, "
          f"shared {figures['heldout_nll']['shared']:.4f}")


def main(args):
    rank, world = join_processes()
    only = SimpleNamespace(only_users=args.only_users, run_dir=args.run_dir, seed=args.seed)
    start_stage(only if args.only_users else args)  # the options of new users are those of the run
    started = time.time()
    if args.only_users:
        return None if rank else infer_only(args)
    interactions, items = read_artifacts(args, "interactions.parquet", "items.parquet")
    codebook = read_codebook(args)
    locked = lock(args.run_dir) if rank == 0 else None
    num_users = int(interactions["user"].max()) + 1
    train, own, is_warm, verdict, words = parts_of(args, interactions, num_users)
    streams, make, prompt, llm, names, name_texts = set_up(args, interactions, items, train, words, rank)
    # a GPU wants large batches of texts of one length, which a large block has; profiles are the same
    args.batch_size = args.batch_size or (1024 if prompt.device.type == "cuda" else 128)

    kept = [*(select(own, own.fold != left_out) for left_out in range(args.folds)), own]
    by_fold = [Evidence(*sorted_by_user(events, num_users), make) for events in kept]
    count = torch.stack([evidence_counts(args, streams, events, num_users, len(names)) for events in kept])
    check_lengths(args, prompt, streams, own)
    inputs = ["interactions.parquet", "items.parquet"]
    # as asked for: how much memory is free now must not decide whether a run goes on
    recipe = recipe_of(args, prompt, inputs + ["codebook.pt"] * bool(args.prior))
    args.tokens_per_batch = args.tokens_per_batch or tokens_that_fit(prompt)
    if args.estimate:
        return estimate(args, prompt, streams, by_fold[-1], num_users)
    generator = torch.Generator().manual_seed(args.seed)
    tune, report = heldout_rows(interactions, verdict, streams, args.heldout, args.seed)
    progress = Progress(args, recipe, generator, rank, world)

    inference_started = time.time()
    shared, weights, information, noise, curve = fit_common(args, prompt, streams, by_fold[-1], train, own,
                                                            is_warm, progress)
    prior, needs, objective, num_steps = prior_of(args, codebook, names, shared), None, None, None
    if args.method == "score":
        coordinates = coordinates_of(args, prompt, streams, information, own, is_warm)
        profiles, needs = infer_by_score(args, prompt, streams, train, own, coordinates, shared, tune,
                                         is_warm, prior, progress)
        noise = torch.einsum("pcd,pce->pde", needs["lift"], needs["lift"])  # whitened sums: 1 per text
        gain, pull = (count[-1] + needs["pull"]) / count[-1].clamp(min=1).sqrt(), needs["pull"].tolist()
    else:
        gain, pull = torch.ones(num_users, len(names)), 10.0 if args.pull is None else args.pull
        profiles, num_steps = profiles_by_gradient(args, prompt, streams, by_fold, shared, weights, noise,
                                                   pull, prior, tune, num_users, progress)
        pull = [pull] * len(names)
    if rank:  # the first process writes
        return progress.clear()
    if prior:
        profiles, objective = descend(args, prompt, streams, train, profiles, prior, pull, noise)
    seconds = time.time() - inference_started
    print(f"inferred {num_users:,} users in {seconds:.1f} s, the shared start included: "
          f"{num_users / seconds:,.0f} users per second")
    has_evidence = (count[-1] > 0).any(1)
    figures = report_heldout(args, prompt, streams, profiles, shared, report, generator)

    value = {"profiles": profiles, "shared": shared, "noise": noise, "gain": gain, "num_evidence": count,
             "has_evidence": has_evidence, "names": list(names), "llm": llm, "num_soft": args.soft_tokens,
             "texts": [TARGET.sub("", text) for text in name_texts],
             "tiny_llm": (Path(args.run_dir) / TINY_STAMP).read_text() if llm == "tiny" else ""}
    if args.folds:
        value["fold"] = train.fold  # of each train row, in the order of interactions.parquet
    if prior:  # stage 3 goes on from it
        value["prior"] = {name: {key: part[key] for key in ("codebook", "transform", "mean")}
                          for name, part in zip(names, prior)}
    facts = {"names": names, "llm": llm, "users": num_users, "users_with_evidence": int(has_evidence.sum())}
    write_profiles(args, value, needs, words, inputs, facts,
                   {"pull": pull, "field_weights": dict(zip(FIELDS, weights.tolist())),
                    "heldout_nll": figures, "objective": objective, "curve": curve, "num_steps": num_steps,
                    "seconds": time.time() - started, "inference_seconds": seconds})
    progress.clear()
    if locked:
        locked.close()


if __name__ == "__main__":
    main(parse_args())
