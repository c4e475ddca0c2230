"""How fast and how large stage 1 reads: python tests/bench_prepare.py [--reviews 10000000]

Generates a file of reviews and one of metadata in the format of Amazon 2014 (gzip, about 720 bytes a review,
of which 450 are text), runs 01_prepare.py on it in a process of its own on one core, and prints what bounds
it.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
WORDS = ("the a film was great and boring loved plot actors seen better worse music price fits shirt size "
         "colour bad\n"
         "nice story time never again really would recommend it's because their with from this that have "
         "you\n").split()
NOT_ASCII = [" café ♥", *[""] * 9]


def generate(folder, num_reviews, num_users, num_items, seed=0):
    """Reviews by users and of items of uneven activity; texts are slices of a long one, a tenth not ASCII."""
    rng = np.random.default_rng(seed)
    corpus = " ".join(rng.choice(WORDS, 400_000))
    with gzip.open(folder / "reviews_Bench_5.json.gz", "wb", compresslevel=1) as file:
        for start in range(0, num_reviews, 100_000):
            size = min(100_000, num_reviews - start)
            users = (num_users * rng.random(size) ** 2).astype(int)
            items = (num_items * rng.random(size) ** 2).astype(int)
            begin, length = (rng.integers(len(corpus) - 5000, size=size),
                             rng.exponential(450, size).astype(int))
            rating, when = rng.integers(1, 6, size), rng.integers(10**9, 14 * 10**8, size)
            file.write("".join(
                f'{{"reviewerID": "A{u:013d}", "asin": "B{i:09d}", "reviewerName": "Some \\"One\\"", '
                f'"helpful": [0, 0], "reviewText": "{corpus[b:b + n]}{NOT_ASCII[b % 10]}", "overall": {r}.0, '
                f'"summary": "Five Stars", "unixReviewTime": {t}, "reviewTime": "09 12, 2006"}}\n'
                for u, i, b, n, r, t in zip(users.tolist(), items.tolist(), begin.tolist(), length.tolist(),
                                            rating.tolist(), when.tolist())).encode())
    with gzip.open(folder / "meta_Bench.json.gz", "wt") as file:
        for item in range(num_items):
            file.write(str({"asin": f"B{item:09d}", "title": f"Title's {item}", "price": 9.99,
                            "categories": [["Bench", "Things"]]}) + "\n")


def bare_gzip_seconds(path):
    """Decompression alone, with nothing done to what comes out."""
    started, decompressor = time.perf_counter(), zlib.decompressobj(31)
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            decompressor.decompress(data)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", type=int, default=10_000_000)
    parser.add_argument("--folder", help="keep the generated files here, and use those that are there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_prepare_") as temporary:
        folder = Path(args.folder or temporary)
        raw, run = folder / "raw", folder / "run"
        if not raw.exists():
            raw.mkdir(parents=True)
            print(f"generating {args.reviews:,} reviews ...", flush=True)
            generate(raw, args.reviews, args.reviews // 8 + 1, args.reviews // 100 + 1)
        path = raw / "reviews_Bench_5.json.gz"
        unzip = bare_gzip_seconds(path)
        one_core = {"OMP_NUM_THREADS": "1", "ARROW_IO_THREADS": "1"}
        command = [sys.executable, ROOT / "01_prepare.py", "--dataset", "amazon", "--raw", raw,
                   "--run-dir", run]
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, **one_core, "TQDM_DISABLE": "1"},
                       preexec_fn=lambda: os.sched_setaffinity(0, {0}))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        facts = json.loads((run / "prepare.json").read_text())
        steps = json.loads((run / "interactions.parquet.json").read_text())["seconds_of"]
        batches = pq.ParquetFile(run / "interactions.parquet").iter_batches(100_000)
        kept = sum(batch.nbytes for batch in batches)  # as they lie in memory
    write = seconds - sum(steps.values())
    told = " | ".join(f"{name} {value:.1f} s" for name, value in steps.items())
    print(f"gzip alone {unzip:.1f} s | {told} | start and write {write:.1f} s")
    rate = lambda taken: round(facts["rows_read"] / taken)
    print(json.dumps({"reviews": facts["rows_read"], "kept": facts["interactions"],
                      "read_per_second": rate(steps["read"]),
                      "read_filter_split_per_second": rate(sum(steps.values())),
                      "whole_stage_per_second": rate(seconds),
                      "peak_gib": round(peak / 2**30, 2), "kept_columns_gib": round(kept / 2**30, 2),
                      "beyond_kept_columns_gib": round((peak - kept) / 2**30, 2)}))


if __name__ == "__main__":
    main()
