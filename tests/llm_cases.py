"""Small prompts, routes and events, and a run of stage 2 whose progress is kept in memory."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pandas as pd
import torch

from conftest import NAME_TEXTS, TASK_TEXT, run_stage
from userip.evidence import FIELDS, Evidence, Events, Route, item_pieces, tokenize
from userip.prompt import Prompt

ITEMS = pd.DataFrame({"title": ["red racer 1", "iron skillet 2", "café racer 3", "a job", "sport"],
                      "category": ["Games", "Kitchen", "Games", None, "Games"],
                      "brand": ["Acme", None, "Acme", "Bolt", "Bolt"],
                      "price": [3.0, 12.99, None, 140.0, 5.5]})


FIELD_SETS = [("title", "category"), ("brand", "price")]


def prompt_of(llm, names=tuple(NAME_TEXTS), task=TASK_TEXT, **options):
    return Prompt(llm, {f"n{k}": name for k, name in enumerate(names)}, task, **options)


def texts_of(llm, fields=FIELDS, words=("",)):
    return tokenize(llm[1], pieces_of(fields, words))


def pieces_of(fields, words=("",)):
    return [item_pieces(item, fields, word) for item in ITEMS.itertuples() for word in words]


def routes_for(llm, fields=FIELD_SETS):
    may_read = torch.eye(2, dtype=torch.bool) if len(fields) == 2 else [torch.ones(2, dtype=torch.bool)]
    return [Route(each, mask, 1, pieces_of(each), texts_of(llm, each))
            for each, mask in zip(fields, may_read)]


WORDS = ["disliked", "liked"]


def rating_route(llm, num_profiles=2):
    """The last profile reads how users rated."""
    may_read = torch.arange(num_profiles) == num_profiles - 1
    return Route(("rating",), may_read, 2, pieces_of(("rating",), WORDS), texts_of(llm, ("rating",), WORDS))


def events_of(users, items, levels=None, folds=None):
    column = lambda values: torch.tensor(values)
    rows = len(users)
    return Events(column(users), column(items), column(levels or [0] * rows), torch.arange(rows),
                  column(folds or [-1] * rows))


class InMemory:
    """Progress whose pieces are not written to disk."""

    def __init__(self):
        self.generator, self.pieces = torch.Generator().manual_seed(0), {}

    def compute(self, name, function):
        return function()

    def compute_blocks(self, name, blocks, unit, function):
        self.pieces |= {f"{name}-{index}": function(block) for index, block in enumerate(blocks)}

    def read(self, name):
        return self.pieces[name]


def run_of(llm, prompt, routes, train, own=None, is_warm=None, **options):
    """A run of stage 2 with these train events; own: theirs and cold users' (default: no cold ones)"""
    own = train if own is None else own
    is_warm = torch.ones(int(own.user.max()) + 1, dtype=torch.bool) if is_warm is None else is_warm
    options = {"evidence": "items", "max_history": 2, "folds": 0, "pull": None, "rank": 16, "lr": 0.01,
               "tokens_per_batch": 500} | options
    args = argparse.Namespace(**options)
    kept = [*(own.select(own.fold != fold) for fold in range(args.folds)), own]
    evidence = [Evidence(args, llm[1], routes, events, len(is_warm)) for events in kept]
    observed = SimpleNamespace(rows=own, train=train, own=own, is_warm=is_warm, words=WORDS)
    return SimpleNamespace(args=args, prompt=prompt, observed=observed, routes=routes, evidence=evidence,
                           tune=own, report=own, progress=InMemory())


def shared_of(soft, scores=None, noise=None, prior=()):
    """What fit_shared returns, with random weights of fields"""
    return SimpleNamespace(soft=soft, weights=weights_of(), scores=scores, noise=noise, prior=list(prior))


def soft_for(prompt, rows, seed=0):
    shape = rows, prompt.num_profiles, prompt.num_soft * prompt.embedding.shape[1]
    return prompt.scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(seed=0):
    return 0.5 + torch.rand(len(FIELDS), generator=torch.Generator().manual_seed(seed))


def fast(options):
    """Small numbers for the options of stage 2 that these options leave a meaning"""
    words = list(map(str, options))
    is_gradient = bool({"gradient", "--paper", "--released"} & set(words))
    is_tiny = "--llm" not in words or "tiny" in words
    return ["--shared-steps", 4, "--heldout", 60, *(["--steps", 2] if is_gradient else ["--map-steps", 4]),
            *["--tiny-steps", 6] * is_tiny]


def infer_run(small_run, tmp_path, *options, ok=True):
    """Stage 2 on a copy of the small run's stage 1, tiny LLM kept where the texts are the same."""
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(small_run[1], run)
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, *fast(options), *options, ok=ok)
    if not ok:
        return printed
    stored = torch.load(run / "profiles.pt", weights_only=True)
    return printed, stored, json.loads((run / "profiles.pt.json").read_text())


def fresh(small_run, folder):
    """A copy of the small run without what stage 2 wrote"""
    shutil.copytree(small_run[1], folder)
    for name in ("profiles.pt", "profiles.pt.json", "scores.pt", "scores.pt.json"):
        (folder / name).unlink()
    return folder
