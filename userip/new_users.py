"""Users who arrive later: their table, and their profiles by what the run has fitted."""

import csv
import functools
import hashlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from userip.artifacts import fail, lock, read_artifacts, read_sidecar, write_artifact
from userip.cost import tokens_that_fit
from userip.evidence import Evidence, Events, incidence
from userip.llm import tiny_stamp
from userip.score import Shared, user_steps
from userip.setup import set_up
from userip.texts import FIELDS


def _read_table(path, columns):
    """The table of --only-users with these columns, at least one row, and a user_id in each"""
    read = pd.read_parquet if path.suffix == ".parquet" else functools.partial(
        pd.read_csv, sep=None, engine="python", dtype={"user_id": str, "item_id": str}, keep_default_na=False)
    try:
        table = read(path) if path.stat().st_size else ()
        if not len(table):
            raise ValueError("it holds no rows")
    except (OSError, ValueError, ImportError, csv.Error) as error:
        fail(f"--only-users {path}: {str(error).splitlines()[0]}; give a table (csv, tsv, parquet) of "
             f"user_id, item_id and, where the run reads ratings, rating")
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


def new_by_gradient(args, sidecar, infer_new_user):
    """The same by the run's AdamW steps from its θ̄; sidecar: that of profiles.pt.

    One user after the other, so that a profile has the same bits in any company; in the run's blocks it
    differs by the order of sums. A random start is drawn for the user's id. A history is in the order of the
    table. infer_new_user: see stage 2.
    """
    options = SimpleNamespace(**sidecar["options"] | {"run_dir": args.run_dir, "only_users": args.only_users})
    stored, interactions, items = read_artifacts(args, "profiles.pt", "interactions.parquet", "items.parquet")
    options.llm = stored["llm"]
    if options.llm == "tiny" and tiny_stamp(args.run_dir) != stored["tiny_llm"]:
        fail(f"--only-users: {args.run_dir}/tiny_llm is not the LLM that {args.run_dir}/profiles.pt was "
             f"inferred with: run stage 2 again")
    run = set_up(options, interactions, items, len(stored["has_evidence"]))
    options.tokens_per_batch = tokens_that_fit(run.prompt)
    events, user_ids = read_new_users(args, run.observed.words, items)
    evidence = Evidence(options, run.evidence[-1].tokenizer, run.routes, events, len(user_ids))
    weights = torch.tensor([sidecar["field_weights"][field] for field in FIELDS])
    shared = Shared(stored["shared"], weights, {}, stored["noise"], [])
    profiles = stored["shared"].repeat(len(user_ids), 1, 1)  # a user without a text stays at θ̄
    for user in tqdm(events.user.unique().tolist(), desc="new users", unit="user", mininterval=2):
        texts = evidence.of_users(user, user + 1)
        for route, pairs in texts:
            if len(pairs.text):
                run.prompt.check_context(route.texts.length[pairs.text], f"new user {user_ids[user]}: text",
                                         "give fewer rows of this user")
        if any(len(pairs.text) for _, pairs in texts):
            number = int.from_bytes(hashlib.sha256(user_ids[user].encode()).digest()[:7], "big")
            profiles[user] = infer_new_user(run, shared, texts, number, sidecar)
    return profiles, evidence.counts(), user_ids, len(events.item)


def infer_new_users(args, infer_new_user):
    """--only-users: write the profiles of new users, from what the run has fitted, as new_profiles.pt

    infer_new_user: the gradient method for one user (see stage 2).
    """
    sidecar, locked = read_sidecar(args, "profiles.pt"), lock(args.run_dir)
    options = sidecar["options"]
    if options["prior"] or options["evidence"] == "review":
        kind = "a round of EM (--prior)" if options["prior"] else "--evidence review"
        fail(f"--only-users: {args.run_dir}/profiles.pt is of {kind}, which no table of items repeats: run "
             f"stages 2 and 3 without it")
    if options["method"] == "score":
        inputs = ["scores.pt", "items.parquet"]
        profiles, counts, user_ids, num_rows = new_by_score(args)
    else:
        inputs = ["profiles.pt", "interactions.parquet", "items.parquet"]
        profiles, counts, user_ids, num_rows = new_by_gradient(args, sidecar, infer_new_user)
    has_evidence = (counts > 0).any(1)
    tensors = {"profiles": profiles, "user_id": user_ids, "num_evidence": counts, "names": sidecar["names"],
               "has_evidence": has_evidence}
    path = write_artifact(args, "new_profiles.pt", tensors, inputs, users=len(user_ids))
    print(f"wrote {path}: {len(user_ids):,} new users, {int(has_evidence.sum()):,} of them "
          f"with evidence among {num_rows:,} rows of items that the run knows")
    locked.close()
