"""Readers of MovieLens and of tables as csv, tsv or parquet: raw files -> interactions, items, users.

Each reader takes the stage's options and returns three frames: interactions with user_id, item_id, rating,
timestamp (s), maybe review and split; items with item_id, title, maybe category, brand, price; users with
user_id and what is known of them. A file that cannot be read exits with code 2.
"""

import re
import zlib

import numpy as np
import pandas as pd

from userip.artifacts import fail, warn
from userip.cleaning import to_seconds

INTERACTION_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
REQUIRED = {"interactions": INTERACTION_COLUMNS, "items": ["item_id", "title"], "users": ["user_id"]}
OPTIONAL = ["review", "split", "category", "brand", "price"]
ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


def _to_numbers(frame, columns, path, first_line):
    """Make columns numbers, in place; the first text that is none is named with its line (row 0: first_line)."""
    for column in columns:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        is_bad = ~np.isfinite(numbers.to_numpy(dtype="float64", na_value=np.nan))
        if is_bad.any():
            row = int(is_bad.argmax())
            fail(f"{path}, line {row + first_line}: {column} {frame[column].iloc[row]!r} is not a number; "
                 f"mend or drop the line")
        frame[column] = numbers


# ----------------------------------------------------------------------------------------------------------
# MovieLens
# ----------------------------------------------------------------------------------------------------------


def movielens_folder(args, name):
    """The folder of a MovieLens file: --raw, or the folder in it that the published archive makes."""
    inner = args.raw / args.dataset
    return inner if not (args.raw / name).exists() and (inner / name).exists() else args.raw


def _read_movielens(path, columns, separator):
    """A file of MovieLens: Latin-1, no header -> a frame; numbers where they are computed with."""
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}): --raw must be the folder that holds it")
    rows = [[field or None for field in line.decode("latin-1").split(separator)] for line in lines]
    if not rows or any(len(row) != len(columns) for row in rows):
        fail(f"{path} is empty or has a line without {len(columns)} columns: is it MovieLens's?")
    frame = pd.DataFrame(rows, columns=columns)
    _to_numbers(frame, frame.columns.intersection(["rating", "timestamp", "age"]), path, first_line=1)
    return frame


def read_ml_100k(args):
    """MovieLens-100k as published: u.data (tab), u.item (pipe, 19 genre flags), u.user, u.genre."""
    folder = movielens_folder(args, "u.data")
    interactions = _read_movielens(folder / "u.data", INTERACTION_COLUMNS, "\t")
    info = folder / "u.info"  # "943 users\n1682 items\n100000 ratings"
    if info.exists() and (count := re.search(r"(\d+) ratings", info.read_text(errors="replace"))):
        if int(count[1]) != len(interactions):
            warn(f"{folder / 'u.data'} holds {len(interactions):,} ratings, but {info} says "
                 f"{int(count[1]):,}: is it whole?")
    genres = np.array(_read_movielens(folder / "u.genre", ["genre", "number"], "|")["genre"])
    columns = ["item_id", "title", "released", "video_released", "url", *genres]
    items = _read_movielens(folder / "u.item", columns, "|")
    items["category"] = [", ".join(genres[flags]) or None for flags in items[genres].to_numpy() == "1"]
    columns = ["user_id", "age", "gender", "occupation", "zip_code"]
    return interactions, items, _read_movielens(folder / "u.user", columns, "|")


def read_ml_1m(args):
    """MovieLens-1M as published: ratings.dat, movies.dat, users.dat, "::" between columns."""
    folder = movielens_folder(args, "ratings.dat")
    interactions = _read_movielens(folder / "ratings.dat", INTERACTION_COLUMNS, "::")
    items = _read_movielens(folder / "movies.dat", ["item_id", "title", "category"], "::")
    items["category"] = items["category"].str.replace("|", ", ")
    columns = ["user_id", "gender", "age", "occupation", "zip_code"]
    return interactions, items, _read_movielens(folder / "users.dat", columns, "::")


# ----------------------------------------------------------------------------------------------------------
# csv, tsv, parquet
# ----------------------------------------------------------------------------------------------------------


def _read_frame(path):
    """A csv, tsv (also .gz) or parquet file as a frame of at least one row; all columns of a csv as text."""
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", dtype=str,
                                keep_default_na=False, na_values=[""])
    except pd.errors.EmptyDataError:
        fail(f"{path} is empty: download or export it again")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # broken gzip, not parquet, not the encoding, not csv
        fail(f"{path} cannot be read ({error}): download or export it again")
    if frame.empty:
        fail(f"{path} has no rows: download or export it again")
    return frame


def _parse_columns(args):
    """--columns ours=theirs … -> {theirs: ours}"""
    typed = f"--columns {' '.join(args.columns)}"
    pairs = [pair.partition("=") for pair in args.columns]
    if any(not ours or not theirs for ours, _, theirs in pairs):
        fail(f"{typed}: each must be ours=theirs, such as rating=stars")
    names = {theirs: ours for ours, _, theirs in pairs}
    if unknown := set(names.values()) - {*OPTIONAL, *sum(REQUIRED.values(), [])}:
        fail(f"{typed}: {', '.join(sorted(unknown))} is none of our columns")
    return names


def read_table(args):
    """A folder with interactions.*, items.* (and users.*, if any) as csv, tsv (both also .gz) or parquet."""
    names, unused = _parse_columns(args), set(_parse_columns(args))
    frames, paths = {}, {}
    for kind, required in REQUIRED.items():
        candidates = [path for ending in ENDINGS if (path := args.raw / f"{kind}{ending}").exists()]
        if len(candidates) > 1:
            fail(f"{args.raw} holds {' and '.join(path.name for path in candidates)}: leave one of them there")
        if not candidates and kind == "users":
            frames[kind] = pd.DataFrame({"user_id": frames["interactions"]["user_id"].unique()})
            continue
        if not candidates:
            fail(f"{args.raw} holds no {' or '.join(kind + ending for ending in ENDINGS)}")
        path = paths[kind] = candidates[0]
        frame = _read_frame(path)
        for theirs, ours in names.items():
            if theirs in frame and ours in frame and ours not in names:
                fail(f"--columns {ours}={theirs}: {path} has a column {ours}, too")
        unused -= set(frame)
        frames[kind] = frame = frame.rename(columns=names)
        if missing := [column for column in required if column not in frame]:
            fail(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if unused:
        fail(f"--columns: no file has a column {', '.join(unused)}")
    print("reading " + ", ".join(map(str, paths.values())))
    interactions = frames["interactions"]
    _to_numbers(interactions, ["rating", "timestamp"], paths["interactions"], first_line=2)
    interactions["timestamp"] = to_seconds(interactions["timestamp"])
    _check_split(args, interactions, paths["interactions"])
    return interactions, frames["items"], frames["users"]


def _check_split(args, interactions, path):
    """With --split published the column `split` must hold names of splits."""
    if args.split != "published":
        if "split" in interactions:
            print(f"the column split is not used: --split is {args.split}, not published")
        return
    if "split" not in interactions:
        fail(f"{path} has no column split, which --split published needs")
    interactions["split"] = interactions["split"].replace("validation", "valid")
    if unknown := set(interactions["split"].dropna()) - {"train", "valid", "test", "support"}:
        fail(f"{path}: {', '.join(map(str, unknown))} is no split; it must be train, valid, test or support")
