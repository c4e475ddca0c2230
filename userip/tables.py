"""Readers of MovieLens and of tables as csv, tsv or parquet: options of stage 1 -> three frames.

They are as in `userip.readers`, but of the columns only those that are REQUIRED must be there.
"""

import zlib

import numpy as np
import pandas as pd

from userip.artifacts import fail
from userip.cleaning import to_seconds

REQUIRED = {"interactions": ["user_id", "item_id", "rating", "timestamp"], "items": ["item_id", "title"],
            "users": ["user_id"]}
ALLOWED = {"review", "split", "category", "brand", "price"}.union(*REQUIRED.values())
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


def movielens_file(args, name):
    """The path of a file of MovieLens, in --raw or in the folder in it that the published archive makes."""
    inner = args.raw / args.dataset / name
    return inner if inner.exists() else args.raw / name


def _read_movielens(args, name, columns, separator):
    """A file of MovieLens: Latin-1, no header -> a frame; numbers where they are computed with."""
    path = movielens_file(args, name)
    rows = [[field or None for field in line.split(separator)]
            for line in path.read_text("latin-1").split("\n") if line.strip()]
    if not rows or any(len(row) != len(columns) for row in rows):
        fail(f"{path} is empty or has a line without {len(columns)} columns: is it MovieLens's?")
    frame = pd.DataFrame(rows, columns=columns)
    _to_numbers(frame, frame.columns.intersection(["rating", "timestamp", "age"]), path, first_line=1)
    return frame


def read_ml_100k(args):
    """MovieLens-100k as published: u.data (tab), u.item (pipe, 19 genre flags), u.user, u.genre."""
    interactions = _read_movielens(args, "u.data", REQUIRED["interactions"], "\t")
    genres = np.array(_read_movielens(args, "u.genre", ["genre", "number"], "|")["genre"])
    columns = ["item_id", "title", "released", "video_released", "url", *genres]
    items = _read_movielens(args, "u.item", columns, "|")
    items["category"] = [", ".join(genres[flags]) or None for flags in items[genres].to_numpy() == "1"]
    columns = ["user_id", "age", "gender", "occupation", "zip_code"]
    return interactions, items, _read_movielens(args, "u.user", columns, "|")


def read_ml_1m(args):
    """MovieLens-1M as published: ratings.dat, movies.dat, users.dat, "::" between columns."""
    interactions = _read_movielens(args, "ratings.dat", REQUIRED["interactions"], "::")
    items = _read_movielens(args, "movies.dat", ["item_id", "title", "category"], "::")
    items["category"] = items["category"].str.replace("|", ", ")
    columns = ["user_id", "gender", "age", "occupation", "zip_code"]
    return interactions, items, _read_movielens(args, "users.dat", columns, "::")


def read_table(args):
    """A folder with interactions.*, items.* (and users.*, if any) as csv, tsv (both also .gz) or parquet."""
    required = REQUIRED | {"interactions": REQUIRED["interactions"] + ["split"] * (args.split == "published")}
    names = {theirs: ours for ours, _, theirs in (pair.partition("=") for pair in args.columns)}
    if "" in names or not ALLOWED.issuperset(names.values()):
        fail(f"--columns {' '.join(args.columns)}: each must be OURS=THEIRS, such as rating=stars; ours is "
             f"one of {', '.join(sorted(ALLOWED))}")
    frames, unused = {}, set(names)
    for kind, columns in required.items():
        paths = [path for ending in ENDINGS if (path := args.raw / f"{kind}{ending}").exists()]
        if len(paths) > 1:
            fail(f"{args.raw} holds {' and '.join(path.name for path in paths)}: leave one of them")
        if not paths and kind == "users":
            continue
        if not paths:
            fail(f"{args.raw} holds no {' or '.join(kind + ending for ending in ENDINGS)}")
        print(f"reading {paths[0]}")
        frame = _read_frame(paths[0])
        unused -= set(frame)
        frames[kind] = frame = frame.rename(columns=names)
        if frame.columns.has_duplicates:
            fail(f"--columns: {paths[0]} then has two columns {frame.columns[frame.columns.duplicated()][0]}")
        if missing := [column for column in columns if column not in frame]:
            fail(f"{paths[0]} has no column {', '.join(missing)}; it has {', '.join(map(str, frame))}")
        if kind == "interactions":
            _to_numbers(frame, ["rating", "timestamp"], paths[0], first_line=2)
    if unused:
        fail(f"--columns: no file has a column {', '.join(unused)}")
    interactions = frames["interactions"]
    interactions["timestamp"] = to_seconds(interactions["timestamp"])
    if args.split == "published":
        interactions["split"] = interactions["split"].replace("validation", "valid")
        if unknown := set(interactions["split"].dropna()) - {"train", "valid", "test", "support"}:
            fail(f"{', '.join(map(str, unknown))} is no split; it must be train, valid, test or support")
    elif "split" in interactions:
        print(f"the column split is not used: --split is {args.split}, not published")
    return interactions, frames["items"], frames.get("users")


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
