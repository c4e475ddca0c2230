"""How fast stage 4 trains and serves: python tests/bench_ctr.py [--threads 2] [--no-compile]

Trains a DCN (user id, item id, E = 8, 3 cross layers, MLP (16, 16), dropout 0.2) on drawn rows: one alone,
and 9 and 18 side by side as one stack; where DeepCTR-Torch can be imported (it is no requirement: install it
into an environment of its own), also its DCN, in turn with ours, same rows and batch size. Then an epoch of 1
million rows x 20 fields, and table 6. The last line is one JSON object:
dcn_rows_per_second (batch 1,024), speedup_over_library (the smaller of batch 128 and 1,024; null without the
library), bank_overhead (median seconds of DCN + bank over DCN, both folded, batch 10,000), and
seconds_per_10000 (medians, batch 10,000).
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from userip.ctr_training import Member, Rows, Stack, train_epoch  # noqa: E402
from userip.serving import serving_figures, serving_table  # noqa: E402

USERS, ITEMS, ROWS = 7_000, 7_000, 45_000
SETTINGS = dict(field_dim=8, layers=3, hidden=[16, 16], dropout=0.2, id_dropout=0.0)


def drawn(num_rows, sizes, seed=0):
    """Rows of ids without meaning, each field with rows of its own in the table."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.integers(size, size=num_rows) for size in sizes], 1)
    first = np.cumsum([0, *sizes[:-1]])
    label = rng.integers(2, size=num_rows).astype(np.int8)
    return Rows({"train": torch.from_numpy(ids + first)[None]}, {"train": label}, [sum(sizes)]), ids, label


def our_epoch(rows, num_fields, num_models, batch_size, is_compiled):
    """A function that trains one epoch of so many DCNs, three of each start, warmed up."""
    args = SimpleNamespace(batch_size=batch_size, **SETTINGS)
    seeds = list(range(-(-num_models // 3))) if num_models > 1 else [0]
    members = [Member(0, seeds[k % len(seeds)], 0.01, 1e-4) for k in range(num_models)]
    stack = Stack(("dcn", num_fields, 8, 3, (16, 16), ()), members, rows, batch_size, 0.2, is_compiled)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    seed_index = torch.tensor([member.seed for member in members])

    def epoch():
        with torch.no_grad():
            train_epoch(args, stack, rows, generators, seed_index)

    short = rows._replace(ids={"train": rows.ids["train"][:, :2 * batch_size]},
                          labels={"train": rows.labels["train"][:2 * batch_size]})
    with torch.no_grad():
        train_epoch(args, stack, short, generators, seed_index)
    return epoch


def library_epoch(ids, label, batch_size):
    """The same of DeepCTR-Torch's DCN; None where it is not installed"""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from deepctr_torch.inputs import SparseFeat
            from deepctr_torch.models import DCN
    except ImportError:
        return None
    columns = [SparseFeat("user", USERS, 8), SparseFeat("item", ITEMS, 8)]
    model = DCN(columns, columns, cross_num=3, dnn_hidden_units=(16, 16), dnn_dropout=0.2, device="cpu")
    model.compile("adam", "binary_crossentropy")

    def epoch():
        with contextlib.redirect_stdout(io.StringIO()):
            model.fit({"user": ids[:, 0], "item": ids[:, 1]}, label, batch_size, epochs=1, verbose=0)

    return epoch


def seconds_of(functions, rounds=5):
    """Median seconds of each function, run in turn so that a change of the machine's speed meets them all"""
    taken = [[] for _ in functions]
    for _ in range(rounds):
        for function, seconds in zip(functions, taken):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--threads", type=int, default=2, help="of torch, for both")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    is_compiled = not args.no_compile and shutil.which("g++") is not None
    how = "compiled" if is_compiled else "not compiled"
    print(f"torch {torch.__version__}, {args.threads} threads, {how}; rows x models per second in training")
    rows, ids, label = drawn(ROWS, [USERS, ITEMS])
    speedups, alone = [], {}
    print("| batch | DCN alone | 9 as a stack | 18 as a stack | DeepCTR-Torch | alone / library | "
          "18 / library |\n|---|---|---|---|---|---|---|")
    for size in (128, 1024):
        ours = [our_epoch(rows, 2, number, size, is_compiled) for number in (1, 9, 18)]
        library = library_epoch(ids, label, size)
        seconds = seconds_of([*ours, *([library] if library else [])])
        speed = [number * ROWS / took for number, took in zip((1, 9, 18, 1), seconds)]
        alone[size] = speed[0]
        compared = ["–"] * 3
        if library:
            speedups.append(speed[0] / speed[3])
            compared = [f"{speed[3]:,.0f}", f"{speedups[-1]:.1f}", f"{speed[2] / speed[3]:.1f}"]
        cells = [*(f"{rate:,.0f}" for rate in speed[:3]), *compared]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)
    large, _, _ = drawn(1_000_000, [5_000] * 20)
    (took,) = seconds_of([our_epoch(large, 20, 1, 1024, is_compiled)], rounds=1)
    print(f"1,000,000 rows x 20 fields, one epoch, batch 1,024: {took:.1f} s")

    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(size, (USERS,), generator=generator) for size in (4, 3)], 1)
    vectors = torch.randn(USERS, 2 * 128, generator=generator)
    options = SimpleNamespace(**SETTINGS)
    item_codes = torch.randint(8, (ITEMS, 1), generator=generator)
    serving = serving_figures(options, codes, item_codes, [5, 4, 8], vectors)
    print("\n".join(serving_table(serving)))
    medians = {name: row["median_10000"] for name, row in serving.items()}
    print(json.dumps({"dcn_rows_per_second": round(alone[1024]),
                      "speedup_over_library": round(min(speedups), 2) if speedups else None,
                      "bank_overhead": round(medians["DCN + bank, folded"] / medians["DCN, folded"], 3),
                      "seconds_per_10000": {name: round(value, 6) for name, value in medians.items()}}))


if __name__ == "__main__":
    main()
