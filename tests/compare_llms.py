"""Does a LLM that knows the world help a recommender? LLMs side by side on one data set.

    python tests/compare_llms.py --run-dir runs/llms --llms tiny models/SmolLM2 words --splits 3 \\
        --dataset table --raw data/games --split cold-user
    python tests/compare_llms.py --run-dir runs/llms-rated --llms tiny models/SmolLM2 words --evidence ratings …

Each LLM has a folder of its own below --run-dir/split-S: stages 2 to 4 (a DCN, 3 seeds). What is finished is
kept, so LLMs and splits can be added later. `words` is the control without a LLM: in place of a text's score
stands its row in the truncated SVD of TF-IDF of the same fields, and all that follows is the same. With
--evidence ratings `words` takes the users' codes of the first LLM and codes items by these rows.

To save time θ̄ has 20 steps and the map 5, which move soft tokens and no codes: held-out NLLs are not shown.
Differences: of test AUC and logloss, with the same split and seed, to random codes (titles), to random parts
and leniency16+tfidf (ratings), and to `words`; intervals of several splits are corrected for their overlap.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import with_interval  # noqa: E402  (needs the path)
from userip.artifacts import write_artifact  # noqa: E402
from userip.ctr_report import markdown, paired_interval  # noqa: E402
from userip.score import incidence, project_scores  # noqa: E402
from userip.taste import word_vectors  # noqa: E402

QUICK = ["--shared-steps", 20, "--map-steps", 5, "--heldout", 64]
STAGE_2 = {"titles": [], "ratings": ["--ratings", "--items", "--profiles", "judgement=his judgement is",
                                     "--route", "rating"]}
FEATURES = {"titles": ["codes", "random"],  # the first, its control, and what else it is compared with
            "ratings": ["codes+items", "random+random", "leniency16+tfidf", "codes", "random"]}
FIELDS = {"hobby": ["title", "category"], "background": ["brand", "price"]}
RANK = 16


def run(script, folder, *options):
    subprocess.run([sys.executable, ROOT / script, "--run-dir", folder, *map(str, options)], check=True)


def link(names, source, folder):
    """Hard links of artifacts with their sidecars"""
    for name in (f"{name}{ending}" for name in names for ending in ("", ".json")):
        if (source / name).exists() and not (folder / name).exists():
            os.link(source / name, folder / name)


def profiles_of_words(folder):
    """Write profiles.pt as stage 2's score method does, with rows of the SVD as scores of texts."""
    rows, items, users = (pd.read_parquet(folder / f"{name}.parquet")
                          for name in ("interactions", "items", "users"))
    train, own = rows[rows["split"] == "train"], rows[rows["split"].isin(["train", "support"])]
    is_warm = torch.from_numpy(users["user"].isin(train["user"]).to_numpy(copy=True))
    matrix, count = incidence(*(torch.from_numpy(own[key].to_numpy()) for key in ("user", "item")),
                              (len(users), len(items)))
    share = torch.from_numpy(train["item"].value_counts(normalize=True).reindex(items["item"]).fillna(0).values)
    y, gain = [], []
    for fields in FIELDS.values():
        fields = [field for field in fields if items[field].notna().any()] or ["title", "category"]
        scores = torch.from_numpy(word_vectors(items, fields))
        scores = scores - share @ scores
        noise = (scores * share[:, None]).T @ scores
        noise += 1e-3 * noise.diagonal().mean() * torch.eye(len(noise))
        projection, eigenvalues = project_scores(matrix, scores, count, noise, is_warm, RANK)
        edge = (1 + np.sqrt(len(noise) / int(is_warm.sum()))) ** 2
        above = eigenvalues[eigenvalues > edge]
        pull = float(count[is_warm].mean()) / (float(above.mean()) - 1 if len(above) else 0.1)
        y.append(torch.from_numpy(matrix @ (scores @ projection).numpy()) / (count + pull)[:, None])
        gain.append((count + pull) / count.clamp(min=1).sqrt())
    names = list(FIELDS)
    tensors = {"profiles": torch.stack(y, 1).float(), "shared": torch.zeros(2, RANK),
               "noise": torch.eye(RANK).repeat(2, 1, 1), "gain": torch.stack(gain, 1).float(),
               "num_evidence": count.long()[:, None].repeat(1, 2), "has_evidence": count > 0, "names": names,
               "llm": "words", "num_soft": 1, "texts": names, "tiny_llm": ""}
    write_artifact(SimpleNamespace(run_dir=folder, seed=0, method="score", route=["none"]), "profiles.pt",
                   tensors, ["interactions.parquet", "items.parquet"], names=names, llm="words",
                   heldout_nll=dict.fromkeys(("none", "shared", "shuffled", "own"), 0.0)
                   | dict.fromkeys(("own_minus_shared", "own_minus_shuffled"), [0.0, 0.0]))


def climb(args, data, folder, llm, first):
    """Stages 2 to 4 of one LLM on one split; first: the folder of the first LLM"""
    folder.mkdir(parents=True, exist_ok=True)
    link(["interactions.parquet", "items.parquet", "users.parquet", "prepare.json"], data, folder)
    if (folder / "results.parquet.json").exists():
        return
    if llm != "words":
        quick = [*QUICK, *["--tiny-steps", 100] * (llm == "tiny")]
        if not (folder / "profiles.pt.json").exists():
            run("02_infer_profiles.py", folder, "--llm", llm, *STAGE_2[args.evidence], *quick)
    elif args.evidence == "titles":
        profiles_of_words(folder)
    else:
        link(["profiles.pt", "scores.pt"], first, folder)
        vectors = torch.from_numpy(word_vectors(pd.read_parquet(folder / "items.parquet"))).float()
        write_artifact(SimpleNamespace(run_dir=folder, seed=0), "item_vectors.pt", {"vectors": vectors},
                       ["profiles.pt", "items.parquet"])
    is_cold = json.loads((data / "interactions.parquet.json").read_text())["options"]["split"] != "random"
    run("03_quantize.py", folder, "--stability", int(args.evidence == "titles" and not is_cold))
    run("04_train_ctr.py", folder, "--models", *args.models, "--features", *FEATURES[args.evidence], "--seeds", 3,
        *["--id-dropout", 0.3] * is_cold)


def line_of(args, folders, words):
    """What an LLM found: its folders and those of `words`, one per split -> cells of the table"""
    results, of_words = (pd.concat([pd.read_parquet(folder / "results.parquet") for folder in part])
                         for part in (folders, words))
    facts = [json.loads((folder / "feature_bank.parquet.json").read_text()) for folder in folders]
    split = pd.read_parquet(folders[0] / "interactions.parquet", columns=["split"])["split"].value_counts()
    overlap = split["test"] / split["train"] if len(folders) > 1 else 0.0
    first, *others = FEATURES[args.evidence][:3]
    pair = lambda key: " · ".join("–" if facts[0].get(name) is None else f"{np.mean([f[name] for f in facts]):.3f}"
                                  for name in key)
    cells = [pair([f"{name}_stability" for name in facts[0]["names"]]), pair(["probe_gender", "probe_age_over_30"])]
    if args.evidence == "ratings":
        banks = [json.loads((folder / "item_bank.parquet.json").read_text()) for folder in folders]
        cells = [f"{np.mean([bank['correlation'] for bank in banks]):.3f}"]
    for model in args.models:
        part, of_part = (frame[frame["model"] == model].set_index("features") for frame in (results, of_words))
        figures = lambda frame, name: frame.loc[[name], ["auc", "logloss"]].to_numpy()
        own = figures(part, first)
        cells.append(" · ".join(f"{figure:.4f}" for figure in own.mean(0)))
        for other in (*(figures(part, name) for name in others), figures(of_part, first)):
            cells.append(" · ".join(with_interval(*paired_interval(column, overlap)[:2])
                                    for column in (own - other).T) if (own != other).any() else "–")
    return cells


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/llms"), help="folder of all runs")
    parser.add_argument("--llms", nargs="+", default=["tiny", "words"], help="as stage 2's --llm, and words")
    parser.add_argument("--evidence", choices=STAGE_2, default="titles", help="titles alone, or with ratings")
    parser.add_argument("--models", nargs="+", default=["dcn"], help="CTR models")
    parser.add_argument("--splits", type=int, default=1, help="how many splits")
    # all else goes to stage 1, which refuses what it does not know
    args, of_stage_1 = parser.parse_known_args()
    folders = {Path(llm).name: [] for llm in args.llms}
    for split in range(args.splits):
        data = args.run_dir / f"split-{split}" / "data"
        if not (data / "users.parquet.json").exists():
            run("01_prepare.py", data, *of_stage_1, "--split-seed", split)
        for llm, name in zip(args.llms, folders):
            folders[name].append(data.parent / name)
            climb(args, data, folders[name][-1], llm, data.parent / list(folders)[0])
    others = [f"- {name}" for name in (*FEATURES[args.evidence][1:3], "words")]
    gains = [cell for model in args.models for cell in (f"{model}: AUC · logloss", *others)]
    known = ["ARI between seeds", "probes: gender · age over 30"] if args.evidence == "titles" else [
        "correlation with items' means"]
    lines = [[name, *line_of(args, parts, folders.get("words", parts))] for name, parts in folders.items()]
    print("\n".join(markdown(["LLM", *known, *gains], lines)))


if __name__ == "__main__":
    main()
