"""Every option of every stage: it moves an artifact, changes speed only, or is refused where nothing reads it."""

import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from conftest import STAGES, run_stage, save_llm
from userip.options import run_program

GRADIENT = ["--method", "gradient", "--steps", 2]
HISTORY = [*GRADIENT, "--evidence", "history"]
MOVES, SAME, REFUSED, STOPS, ELSEWHERE = "moves an artifact", "same bits", "refused", "writes nothing", "elsewhere"
# option -> cases of (its value, options beside it in both runs, what happens); ELSEWHERE: a test of its own
OPTIONS = {
    "01_prepare.py": {
        "run-dir": ELSEWHERE, "dataset": ELSEWHERE, "raw": ELSEWHERE,
        "seed": [([1], [], MOVES), ([1], ["--split", "temporal"], REFUSED)],
        "category": [(["Books"], [], REFUSED)], "columns": ELSEWHERE, "fold": [([2], [], REFUSED)],
        "download": [([], [], REFUSED)], "max-bad": [([0.5], [], REFUSED)], "max-line": [([2], [], SAME)],
        "max-ratio": [([100], [], SAME)], "min-interactions": ELSEWHERE, "threshold": [([4], [], MOVES)],
        "split": [(["temporal"], [], MOVES), (["cold-item"], [], MOVES), (["published"], [], REFUSED)],
        "split-seed": [([1], [], MOVES), ([1], ["--split", "temporal"], REFUSED)]},
    "02_infer_profiles.py": {
        "run-dir": ELSEWHERE, "only-users": ELSEWHERE, "prior": ELSEWHERE, "released": ELSEWHERE,
        "items": [([], [], SAME), ([], ["--mask", "causal"], REFUSED)], "only-items": ELSEWHERE,
        "seed": [([1], [], MOVES)], "paper": [([], [], MOVES)], "llm": [(["tiny", "--tiny-steps", 2], [], MOVES)],
        "evidence": [(["history"], GRADIENT, MOVES), (["history"], [], REFUSED), (["review"], [], REFUSED)],
        "ratings": [([], [], MOVES)], "folds": [([2], [], MOVES), ([1], [], REFUSED)],
        "route": [(["none"], [], MOVES), (["title"], [], REFUSED), (["title+title", "brand"], [], REFUSED)],
        "max-history": [([3], HISTORY, MOVES), ([3], [], REFUSED)], "mask": [(["causal"], [], MOVES)],
        "profiles": [(["a=her job is", "b=This user's sport is"], [], MOVES), (["a= "], [], REFUSED)],
        "task-text": [(["a job"], [], MOVES), ([" "], [], REFUSED)], "method": [(["gradient"], ["--route", "none"], MOVES)],
        "soft-tokens": [([2], [], MOVES), ([400], [], REFUSED)],
        "rank": [([2], [], MOVES), ([2], GRADIENT, REFUSED), ([1000], [], REFUSED)],
        "start": [(["random"], GRADIENT, MOVES), (["random"], [], REFUSED)],
        "steps": [([3], GRADIENT, MOVES), ([3], [], REFUSED)],
        "lr": [([0.5], GRADIENT, MOVES), ([0.5], [], REFUSED), (["inf"], GRADIENT, REFUSED), ([1e300], GRADIENT, REFUSED),
               ([1e29], GRADIENT, REFUSED)],
        "pull": [([3], [], MOVES), ([3], GRADIENT, MOVES), (["inf"], [], REFUSED), ([1e300], GRADIENT, REFUSED)],
        "field-weights": [(["none"], [], MOVES)], "shared-steps": [([5], [], MOVES)],
        "map-steps": [([5], [], MOVES), ([5], GRADIENT, REFUSED)], "tiny-steps": [([5], [], REFUSED)],
        "heldout": [([20], [], MOVES)], "dtype": [(["mixed"], [], MOVES), (["bfloat16"], [], MOVES)], "estimate": [([], [], STOPS)],
        "batch-size": [([7], GRADIENT, SAME), ([7], [], REFUSED)], "tokens-per-batch": [([200], [], SAME)]},
    "03_quantize.py": {
        "run-dir": ELSEWHERE, "apply": ELSEWHERE, "item-codes": [([4], [], REFUSED)], "seed": [([1], [], MOVES)], "paper": [([], [], MOVES)],
        "released": [([], [], MOVES)], "codes": [([3, 2], [], MOVES), ([100, 100], [], REFUSED)],
        "whiten": [([], [], MOVES)], "init": [(["released"], [], MOVES)],
        "stability": [([1], [], MOVES)], "epochs": [([3], [], MOVES)], "lr": [([0.1], [], MOVES), ([1e300], [], REFUSED), ([1e29], [], REFUSED), ([0], [], REFUSED)],
        "batch-size": [([100], [], MOVES)], "vq-weight": [([0.5], [], MOVES)], "beta": [([1], [], MOVES)],
        "rec-weight": [([0.1], [], MOVES)]},
    "04_train_ctr.py": {
        "run-dir": ELSEWHERE, "splits": ELSEWHERE, "codebook-sizes": ELSEWHERE, "compile": ELSEWHERE,
        "bench": ELSEWHERE, "seed": [([5], [], MOVES)], "seeds": [([2], [], MOVES)], "paper": [([], [], MOVES)],
        "features": [(["none"], [], MOVES), (["truth"], [], REFUSED), (["none+codes"], [], REFUSED)],
        "fields": [(["brand"], [], MOVES), (["colour"], [], REFUSED)],
        "models": [(["pnn"], [], MOVES), (["means"], [], REFUSED)],
        "field-dim": [([4], [], MOVES), ([4], ["--models", "means"], REFUSED), ([1], ["--models", "afn"], REFUSED)], "layers": [([1], [], MOVES), ([1], ["--models", "pnn"], REFUSED)],
        "hidden": [([8], [], MOVES), ([8], ["--models", "ffm"], REFUSED), ([8], ["--models", "means"], REFUSED)],
        "dropout": [([0.5], [], MOVES), ([0.5], ["--models", "ffm"], REFUSED), ([1.5], [], REFUSED)],
        "with-means": [([], [], MOVES), ([], ["--models", "means"], REFUSED)],
        "id-dropout": [([0.3], [], MOVES), ([0.3], ["--models", "means"], REFUSED)],
        "lr": [([0.1], [], MOVES), ([1e300], [], REFUSED), ([0.1], ["--models", "means"], REFUSED)],
        "weight-decay": [([0.1], [], MOVES), ([1e29], [], REFUSED)], "start": [([0.1], [], MOVES), ([1e29], [], REFUSED)], "batch-size": [([50], [], MOVES)],
        "epochs": [([3], [], MOVES)], "patience": [([1], ["--epochs", 6, "--lr", 0.3], MOVES)],
        "tune": [([], [], MOVES), ([], ["--lr", 0.1], REFUSED)]},
    "05_case_study.py": {
        "run-dir": ELSEWHERE, "user": ELSEWHERE, "seed": [([1], [], MOVES)], "num-users": [([3], [], MOVES)],
        "num-words": [([2], [], MOVES)],
        "num-scored": [([10], [], MOVES), ([3], ["--num-users", 4], REFUSED)]},
}
BASE = {"01_prepare.py": [], "02_infer_profiles.py": ["--shared-steps", 3, "--heldout", 60],
        "03_quantize.py": ["--codes", 2, 2, "--epochs", 2, "--stability", 0],
        "04_train_ctr.py": ["--models", "dcn", "--seeds", 1, "--epochs", 2], "05_case_study.py": ["--num-users", 2]}
CASES = [(script, option, *case) for script, table in OPTIONS.items() for option, cases in table.items()
         if cases != ELSEWHERE for case in cases]


@pytest.mark.parametrize("script", STAGES)
def test_the_table_has_every_option(script, capsys):
    with pytest.raises(SystemExit):
        STAGES[script].parse_args(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0].strip(",")[2:] for line in lines if line.startswith("  --")} == set(OPTIONS[script])


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        STAGES["03_quantize.py"].parse_args(["--help"])
    text = capsys.readouterr().out
    assert "learning rate of Adam (default: 0.003)" in text and "(default: False)" not in text
    assert text.count("default: 4 3") == 1 and "(default: None)" not in text


@pytest.mark.parametrize("script, words, option", [
    ("01_prepare.py", ["--raw", ""], "--raw"), ("02_infer_profiles.py", ["--llm", ""], "--llm"),
    ("02_infer_profiles.py", ["--llm= "], "--llm"), ("02_infer_profiles.py", ["--only-users", ""], "--only-users"),
    ("02_infer_profiles.py", ["--route", "title", " "], "--route"), ("04_train_ctr.py", ["--run-dir", ""], "--run-dir"),
    ("05_case_study.py", ["--user", ""], "--user")])
def test_a_blank_word_as_of_an_unset_variable_is_refused(script, words, option):
    assert f"{option} is empty or blank" in run_stage(script, *words, ok=False)


def outcome(run, script):
    """All numbers that a stage wrote: text that is equal where they are"""
    if script.startswith("01"):
        return [pd.read_parquet(run / f"{name}.parquet").to_csv() for name in ("interactions", "items", "users")]
    if script.startswith("02"):
        stored = torch.load(run / "profiles.pt", weights_only=True)
        nll = json.loads((run / "profiles.pt.json").read_text())["heldout_nll"]
        return [stored["profiles"].tolist(), stored["names"], [nll[name] for name in ("none", "shared", "own")]]
    if script.startswith("03"):
        sidecar = json.loads((run / "feature_bank.parquet.json").read_text())
        return (run / "codebook.pt").read_bytes(), [value for key, value in sidecar.items() if "stability" in key]
    if script.startswith("04"):
        return pd.read_parquet(run / "results.parquet").drop(columns="options").to_csv()
    sidecar = json.loads((run / "report.html.json").read_text())
    return {key: value for key, value in sidecar.items() if key not in ("options", "sha256", "seconds", "seed")}


@pytest.fixture(scope="module")
def before(small_run, tmp_path_factory):
    """outcome of a stage with options, computed once"""
    folder, known = tmp_path_factory.mktemp("options"), {}
    llm = save_llm(folder / "llm", "gpt2")

    def run(script, options, name):
        target = folder / name
        shutil.copytree(small_run[1], target)
        words = list(BASE[script])
        if script.startswith("01"):
            words += ["--dataset", "table", "--raw", small_run[0]]
        if script.startswith("02"):
            words += [] if "--llm" in options else ["--llm", llm]
            words += [] if {"gradient", "--paper", "--map-steps"} & set(map(str, options)) else ["--map-steps", 3]
        return target, ["--run-dir", target, *words, *options]

    def of(script, options):
        key = script, *map(str, options)
        if key not in known:
            target, words = run(script, options, f"before-{len(known)}")
            run_stage(script, *words)
            known[key] = outcome(target, script)
        return known[key]

    of.run = run
    return of


@pytest.mark.parametrize("script, option, value, beside, expected", CASES, ids=str)
def test_an_option_moves_an_artifact_or_is_refused(before, script, option, value, beside, expected):
    name = f"case-{CASES.index((script, option, value, beside, expected))}"
    word = "--no-whiten" if option == "whiten" else f"--{option}"
    target, words = before.run(script, [*beside, word, *value], name)
    files = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    if expected == REFUSED:
        line = run_stage(script, *words, ok=False)
        assert word in line or option in line, line
        return
    run_stage(script, *words)
    if expected == STOPS:
        assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} | {".lock": 0} == files | {".lock": 0}
        return
    after, same = outcome(target, script), before(script, beside)
    if script.startswith("02") and expected == SAME:  # but for the order of sums
        assert torch.tensor(after[0]).shape == torch.tensor(same[0]).shape
        assert torch.allclose(torch.tensor(after[0]), torch.tensor(same[0]), atol=1e-5)
    else:
        assert (after == same) == (expected == SAME)


@pytest.mark.parametrize("error, code, text", [
    (OSError(28, "No space left on device", "x/y"), 2, "x/y: No space left on device"),
    (OSError(30, "Read-only file system"), 2, "Read-only file system"), (KeyboardInterrupt(), 130, "interrupted")])
def test_what_a_disk_refuses_and_ctrl_c_end_in_one_line(tmp_path, capsys, error, code, text):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_program(main, lambda: SimpleNamespace(run_dir=str(tmp_path / "new")))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1 and text in lines[0]
    assert not (tmp_path / "new").exists()  # nothing came of it
