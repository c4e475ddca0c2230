"""Stage 1 of 5: turn raw interactions into one filtered, labelled, split table that all later stages use.

Users and items with fewer than 4 interactions are dropped until none is left (paper, section 3.2), a rating
above 3 is a positive label, duplicates of (user, item) are kept once (the latest), and the split is drawn
once, here. `planted` needs no data: it draws users with a true hobby and background, items that reflect them,
and interactions caused by them, so that the later stages can say how much of the truth they found.

Reads   --raw DIR, as published, plain or gzip, told apart by their content:
          clothing, movies, games, amazon   Amazon reviews and metadata of 2014, 2018 or 2023
          yelp      yelp_academic_dataset_review.json, _business.json and, if there, _user.json
          nete      reviews.pickle, item.json, folders 1, 2, … with train.index, validation.index, test.index
          ml-100k, ml-1m   MovieLens
          table     interactions.*, items.* and, if there, users.* as csv, tsv (both also .gz) or parquet
Writes  interactions.parquet  user, item int64, rating float32, label int8, timestamp int64 (s), split, review
        items.parquet         item, item_id, title, category, brand, price (dollars; Yelp: its range, 1 to 4)
        users.parquet         user, user_id, and what is known of the user, for checking only
        prepare.json          the row of the paper's table 1, and what was dropped on the way

Splits  random     8:1:1 per interaction (the paper's)
        temporal   of each user's interactions the last tenth is test, the tenth before it valid
        cold-user  a tenth of the users is never in train or valid: the first half of their interactions is
                   support, evidence for their own profile only, the rest is test
        published  that of the data set (nete, or a table with a column `split`); nothing is dropped

Example: python 01_prepare.py        (2 seconds)
  wrote runs/demo/interactions.parquet: 34,213 rows, 1,975 users, 600 items | base-rate logloss 0.6674
"""

import argparse
import ast
import contextlib
import hashlib
import html
import json
import pickle
import re
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from datetime import date, datetime
from email.utils import formatdate
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

from common import at_least, fail, logloss, stage_parser, start_stage, write_artifact

INTERACTION_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
ITEM_COLUMNS = ["item_id", "title"]
OPTIONAL_ITEM_COLUMNS = ["category", "brand", "price"]
CATEGORIES = {"clothing": "Clothing_Shoes_and_Jewelry", "movies": "Movies_and_TV", "games": "Video_Games"}
SPLITS = ("random", "temporal", "cold-user", "published")


def share(text):
    """The type of --max-bad: "1%" or 0.01 -> 0.01"""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1; say {text}% for a percentage")
    return value


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the planted world and of the split")
    add("--split-seed", type=at_least(0),
        help="random, cold-user: seed of the split alone: another split of the same data (default: --seed)")
    add("--dataset", choices=READERS, default="planted", help="what to read")
    add("--raw", help="folder with the raw files (not for planted)")
    add("--category", help="amazon: category as in the files' names, such as Digital_Music")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS",
        help="table: columns with other names, such as user_id=reviewer rating=stars")
    add("--fold", type=at_least(1), default=1, help="nete: which of the published splits")
    add("--download", nargs="?", const="", metavar="URL",
        help="first fetch what is not in --raw yet (Amazon 2014, MovieLens); URL: folder of a mirror")
    add("--split", choices=SPLITS, help="see above (default: random; nete: published)")
    add("--ensure-train", action="store_true",
        help="random, temporal: move rows until all users and items of valid and test are in train")
    add("--min-interactions", type=at_least(1), default=4, help="drop users and items with fewer, iterated")
    add("--threshold", type=float, default=3, help="a rating above this is a positive label")
    add("--max-bad", type=share, default=0.01, help="Amazon, Yelp: share of bad lines that is an error")
    add("--strict", action="store_true", help="Amazon, Yelp: a truncated gzip file is an error")
    args = parser.parse_args(argv)
    args.raw = Path(args.raw) if args.raw else None
    if (args.raw is None) != (args.dataset == "planted"):
        advice = "draws its own data: leave --raw out" if args.raw else "needs --raw DIR"
        parser.error(f"--dataset {args.dataset} {advice}")
    args.split = args.split or ("published" if args.dataset == "nete" else "random")
    amazon = {*CATEGORIES, "amazon"}
    args.category = None if args.category == CATEGORIES.get(args.dataset) else args.category
    belongs = {"category": {"amazon"}, "columns": {"table"}, "fold": {"nete"}, "max_bad": {*amazon, "yelp"},
               "strict": {*amazon, "yelp"}, "download": {*amazon, *ARCHIVES}}
    belongs |= {"min_interactions": set(READERS)} if args.split != "published" else {"min_interactions": ()}
    for name, datasets in belongs.items():  # an option that would change nothing is refused
        if getattr(args, name) != parser.get_default(name) and args.dataset not in datasets:
            advice = "fetch it by hand" if name == "download" else "leave it out"
            parser.error(f"--{name.replace('_', '-')} means nothing for --dataset {args.dataset} "
                         f"--split {args.split}: {advice}")
    if args.split == "published" and args.dataset not in ("nete", "table"):
        parser.error(f"--split published: {args.dataset} is published without one")
    if args.ensure_train and args.split not in ("random", "temporal"):
        parser.error(f"--ensure-train contradicts --split {args.split}")
    if args.split_seed is not None and args.split not in ("random", "cold-user"):
        parser.error(f"--split-seed: --split {args.split} draws nothing; leave it out")
    args.split_seed = args.seed if args.split_seed is None else args.split_seed
    if args.fold != 1 and args.split != "published":
        parser.error("--fold names a published split: add --split published or leave it out")
    if args.dataset == "amazon" and args.download is not None and not args.category:
        parser.error("--download needs --category, such as --category Digital_Music")
    args.category = CATEGORIES.get(args.dataset, args.category)
    return args


# ----------------------------------------------------------------------------------------------------------
# planted data: a world whose truth is known
# ----------------------------------------------------------------------------------------------------------

HOBBIES = {  # hobby -> its categories -> nouns of their titles; some nouns stand in several categories
    "gaming": {"Board Games": "Board Dice Cards Puzzle Box Guide",
               "Video Games": "Console Quest Racer Controller Box Guide",
               "Miniatures": "Dragon Knight Paint Figure Case Brush"},
    "cooking": {"Cookware": "Skillet Pot Pan Lid Set Stand",
                "Baking": "Mold Tray Whisk Flour Brush Book",
                "Knives": "Knife Blade Block Sharpener Set Case"},
    "outdoors": {"Hiking": "Boots Pack Poles Map Bag Guide",
                 "Cycling": "Pedal Helmet Saddle Pump Bag Light",
                 "Climbing": "Rope Harness Chalk Hook Shoes Bag"},
    "music": {"Guitars": "Guitar Strings Capo Strap Stand Case",
              "Vinyl": "Record Sleeve Needle Turntable Box Brush",
              "Keyboards": "Piano Synth Pedal Bench Stand Book"},
}
ADJECTIVES = (
    "Classic Modern Compact Deluxe Original Portable Vintage Essential Grand Little Silent Bright Rustic "
    "Sturdy Smooth Royal Simple Clever Golden Silver Urban Nordic Coastal Alpine").split()
SUFFIXES = "Kit Pack Edition Series Pro Plus Mini Max One Two Home Studio Travel Junior Duo Trio".split()
LEVELS = {  # background -> brands that lean to it; the levels' price centres in dollars
    "student": "Basik Frugo Plainly Thrifta Nofrills".split(),
    "family": "Hearthy Daywell Commono Kindred Oakline".split(),
    "executive": "Aurelio Vantagio Lumiere Regalis Monarque".split(),
}
PRICE_CENTRES = np.array([14.0, 42.0, 130.0])
HOBBY_SHARES, BACKGROUND_SHARES = np.array([0.28, 0.26, 0.24, 0.22]), np.array([0.38, 0.34, 0.28])
HOBBY_PULL, BACKGROUND_PULL = 1.4, 1.6  # how strongly truth steers choice; keeps Bayes ARI within 0.5 and 0.9
HOBBY_FIT, BACKGROUND_FIT = 0.85, 1.35  # how strongly truth moves ratings; the oracle gains at least .04 AUC


def draw_items(rng, num_items=600):
    """The catalogue: item frame [M] and what drives choice: affinities of hobby [4, M], background [3, M]."""
    categories = [category for hobby in HOBBIES.values() for category in hobby]
    nouns = {category: words.split() for hobby in HOBBIES.values() for category, words in hobby.items()}
    category = rng.integers(len(categories), size=num_items)
    level = rng.integers(3, size=num_items)  # student, family, executive
    lean = np.where(rng.random(num_items) < 0.8, level, rng.integers(3, size=num_items))
    brands = np.array(list(LEVELS.values()))  # [3, 5]
    price = PRICE_CENTRES[level] * np.exp(0.45 * rng.standard_normal(num_items))
    titles = [f"{rng.choice(ADJECTIVES)} {rng.choice(nouns[categories[c]])} {rng.choice(SUFFIXES)}"
              for c in category]
    items = pd.DataFrame({
        "item_id": [f"P{index:04d}" for index in range(num_items)],
        "title": titles,
        "category": [categories[c] for c in category],
        "brand": brands[lean, rng.integers(brands.shape[1], size=num_items)],
        "price": price.round(2),
    })
    # a hobby likes its own three categories, each to a degree of its own, and has a little liking for others
    degree = 0.15 * rng.standard_normal((4, len(categories)))
    degree += np.repeat(np.eye(4), 3, axis=1)
    by_brand = np.eye(3)[:, lean]
    by_price = np.exp(-0.5 * ((np.log(price) - np.log(PRICE_CENTRES)[:, None]) / 0.6) ** 2)
    return items, degree[:, category], 0.5 * (by_brand + by_price)


def read_planted(args, num_users=2000):
    """Users with a true hobby and background, items, interactions and ratings that they cause.

    The user u has the item i with probability 1 - exp(-activity_u p(i | hobby, background)), each item
    independently, so that the likelihood of a whole history is exact and `bayes_ari` is a true ceiling.
    """
    rng = np.random.default_rng([args.seed, 1])
    items, hobby_affinity, background_affinity = draw_items(rng)
    hobby = rng.choice(4, size=num_users, p=HOBBY_SHARES)
    background = rng.choice(3, size=num_users, p=BACKGROUND_SHARES)
    popularity = np.exp(0.5 * rng.standard_normal(len(items)))
    # p(i | h, b) ∝ popularity_i exp(1.4 hobby affinity + 1.6 background affinity)
    utility = HOBBY_PULL * hobby_affinity[:, None] + BACKGROUND_PULL * background_affinity[None]
    choice = popularity * np.exp(utility)  # [4, 3, M]
    choice /= choice.sum(-1, keepdims=True)
    activity = rng.gamma(6, 3.0, size=num_users)  # about 18 interactions a user
    chance = 1 - np.exp(-activity[:, None] * choice[hobby, background])  # [N, M]
    user, item = np.nonzero(rng.random(chance.shape) < chance)
    # a rating tells how well the item fits, how generous the user is, how good the item is, and chance
    fit = (HOBBY_FIT * (hobby_affinity - hobby_affinity.mean(0))[hobby[user], item]
           + BACKGROUND_FIT * (background_affinity - background_affinity.mean(0))[background[user], item])
    generosity, quality = 0.35 * rng.standard_normal(num_users), 0.35 * rng.standard_normal(len(items))
    opinion = 3.2 + fit + generosity[user] + quality[item] + 0.7 * rng.standard_normal(len(user))
    interactions = pd.DataFrame({
        "user_id": [f"U{index:05d}" for index in user],
        "item_id": items["item_id"].to_numpy()[item],
        "rating": opinion.round().clip(1, 5),
        "timestamp": 1_600_000_000 + rng.integers(60_000_000, size=len(user)),
    })
    users = pd.DataFrame({
        "user_id": [f"U{index:05d}" for index in range(num_users)],
        "true_hobby": np.array(list(HOBBIES))[hobby],
        "true_background": np.array(list(LEVELS))[background],
    })
    world = {"choice": choice, "activity": activity}
    return interactions, items, users, world


def bayes_ari(world, interactions, items, users):
    """Adjusted Rand index of the best possible classifier that sees the items of train and support rows, from
    which profiles are inferred: by profile name.

    It knows the generator: log p(h, b | seen items) = log prior + Σ_i log p(i seen or not | h, b), where an
    item is seen with probability share · (1 - exp(-activity p(i | h, b))), the share being that of a cold
    user's rows or of any other's; ratings are not used, as stage 2 does.
    """
    is_seen = interactions["split"].isin(["train", "support"])
    is_cold = interactions["user"].isin(interactions.loc[interactions["split"] == "support", "user"])
    place = users["user_id"].str[1:].astype(int).to_numpy()
    user = place[interactions["user"]]
    item = items["item_id"].str[1:].astype(int).to_numpy()[interactions["item"][is_seen]]
    activity, choice = world["activity"], world["choice"].reshape(12, -1)
    share = np.full((len(activity), 1), is_seen[~is_cold].mean())
    share[user[is_cold]] = is_seen[is_cold].mean()
    has = np.zeros((len(activity), choice.shape[1]), dtype=bool)
    has[user[is_seen], item] = True
    log_posterior = np.empty((len(activity), 12))
    for cell, prior in enumerate(np.outer(HOBBY_SHARES, BACKGROUND_SHARES).ravel()):
        chance = share * -np.expm1(-activity[:, None] * choice[cell])  # [N, M]
        log_posterior[:, cell] = np.log(prior) + np.where(has, np.log(chance), np.log1p(-chance)).sum(1)
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True)).reshape(-1, 4, 3)
    return {"hobby": adjusted_rand_score(users["true_hobby"], posterior.sum(2).argmax(1)[place]),
            "background": adjusted_rand_score(users["true_background"], posterior.sum(1).argmax(1)[place])}


# ----------------------------------------------------------------------------------------------------------
# cleaning: titles, prices, categories as published
# ----------------------------------------------------------------------------------------------------------

TAG = re.compile(  # also one that was cut short
    r"<(?:!--|/?(?:a|b|big|br|center|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|script|small|span|strong|"
    r"style|sub|sup|table|tbody|td|th|tr|u|ul)\b)[^<>]*(?:>|$)", re.I)
SCRIPT = re.compile(r"getTime\(|function ?\(|[.#][\w-]+ ?\{|\{[^{}]*:[^{}]*\}")  # of the page, no title
AMOUNT = re.compile(r"\$?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
PRICE = re.compile(rf"\s*(?:from\s+)?{AMOUNT.pattern}\s*(?:[-–—]\s*{AMOUNT.pattern}\s*)?", re.I)
NO_NAME = re.compile(r"[<{%]|[.!?:;]$|.{51}")  # features and slogans that 2018's category paths run into
NOT_INFORMATIVE = re.compile(r"(all|general|other|more|misc\w*)( \w+)?", re.I)
YELP_TOP_LEVEL = set("""Active Life|Arts & Entertainment|Automotive|Beauty & Spas|Bicycles|Education|
Event Planning & Services|Financial Services|Food|Health & Medical|Home Services|Hotels & Travel|Local Flavor|
Local Services|Mass Media|Nightlife|Pets|Professional Services|Public Services & Government|
Religious Organizations|Restaurants|Shopping""".replace("\n", "").split("|"))


WARNINGS = []  # of this run, for prepare.json


def warn(message):
    """Print what the user should know, and keep it."""
    print(f"warning: {message}")
    WARNINGS.append(message)


def clean(text):
    """Published text as one plain line: HTML entities and tags, scripts, white space, half surrogates."""
    if not isinstance(text, str):
        return ""
    text, before = text.encode("utf-8", "ignore").decode(), None
    while text != before:  # entities may be escaped twice, tags may hide in entities
        before, text = text, TAG.sub(" ", html.unescape(text))
    return "" if SCRIPT.search(text) else " ".join(text.split())


def price_of(value):
    """Dollars: 12.99, "$1,012.99", "$5 - $9" (its lower end), "from $5"; anything else is missing (nan)."""
    match = PRICE.fullmatch(str(value))
    return min(float(part.replace(",", "")) for part in match.groups() if part) if match else float("nan")


def deepest(paths):
    """The most specific category that tells something: a name, a path, or several paths -> a name or ""."""
    paths = [paths] if isinstance(paths, str) else paths or []
    paths = [path if isinstance(path, list) else [path] for path in paths] \
        if any(isinstance(path, list) for path in paths) else [paths]
    best = []
    for path in paths:
        names = []
        for part in path:
            if not isinstance(part, str) or not part.strip() or NO_NAME.search(part.strip()):
                break
            names.append(clean(part))
        while len(names) > 1 and NOT_INFORMATIVE.fullmatch(names[-1]):
            names.pop()
        best = max(best, names, key=len)
    return best[-1] if best else ""


# ----------------------------------------------------------------------------------------------------------
# files of JSON lines: read as a stream, damage counted
# ----------------------------------------------------------------------------------------------------------

Id = Annotated[str, msgspec.Meta(min_length=1)]
Time = Annotated[float, msgspec.Meta(ge=-1e10, le=1e14)]  # seconds, or milliseconds: see `to_seconds`
REVIEW_FIELDS = {  # format -> our columns and the fields that hold them
    "Amazon 2014 or 2018": dict(user_id="reviewerID", item_id="asin", rating="overall",
                                timestamp="unixReviewTime", review="reviewText"),
    "Amazon 2023": dict(user_id="user_id", item_id="parent_asin", rating="rating", timestamp="timestamp",
                        review="text"),
    "Yelp": dict(user_id="user_id", item_id="business_id", rating="stars", timestamp="date", review="text"),
}


HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def to_seconds(values):
    """Times as int64 seconds; beyond 1e11 (the year 5138) they are read as milliseconds."""
    values = np.asarray(values, dtype="float64")
    return np.where(np.abs(values) > 1e11, values // 1000, values).astype("int64")


def pieces_of(file, size=1 << 19):
    """The content of an open binary file, gzip (also of several members) or not, in pieces of up to `size`.

    Raises EOFError where a gzip file was cut off and zlib.error where it is damaged, after all that is whole.
    """
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not zipped:
        yield from iter(lambda: file.read(size), b"")
        return
    decompressor = zlib.decompressobj(31)
    while data := decompressor.unconsumed_tail or decompressor.unused_data or file.read(1 << 17):
        if decompressor.eof:  # another member, or zeros that fill a block of a tape
            data, decompressor = data.lstrip(b"\0"), zlib.decompressobj(31)
            if not data and not (data := file.read(1 << 17).lstrip(b"\0")):
                return
        if piece := decompressor.decompress(data, size):
            yield piece
    if not decompressor.eof:
        raise EOFError


def blocks_of(path, args):
    """Whole lines of a file, in blocks: yields (number of the first line, bytes). Memory: a few blocks."""
    number, rest, damage = 1, b"", ""
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True,
                                        mininterval=1) as bar:
        pieces = pieces_of(file)
        while True:
            try:
                piece = next(pieces, b"")
            except EOFError:
                damage = "is truncated"
            except zlib.error as error:
                damage = f"is damaged ({error})"
            bar.update(file.tell() - bar.n)
            if damage or not piece:
                break
            if number == 1 and not rest:
                piece = piece.removeprefix(b"\xef\xbb\xbf")
            lines, newline, tail = piece.rpartition(b"\n")
            if newline:
                yield number, rest + lines
                number, rest = number + lines.count(b"\n") + 1, b""
            rest += tail
    if damage:
        if args.strict:
            fail(f"{path} {damage} after {number - 1:,} whole lines: download it again, or leave out "
                 f"--strict")
        warn(f"{path} {damage}: the {number - 1:,} whole lines before are used")
    elif rest:
        yield number, rest


def whole(line):
    """A line of JSON without half surrogate pairs, which some exports hold: no reason to lose a review."""
    if HALF_PAIR.search(line):
        with contextlib.suppress(ValueError):
            return json.dumps(json.loads(line), ensure_ascii=False).encode(errors="replace")
    return line


def read_lines(path, args, decode, decode_block=None):
    """Records of a file of lines: yields a list per block; bad lines are counted by kind and left out.

    decode(line) gives a record, or None for one that nobody needs; decode_block(lines) does all at once. Exit
    code 2 when more than --max-bad of the lines are bad.
    """
    errors = (msgspec.MsgspecError, ValueError, SyntaxError, RecursionError, MemoryError)
    bad, num_lines = {}, 0
    for number, block in blocks_of(path, args):
        try:
            records = decode_block(block) if decode_block else None
        except errors:
            records = None  # one line is bad: take them one by one
        if records is None:
            records = []
            for number, line in enumerate(block.split(b"\n"), number):
                if not line.strip():
                    continue
                num_lines += 1
                try:
                    record = decode(whole(line))
                except errors as error:
                    kind = "not UTF-8" if isinstance(error, UnicodeError) else \
                        re.sub(r" \(byte \d+\)", "", str(error))
                    bad.setdefault(kind, []).append(number)
                    continue
                if record is not None:
                    records.append(record)
        else:
            num_lines += len(records)
        yield records
    if bad:
        num_bad = sum(map(len, bad.values()))
        kinds = "; ".join(f"{len(lines):,} × {kind} (first: line {lines[0]:,})"
                          for kind, lines in bad.items())
        told = f"{path}: {num_bad:,} of {num_lines:,} lines are bad: {kinds}"
        if num_bad > args.max_bad * num_lines:
            fail(f"{told}; that is more than --max-bad {args.max_bad:.3%}: download the file again or allow "
                 f"more")
        warn(f"{told}; they are left out")


def parse_line(line):
    """A line as a dict: JSON or, as in Amazon's metadata of 2014, a Python literal."""
    try:
        record = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        try:
            record = ast.literal_eval(line.decode().strip())
        except UnicodeError:
            raise
        except (SyntaxError, ValueError):
            raise ValueError("neither JSON nor a Python literal") from None
    if not isinstance(record, dict):
        raise ValueError("not a record of named fields")
    return record


def find_files(args, formats):
    """Which file of --raw holds what, by its first records: {"reviews": path, "items": …, …}, format.

    The names decide only between several files of one kind: then those of --category are meant.
    """
    found, of_format, what = {"reviews": [], "items": [], "users": []}, {}, {}
    yelp = "Yelp" in formats
    needed = {name: {field for key, field in REVIEW_FIELDS[name].items() if key != "review"}
              for name in formats}
    for path in sorted(path for path in args.raw.iterdir() if path.is_file()):
        try:
            with open(path, "rb") as file:
                lines = next(pieces_of(file, 1 << 20), b"").splitlines()[:100]
        except (OSError, EOFError, zlib.error) as error:
            what[path.name] = f"unreadable: {error or 'cut off'}"
            continue
        what[path.name] = {b"": "empty", b"[": "a JSON array, not one record a line", b"<": "HTML"}.get(
            b"".join(lines).strip()[:1], "other records")
        for line in lines:
            try:
                names = set(parse_line(line))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if match := [name for name in formats if needed[name] <= names]:
                found["reviews"].append(path)
                what[path.name] = "reviews"
                of_format[path] = match[0]
            elif yelp and {"user_id", "yelping_since"} <= names:
                found["users"].append(path)
                what[path.name] = "users"
            elif names & ({"name"} if yelp else {"title", "categories", "category"}) \
                    and names & ({"business_id"} if yelp else {"asin", "parent_asin"}):
                found["items"].append(path)
                what[path.name] = "items"
            else:
                continue
            break
    for role, paths in found.items():
        if args.category:
            found[role] = paths = of_category(args, paths)
        if not paths and role != "users":
            holds = ", ".join(f"{name} ({role})" for name, role in list(what.items())[:8])
            fail(f"{args.raw} holds no {role} in the format {' or '.join(formats)}; it holds "
                 f"{holds or 'no file'}")
        if len(paths) > 1:
            fail(f"{args.raw} holds several files of {role} ({', '.join(path.name for path in paths)}): "
                 f"leave one there or, if they are of several categories, name one by --category")
    path = found["reviews"][0]
    return {role: paths[0] if paths else None for role, paths in found.items()}, of_format[path]


def of_category(args, paths):
    """Those files that are named as the category is published or, if there is none, one of another name."""
    published = re.compile(r"(?:reviews_|meta_)?([A-Z]\w*?)(?:_5)?\.jsonl?(?:\.gz)?")
    named = {path: match[1] for path in paths if (match := published.fullmatch(path.name))}
    if mine := [path for path, name in named.items() if name.lower() == args.category.lower()]:
        return mine
    if named:
        path, name = next(iter(named.items()))
        fail(f"{path} is named as category {name}, and nothing as {args.category}: take --dataset amazon "
             f"--category {name}, or rename the file")
    return paths


def grouped(lists, size=1 << 13):
    """Join lists until they have `size` entries: blocks fit the processor's cache, columns are longer."""
    group = []
    for part in lists:
        group += part
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group


def texts_of(texts):
    """Texts and None as an arrow array of just their size: arrow's own builder would keep twice as much."""
    encoded = [b"" if text is None else text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype="int64")
    is_text = pa.array([text is not None for text in texts]).buffers()[1]
    content = pa.py_buffer(b"".join(encoded))
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), content, is_text)


def read_reviews(args, path, fields):
    """A file of reviews as a frame: user_id, item_id categorical, rating, timestamp, review (arrow text)."""
    time_type = Time
    if fields["timestamp"] == "date":  # Yelp's are "2018-07-07 22:09:11", in older editions "2018-07-07"
        with open(path, "rb") as file:
            has_time = re.search(rb'"date": ?"[\d-]+[ T]', next(pieces_of(file)))
        time_type = datetime if has_time else date
    record_type = msgspec.defstruct("Review", [
        ("user_id", Id), ("item_id", Id), ("rating", float), ("timestamp", time_type),
        ("review", str | None, None)], rename=fields, gc=False)
    decoder = msgspec.json.Decoder(record_type)
    tables = []
    for records in grouped(read_lines(path, args, decoder.decode, decoder.decode_lines)):
        times = [record.timestamp for record in records]
        tables.append(pa.table({
            "user_id": pa.array([record.user_id for record in records]),
            "item_id": pa.array([record.item_id for record in records]),
            "rating": np.array([record.rating for record in records], dtype="float32"),
            "timestamp": to_seconds(times) if time_type is Time
            else np.array(times, dtype="datetime64[s]").astype("int64"),
            "review": texts_of([record.review for record in records]),
        }))
    table = pa.concat_tables(tables) if tables else pa.table({})
    if not len(table):
        fail(f"{path} holds no review: download it again")
    del tables
    frame = pd.DataFrame({"rating": table["rating"].to_numpy(), "timestamp": table["timestamp"].to_numpy(),
                          "review": pd.arrays.ArrowExtensionArray(table["review"])})
    for name in ("user_id", "item_id"):
        frame[name] = table[name].dictionary_encode().combine_chunks().to_pandas()
        table = table.drop_columns(name)  # as texts they take more memory than all the rest but the reviews
    return frame


# ----------------------------------------------------------------------------------------------------------
# readers: each gives interactions (user_id, item_id, rating, timestamp, maybe review and split), items, users
# and the planted world or None
# ----------------------------------------------------------------------------------------------------------

ITEM_ID = re.compile(rb"""["'](?:parent_)?asin["']: ?["']([^"']+)["']""")


def read_amazon(args):
    """Amazon's reviews of one category, in the format of 2014, 2018 or 2023, with their items' metadata."""
    paths, form = find_files(args, [name for name in REVIEW_FIELDS if name.startswith("Amazon")])
    print(f"reading {paths['reviews']} ({form}) and {paths['items']}")
    interactions = read_reviews(args, paths["reviews"], REVIEW_FIELDS[form])
    wanted = set(interactions["item_id"].cat.categories)

    def item_of(line):
        match = ITEM_ID.search(line)  # literals are slow to read: most items of the shop have no review here
        if match and match[1].decode("utf-8", "replace") not in wanted:
            return None
        record = parse_line(line)
        item_id = record.get("parent_asin") or record.get("asin")
        if not isinstance(item_id, str) or not item_id:
            raise ValueError("no asin")
        details = record.get("details")
        brand = record.get("brand") or record.get("store") or \
            (details.get("Brand") if isinstance(details, dict) else None)
        paths = record.get("category") or record.get("categories") or record.get("main_category")
        return {"item_id": item_id, "title": record.get("title"), "category": deepest(paths), "brand": brand,
                "price": record.get("price")}

    items = pd.DataFrame([item for block in read_lines(paths["items"], args, item_of) for item in block],
                         columns=[*ITEM_COLUMNS, *OPTIONAL_ITEM_COLUMNS])
    return interactions, items, pd.DataFrame({"user_id": interactions["user_id"].cat.categories}), None


def yelp_item(record):
    """A business as an item; of its categories, which Yelp does not order, the first below the top level."""
    names = record.get("categories") or []
    names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    attributes = record.get("attributes")
    price = attributes.get("RestaurantsPriceRange2") if isinstance(attributes, dict) else None
    category = next((name for name in names if name not in YELP_TOP_LEVEL), names[0] if names else "")
    return {"item_id": record["business_id"], "title": record.get("name"), "category": category,
            "brand": None, "price": price}


def read_yelp(args):
    """Yelp's open data set: reviews, businesses and, if there, users: those fields that no rating made."""
    paths, form = find_files(args, ["Yelp"])
    print(f"reading {paths['reviews']}, {paths['items']}" + (f", {paths['users']}" if paths["users"] else ""))
    interactions = read_reviews(args, paths["reviews"], REVIEW_FIELDS[form])

    def needed(line, key, wanted):
        record = parse_line(line)
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"no {key}")
        return record if record[key] in wanted else None

    businesses, people = (set(interactions[name].cat.categories) for name in ("item_id", "user_id"))
    blocks = read_lines(paths["items"], args, lambda line: needed(line, "business_id", businesses))
    items = pd.DataFrame([yelp_item(record) for block in blocks for record in block],
                         columns=[*ITEM_COLUMNS, *OPTIONAL_ITEM_COLUMNS])
    users = pd.DataFrame({"user_id": interactions["user_id"].cat.categories})
    if paths["users"]:
        told = ["user_id", "review_count", "yelping_since", "fans"]
        blocks = read_lines(paths["users"], args, lambda line: needed(line, "user_id", people))
        users = pd.DataFrame([{name: record.get(name) for name in told}
                              for block in blocks for record in block], columns=told)
    return interactions, items, users, None


class SafeUnpickler(pickle.Unpickler):
    """Unpickles plain containers and numbers; asked for anything else it stops before that could run."""

    ADMITTED = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set",
                "slice", "str", "tuple"}

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in self.ADMITTED:  # the second name is Python 2's
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run a stranger's code; "
                                     f"dump it with plain numbers, texts, lists and dicts")


def read_nete(args):
    """The dumps that the paper's Movies and Yelp are (from NETE, Li et al., 2020), maybe with their split.

    reviews.pickle: list of {user, item, rating, template: (feature, adjective, sentence, sentiment)};
    item.json: list (or lines) of {item, title or name, categories, …}; N/train.index, …: places in the list.
    """
    path = args.raw / "reviews.pickle"
    try:
        with open(path, "rb") as file:
            reviews = SafeUnpickler(file).load()
        rows = [(str(review["user"]), str(review["item"]), float(review["rating"]),
                 (review.get("template") or (None,) * 3)[2] or review.get("text")) for review in reviews]
    except FileNotFoundError:
        fail(f"{path} is missing: --raw must be the folder that holds it")
    except pickle.UnpicklingError as error:
        fail(f"{path} is refused: {error}")
    except EOFError:
        fail(f"{path} is cut off: download it again")
    except Exception as error:  # a broken pickle raises nearly anything
        fail(f"{path} is not a list of reviews with user, item and rating "
             f"({type(error).__name__}: {error}): download it again")
    interactions = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "review"])
    interactions["timestamp"] = 0  # the dumps tell none
    path = args.raw / "item.json"
    try:
        text = path.read_bytes()
        records = json.loads(text) if text.lstrip().startswith(b"[") else map(parse_line, text.splitlines())
        items = pd.DataFrame([nete_item(record) for record in records])
    except FileNotFoundError:
        fail(f"{path} is missing: --raw must be the folder that holds it")
    except (OSError, ValueError, SyntaxError, KeyError, AttributeError, TypeError) as error:
        fail(f"{path} cannot be read as items ({type(error).__name__}: {error}): download it again")
    if args.split == "published":
        interactions["split"] = published_split(args.raw / str(args.fold), len(interactions))
    return interactions, items, pd.DataFrame({"user_id": interactions["user_id"].unique()}), None


def nete_item(record):
    """An item of item.json, whose fields differ from dump to dump."""
    if "attributes" in record or "business_id" in record:
        return yelp_item({**record, "business_id": str(record["item"])})
    return {"item_id": str(record["item"]), "title": record.get("title") or record.get("name"),
            "brand": record.get("brand"), "price": record.get("price"),
            "category": deepest(record.get("categories") or record.get("category"))}


def published_split(folder, num_rows):
    """Row numbers in train.index, validation.index, test.index -> split by row; None: in none of them."""
    split = pd.Series(None, index=range(num_rows), dtype=object)
    for name in ("train", "validation", "test"):
        path = folder / f"{name}.index"
        try:
            index = np.array(path.read_text().split(), dtype="int64")
        except FileNotFoundError:
            fail(f"{path} is missing: choose another --fold, or --split random")
        except (OSError, ValueError, OverflowError) as error:
            fail(f"{path} is no list of row numbers ({error}): download it again")
        if not len(index):
            fail(f"{path} is empty: download it again")
        if index.min() < 0 or index.max() >= num_rows or split.iloc[index].notna().any():
            fail(f"{path} does not fit reviews.pickle with its {num_rows:,} reviews: its row numbers must be "
                 f"within 0 and {num_rows - 1:,} and in no other index file")
        split.iloc[index] = "valid" if name == "validation" else name
    return split


def read_frame(path, **options):
    """A csv, tsv (also .gz) or parquet file as a frame of at least one row; all columns of a csv as text."""
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            if ".tsv" in path.suffixes:
                options["sep"] = "\t"
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""], **options)
    except FileNotFoundError:
        fail(f"{path} is missing: --raw must be the folder that holds it")
    except pd.errors.EmptyDataError:
        fail(f"{path} is empty: download or export it again")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # broken gzip, not parquet, not the encoding, not csv
        fail(f"{path} cannot be read ({error}): download or export it again")
    if frame.empty:
        fail(f"{path} has no rows: download or export it again")
    return frame


def to_number(frame, column, path, first_line):
    """A column as numbers; the first that is none is named with its line. `first_line`: that of row 0."""
    number = pd.to_numeric(frame[column], errors="coerce")
    if number.isna().any() or np.isinf(number).any():
        row = int((number.isna() | np.isinf(number)).to_numpy().argmax())
        fail(f"{path}, line {row + first_line}: {column} {frame[column].iloc[row]!r} is not a number; "
             f"mend or drop the line")
    return number


def need_columns(frame, columns, path):
    """Exit with the missing columns and those found."""
    missing = [column for column in columns if column not in frame]
    if missing:
        fail(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")


def folder_of(args, name):
    """The folder that holds the file: --raw, or the one within it that the archive makes."""
    inner = args.raw / args.dataset
    return inner if not (args.raw / name).exists() and (inner / name).exists() else args.raw


def read_ml_100k(args):
    """MovieLens-100k as published: u.data (tab), u.item (pipe, Latin-1, 19 genre flags), u.user."""
    folder = folder_of(args, "u.data")
    data, item, user, genre = (folder / name for name in ("u.data", "u.item", "u.user", "u.genre"))
    interactions = read_frame(data, sep="\t", header=None, names=INTERACTION_COLUMNS)
    for column in ("rating", "timestamp"):
        interactions[column] = to_number(interactions, column, data, first_line=1)
    info = folder / "u.info"  # "943 users\n1682 items\n100000 ratings"
    if info.exists() and (told := re.search(r"(\d+) ratings", info.read_text(errors="replace"))):
        if int(told[1]) != len(interactions):
            warn(f"{data} holds {len(interactions):,} ratings, but {info} tells of {int(told[1]):,}: is it "
                 f"whole?")
    genres = read_frame(genre, sep="|", header=None)[0].tolist()
    table = read_frame(item, sep="|", header=None, encoding="latin-1")
    if table.shape[1] != 5 + len(genres):
        fail(f"{item} has {table.shape[1]} columns, not 5 and {len(genres)} genres: "
             f"is it MovieLens-100k's u.item?")
    flags = table.iloc[:, 5:].to_numpy() == "1"
    items = pd.DataFrame({"item_id": table[0], "title": table[1],
                          "category": [", ".join(np.array(genres)[row]) or None for row in flags]})
    user_columns = ["user_id", "age", "gender", "occupation", "zip_code"]
    users = read_frame(user, sep="|", header=None, names=user_columns)
    users["age"] = to_number(users, "age", user, first_line=1).astype("int64")
    return interactions, items, users, None


def read_ml_1m(args):
    """MovieLens-1M as published: ratings.dat, movies.dat, users.dat, "::" between columns, Latin-1."""
    folder, frames = folder_of(args, "ratings.dat"), []
    for name, columns in (("ratings", INTERACTION_COLUMNS), ("movies", ["item_id", "title", "category"]),
                          ("users", ["user_id", "gender", "age", "occupation", "zip_code"])):
        path = folder / f"{name}.dat"
        try:
            text = path.read_bytes().replace(b"::", b"\t")
        except OSError as error:
            fail(f"{path} cannot be read ({error.strerror}): --raw must be the folder that holds it")
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines or any(line.count(b"\t") != len(columns) - 1 for line in lines):
            fail(f"{path} is empty or has a line without {len(columns)} columns: is it MovieLens-1M's?")
        frame = pd.read_csv(BytesIO(text), sep="\t", names=columns, dtype=str, encoding="latin-1", quoting=3,
                            keep_default_na=False, na_values=[""])
        for column in frame.columns.intersection(["rating", "timestamp", "age"]):
            frame[column] = to_number(frame, column, path, first_line=1)
        frames.append(frame)
    interactions, items, users = frames
    items["category"] = items["category"].str.replace("|", ", ")
    return interactions, items, users, None


def read_table(args):
    """A folder with interactions.*, items.* (and users.*, if any) as csv, tsv (both also .gz) or parquet."""
    if any("=" not in pair or not all(pair.split("=", 1)) for pair in args.columns):
        fail(f"--columns {' '.join(args.columns)}: each must be ours=theirs, such as rating=stars")
    ours = {theirs: name for name, theirs in (pair.split("=", 1) for pair in args.columns)}
    known = {*INTERACTION_COLUMNS, "review", "split", *ITEM_COLUMNS, *OPTIONAL_ITEM_COLUMNS}
    if unknown := set(ours.values()) - known:
        fail(f"--columns {' '.join(args.columns)}: {', '.join(sorted(unknown))} is none of our columns")
    endings = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
    paths, frames = {}, {}
    for name in ("interactions", "items", "users"):
        there = [path for ending in endings if (path := args.raw / f"{name}{ending}").exists()]
        if not there and name != "users":
            fail(f"{args.raw} holds no {' or '.join(name + ending for ending in endings)}")
        if len(there) > 1:
            fail(f"{args.raw} holds {' and '.join(path.name for path in there)}: leave one of them there")
        paths[name] = there[0] if there else None
        frames[name] = read_frame(paths[name]) if paths[name] else None
    found = {name: set() if frame is None else set(frame.columns) for name, frame in frames.items()}
    if unused := [theirs for theirs in ours if not any(theirs in names for names in found.values())]:
        fail(f"--columns: no file has a column {', '.join(unused)}")
    for name, frame in frames.items():
        for theirs in set(ours) & found[name]:
            if ours[theirs] in found[name] - set(ours):
                fail(f"--columns {ours[theirs]}={theirs}: {paths[name]} has a column {ours[theirs]}, too")
        frames[name] = frame if frame is None else frame.rename(columns=ours)
    print("reading " + ", ".join(str(path) for path in paths.values() if path))
    interactions, items, users = frames.values()
    if "split" in interactions and args.split != "published":
        print(f"the column split is not used: --split is {args.split}, not published")
    need_columns(interactions, INTERACTION_COLUMNS, paths["interactions"])
    need_columns(items, ITEM_COLUMNS, paths["items"])
    for column in ("rating", "timestamp"):
        interactions[column] = to_number(interactions, column, paths["interactions"], first_line=2)
    interactions["timestamp"] = to_seconds(interactions["timestamp"])
    if users is None:
        users = pd.DataFrame({"user_id": interactions["user_id"].unique()})
    need_columns(users, ["user_id"], paths["users"])
    if args.split == "published":
        need_columns(interactions, ["split"], paths["interactions"])
        interactions["split"] = interactions["split"].replace("validation", "valid")
        if strange := set(interactions["split"].dropna()) - {"train", "valid", "test", "support"}:
            fail(f"{paths['interactions']}: {', '.join(map(str, strange))} is no split; it must be train, "
                 f"valid, test or support")
    return interactions, items, users, None


READERS = {"planted": read_planted, **dict.fromkeys((*CATEGORIES, "amazon"), read_amazon), "yelp": read_yelp,
           "nete": read_nete, "ml-100k": read_ml_100k, "ml-1m": read_ml_1m, "table": read_table}

# ----------------------------------------------------------------------------------------------------------
# download: what is published without terms to accept
# ----------------------------------------------------------------------------------------------------------

AMAZON_2014 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon/categoryFiles"
MOVIELENS = "https://files.grouplens.org/datasets/movielens"
PATIENCE = 1.0  # seconds: the waits between attempts are multiples of it
ARCHIVES = {"ml-100k": "0e33842e24a9c977be4e0107933c0723", "ml-1m": "c4d9eecfca2ab87c1945afe126590906"}  # md5


def download(args, attempts=5):
    """Fetch the published files of --dataset into --raw, but for those that are there already."""
    try:
        args.raw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--raw {args.raw} cannot be made: {error.strerror}")
    if args.dataset not in ARCHIVES:
        for name in (f"reviews_{args.category}_5.json.gz", f"meta_{args.category}.json.gz"):
            fetch(f"{args.download or AMAZON_2014}/{name}", args.raw / name, attempts)
        return
    path = args.raw / f"{args.dataset}.zip"
    unpacked = "u.data" if args.dataset == "ml-100k" else "ratings.dat"
    if (folder_of(args, unpacked) / unpacked).exists():
        return
    fetch(f"{args.download or MOVIELENS}/{path.name}", path, attempts, md5=ARCHIVES[args.dataset])
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(args.raw)
    except (OSError, zipfile.BadZipFile) as error:
        fail(f"{path} cannot be unpacked ({error}): delete it and download it again")


def fetch(url, path, attempts, md5=None):
    """Download `url` as `path`, going on from path.part where an earlier try broke off; checks the size.

    Where `md5` is given, the digest, too. Exit code 2 after so many attempts in vain; path.part stays.
    """
    if path.exists():
        print(f"{path} is there already")
        return
    part, total, reason = path.with_name(f"{path.name}.part"), None, ""
    for attempt in range(attempts):
        if attempt:
            print(f"{url}: {reason}; attempt {attempt + 1} of {attempts}", flush=True)
            time.sleep(min(2 ** attempt, 30) * PATIENCE)
        try:
            total = fetch_rest(url, part)
            if part.stat().st_size == total or total is None:
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500:
                fail(f"{url}: {error.code} {error.reason}; is it another --category, or a mirror without it?")
            reason = str(error)
        except (OSError, HTTPException) as error:
            reason = str(error)
        except ValueError as error:  # not a URL
            fail(f"{url} cannot be fetched: {error}")
    else:
        if not total:
            fail(f"{url} cannot be fetched ({reason}): try later or from another mirror")
        fail(f"{url}: {reason}; {part.stat().st_size:,} of {total:,} bytes are kept in {part}: the same "
             f"command goes on from there")
    if md5 and (found := hashlib.md5(part.read_bytes()).hexdigest()) != md5:
        part.unlink()
        fail(f"{url} has the digest {found}, not {md5} as published, and was deleted: try again")
    with open(part, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if path.suffix == ".gz" and not is_gzip:
        part.unlink()
        fail(f"{url} is no gzip file (a page of the mirror?) and was deleted: try another mirror")
    part.replace(path)


def fetch_rest(url, part):
    """Append to `part` what it lacks of `url`; returns the size of the whole, None where it is not told."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Unmodified-Since", formatdate(part.stat().st_mtime, usegmt=True))
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if have and error.code in (412, 416):  # changed since then, or nothing is left that it could send
            part.unlink()
            return fetch_rest(url, part)
        raise
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        have = have if answer.status == 206 else 0  # 200: the server sends all of it
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, mininterval=1) as bar:
            while piece := answer.read(1 << 18):
                file.write(piece)
                bar.update(len(piece))
    return total


# ----------------------------------------------------------------------------------------------------------
# filter, index, split
# ----------------------------------------------------------------------------------------------------------


def codes_of(column):
    """A column of ids as a categorical's codes, int64 [R]"""
    return column.astype("category").cat.codes.to_numpy().astype("int64")


def keep_latest(interactions):
    """Of rows with the same user and item the latest, of equal times the last in the file; in their order."""
    user, item = codes_of(interactions["user_id"]), codes_of(interactions["item_id"])
    pair = pd.Series(user * (item.max(initial=0) + 1) + item)
    again = np.flatnonzero(pair.duplicated(keep=False))  # few: only these need to be sorted
    again = again[np.argsort(interactions["timestamp"].to_numpy()[again], kind="stable")]
    keep = np.ones(len(pair), dtype=bool)
    keep[again[pair[again].duplicated(keep="last")]] = False
    return interactions[keep]


def keep_core(interactions, min_interactions):
    """Drop users and items with fewer rows until none is left (a k-core); the order of rows stays."""
    user, item = codes_of(interactions["user_id"]), codes_of(interactions["item_id"])
    keep = np.ones(len(user), dtype=bool)
    while True:
        enough = [np.bincount(codes[keep], minlength=codes.max(initial=0) + 1)[codes] >= min_interactions
                  for codes in (user, item)]
        still = keep & enough[0] & enough[1]
        if (still == keep).all():
            return interactions[keep]
        keep = still


def order_of(user, timestamp):
    """The order by user and time, ties as they stand: int64 [R]. One key for both is twice as fast."""
    first = timestamp.min()
    span = int(timestamp.max()) - int(first) + 1
    if span * (int(user.max()) + 1) < 2**63:
        return np.argsort(user.astype("int64") * span + (timestamp - first), kind="stable")
    return np.lexsort((timestamp, user))


def rows_by_id(frame, name, ids):
    """The row of each id, the first where it has several, empty where it has none; how many of either."""
    once = frame.drop_duplicates(name, ignore_index=True)
    place = pd.Index(once[name]).get_indexer(ids)
    rows = once.reindex(place).reset_index(drop=True)  # place -1 stands for no row
    rows[name] = ids
    return rows, (len(frame) - len(once), int((place < 0).sum()))


def tabulate(interactions, items, users):
    """Published ids become indices in [0, N) and [0, M): interactions, items, users as the artifacts hold.

    The index of the interactions tells each row's place in what was read; sorted by user and time, ties in
    the order of the file.
    """
    ids = [sorted(interactions[name].unique()) for name in ("user_id", "item_id")]
    user, item = (interactions[name].astype("category").cat.set_categories(known).cat.codes.to_numpy()
                  for name, known in zip(("user_id", "item_id"), ids))
    order = order_of(user, interactions["timestamp"].to_numpy().astype("int64"))
    table = pd.DataFrame({"user": user[order].astype("int64"), "item": item[order].astype("int64"),
                          "rating": interactions["rating"].to_numpy()[order].astype("float32"),
                          "timestamp": interactions["timestamp"].to_numpy()[order].astype("int64")},
                         index=interactions.index[order])
    if "split" in interactions:
        table["split"] = interactions["split"].to_numpy()[order]

    told, (items_again, items_missing) = rows_by_id(items, "item_id", ids[1])
    titles = [clean(title) for title in told["title"]]
    prices = [None if pd.isna(price) or price == "" else price
              for price in told.get("price", [None] * len(told))]
    texts = {name: [clean(value) or None for value in told[name]] if name in told else [None] * len(told)
             for name in ("category", "brand")}
    users, (users_again, users_missing) = rows_by_id(users, "user_id", ids[0])
    stored = pd.DataFrame({
        "item": np.arange(len(told)), "item_id": ids[1],
        "title": [title or item_id for title, item_id in zip(titles, ids[1])],
        **{name: pd.array(values, dtype="str") for name, values in texts.items()},
        "price": np.array([price_of(price) for price in prices], dtype="float64")})
    counts = {"untitled_items": titles.count(""),
              "items_not_listed": items_missing, "items_listed_twice": items_again,
              "junk_prices": int(stored["price"].isna().sum()) - prices.count(None),
              "users_listed_twice": users_again, "users_not_listed": users_missing}
    users.insert(0, "user", np.arange(len(ids[0])))
    return table, stored, users, counts


def split_random(num_rows, seed):
    """8:1:1 per interaction: array of "train", "valid", "test" [num_rows]."""
    order = np.random.default_rng([seed, 2]).permutation(num_rows)
    split = np.full(num_rows, "train", dtype=object)
    tenth = round(num_rows / 10)
    split[order[:tenth]], split[order[tenth:2 * tenth]] = "test", "valid"
    return split


def split_temporal(table):
    """Each user's last tenth (at least one row) is test, the tenth before it valid: table by time -> [R]"""
    size = table.groupby("user")["item"].transform("size").to_numpy()
    left = size - 1 - table.groupby("user").cumcount().to_numpy()  # rows of the user that come later
    tenth = np.maximum(1, np.round(size / 10))
    split = np.full(len(table), "train", dtype=object)
    split[(left < 2 * tenth) & (size > 2)] = "valid"
    split[(left < tenth) & (size > 1)] = "test"  # whoever has a single row has it in train
    return split


def split_cold_user(table, seed):
    """A tenth of the users is cold: support and then test; of the others' rows a ninth is valid: -> [R]"""
    rng = np.random.default_rng([seed, 2])
    user, num_users = table["user"].to_numpy(), int(table["user"].max()) + 1
    is_cold = np.zeros(num_users, dtype=bool)
    is_cold[rng.permutation(num_users)[:max(1, round(num_users / 10))]] = True
    size = table.groupby("user")["item"].transform("size").to_numpy()
    first_half = table.groupby("user").cumcount().to_numpy() < size // 2
    split = np.where(is_cold[user], np.where(first_half, "support", "test"), "train").astype(object)
    warm = rng.permutation(np.flatnonzero(~is_cold[user]))
    split[warm[:round(len(warm) / 9)]] = "valid"
    return split


def untrained(table):
    """Users and items of valid and test rows that no train row has: two arrays of bool [R], by row."""
    held = table["split"].isin(["valid", "test"])
    return [held & ~table[name].isin(table.loc[table["split"] == "train", name]) for name in ("user", "item")]


def ensure_train(table):
    """Move the first row of each user and item without a train row into train."""
    for side, name in enumerate(("user", "item")):
        first = table[untrained(table)[side]].drop_duplicates(name).index
        table.loc[first, "split"] = "train"
    return table


def keep_past(table):
    """What lies before a train row of its user joins train, or the past would be tested with the future."""
    later_train = table["split"].eq("train")[::-1].groupby(table["user"][::-1]).cummax()[::-1]
    table.loc[later_train, "split"] = "train"
    return table


# ----------------------------------------------------------------------------------------------------------
# assemble, report, write
# ----------------------------------------------------------------------------------------------------------


def gather(chunks, rows):
    """chunks: arrow arrays, one behind the other; rows: places in them -> the values there, in that order.

    A take from all chunks at once would copy all of them into one first.
    """
    order = np.argsort(rows, kind="stable")
    starts = np.cumsum([0, *map(len, chunks)])
    bounds = np.searchsorted(rows[order], starts)
    pieces = [chunk.take(pa.array(rows[order[low:high]] - start))
              for chunk, start, low, high in zip(chunks, starts, bounds, bounds[1:]) if low < high]
    back = np.empty(len(rows), dtype="int64")
    back[order] = np.arange(len(rows))
    return pa.concat_arrays(pieces).take(pa.array(back))


def row_groups(table, reviews, size=1 << 16):
    """The interactions as the artifact holds them, in pieces: arrow tables; `reviews`: as read, chunked"""
    chunks = [chunk.cast(pa.large_string()) for chunk in reviews.chunks] if reviews is not None else None
    for start in range(0, len(table), size):
        part = table.iloc[start:start + size]
        review = gather(chunks, part.index.to_numpy()) if chunks else pa.nulls(len(part), pa.large_string())
        names = ("user", "item", "rating", "label", "timestamp", "split")
        yield pa.table({**{name: pa.array(part[name].to_numpy()) for name in names}, "review": review})


def load(args):
    """The raw data, ids as categoricals: interactions, items, users, world, reviews (arrow text or None)"""
    if args.download is not None:
        download(args)
    if args.raw and not args.raw.is_dir():
        advice = "; --download fetches it" if args.dataset in {*CATEGORIES, *ARCHIVES} else ""
        fail(f"--raw {args.raw} is {'no folder' if args.raw.exists() else f'not there{advice}'}")
    try:
        interactions, items, users, world = READERS[args.dataset](args)
    except OSError as error:
        fail(f"{error.filename or args.raw} cannot be read: {error.strerror or error}")
    for frame in (interactions, items, users):
        for column in frame.columns.intersection(["user_id", "item_id"]):
            if num_missing := int(frame[column].isna().sum()):
                fail(f"{num_missing} rows have no {column} in {args.raw}: fill or drop them")
            if frame[column].dtype != "category":
                frame[column] = frame[column].astype(str)
    interactions = interactions.reset_index(drop=True)
    reviews = None
    if "review" in interactions:
        reviews = interactions.pop("review")
        reviews = pa.array(reviews if isinstance(reviews.dtype, pd.ArrowDtype) else reviews.astype("string"))
        reviews = reviews if isinstance(reviews, pa.ChunkedArray) else pa.chunked_array([reviews])
    for column in ("user_id", "item_id"):
        interactions[column] = interactions[column].astype("category")
    return interactions, items, users, world, reviews


def choose_split(args, table):
    """The column `split` of the table, in place, and what is to be told about it: dict of facts"""
    if args.split == "temporal" and table["timestamp"].nunique() < 2:
        fail(f"--split temporal: all rows of {args.raw} have the same time; choose another split")
    if args.split != "published":
        table["split"] = {"random": lambda: split_random(len(table), args.split_seed),
                          "temporal": lambda: split_temporal(table),
                          "cold-user": lambda: split_cold_user(table, args.split_seed)}[args.split]()
    told = {}
    for when in ("untrained", "untrained_after_ensure_train")[:1 + args.ensure_train]:
        if when != "untrained":
            ensure_train(table)
            if args.split == "temporal":
                keep_past(table)
        rows = untrained(table)
        told[when] = {f"{name}s": int(table.loc[row, name].nunique())
                      for name, row in zip(("user", "item"), rows)}
        told[when]["rows"] = int((rows[0] | rows[1]).sum())
    count = table["split"].value_counts()
    names = ("train", "valid", "test", "support")
    told["rows_of_split"] = {name: int(count[name]) for name in names if name in count}
    for name in names[:3]:
        if name not in count:
            fail(f"--split {args.split}{' --ensure-train' * args.ensure_train} leaves no {name} row among "
                 f"{len(table):,}: take more data or another split")
    if args.split == "cold-user":
        cold, heard = (set(table.loc[table["split"] == name, "user"]) for name in ("test", "support"))
        if cold - heard:
            warn(f"{len(cold - heard):,} of {len(cold):,} cold users have one interaction, so no support row")
    again = int(table.duplicated(["user", "item"]).sum()) if args.split == "published" else 0
    if again:  # elsewhere the latest is kept
        pairs = table.groupby(["user", "item"])["split"].nunique()
        warn(f"{again:,} rows repeat a (user, item) of the published split, which keeps them; "
             f"{int((pairs > 1).sum()):,} pairs stand in two of its parts")
    return told


def report(args, facts):
    """What stage 1 found, as its prints: table 1's row, what was dropped, the split."""
    reasons = {
        "duplicates": "duplicates of (user, item) dropped, the latest kept",
        "not_in_split": "interactions in no index of the published split dropped",
        "filtered": f"interactions of users or items with fewer than {args.min_interactions} dropped",
        "untitled_items": "items without a title keep their id as title",
        "items_not_listed": "items are not in the items file",
        "items_listed_twice": "lines of the items file list an item again, the first counts",
        "users_listed_twice": "lines of the users file list a user again, the first counts",
        "junk_prices": "prices are no numbers and count as missing",
        "users_not_listed": "users are not in the users file",
    }
    print(f"read {facts['rows_read']:,} interactions")
    for name, reason in reasons.items():
        if facts[name]:
            print(f"  {facts[name]:,} {reason}")
    print("| data | interactions | users | items | sparsity (%) | positive labels | "
          "logloss of predicting it |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {facts['dataset']} | {facts['interactions']:,} | {facts['users']:,} | {facts['items']:,} | "
          f"{facts['sparsity_percent']:.2f} | {facts['positive_share']:.3f} | "
          f"{facts['base_rate_logloss']:.4f} |")
    rows = ", ".join(f"{count:,} {name}" for name, count in facts["rows_of_split"].items())
    print(f"split {args.split}: {rows}")
    for when, found in facts.items():
        if when.startswith("untrained"):
            print(f"{'after --ensure-train, ' if 'after' in when else ''}{found['rows']:,} rows of valid and "
                  f"test have a user or an item without a train row: {found['users']:,} users, "
                  f"{found['items']:,} items")
    if "bayes_ari" in facts:
        ceilings = "  ".join(f"{name} {value:.3f}" for name, value in facts["bayes_ari"].items())
        seen = "train and support" if args.split == "cold-user" else "train"
        print(f"Bayes-optimal ARI from the {seen} items: {ceilings}")


def main(args):
    start_stage(args)
    clock = {"start": time.time()}
    WARNINGS.clear()
    try:
        Path(args.run_dir).mkdir(parents=True, exist_ok=True)  # now rather than after hours of reading
    except OSError as error:
        fail(f"--run-dir {args.run_dir} cannot be made: {error.strerror}")
    interactions, items, users, world, reviews = load(args)
    clock["read"] = time.time()
    facts = {"dataset": args.dataset, "rows_read": len(interactions), "duplicates": 0, "not_in_split": 0,
             "filtered": 0}
    if args.split == "published":
        interactions = interactions[interactions["split"].notna()]
        facts["not_in_split"] = facts["rows_read"] - len(interactions)
    else:
        interactions = keep_latest(interactions.drop(columns="split", errors="ignore"))
        facts["duplicates"] = facts["rows_read"] - len(interactions)
        interactions = keep_core(interactions, args.min_interactions)
        facts["filtered"] = facts["rows_read"] - facts["duplicates"] - len(interactions)
    if interactions.empty:
        fail(f"no user is left of {facts['rows_read']:,} interactions after dropping users and items with "
             f"fewer than {args.min_interactions}: lower --min-interactions")
    table, items, users, counts = tabulate(interactions, items, users)
    del interactions  # may be large
    table["label"] = (table["rating"] > args.threshold).astype("int8")
    if table["label"].nunique() < 2:
        low, high = table["rating"].min(), table["rating"].max()
        fail(f"all ratings ({low:g} to {high:g}) are on one side of --threshold {args.threshold:g}: choose "
             f"another")
    num_rows, num_users, num_items = len(table), len(users), len(items)
    positive = float(table["label"].mean())
    facts |= {"interactions": num_rows, "users": num_users, "items": num_items,
              "sparsity_percent": round(100 * (1 - num_rows / (num_users * num_items)), 2),
              "positive_share": positive, "base_rate_logloss": logloss(table["label"], positive), **counts}
    facts |= {"split": args.split, "split_seed": args.fold if args.split == "published" else args.split_seed}
    facts |= choose_split(args, table)
    if counts["items_not_listed"] == num_items:
        fail(f"not one of the {num_items:,} items is in the items file: do both belong to one data set?")
    if counts["untitled_items"] > num_items / 2:
        warn(f"{counts['untitled_items']:,} of {num_items:,} items have no title: a LLM reads only their ids")
    if world:
        facts["bayes_ari"] = bayes_ari(world, table, items, users)
    report(args, facts)

    facts["warnings"] = WARNINGS
    row = json.dumps(facts, indent=2) + "\n"  # without seconds: the same run gives the same bits
    clock["filter and split"] = time.time()
    times = list(clock.items())
    facts["seconds"] = clock["filter and split"] - clock["start"]
    facts["seconds_of"] = {name: at - before for (name, at), (_, before) in zip(times[1:], times)}
    artifacts = {"users.parquet": users, "items.parquet": items,
                 "interactions.parquet": row_groups(table, reviews)}
    for name, value in artifacts.items():
        write_artifact(args, name, value, **facts)
    write_artifact(args, "prepare.json", row, inputs=list(artifacts))
    print(f"wrote {args.run_dir}/interactions.parquet: {num_rows:,} rows, {num_users:,} users, "
          f"{num_items:,} items | base-rate logloss {facts['base_rate_logloss']:.4f}")


if __name__ == "__main__":
    main(parse_args())
