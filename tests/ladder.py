"""From the released recipe to profiles that know their users, a rung at a time: python tests/ladder.py

    python tests/ladder.py --run-dir runs/ladder --dataset planted --seed 0
    python tests/ladder.py --run-dir runs/ladder-ml --dataset ml-100k --raw data/ml-100k

Runs stage 1 once, stages 2 to 4 for every rung in a folder of its own below --run-dir (finished rungs are
kept), all with the tiny LLM of the default recipe (with ratings, of one that has read these), and prints one
table. AUC is test AUC of a DCN with codes
less the same with random codes (3 seeds), of warm users with --split random, of cold ones with --split
cold-user (then with --id-dropout 0.3, so that they meet a trained unknown id).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from userip.profiles import probe_auc  # noqa: E402  (needs the path)

PAPER = ["--paper"]
SHARED = [*PAPER, "--start", "shared"]
PULLED = [*SHARED, "--pull", "10"]
ITEMS = [*PULLED, "--evidence", "items"]
ROUTED = [*ITEMS, "--route", "title+category", "brand+price"]
RUNGS = {  # rung -> options of stage 2, of stage 3
    "released": (["--released", "--evidence", "items"], ["--released"]),
    "paper": (PAPER, ["--paper"]),
    "shared start": (SHARED, ["--paper"]),
    "pull": (PULLED, ["--paper"]),
    "items": (ITEMS, ["--paper"]),
    "routing": (ROUTED, ["--paper"]),
    "whitening by noise": (ROUTED, []),
    "score": ([], []),
    "ratings and folds": (["--ratings"], []),
    "EM": (None, []),
}


def run(script, run_dir, *options):
    subprocess.run([sys.executable, ROOT / script, "--run-dir", run_dir, *map(str, options)], check=True)


def train_ctr(folder):
    split = json.loads((folder / "interactions.parquet.json").read_text())["options"]["split"]
    run("04_train_ctr.py", folder, "--models", "dcn", "--features", "none", "codes", "random", "--seeds", 3,
        *["--id-dropout", 0.3] * (split == "cold-user"))


def climb(folder, data, options, llm):
    """Stages 2 to 4 of one rung: (run directory, --llm of the next)"""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("interactions.parquet", "items.parquet", "users.parquet", "prepare.json"):
        for file in (name, f"{name}.json"):
            if not (folder / file).exists():
                os.link(data / file, folder / file)
    of_stage_2, of_stage_3 = options
    if not (folder / "results.parquet").exists():
        run("02_infer_profiles.py", folder, *of_stage_2, "--llm", llm)
        run("03_quantize.py", folder, *of_stage_3, "--stability", 2)
        train_ctr(folder)


def em_rounds(folder, score, num_rounds=2):
    """The rung EM: from the rung `score`, stages 2 and 3 in turn."""
    if not (folder / "results.parquet").exists():
        shutil.copytree(score, folder, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("results*", "finished*"))
        for _ in range(num_rounds):
            run("02_infer_profiles.py", folder, "--prior", folder / "codebook.pt", "--llm",
                score / "tiny_llm")
            run("03_quantize.py", folder)
        train_ctr(folder)


def row_of(name, folder):
    """One line of the table"""
    inferred, coded, scored = (json.loads((folder / f"{artifact}.json").read_text())
                               for artifact in ("profiles.pt", "feature_bank.parquet", "results.parquet"))
    shared, shuffled = (inferred["heldout_nll"][f"own_minus_{other}"] for other in ("shared", "shuffled"))
    pair = lambda key, digits: " · ".join(
        "–" if coded.get(f"{profile}_{key}") is None else f"{coded[f'{profile}_{key}']:.{digits}f}"
        for profile in coded["names"])
    # by place: the released recipe's `likes` and `level` are to find what `hobby` and `background` find
    truths = [key.split("_vs_")[1] for key in coded if key.startswith(f"{coded['names'][0]}_vs_true_")]
    pairs = dict(zip(coded["names"], truths))
    share = lambda name: (f" ({coded[key]:.0%})" if (key := f"{name}_share_of_bayes") in coded else "")
    ari = " · ".join(f"{coded[f'{name}_vs_{truth}']:.2f}{share(name)}" for name, truth in pairs.items())
    cross = [coded[f"{name}_vs_{truth}"] for name in coded["names"] for truth in truths
             if pairs.get(name) != truth]
    probes = " · ".join(f"{coded[key]:.2f}" for key in ("probe_gender", "probe_age_over_30") if key in coded)
    gain = scored["gains"]["dcn"]
    return [name, f"{shared[0]:+.4f} ± {shared[1]:.4f}", f"{shuffled[0]:+.4f} ± {shuffled[1]:.4f}",
            pair("perplexity", 2), pair("stability", 2), ari or "–",
            f"{max(map(abs, cross)):.3f}" if cross else "–", probes or "–",
            f"{gain['auc_gain']:+.4f} ± {gain['auc_half_interval']:.4f}", f"{inferred['seconds']:.0f}"]


def context(data):
    """Where gender and age are known: the same probe on who had what (truncated SVD of train rows)"""
    users, rows = (pd.read_parquet(data / f"{name}.parquet") for name in ("users", "interactions"))
    if "gender" not in users:
        return
    rows = rows[rows["split"] == "train"]
    had = sparse.csr_matrix((np.ones(len(rows)), (rows["user"], rows["item"])))
    factors = TruncatedSVD(32, random_state=0).fit_transform(had)[:len(users)]
    labels = (users["gender"] == "M").to_numpy(), (pd.to_numeric(users["age"]) > 30).to_numpy()
    aucs = " · ".join(f"{probe_auc(factors, label):.2f}" for label in labels)
    print(f"probe on the truncated SVD of the user x item matrix, rank 32: {aucs}; chance 0.50 · 0.50")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/ladder"), help="folder of all rungs")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), help="which of them")
    # all else goes to stage 1, which refuses what it does not know
    args, of_stage_1 = parser.parse_known_args()
    data, default = args.run_dir / "data", args.run_dir / "score"
    asked = args.run_dir / "stage_1.txt"
    if asked.exists() and asked.read_text() != " ".join(of_stage_1):
        parser.error(f"{args.run_dir} holds the rungs of another stage 1 ({asked.read_text()}): take another "
                     f"--run-dir")
    if not (data / "users.parquet").exists():
        run("01_prepare.py", data, *of_stage_1)
        asked.write_text(" ".join(of_stage_1))
    climb(default, data, RUNGS["score"], "tiny")
    lines = []
    for name in args.rungs:
        folder = args.run_dir / name.replace(" ", "-")
        if name == "EM":
            em_rounds(folder, default)
        elif name != "score":
            climb(folder, data, RUNGS[name], "tiny" if "ratings" in name else default / "tiny_llm")
        lines.append(row_of(name, folder))
    header = ["rung", "own - shared", "own - shuffled (nats per token)", "perplexity", "ARI between seeds",
              "ARI (share of Bayes)", "cross-ARI", "probe: gender · age over 30", "AUC over random",
              "stage 2 (s)"]
    print("\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]))
    context(data)


if __name__ == "__main__":
    main()
