"""Readers of MovieLens and of tables as csv, tsv or parquet: raw files -> interactions, items, users.

Each reader takes the stage's options and returns three frames: interactions with user_id, item_id, rating,
timestamp (s), maybe review and split; items with item_id, title, maybe category, brand, price; users with
user_id and what is known of the user. A file that cannot be read exits with code 2.
"""

import zlib

import numpy as np
import pandas as pd

from userip.artifacts import fail
from userip.cleaning import to_seconds

INTERACTION_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
REQUIRED = {"interactions": INTERACTION_COLUMNS, "items": ["item_id", "title"], "users": ["user_id"]}
OPTIONAL = ["review", "split", "category", "brand", "price"]
ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")


def _to_numbers(frame, columns, path, first_line):
    """Make columns numbers, in place; exit code 2 with the line of the first that is none."""
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


def read_table(args):
    """A folder with interactions.*, items.* (and users.*, if any) as csv, tsv (both also .gz) or parquet."""
    names = _column_names(args.columns)
    frames, paths, unused = {}, {}, set(names)
    for kind, required in REQUIRED.items():
        candidates = [path for ending in ENDINGS if (path := args.raw / f"{kind}{ending}").exists()]
        if len(candidates) > 1:
            fail(f"{args.raw} holds {' and '.join(path.name for path in candidates)}: leave one of them")
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
        if kind == "interactions" and args.split == "published":
            required = [*required, "split"]
        if missing := [column for column in required if column not in frame]:
            fail(f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    if unused:
        fail(f"--columns: no file has a column {', '.join(unused)}")
    print("reading " + ", ".join(map(str, paths.values())))
    interactions, path = frames["interactions"], paths["interactions"]
    _to_numbers(interactions, ["rating", "timestamp"], path, first_line=2)
    interactions["timestamp"] = to_seconds(interactions["timestamp"])
    if args.split == "published":
        interactions["split"] = interactions["split"].replace("validation", "valid")
        if unknown := set(interactions["split"].dropna()) - {"train", "valid", "test", "support"}:
            fail(f"{path}: {', '.join(map(str, unknown))} is no split; it must be train, valid, test or "
                 f"support")
    elif "split" in interactions:
        print(f"the column split is not used: --split is {args.split}, not published")
    return interactions, frames["items"], frames["users"]


def _column_names(pairs):
    """--columns: ["ours=theirs", …] -> {theirs: ours}"""
    names = {theirs: ours for ours, _, theirs in (pair.partition("=") for pair in pairs)}
    allowed = {*OPTIONAL, *(name for columns in REQUIRED.values() for name in columns)}
    if "" in names or not allowed.issuperset(names.values()):
        fail(f"--columns {' '.join(pairs)}: each must be OURS=THEIRS, such as rating=stars; ours is one of "
             f"{', '.join(sorted(allowed))}")
    return names


def _read_frame(path):
    """A csv, tsv (also .gz) or parquet file as a frame of at least one row; all columns of a csv as text."""
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if ".tsv" in path.suffixes else ",", dtype=str,
                                keep_default_na=False, na_values=[""])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        # broken gzip, not parquet, not the encoding, not csv, empty
        fail(f"{path} cannot be read ({error}): download or export it again")
    if frame.empty:
        fail(f"{path} has no rows: download or export it again")
    return frame
