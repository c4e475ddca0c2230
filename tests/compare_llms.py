"""Does an LLM that knows the world help a recommender? LLMs side by side on one data set.

    python tests/compare_llms.py --run-dir runs/llms --llms tiny models/SmolLM2 words --splits 3 \\
        --dataset table --raw data/games --split cold-user
    python tests/compare_llms.py --run-dir runs/llms-rated --llms tiny models/SmolLM2 words --evidence ratings …

Each LLM has a folder of its own below --run-dir/split-S: stages 2 to 4 (a DCN, 3 seeds). What is finished is
kept, so LLMs and splits can be added later. `words` is the control without an LLM: in place of a text's score
stands its row in the truncated SVD of TF-IDF of the same fields, and all that follows is the same.

With --evidence ratings the LLMs differ in what they read of items, which `items` and `taste` hold: the users'
codes are the first LLM's for all (they read rating habits, and valid rows mostly leave titles out of them),
and so are the sets that need no LLM. The others run the item pass alone, once for all splits; `words` has the SVD's rows.

To save time θ̄ has 20 steps and the map 5, which move soft tokens and no codes: held-out NLLs are not shown.
Differences: of test AUC and logloss, with the same split and seed, to the first LLM's sets of the header, and
to the same set of `words`; intervals of several splits are over these, corrected for their overlap.
"""

import argparse
import importlib
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
from userip.item_bank import infer_items  # noqa: E402
from userip.score import incidence, project_scores  # noqa: E402
from userip.taste import word_vectors  # noqa: E402

QUICK = ["--shared-steps", 20, "--map-steps", 5, "--heldout", 64]
STAGE_2 = {"titles": [], "ratings": ["--ratings", "--items", "--profiles", "judgement=his judgement is",
                                     "--route", "rating"]}
# sets that differ between LLMs, each with the sets of the first LLM that it is compared with
FEATURES = {"titles": {"codes": ["random"]},
            "ratings": {"codes+items": ["random+random", "leniency16+tfidf"],
                        "codes+items+taste": ["leniency16+tfidf"]}}
ROUTES = {"hobby": ["title", "category"], "background": ["brand", "price"]}
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
    matrix, count = incidence(*(torch.from_numpy(own[key].to_numpy(copy=True)) for key in ("user", "item")),
                              (len(users), len(items)))
    share = train["item"].value_counts(normalize=True).reindex(items["item"], fill_value=0)
    share = torch.from_numpy(share.to_numpy(copy=True))
    y, gain = [], []
    for fields in ROUTES.values():
        fields = [field for field in fields if items[field].notna().any()] or ["title", "category"]
        scores = torch.from_numpy(word_vectors(items, train, fields))
        scores = scores - share @ scores
        noise = (scores * share[:, None]).T @ scores
        noise += 1e-3 * noise.diagonal().mean() * torch.eye(len(noise))
        projection, eigenvalues = project_scores(matrix, scores, count, noise, is_warm, RANK)
        edge = (1 + np.sqrt(len(noise) / int(is_warm.sum()))) ** 2
        above = eigenvalues[eigenvalues > edge]
        pull = float(count[is_warm].mean()) / (float(above.mean()) - 1 if len(above) else 0.1)
        y.append(torch.from_numpy(matrix @ (scores @ projection).numpy()) / (count + pull)[:, None])
        gain.append((count + pull) / count.clamp(min=1).sqrt())
    names = list(ROUTES)
    tensors = {"profiles": torch.stack(y, 1).float(), "shared": torch.zeros(2, RANK),
               "noise": torch.eye(RANK).repeat(2, 1, 1), "gain": torch.stack(gain, 1).float(),
               "num_evidence": count.long()[:, None].repeat(1, 2), "has_evidence": count > 0, "names": names,
               "llm": "words", "texts": names, "tiny_llm": ""}
    write_artifact(SimpleNamespace(run_dir=folder, seed=0, method="score", route=["none"]), "profiles.pt",
                   tensors, ["interactions.parquet", "items.parquet"], names=names, llm="words",
                   heldout_nll=dict.fromkeys(("none", "shared", "shuffled", "own"), 0.0)
                   | dict.fromkeys(("own_minus_shared", "own_minus_shuffled"), [0.0, 0.0]))


def vectors_of_items(llm, data, cache):
    """What an LLM reads in the items' texts, float32 [M, V], by stage 2's item pass. The soft tokens before them
    are untrained, so that one pass, which is kept in the file cache, is for all splits (SmolLM2 on games: .98 is
    the mean cosine to the vectors at θ̄, and they foretell the items' means as well).
    """
    items = pd.read_parquet(data / "items.parquet")
    if llm == "words":
        rows = pd.read_parquet(data / "interactions.parquet")
        return torch.from_numpy(word_vectors(items, rows[rows["split"] == "train"])).float()
    if cache.exists() and (kept := torch.load(cache))["item_id"] == items["item_id"].tolist():
        return kept["vectors"]
    stage = importlib.import_module("02_infer_profiles")
    options = ["--run-dir", data, "--llm", llm, *STAGE_2["ratings"], *QUICK]
    run = stage.set_up(stage.parse_args(list(map(str, options))), 0, 1)
    soft = run.prompt.random_soft(1, torch.Generator().manual_seed(0))[0].float().cpu()
    vectors = infer_items(run, soft)
    run.progress.clear()
    torch.save({"vectors": vectors, "item_id": items["item_id"].tolist()}, cache)
    return vectors


def climb(args, data, folder, llm, first):
    """Stages 2 to 4 of one LLM on one split; first: the folder of the first LLM"""
    folder.mkdir(parents=True, exist_ok=True)
    link(["interactions.parquet", "items.parquet", "users.parquet", "prepare.json"], data, folder)
    if (folder / "results.parquet.json").exists():
        return
    quick = [*QUICK, *["--tiny-steps", 100] * (llm == "tiny")]
    if args.evidence == "ratings" and folder != first:
        vectors = vectors_of_items(llm, data, args.run_dir / f"{folder.name}-vectors.pt")
        link(["profiles.pt", "scores.pt"], first, folder)
        write_artifact(SimpleNamespace(run_dir=folder, seed=0), "item_vectors.pt", {"vectors": vectors},
                       ["profiles.pt", "items.parquet"])
    elif llm == "words":
        profiles_of_words(folder)
    elif not (folder / "profiles.pt.json").exists():
        run("02_infer_profiles.py", folder, "--llm", llm, *STAGE_2[args.evidence], *quick)
    is_cold = json.loads((data / "interactions.parquet.json").read_text())["options"]["split"].startswith("cold")
    run("03_quantize.py", folder, "--stability", int(args.evidence == "titles" and not is_cold))
    sets = list(FEATURES[args.evidence])
    if folder == first:
        sets += sorted({other for others in FEATURES[args.evidence].values() for other in others})
    run("04_train_ctr.py", folder, "--models", *args.models, "--features", *sets, "--seeds", 3,
        *["--id-dropout", 0.3] * is_cold)


def line_of(args, folders, firsts, words):
    """What an LLM found: its folders, the first LLM's and those of `words`, one per split -> cells of a line"""
    results, of_first, of_words = (pd.concat([pd.read_parquet(folder / "results.parquet") for folder in part])
                                   for part in (folders, firsts, words))
    facts = [json.loads((folder / "feature_bank.parquet.json").read_text()) for folder in folders]
    split = pd.read_parquet(folders[0] / "interactions.parquet", columns=["split"])["split"].value_counts()
    overlap = split["test"] / split["train"]
    pair = lambda key: " · ".join("–" if facts[0].get(name) is None else f"{np.mean([f[name] for f in facts]):.3f}"
                                  for name in key)
    cells = [pair([f"{name}_stability" for name in facts[0]["names"]]), pair(["probe_gender", "probe_age_over_30"])]
    if args.evidence == "ratings":
        banks = [json.loads((folder / "item_bank.parquet.json").read_text()) for folder in folders]
        cells = [f"{np.mean([bank['correlation'] for bank in banks]):.3f}"]

    def figures(frame, model, name):  # AUC and logloss [splits x seeds, 2]
        rows = frame.set_index(["model", "features"]).loc[[(model, name)]]
        return rows.set_index("split_seed")[["auc", "logloss"]]

    for model in args.models:
        for name, others in FEATURES[args.evidence].items():
            own = figures(results, model, name)
            cells.append(" · ".join(f"{figure:.4f}" for figure in own.mean()))
            controls = [figures(of_first, model, other) for other in others]
            for other in (*controls, figures(of_words, model, name)):
                gains = own - other.to_numpy()
                cells.append(" · ".join(with_interval(*paired_interval(gains[key], gains.index, overlap)[:2])
                                        for key in gains) if gains.any(axis=None) else "–")
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
    if args.evidence == "ratings" and args.llms[0] == "words":
        parser.error("--evidence ratings: let --llms begin with an LLM, whose users' codes all others take")
    folders = {Path(llm).name: [] for llm in args.llms}
    for split in range(args.splits):
        data = args.run_dir / f"split-{split}" / "data"
        if not (data / "users.parquet.json").exists():
            run("01_prepare.py", data, *of_stage_1, "--split-seed", split)
        for llm, name in zip(args.llms, folders):
            folders[name].append(data.parent / name)
            climb(args, data, folders[name][-1], llm, data.parent / list(folders)[0])
    gains = [cell for model in args.models for name, others in FEATURES[args.evidence].items()
             for cell in (f"{model}, {name}: AUC · logloss", *(f"- {other}" for other in (*others, "words")))]
    known = ["ARI between seeds", "probes: gender · age over 30"] if args.evidence == "titles" else [
        "correlation with items' means"]
    firsts = list(folders.values())[0]
    words = folders.get("words", firsts)
    lines = [[name, *line_of(args, parts, firsts, words)] for name, parts in folders.items()]
    print("\n".join(markdown(["LLM", *known, *gains], lines)))


if __name__ == "__main__":
    main()
