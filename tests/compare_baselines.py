"""What do LLM-based recommenders gain over their controls, and what do they cost? The systems of baselines/
beside this method's codes on one data set.

    python tests/compare_baselines.py --run-dir runs/systems --splits 3 --dataset ml-100k --raw data/ml-100k
    python tests/compare_baselines.py --run-dir runs/smol --llm models/SmolLM2 --systems kar rella …

Each split has a folder below --run-dir: stage 1, stages 2 to 4 (a DCN, 3 seeds) for this method (`codes`),
the baselines, and PeaPOD's profiles through stages 3 and 4. What is finished is kept, so systems and splits
can be added later. An LLM other than `tiny` reads fewer users and rows (CAPS): no system should need more
than 45 minutes on two cores.

Differences: of test AUC and logloss, with the same split and seed, to the control that the line names. Their
intervals are over splits, each the mean of its seeds, corrected for the overlap of their train rows; with one
split over its seeds. Serving: milliseconds per 10,000 rows, MB held. LLM tokens per user. Minutes: a system's
in one split, all seeds and stages, by the clock.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import with_interval  # noqa: E402  (needs the path)
from compare_llms import QUICK, STAGE_2, link, run  # noqa: E402
from userip.artifacts import whole_file  # noqa: E402
from userip.baseline import INPUTS  # noqa: E402
from userip.ctr_report import markdown, paired_interval  # noqa: E402
from userip.options import at_least  # noqa: E402

SETS = {"titles": ["none", "random", "leniency", "codes"],
        "ratings": ["none", "random", "leniency", "codes", "random+random", "codes+items"]}
OPTIONS = {"kar": ["--folds", 2, "--max-history", 10, "--new-tokens", 12],
           "pepler": ["--head", "mlp", "--text-rows", 500],
           "rella": ["--num-items", 5, "--shots", 512, "--test-rows", 2000, "--valid-rows", 500],
           "peapod": ["--variant", "pool", "--seeds", 1]}
CAPS = {"kar": ["--max-users", 500],
        "pepler": ["--seeds", 1, "--text-rows", 200, "--max-texts", 50, "--epochs", 30],
        "rella": ["--seeds", 1, "--shots", 128, "--epochs", 3, "--test-rows", 500, "--valid-rows", 200],
        "peapod": ["--max-users", 300, "--max-texts", 50, "--prompts", 500, "--epochs", 8]}
# a line's name, the system, the file and the set of features, and the line that it is compared with
LINES = [("DCN, none", "codes", "results", "none", None),
         ("DCN, random codes", "codes", "results", "random", "DCN, none"),
         ("DCN, leniency", "codes", "results", "leniency", "DCN, random codes"),
         ("DCN, codes", "codes", "results", "codes", "DCN, random codes"),
         ("DCN, random + random", "codes", "results", "random+random", "DCN, none"),
         ("DCN, codes+items", "codes", "results", "codes+items", "DCN, random + random"),
         ("KAR, none", "kar", "baseline-kar", "none", None),
         ("KAR, random", "kar", "baseline-kar", "random", "KAR, none"),
         ("KAR, generated", "kar", "baseline-kar", "generated", "KAR, random"),
         ("PEPLER without text", "pepler", "without-text/baseline-pepler", "mlp without text", "DCN, none"),
         ("PEPLER", "pepler", "baseline-pepler", "mlp", "PEPLER without text"),
         ("ReLLa, zero-shot", "rella", "baseline-rella", "semantic zero-shot", None),
         ("ReLLa, LoRA", "rella", "baseline-rella", "semantic lora", "ReLLa, zero-shot"),
         ("DCN, PeaPOD's random codes", "peapod", "peapod/results", "random", "DCN, none"),
         ("DCN, PeaPOD's codes", "peapod", "peapod/results", "codes", "DCN, PeaPOD's random codes")]


def steps_of(args, is_cold):
    """What each system runs: {system: list of (script, folder below the split's, options)}"""
    llm, is_tiny = ["--llm", args.llm], args.llm == "tiny"
    llm += ["--tiny-steps", 100] * is_tiny
    dropout = ["--id-dropout", 0.3] * is_cold
    stage_4 = ["--models", "dcn", "--seeds", 3, *dropout, "--features"]
    baseline = {name: [*llm, *options, *CAPS[name] * (not is_tiny)] for name, options in OPTIONS.items()}
    baseline["kar"] += dropout
    steps = {name: [(f"baselines/{name}.py", ".", options)] for name, options in baseline.items()}
    control = [*llm, "--head", "mlp", "--text-weight", 0, *["--seeds", 1, "--epochs", 30] * (not is_tiny)]
    steps["pepler"] += [("baselines/pepler.py", "without-text", control)]
    steps["peapod"] += [("03_quantize.py", "peapod", ["--codes", 12, "--stability", 0]),
                        ("04_train_ctr.py", "peapod", [*stage_4, "none", "random", "codes"])]
    return steps | {"codes": [("02_infer_profiles.py", ".", [*llm, *STAGE_2[args.evidence], *QUICK]),
                              ("03_quantize.py", ".", ["--stability", 0]),
                              ("04_train_ctr.py", ".", [*stage_4, *SETS[args.evidence]])]}


def climb(args, folder, of_stage_1, split):
    """Run what this split lacks -> {system: seconds} of what is finished, kept in finished.json"""
    path, asked = folder / "finished.json", [args.llm, args.evidence, of_stage_1]
    state = json.loads(path.read_text()) if path.exists() else {"asked": asked, "seconds": {}, "finished": []}
    if state["asked"] != asked:
        sys.exit(f"{folder} has runs of other options, {state['asked']}: take another --run-dir")
    if not (folder / "users.parquet.json").exists():
        run("01_prepare.py", folder, *of_stage_1, *["--split-seed", split] * (args.splits > 1))
    options = json.loads((folder / "interactions.parquet.json").read_text())["options"]
    steps, seconds = steps_of(args, options["split"].startswith("cold")), state["seconds"]

    def keep():
        with whole_file(path) as file:
            file.write(json.dumps(state).encode())

    for system in [name for name in args.systems if name not in state["finished"]]:
        for script, below, options in steps[system]:
            if below == "without-text":
                (folder / below).mkdir(exist_ok=True)
                link(INPUTS, folder, folder / below)
            started = time.time()
            try:
                run(script, folder / below, *options)
            finally:  # a killed step goes on later, and its seconds add up
                seconds[system] = seconds.get(system, 0.0) + time.time() - started
                keep()
        state["finished"].append(system)
        keep()
    return {system: seconds[system] for system in state["finished"]}


def rows_of(folders, file, features):
    """Rows of one set of features of those splits that have it, by split and seed; None if none has"""
    paths = [path for folder in folders if (path := folder / f"{file}.parquet").exists()]
    frames = [frame[(frame["features"] == features) & ~frame["model"].isin(["means", "base rate"])]
              for frame in map(pd.read_parquet, paths)]
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames).set_index(["split_seed", "seed"]) if frames else None


def gains_over(rows, control):
    """Differences of AUC and logloss, with the same split and seed, or the same split where the control has
    one seed
    """
    columns, splits = ["auc", "logloss"], control.index.get_level_values("split_seed")
    if not splits.duplicated().any():
        control = control.droplevel("seed").reindex(rows.index.get_level_values("split_seed"))
        control.index = rows.index
    return (rows[columns] - control[columns]).dropna()


def costs_of(folder, system, features, rows):
    """Cells of a line: ms, MB, tokens per user; of a DCN those of the first split, ms and MB by KAR's script"""
    cells = lambda ms, megabytes, tokens: [f"{ms:,.4g}", f"{megabytes:.2f}", f"{tokens:,.0f}"]
    if "bytes" in rows:
        mean = rows[["milliseconds", "bytes", "tokens_per_user"]].mean()
        return cells(mean["milliseconds"], mean["bytes"] / 2**20, mean["tokens_per_user"])
    tokens, sidecar = 0.0, lambda name: json.loads((folder / f"{name}.json").read_text())
    if system == "peapod" and features == "codes":
        ranked = pd.read_parquet(folder / "peapod.parquet")
        tokens = ranked.loc[ranked["model"] == "pool"].get("tokens_per_user", pd.Series(float("nan"))).mean()
    elif "codes" in features:
        profiles = sidecar("profiles.pt")
        tokens = sum(profiles["tokens"].values()) / profiles["users"]
    mode = {"none": "DCN", "codes": "DCN + bank"}.get(features)
    if not mode or not (folder / "baseline-kar.parquet.json").exists():
        return ["–", "–", f"{tokens:,.0f}"]
    mode = sidecar("baseline-kar.parquet")["modes"][mode]
    return cells(1000 * mode["median_10000"], mode["megabytes"], tokens)


def table(folders, seconds):
    """Lines of the table; folders and seconds by split"""
    split = pd.read_parquet(folders[0] / "interactions.parquet", columns=["split"])["split"].value_counts()
    found = {name: rows_of(folders, file, features) for name, _, file, features, _ in LINES}
    lines = []
    for name, system, file, features, control in LINES:
        if (rows := found[name]) is None:
            continue
        minutes = [part[system] / 60 for part in seconds if system in part]
        has_llm = system != "codes" or "codes" in features
        cells = [name, f"{len(rows)}", f"{rows['test_rows'].mean():,.0f}" if "test_rows" in rows else "all",
                 *(f"{rows[key].mean():.4f}" for key in ("auc", "logloss")), control or "–"]
        if control and found[control] is not None and len(gains := gains_over(rows, found[control])):
            splits, overlap = gains.index.get_level_values("split_seed"), split["test"] / split["train"]
            cells += [with_interval(*paired_interval(gains[key], splits, overlap)[:2]) for key in gains]
        else:
            cells += ["–", "–"]
        lines.append([*cells, *costs_of(folders[0], system, features, rows),
                      f"{sum(minutes) / len(minutes):.1f}" if minutes and has_llm else "–"])
    return markdown(["system", "runs", "test rows", "AUC", "logloss", "control", "AUC - control",
                     "logloss - control", "ms", "MB", "tokens", "minutes"], lines)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/systems"), help="folder of all runs")
    parser.add_argument("--llm", default="tiny", help="as stage 2's --llm")
    parser.add_argument("--evidence", choices=SETS, default="ratings", help="what the codes are made of")
    parser.add_argument("--systems", nargs="+", choices=["codes", *OPTIONS], default=["codes", *OPTIONS],
                        help="what is run (the table has all that is there)")
    parser.add_argument("--splits", type=at_least(1), default=1, help="how many splits")
    # all else goes to stage 1, which refuses what it does not know
    args, of_stage_1 = parser.parse_known_args()
    args.systems = list(dict.fromkeys(args.systems))
    folders = [args.run_dir / f"split-{split}" for split in range(args.splits)]
    try:
        seconds = [climb(args, folder, of_stage_1, split) for split, folder in enumerate(folders)]
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # the stage has said why
    print("\n".join(table(folders, seconds)))


if __name__ == "__main__":
    main()
