"""Users who arrive later: their table, and their profiles by what a run of the score method has fitted."""

import csv
import functools

import numpy as np
import pandas as pd
import torch

from userip.artifacts import fail, read_artifacts, read_sidecar
from userip.evidence import Events, incidence
from userip.score import user_steps


def _read_table(path, columns):
    """The table of --only-users with these columns, at least one row, and a user_id in each"""
    read = pd.read_parquet if path.suffix == ".parquet" else functools.partial(
        pd.read_csv, sep=None, engine="python", dtype={"user_id": str, "item_id": str}, keep_default_na=False)
    try:
        table = read(path) if path.stat().st_size else ()
        if not len(table):
            raise ValueError("it holds no rows")
    except (OSError, ValueError, ImportError, csv.Error) as error:
        fail(f"--only-users {path}: {str(error).splitlines()[0]}; give a table (csv, tsv, parquet) of user_id, "
             f"item_id and, where the run reads ratings, rating")
    if missing := [name for name in columns if name not in table]:
        fail(f"--only-users {path} has no column {missing[0]}; it needs {', '.join(columns)}")
    is_nameless = table["user_id"].isna() | (table["user_id"].astype(str).str.strip() == "")
    if is_nameless.any():
        fail(f"--only-users {path}: {int(is_nameless.sum())} of {len(table)} rows have no user_id")
    return table.drop_duplicates(["user_id", "item_id"], keep="last")


def _rating_levels(args, ratings, words):
    """The run's rating level of each row: int64 [rows]"""
    rating = pd.to_numeric(ratings, errors="coerce").to_numpy(dtype=float)
    if not np.isfinite(rating).all():
        invalid = ratings[~np.isfinite(rating)]
        fail(f"--only-users {args.only_users}: {len(invalid)} of {len(ratings)} rows have no number as "
             f"rating, the first of them {str(invalid.iloc[0])!r}")
    if words[-1] == "liked":
        threshold = read_sidecar(args, "interactions.parquet")["options"]["threshold"]
        return (rating > threshold).astype(np.int64)
    stars = np.array([float(word.split()[-1]) for word in words])
    return np.abs(rating[:, None] - stars).argmin(1)


def read_new_users(args, words, items):
    """The rows of --only-users' table with items of the run, as Events, and the users' ids: list of N' texts

    words: the run's words for rating levels; [""] where it does not read ratings.
    """
    columns = ["user_id", "item_id", *["rating"] * (len(words) > 1)]
    table = _read_table(args.only_users, columns)
    item_number = pd.Series(items["item"].to_numpy(), index=items["item_id"].astype(str))
    item = item_number.reindex(table["item_id"].astype(str)).to_numpy()
    user, user_ids = pd.factorize(table["user_id"].astype(str), sort=True)
    level = np.zeros(len(table), dtype=np.int64)
    if len(words) > 1:
        level = _rating_levels(args, table["rating"], words)
    is_known = np.isfinite(item)
    if not is_known.all():
        print(f"{int((~is_known).sum())} of {len(table)} rows are left out, of items that the run does not "
              f"know, the first of them {str(table['item_id'][~is_known].iloc[0])!r}")
    user, item, level = (torch.tensor(column[is_known].astype(np.int64)) for column in (user, item, level))
    no_row = torch.full_like(item, -1)
    return Events(user, item, level, no_row, no_row), list(user_ids)


def new_by_score(args):
    """New users by scores.pt: a sparse sum each, the same bits as in the run itself, and no LLM.

    -> profiles [N', P, S D], number of texts that are evidence of them [N', P], user ids, number of rows
    """
    fitted, _, items = read_artifacts(args, "scores.pt", "profiles.pt", "items.parquet")
    events, user_ids = read_new_users(args, fitted["words"], items)
    sums, counts = [], []
    for table, is_scored, num_levels in zip(fitted["tables"], fitted["told"], fitted["num_verdicts"]):
        text = events.item * num_levels + (events.level if num_levels > 1 else 0)
        has_score = is_scored[text]
        user_texts = incidence(events.user[has_score], text[has_score], (len(user_ids), len(table)))
        sums.append(torch.from_numpy(user_texts @ table.double().numpy()).float())
        counts.append(torch.bincount(events.user[has_score], minlength=len(user_ids)).float())
    sums, counts = torch.stack(sums, 1), torch.stack(counts, 1)
    profiles = fitted["shared"] + user_steps(sums, counts, fitted["pull"], fitted["lift"])
    return profiles, counts.long(), user_ids, len(events.item)
