"""Stage 1 of 5: turn raw interactions into one filtered, labelled, split table that all later stages use.

Users and items with fewer than 4 interactions are dropped until none is left (paper, section 3.2). A rating
above 3 is a positive label. Of several interactions of a user with an item the latest is kept. `planted`
draws users with a true hobby and background: later stages report how much of it they found.

Reads   --raw DIR, files as published (Amazon, Yelp and tables: plain or gzip):
          clothing, movies, games, amazon   Amazon reviews and metadata of 2014, 2018 or 2023
          yelp      yelp_academic_dataset_review.json, _business.json and, if there, _user.json
          nete      reviews.pickle, item.json, folders 1, 2, … with train.index, validation.index, test.index
          ml-100k, ml-1m   MovieLens
          table     interactions.*, items.* and, if there, users.* as csv, tsv (both also .gz) or parquet
Writes  interactions.parquet  user, item int64, rating float32, label int8, timestamp int64 (s), split,
                              review, of nete also feature, what the review is about
        items.parquet         item, item_id, title, category, brand, price (dollars; Yelp: its range, 1 to 4)
        users.parquet         user, user_id, and what is known of the user: for checking, and --fields
        prepare.json          the row of the paper's table 1, and counts of what was dropped

Splits  random     8:1:1 per interaction (the paper's)
        temporal   of each user's interactions the last tenth is test, the tenth before it valid
        cold-user  a tenth of the users is never in train or valid: the first half of their interactions is
                   support, evidence for their own profile only, the rest is test; a ninth of others' is valid
        cold-item  a tenth of the items is never in train or valid: all their interactions are test; a ninth
                   of the other interactions is valid
        published  that of the data set (nete, or a table with a column `split`); rows without one go

Example: python 01_prepare.py        (2 seconds)
  wrote runs/demo/interactions.parquet: 34,213 rows, 1,975 users, 600 items | base-rate logloss 0.6674
"""

import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from common import logloss
from userip.artifacts import WARNINGS, fail, warn, write_artifact
from userip.cleaning import clean_items, is_no_age
from userip.download import ARCHIVES, download
from userip.options import at_least, changed_options, option_name, run_program, stage_parser, start_stage
from userip.planted import bayes_ari, read_planted
from userip.readers import CATEGORIES, read_amazon, read_nete, read_yelp
from userip.tables import read_ml_1m, read_ml_100k, read_table

AMAZON = (*CATEGORIES, "amazon")
READERS = {"planted": read_planted, **dict.fromkeys(AMAZON, read_amazon), "yelp": read_yelp,
           "nete": read_nete, "ml-100k": read_ml_100k, "ml-1m": read_ml_1m, "table": read_table}
SPLITS = ("random", "temporal", "cold-user", "cold-item", "published")
BELONGS = {  # option -> the data sets, or the splits, for which it means something
    "category": AMAZON, "columns": ["table"], "max_bad": [*AMAZON, "yelp"],
    "max_line": [*AMAZON, "yelp", "table"], "max_ratio": [*AMAZON, "yelp", "table"],
    "download": [*AMAZON, *ARCHIVES], "fold": ["nete published"],
    "seed": ["planted", "random", "cold-user", "cold-item"], "min_interactions": SPLITS[:-1],
    "split_seed": ["random", "cold-user", "cold-item"]}
COUNTS = ("duplicates", "not_in_split", "filtered", "untitled_items", "cut_titles", "items_not_listed",
          "items_listed_twice", "junk_prices", "users_listed_twice", "users_not_listed")  # that are printed


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--seed", type=at_least(0), default=0, help="seed of the planted world and of the split")
    add.data("--dataset", choices=READERS, default="planted", help="what to read")
    add.data("--raw", type=Path, help="folder with the raw files (not for planted)")
    add.data("--category", help="Amazon: category as in the files' names, such as Digital_Music")
    add.data("--columns", nargs="+", default=[], metavar="OURS=THEIRS",
             help="table: columns with other names, such as user_id=reviewer rating=stars")
    add.data("--fold", type=at_least(1), default=1, help="nete: which of the published splits")
    add.data("--download", nargs="?", const="", metavar="URL",
             help="first fetch what is not in --raw yet (Amazon 2014, MovieLens); URL: folder of a mirror")
    add.data("--max-bad", type=at_least(0, float, at_most=1), default=0.01,
             help="Amazon, Yelp: share of bad lines above which a file is refused")
    add.data("--max-line", type=at_least(1), default=16, help="longest line of a text file, in MiB")
    add.data("--max-ratio", type=at_least(1), default=200, help="largest factor by which gzip files expand")
    add.method("--min-interactions", type=at_least(1), default=4, help="drop users and items with fewer")
    add.method("--threshold", type=at_least(-1e30, float), default=3,
               help="a rating above this is a positive label")
    add.method("--split", choices=SPLITS, help="see above (default: random; nete: published)")
    add.method("--split-seed", type=at_least(0), help="of a split that is drawn (default: --seed)")
    args = parser.parse_args(argv)
    args.split = args.split or ("published" if args.dataset == "nete" else "random")
    check_options(parser, args)
    args.split_seed = args.seed if args.split_seed is None else args.split_seed
    args.category = args.category or CATEGORIES.get(args.dataset)
    return args


def check_options(parser, args):
    """Refuse options that contradict each other or would change nothing."""
    if (args.raw is None) != (args.dataset == "planted"):
        advice = "draws its own data: leave --raw out" if args.raw else "needs --raw DIR"
        parser.error(f"--dataset {args.dataset} {advice}")
    for name in changed_options(parser, args):
        chosen = {args.dataset, args.split, f"{args.dataset} {args.split}"}
        if name in BELONGS and chosen.isdisjoint(BELONGS[name]):
            parser.error(f"{option_name(name)} means nothing for --dataset {args.dataset} "
                         f"--split {args.split}: leave it out")
    if args.split == "published" and args.dataset not in ("nete", "table"):
        parser.error(f"--split published: {args.dataset} is published without one")
    if args.dataset == "amazon" and args.download is not None and not args.category:
        parser.error("--download needs --category, such as --category Digital_Music")


# ----------------------------------------------------------------------------------------------------------
# data: read, filter, index
# ----------------------------------------------------------------------------------------------------------


def load(args):
    """Interactions, items, users, and the interactions' review texts as a list of arrow arrays (or None). Ids
    of users and items are texts, in interactions categorical.
    """
    try:
        if args.download is not None:
            download(args)
        interactions, items, users = READERS[args.dataset](args)
    except OSError as error:
        advice = "; --download fetches what is missing" if args.dataset in BELONGS["download"] else ""
        fail(f"--raw {args.raw} cannot be read: {error}{advice}")
    users = pd.DataFrame({"user_id": interactions["user_id"].unique()}) if users is None else users
    for column in users.columns[users.dtypes == object]:  # of mixed types, which parquet does not have
        users[column] = users[column].map(str, na_action="ignore")
    if "age" in users and (is_bad := users["age"].map(is_no_age)).any():
        warn(f"{int(is_bad.sum()):,} ages of users are dates, years or no number from 0 to 120, the first of "
             f"them {str(users['age'][is_bad].iloc[0])!r}: they are left out")
        users["age"] = users["age"].mask(is_bad)
    for frame in (interactions, items, users):
        for column in frame.columns.intersection(["user_id", "item_id"]):
            if frame[column].dtype != "category":
                frame[column] = frame[column].astype(str)
    interactions = interactions.reset_index(drop=True).astype({"user_id": "category", "item_id": "category"})
    if args.dataset != "nete":  # a table's own column of this name is another thing
        interactions = interactions.drop(columns="feature", errors="ignore")
    if "review" not in interactions:
        return interactions, items, users, None
    reviews = pa.Table.from_pandas(interactions[["review"]], preserve_index=False)["review"]
    return interactions.drop(columns="review"), items, users, reviews.cast(pa.large_string()).chunks


def keep_latest(interactions):
    """Of rows with the same user and item the latest, of equal times the last; rows stay in order."""
    pair = ["user_id", "item_id"]
    repeated = interactions[interactions.duplicated(pair, keep=False)].sort_values("timestamp", kind="stable")
    if num_equal := int(repeated.duplicated([*pair, "timestamp"]).sum()):
        warn(f"{num_equal:,} rows repeat another's user, item and time; the last is kept")
    return interactions.drop(index=repeated.index[repeated.duplicated(pair, keep="last")])


def keep_core(interactions, min_interactions):
    """Drop users and items with fewer rows until none is left (a k-core); rows stay in order."""
    users, items = (pd.factorize(interactions[name])[0] for name in ("user_id", "item_id"))  # [R], [R]
    keep, num_kept = np.ones(len(users), dtype=bool), None
    while num_kept != keep.sum():
        num_kept = keep.sum()
        for ids in (users, items):
            counts = np.bincount(ids[keep], minlength=len(ids))
            keep &= counts[ids] >= min_interactions
    return interactions[keep]


def index_ids(interactions, *listed):
    """Published ids become user 0..N-1 and item 0..M-1, sorted. listed: users, items -> interactions, the
    first row of each user and item (empty if it has none), counts.

    Interactions are sorted by user and time, ties in the order of the file; their index keeps the file's row.
    """
    table = interactions.drop(columns=["user_id", "item_id"])
    table = table.astype({"rating": "float32", "timestamp": "int64"})
    counts, frames = {}, []
    for kind, frame in zip(("user", "item"), listed):
        key = f"{kind}_id"
        ids = pd.Index(sorted(interactions[key].unique()), name=key)
        table[kind] = interactions[key].astype("category").cat.set_categories(ids).cat.codes.astype("int64")
        if kind in frame:
            print(f"the column {kind} of {kind}s is left out: {kind} is our own number of each")
        first = frame.drop(columns=kind, errors="ignore").drop_duplicates(key).set_index(key)
        counts[f"{kind}s_listed_twice"] = len(frame) - len(first)
        counts[f"{kind}s_not_listed"] = len(ids.difference(first.index))
        frames.append(first.reindex(ids).reset_index())
        frames[-1].insert(0, kind, np.arange(len(ids)))
    return table.iloc[np.lexsort((table["timestamp"], table["user"]))], *frames, counts


# ----------------------------------------------------------------------------------------------------------
# splits
# ----------------------------------------------------------------------------------------------------------


def draw_split(name, table, seed):
    """table, sorted by user and time -> split of each row, an array of texts [R]"""
    rng, split = np.random.default_rng([seed, 2]), np.full(len(table), "train", dtype=object)
    size = table.groupby("user")["user"].transform("size").to_numpy()  # of the row's user
    num_earlier = table.groupby("user").cumcount().to_numpy()  # rows of the same user
    if name == "random":
        order, tenth = rng.permutation(len(table)), round(len(table) / 10)
        split[order[:tenth]], split[order[tenth:2 * tenth]] = "test", "valid"
    elif name == "temporal":
        num_left, tenth = size - num_earlier, np.maximum(1, np.round(size / 10))
        split[(num_left <= 2 * tenth) & (size > 2)] = "valid"
        split[(num_left <= tenth) & (size > 1)] = "test"  # a single row is train
    else:  # cold-user, cold-item
        key = name.removeprefix("cold-")
        ids = rng.permutation(table[key].max() + 1)
        is_cold = table[key].isin(ids[:max(1, round(len(ids) / 10))]).to_numpy()
        is_support = (num_earlier < size // 2) & (key == "user")  # no row of a cold item is evidence
        split[is_cold] = np.where(is_support, "support", "test")[is_cold]
        warm = rng.permutation(np.flatnonzero(~is_cold))
        split[warm[:round(len(warm) / 9)]] = "valid"
    return split


def add_split(args, table):
    """Set the column `split`, in place -> facts: rows per split, users and items without a train row."""
    if args.split == "temporal" and table["timestamp"].nunique() < 2:
        fail(f"--split temporal: all rows of {args.raw} have the same time; choose another split")
    if args.split != "published":
        table["split"] = draw_split(args.split, table, args.split_seed)
    elif num_repeated := int(table.duplicated(["user", "item"]).sum()):
        num_splits = table.groupby(["user", "item"])["split"].nunique()
        warn(f"{num_repeated:,} rows repeat a (user, item) of the published split, which keeps them; "
             f"{int((num_splits > 1).sum()):,} pairs stand in two of its parts")
    num_rows = table["split"].value_counts()
    if missing := [name for name in ("train", "valid", "test") if name not in num_rows]:
        fail(f"--split {args.split} leaves no {missing[0]} row among {len(table):,}: take more data")
    trained = table[table["split"] == "train"]
    held_out = table[table["split"].isin(["valid", "test"])]
    no_user, no_item = (~held_out[name].isin(trained[name]) for name in ("user", "item"))
    return {"untrained": {"users": int(held_out.loc[no_user, "user"].nunique()),
                          "items": int(held_out.loc[no_item, "item"].nunique()),
                          "rows": int((no_user | no_item).sum())},
            "rows_of_split": {name: int(num_rows[name]) for name in ("train", "valid", "test", "support")
                              if name in num_rows}}


# ----------------------------------------------------------------------------------------------------------
# report and write
# ----------------------------------------------------------------------------------------------------------


def report(args, facts):
    """Print what was read and dropped, the row of the paper's table 1, and the split."""
    counts = [f"{facts[name]:,} {name.replace('_', ' ')}" for name in COUNTS if facts[name]]
    print(", ".join([f"read {facts['rows_read']:,} interactions", *counts]))
    if facts["first_junk_price"]:
        print(f"prices that are no number of dollars, the first of them: {facts['first_junk_price']!r}")
    if facts["first_cut_title"]:
        before, after = facts["first_cut_title"]
        print(f"titles are cut where they hold HTML or scripts; the first: {before!r} is now {after!r}")
    print("| data | interactions | users | items | sparsity (%) | positive labels | base-rate logloss |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {facts['dataset']} | {facts['interactions']:,} | {facts['users']:,} | {facts['items']:,} | "
          f"{facts['sparsity_percent']:.2f} | {facts['positive_share']:.3f} | "
          f"{facts['base_rate_logloss']:.4f} |")
    rows = ", ".join(f"{count:,} {name}" for name, count in facts["rows_of_split"].items())
    print(f"split {args.split}: {rows}")
    counts = facts["untrained"]
    print(f"{counts['rows']:,} rows of valid and test have a user or an item without a train row: "
          f"{counts['users']:,} users, {counts['items']:,} items")
    if "bayes_ari" in facts:
        ceilings = "  ".join(f"{name} {ari:.3f}" for name, ari in facts["bayes_ari"].items())
        seen = "train and support" if args.split == "cold-user" else "train"
        print(f"Bayes-optimal ARI from the {seen} items: {ceilings}")


def take_texts(chunks, rows):
    """The review texts of `rows` (positions in all chunks together), in that order: an arrow array."""
    # a take from all chunks at once would first copy all of them into one
    order = np.argsort(rows, kind="stable")
    starts = np.cumsum([0, *map(len, chunks)])
    bounds = np.searchsorted(rows[order], starts)
    parts = [chunk.take(pa.array(rows[order[low:high]] - start))
             for chunk, start, low, high in zip(chunks, starts, bounds, bounds[1:]) if low < high]
    return pa.concat_arrays(parts).take(pa.array(np.argsort(order)))


def row_groups(table, reviews, size=1 << 16):
    """The rows of interactions.parquet as arrow tables of `size` rows: texts are never copied all at once."""
    for start in range(0, len(table), size):
        part = table.iloc[start:start + size]
        columns = {name: pa.array(part[name].to_numpy())
                   for name in ("user", "item", "rating", "label", "timestamp", "split")}
        columns["review"] = take_texts(reviews, part.index.to_numpy()) if reviews else \
            pa.nulls(len(part), pa.large_string())
        if "feature" in part:  # of NETE's reviews
            columns["feature"] = pa.array(part["feature"], pa.large_string(), from_pandas=True)
        yield pa.table(columns)


def main(args):
    start_stage(args)
    started = time.time()
    WARNINGS.clear()
    interactions, items, users, reviews = load(args)
    read = time.time()
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
    listed = items["item_id"].iloc[0] if len(items) else ""
    table, users, items, counts = index_ids(interactions, users, items)
    del interactions  # may be large
    if counts["items_not_listed"] == len(items):
        fail(f"not one of the {len(items):,} items is in the items file: interactions have ids such as "
             f"{items['item_id'].iloc[0]!r}, items such as {listed!r}")
    items, counts_of_items = clean_items(items)
    counts |= counts_of_items
    if counts["untitled_items"] > len(items) / 2:
        warn(f"{counts['untitled_items']:,} of {len(items):,} items have no title: an LLM reads their ids")
    table["label"] = (table["rating"] > args.threshold).astype("int8")
    if table["label"].nunique() < 2:
        fail(f"all ratings ({table['rating'].min():g} to {table['rating'].max():g}) are on one side of "
             f"--threshold {args.threshold:g}: choose another")
    positive = float(table["label"].mean())
    facts |= {"interactions": len(table), "users": len(users), "items": len(items),
              "sparsity_percent": round(100 * (1 - len(table) / (len(users) * len(items))), 2),
              "positive_share": positive, "base_rate_logloss": logloss(table["label"], positive)}
    facts |= counts
    facts |= {"split": args.split, "split_seed": args.fold if args.split == "published" else args.split_seed}
    facts |= add_split(args, table)
    if args.dataset == "planted":
        facts["bayes_ari"] = bayes_ari(args.seed, table, items, users)
    report(args, facts)

    facts["warnings"] = WARNINGS
    row = json.dumps(facts, indent=2) + "\n"  # without seconds: the same run gives the same bits
    facts |= {"seconds": time.time() - started,
              "seconds_of": {"read": read - started, "filter and split": time.time() - read}}
    artifacts = {"interactions.parquet": row_groups(table, reviews), "users.parquet": users,
                 "items.parquet": items}  # the first gives the run its digest
    for name, content in artifacts.items():
        write_artifact(args, name, content, **facts)
    write_artifact(args, "prepare.json", row, inputs=list(artifacts))
    print(f"wrote {args.run_dir}/interactions.parquet: {len(table):,} rows, {len(users):,} users, "
          f"{len(items):,} items | base-rate logloss {facts['base_rate_logloss']:.4f}")


if __name__ == "__main__":
    run_program(main, parse_args)
