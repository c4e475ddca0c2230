"""What tests of baselines/ share: runs of stage 1, poisoned test rows, finished pieces, naive metrics."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from conftest import run_stage, save_llm, write_table
from userip.artifacts import write_artifact
from userip.options import stage_parser


def prepared_run(folder, split="random"):
    """Stage 1 on a small table: the run's folder"""
    write_table(folder / "raw")
    run_stage("01_prepare.py", "--dataset", "table", "--raw", folder / "raw", "--run-dir", folder / "run",
              "--split", split)
    return folder / "run"


def finished_run(folder, script, kind, options):
    """Stage 1, with cold items, and a baseline with a saved LLM of this kind: (run directory, options)"""
    options = "--llm", save_llm(folder / "llm", kind), *options
    folder = prepared_run(folder, "cold-item")
    run_stage(script, "--run-dir", folder, *options)
    return folder, options


def poisoned(run, folder):
    """A copy of the run in which test rows have other ratings, and items only in test other titles"""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("baseline*"))
    frames = {name: pd.read_parquet(folder / f"{name}.parquet")
              for name in ("interactions", "items", "users")}
    table, items = frames["interactions"], frames["items"]
    is_test = table["split"] == "test"
    table.loc[is_test, "rating"] = 6 - table.loc[is_test, "rating"]
    table["label"] = (table["rating"] > 3).astype(table["label"].dtype)
    table.loc[is_test & table["review"].notna(), "review"] = "Poison. More of it."
    only_test = ~items["item"].isin(table.loc[~is_test, "item"])
    assert only_test.any() and is_test.any()
    items.loc[only_test, ["title", "category"]] = "poison poison of quite another length than any other title"
    options = argparse.Namespace(run_dir=str(folder), seed=0, threshold=3.0, split="cold-item")
    for name, frame in frames.items():
        write_artifact(options, f"{name}.parquet", frame, split="cold-item")
    return folder


def pieces_with(run, name, key):
    """The finished pieces of a baseline that are dicts with this key, in an order that their values decide"""
    paths = Path(run, "baselines", name).glob("*.pt")
    pieces = [torch.load(path, weights_only=True)["value"] for path in paths]
    pieces = [piece for piece in pieces if isinstance(piece, dict) and key in piece]
    return sorted((piece[key] for piece in pieces), key=lambda state: float(next(iter(state.values())).sum()))


def same_tensors(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def rows_of(run, name):
    """The rows that a baseline wrote, without what no two runs share"""
    return pd.read_parquet(Path(run) / f"baseline-{name}.parquet").drop(
        columns=["seconds", "milliseconds", "options"])


def naive_auc(labels, scores):
    pairs = [(1.0 if one > other else 0.5 if one == other else 0.0)
             for one, is_one in zip(scores, labels) for other, is_other in zip(scores, labels)
             if is_one and not is_other]
    return sum(pairs) / len(pairs)


def naive_logloss(labels, probabilities):
    return float(np.mean([-np.log(p if label else 1 - p) for label, p in zip(labels, probabilities)]))


def options_of(**options):
    """Options that a function reads, with defaults of the shared ones"""
    parser, _ = stage_parser("")
    return argparse.Namespace(**vars(parser.parse_args([])) | {"tokens_per_batch": 500, "seed": 0} | options)


def trained_states(run):
    """What each training of PeaPOD or PEPLER had after its last epoch, as bytes: a set"""
    pieces = [torch.load(path, weights_only=True)["model"] for path in run.glob("baselines/pe*/*.pt")]
    return {b"".join(state[key].numpy().tobytes() for key in sorted(state)) for state in pieces}


def kill_at_call(monkeypatch, module, name, number):
    """module.name raises KeyboardInterrupt when it is called for this time"""
    calls, function = [], getattr(module, name)

    def counted(*arguments):
        calls.append(name)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments)
    monkeypatch.setattr(module, name, counted)
