"""Users who arrive later: their table, and their profiles by scores.pt: a sparse sum each, and no LLM."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from userip.artifacts import fail, read_artifacts, read_sidecar, write_artifact
from userip.rating_means import user_habits
from userip.score import incidence, user_steps
from userip.tables import read_frame

LIMITS = SimpleNamespace(max_line=16, max_ratio=200)  # as stage 1's defaults


def read_new_users(args, items, interactions=None):
    """The rows of --only-users' table with items of the run, a frame of user, item, label, the rating level,
    and, after --ratings, for which interactions stands, rating; the users' ids, list of N' texts
    """
    has_ratings = interactions is not None
    table = read_frame(args.only_users, ["user_id", "item_id", *["rating"] * has_ratings], LIMITS)
    if "timestamp" in table:
        table = table.sort_values("timestamp", kind="stable")
    is_older = table.duplicated(["user_id", "item_id"], keep="last")
    if is_older.any():
        print(f"{int(is_older.sum())} rows repeat a user and an item: the last one counts"
              + ", in the order of the file" * ("timestamp" not in table))
    table = table[~is_older]
    item_number = pd.Series(items["item"].to_numpy(), index=items["item_id"].astype(str))
    item = item_number.reindex(table["item_id"]).to_numpy()
    user, user_ids = pd.factorize(table["user_id"], sort=True)
    rows = pd.DataFrame({"user": user, "item": item, "label": 0})
    if has_ratings:
        least, most = interactions["rating"].min(), interactions["rating"].max()
        is_odd = ~table["rating"].between(least, most)
        if is_odd.any():
            fail(f"{args.only_users}: {int(is_odd.sum())} of {len(table)} ratings are not on the scale of the"
                 f" run, {least:g} to {most:g}, the first of them {table['rating'][is_odd].iloc[0]:g}")
        threshold = read_sidecar(args, "interactions.parquet")["options"].get("threshold")
        if threshold is None:
            fail(f"{args.run_dir}/interactions.parquet.json does not say --threshold: run stage 1 again")
        rows["rating"] = table["rating"].to_numpy()
        rows["label"] = (rows["rating"] > threshold).astype(int)
    is_again = np.isin(user_ids, read_artifacts(args, "users.parquet")[0]["user_id"])
    if is_again.any():
        print(f"{int(is_again.sum())} of {len(user_ids)} users are in the run already, the first of them "
              f"{user_ids[is_again][0]!r}: their profiles here are of these rows alone")
    is_known = np.isfinite(item)
    if not is_known.all():
        print(f"{int((~is_known).sum())} of {len(table)} rows are left out, of items that the run does not "
              f"know, the first of them {table['item_id'][~is_known].iloc[0]!r}; its own are such as "
              f"{items['item_id'].iloc[0]!r}")
    return rows[is_known].astype({"item": np.int64}), list(user_ids)


def infer_new_users(args):
    """Write the profiles of new users, the same bits as in the run itself, as new_profiles.pt."""
    options = read_sidecar(args, "profiles.pt")["options"]
    for kind, is_meant in (("a round of EM (--prior)", options.get("prior")),
                           ("--evidence review", options.get("evidence") == "review"),
                           ("--method gradient", options.get("method") == "gradient")):
        if is_meant:
            fail(f"--only-users: {args.run_dir}/profiles.pt is of {kind}, which cannot place new users: run "
                 f"stages 2 and 3 without it")
    has_ratings, inputs = options.get("ratings", False), ["scores.pt", "items.parquet"]
    inputs += ["interactions.parquet"] * has_ratings
    fitted, items, *interactions, _ = read_artifacts(args, *inputs, "profiles.pt")
    rows, user_ids = read_new_users(args, items, *interactions)
    user, item, level = (torch.tensor(rows[name].to_numpy()) for name in ("user", "item", "label"))
    sums, counts = [], []
    for table, is_scored, num_levels in zip(fitted["tables"], fitted["told"], fitted["num_verdicts"]):
        text = item * num_levels + level % num_levels
        has_score = is_scored[text]
        user_texts, count = incidence(user[has_score], text[has_score], (len(user_ids), len(table)))
        sums.append(torch.from_numpy(user_texts @ table.double().numpy()).float())
        counts.append(count)
    sums, counts = torch.stack(sums, 1), torch.stack(counts, 1)  # [N', P, C], [N', P]
    profiles = fitted["shared"] + user_steps(sums, counts, fitted["pull"], fitted["lift"])
    has_evidence = (counts > 0).any(1)
    tensors = {"profiles": profiles, "user_id": user_ids, "num_evidence": counts.long(),
               "names": fitted["names"], "has_evidence": has_evidence}
    if has_ratings:  # the same means of items as in the run, so the same habits
        train = interactions[0][interactions[0]["split"] == "train"]
        num_users = int(train["user"].max()) + 1
        rows = rows.assign(user=rows["user"] + num_users).astype({"rating": train["rating"].dtype})
        habits = user_habits(train, rows, num_users + len(user_ids), len(items))
        tensors["habits"] = torch.from_numpy(habits[num_users:]).float()
    path = write_artifact(args, "new_profiles.pt", tensors, inputs, users=len(user_ids))
    print(f"wrote {path}: {len(user_ids):,} new users, {int(has_evidence.sum()):,} of them "
          f"with evidence among {len(item):,} rows of items that the run knows")
