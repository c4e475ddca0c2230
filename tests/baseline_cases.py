"""What tests of the scripts in baselines/ share: trained states, and a run with poisoned test rows."""

import argparse
import shutil

import pandas as pd
import torch

from conftest import write_interactions


def pieces_of(run_dir):
    """The trained states of all finished epochs, each as bytes: a set"""
    pieces = [torch.load(path, weights_only=True)["model"] for path in run_dir.glob("baselines/*/*.pt")]
    return {b"".join(state[key].numpy().tobytes() for key in sorted(state)) for state in pieces}


def poison(source, run_dir):
    """A copy of a run with other ratings and reviews in test rows, and other titles of items that only these
    have; how many such items there are
    """
    shutil.copytree(source, run_dir)
    rows, items = (pd.read_parquet(run_dir / f"{name}.parquet") for name in ("interactions", "items"))
    is_test = rows["split"] == "test"
    rows.loc[is_test, "rating"] = 6 - rows["rating"]
    rows["label"] = (rows["rating"] > 3).astype("int8")
    if rows["review"].notna().any():
        rows.loc[is_test, "review"] = "Poison. More of it."
    only_test = ~items["item"].isin(rows["item"][~is_test])
    items.loc[only_test, "title"] = "poison"
    items.to_parquet(run_dir / "items.parquet")
    write_interactions(argparse.Namespace(run_dir=run_dir, seed=0), rows)
    return int(only_test.sum())
