"""Stage 1 of 5: turn raw interactions into one filtered, labelled, split table that all later stages use.

Users and items with fewer than 4 interactions are dropped until none is left (paper, section 3.2), a rating
above 3 is a positive label, duplicates of (user, item) are kept once (the latest), and a random 8:1:1 split
is drawn once, here. `planted` needs no data: it draws users with a true hobby and background, items that
reflect them, and interactions caused by them, so that the later stages can say how much of the truth they
found.

Reads   --raw DIR: ml-100k (u.data, u.item, u.user) or table (interactions.* and items.* as csv, csv.gz,
        parquet)
Writes  interactions.parquet  user, item int64, rating float32, label int8, timestamp int64 (s), split, review
        items.parquet         item, item_id, title, category, brand, price (dollars)
        users.parquet         user, user_id, and what is known of the user, for checking only

Example: python 01_prepare.py        (2 seconds)
  wrote runs/demo/interactions.parquet: 34,213 rows, 1,975 users, 600 items | base-rate logloss 0.6674
"""

import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score

from common import at_least, fail, logloss, stage_parser, start_stage, write_artifact

INTERACTION_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
ITEM_COLUMNS = ["item_id", "title"]
OPTIONAL_ITEM_COLUMNS = ["category", "brand", "price"]


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the split, and of the planted world")
    add("--dataset", choices=READERS, default="planted", help="what to read")
    add("--raw", type=Path, help="folder with the raw files (not for planted)")
    add("--min-interactions", type=at_least(1), default=4, help="drop users and items with fewer, iterated")
    add("--threshold", type=float, default=3, help="a rating above this is a positive label")
    args = parser.parse_args(argv)
    if (args.raw is None) != (args.dataset == "planted"):
        advice = "draws its own data: leave --raw out" if args.raw else "needs --raw DIR"
        parser.error(f"--dataset {args.dataset} {advice}")
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
    """Adjusted Rand index of the best possible classifier that sees the train rows' items: by profile name.

    It knows the generator: log p(h, b | train items) = log prior + Σ_i log p(i in or not in train | h, b),
    where an item is in train with probability share · (1 - exp(-activity p(i | h, b))); ratings are not used,
    as stage 2 does.
    """
    train = interactions[interactions["split"] == "train"]
    share = len(train) / len(interactions)
    user = users["user_id"].str[1:].astype(int).to_numpy()[train["user"]]
    item = items["item_id"].str[1:].astype(int).to_numpy()[train["item"]]
    activity, choice = world["activity"], world["choice"].reshape(12, -1)
    has = np.zeros((len(activity), choice.shape[1]), dtype=bool)
    has[user, item] = True
    log_posterior = np.empty((len(activity), 12))
    for cell, prior in enumerate(np.outer(HOBBY_SHARES, BACKGROUND_SHARES).ravel()):
        chance = share * -np.expm1(-activity[:, None] * choice[cell])  # [N, M]
        log_posterior[:, cell] = np.log(prior) + np.where(has, np.log(chance), np.log1p(-chance)).sum(1)
    posterior = np.exp(log_posterior - log_posterior.max(1, keepdims=True)).reshape(-1, 4, 3)
    kept = users["user_id"].str[1:].astype(int).to_numpy()
    return {"hobby": adjusted_rand_score(users["true_hobby"], posterior.sum(2).argmax(1)[kept]),
            "background": adjusted_rand_score(users["true_background"], posterior.sum(1).argmax(1)[kept])}


# ----------------------------------------------------------------------------------------------------------
# readers: each gives interactions (user_id, item_id, rating, timestamp, maybe review), items, users, and the
# planted world or None
# ----------------------------------------------------------------------------------------------------------


def read_frame(path, **options):
    """A csv, csv.gz or parquet file as a data frame of at least one row; every column of a csv as text."""
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
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


def read_ml_100k(args):
    """MovieLens-100k as published: u.data (tab), u.item (pipe, Latin-1, 19 genre flags), u.user."""
    data, item, user, genre = (args.raw / name for name in ("u.data", "u.item", "u.user", "u.genre"))
    interactions = read_frame(data, sep="\t", header=None, names=INTERACTION_COLUMNS)
    for column in ("rating", "timestamp"):
        interactions[column] = to_number(interactions, column, data, first_line=1)
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


def read_table(args):
    """A folder with interactions.* and items.* (and users.*, if any) as csv, csv.gz or parquet."""
    paths = {}
    for name in ("interactions", "items", "users"):
        found = [args.raw / f"{name}{ending}" for ending in (".parquet", ".csv", ".csv.gz")]
        paths[name] = next((path for path in found if path.exists()), None)
        if paths[name] is None and name != "users":
            fail(f"{args.raw} holds no {name}.csv, {name}.csv.gz or {name}.parquet")
    interactions, items = read_frame(paths["interactions"]), read_frame(paths["items"])
    need_columns(interactions, INTERACTION_COLUMNS, paths["interactions"])
    need_columns(items, ITEM_COLUMNS, paths["items"])
    for column in ("rating", "timestamp"):
        interactions[column] = to_number(interactions, column, paths["interactions"], first_line=2)
    if "price" in items:
        price = pd.to_numeric(items["price"], errors="coerce")
        if junk := int((price.isna() & items["price"].notna()).sum()):
            print(f"{paths['items']}: {junk:,} prices are no bare numbers and count as missing")
        items["price"] = price
    users = pd.DataFrame({"user_id": interactions["user_id"].unique()})
    if paths["users"]:
        users = read_frame(paths["users"])
        need_columns(users, ["user_id"], paths["users"])
    return interactions, items, users, None


READERS = {"planted": read_planted, "ml-100k": read_ml_100k, "table": read_table}

# ----------------------------------------------------------------------------------------------------------
# filter, index, label, split
# ----------------------------------------------------------------------------------------------------------


def keep_core(interactions, min_interactions):
    """Drop users and items with fewer rows until none is left (a k-core); the order of rows stays."""
    while True:
        per_user = interactions.groupby("user_id")["item_id"].transform("size")
        per_item = interactions.groupby("item_id")["user_id"].transform("size")
        keep = (per_user >= min_interactions) & (per_item >= min_interactions)
        if keep.all():
            return interactions
        interactions = interactions[keep]


def tabulate(interactions, items, users):
    """Published ids become indices in [0, N) and [0, M): interactions, items, users as the artifacts hold."""
    user_ids, item_ids = sorted(interactions["user_id"].unique()), sorted(interactions["item_id"].unique())
    table = pd.DataFrame({
        "user": pd.Index(user_ids).get_indexer(interactions["user_id"]).astype("int64"),
        "item": pd.Index(item_ids).get_indexer(interactions["item_id"]).astype("int64"),
        "rating": interactions["rating"].astype("float32").to_numpy(),
        "timestamp": interactions["timestamp"].astype("int64").to_numpy(),
        "review": interactions["review"].to_numpy() if "review" in interactions else None,
    })
    table["review"] = table["review"].astype("string")
    table = table.sort_values(["user", "timestamp"], kind="stable", ignore_index=True)
    items = items.drop_duplicates("item_id").set_index("item_id").reindex(item_ids)
    untitled = items["title"].isna() | (items["title"].astype(str).str.strip() == "")
    titles = items["title"].where(~untitled, pd.Series(item_ids, index=item_ids))
    columns = {"title": titles.astype(str).str.split().str.join(" ")}
    for name in OPTIONAL_ITEM_COLUMNS:
        columns[name] = items[name] if name in items else pd.Series(index=items.index, dtype="object")
        columns[name] = columns[name].astype("float64" if name == "price" else "string")
    items = pd.DataFrame({"item": np.arange(len(item_ids)), "item_id": item_ids,
                          **{name: column.to_numpy() for name, column in columns.items()}})
    users = users.drop_duplicates("user_id").set_index("user_id").reindex(user_ids).reset_index()
    users.insert(0, "user", np.arange(len(user_ids)))
    return table, items, users, int(untitled.sum())


def split_random(num_rows, seed):
    """8:1:1 per interaction: array of "train", "valid", "test" [num_rows]."""
    order = np.random.default_rng([seed, 2]).permutation(num_rows)
    split = np.full(num_rows, "train", dtype=object)
    tenth = round(num_rows / 10)
    split[order[:tenth]], split[order[tenth:2 * tenth]] = "test", "valid"
    return split


def main(args):
    start_stage(args)
    started = time.time()
    if args.raw and not args.raw.is_dir():
        fail(f"--raw {args.raw}: no such folder")
    interactions, items, users, world = READERS[args.dataset](args)
    num_read = len(interactions)
    for frame in (interactions, items, users):
        for column in frame.columns.intersection(["user_id", "item_id"]):
            num_missing = int(frame[column].isna().sum())
            if num_missing:
                fail(f"{num_missing} rows have no {column} in {args.raw}: fill or drop them")
            frame[column] = frame[column].astype(str)

    latest = interactions.sort_values("timestamp", kind="stable")
    latest = latest.drop_duplicates(["user_id", "item_id"], keep="last")
    interactions = keep_core(interactions.loc[latest.index.sort_values()], args.min_interactions)
    if interactions.empty:
        fail(f"no user is left of {num_read:,} interactions after dropping users and items with fewer than "
             f"{args.min_interactions}: lower --min-interactions")
    interactions, items, users, num_untitled = tabulate(interactions, items, users)
    interactions.insert(3, "label", (interactions["rating"] > args.threshold).astype("int8"))
    interactions.insert(5, "split", split_random(len(interactions), args.seed))

    if interactions["label"].nunique() < 2:
        low, high = interactions["rating"].min(), interactions["rating"].max()
        fail(f"all ratings ({low:g} to {high:g}) are on one side of --threshold {args.threshold:g}: choose "
             f"another")

    num_rows, num_users, num_items = len(interactions), len(users), len(items)
    positive = float(interactions["label"].mean())
    facts = {"dataset": args.dataset, "interactions": num_rows, "users": num_users, "items": num_items,
             "sparsity_percent": round(100 * (1 - num_rows / (num_users * num_items)), 2),
             "positive_share": positive, "base_rate_logloss": logloss(interactions["label"], positive),
             "rows_read": num_read, "duplicates": num_read - len(latest), "untitled_items": num_untitled}
    if world:
        facts["bayes_ari"] = bayes_ari(world, interactions, items, users)
    print(f"read {num_read:,} interactions; {facts['duplicates']:,} duplicates of (user, item) dropped; "
          f"{num_untitled:,} items without a title, or not in the items file, keep their id as title")
    print("| data | interactions | users | items | sparsity (%) | positive labels | "
          "logloss of predicting it |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {args.dataset} | {num_rows:,} | {num_users:,} | {num_items:,} | "
          f"{facts['sparsity_percent']:.2f} | {positive:.3f} | {facts['base_rate_logloss']:.4f} |")
    if world:
        ceilings = "  ".join(f"{name} {value:.3f}" for name, value in facts["bayes_ari"].items())
        print(f"Bayes-optimal ARI from the train items: {ceilings}")

    facts["seconds"] = time.time() - started
    for name, frame in (("users", users), ("items", items), ("interactions", interactions)):
        path = write_artifact(args, f"{name}.parquet", frame, **facts)
    print(f"wrote {path}: {num_rows:,} rows, {num_users:,} users, {num_items:,} items | "
          f"base-rate logloss {facts['base_rate_logloss']:.4f}")


if __name__ == "__main__":
    main(parse_args())
