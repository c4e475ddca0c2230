import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import (RATINGS, ROOT, SMALL, STAGES, run_pipeline, run_process, run_stage, write_interactions,
                      write_table)
from userip.artifacts import MADE_BY, read_artifacts, write_artifact


@pytest.mark.parametrize("split, ratings", [
    (["cold-item"], False), (["random"], True), (["temporal"], False), (["cold-user"], True),
    (["published"], False)], ids=str)
def test_no_test_row_reaches_profiles_codes_or_models(tmp_path, split, ratings):
    """Poison the rating and review of every test row, and the title of each item that only test rows have."""
    interactions, items = write_table(tmp_path / "raw")
    rows = np.random.default_rng(1).permutation(len(interactions))
    interactions["split"] = np.array(["train"] * 8 + ["valid", "test"])[rows % 10]
    lonely = interactions.groupby("user_id").tail(1).index[:6]  # late rows: some are test under any split
    interactions.loc[lonely, ["item_id", "split"]] = [["only", "test"]] * len(lonely)
    items = pd.concat([items, items.tail(1).assign(item_id="only")])

    def write(name, frame, suffix=""):
        (tmp_path / name).mkdir()
        frame.to_csv(tmp_path / name / "interactions.csv", index=False)
        titles = items["title"] + np.where(items["item_id"].isin(only_test), suffix, "")
        items.assign(title=titles).to_csv(tmp_path / name / "items.csv", index=False)

    only_test = set()
    write("plain", interactions)
    run_pipeline(tmp_path / "run", tmp_path / "plain", stages=1, split=split)
    table, stored, users = (pd.read_parquet(tmp_path / f"run/{name}.parquet")
                            for name in ("interactions", "items", "users"))
    keys = ["user_id", "item_id"]
    table["user_id"] = users["user_id"].to_numpy()[table["user"]]
    table["item_id"] = stored["item_id"].to_numpy()[table["item"]]
    found = interactions[keys].merge(table[[*keys, "split"]], how="left")["split"].to_numpy()
    is_test = found == "test"
    assert is_test.any() and set(found) >= {"train", "valid", "test"}
    only_test = set(interactions.loc[is_test, "item_id"]) - set(interactions.loc[~is_test, "item_id"])
    assert only_test == {"only"} or "random" in split or split[0][:4] == "cold"
    poisoned = interactions.assign(review=np.where(is_test, "poison", "plain"))
    poisoned.loc[is_test, "rating"] = 6 - poisoned.loc[is_test, "rating"]
    write("clean", interactions.assign(review="plain"))
    write("poisoned", poisoned, " poison")
    first, second = tmp_path / "run_clean", tmp_path / "run_poisoned"
    for run, name in ((first, "clean"), (second, "poisoned")):
        run_pipeline(run, tmp_path / name, stages=4 + ratings, split=split, ratings=ratings)
        if split[0].startswith("cold"):
            run_stage("04_train_ctr.py", "--run-dir", run, *SMALL["04_train_ctr.py"], "--models", "dcn", "--features",
                      "codes", "leniency16+tfidf", "item-mean", "--fields", "category", "brand", "price")
    assert (first / "interactions.parquet").read_bytes() != (second / "interactions.parquet").read_bytes()
    for name in ("profiles.pt", "codebook.pt", "feature_bank.parquet", "tiny_llm/model.safetensors",
                 "tiny_llm/tokenizer.json", "scores.pt", *["train_codes.parquet"] * ratings):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    results = [pd.read_parquet(path / "results.parquet") for path in (first, second)]
    same = ["model", "features", "seed", "rows", "valid_auc", "valid_logloss", "best_epoch"]
    pd.testing.assert_frame_equal(results[0][same], results[1][same], check_exact=True)
    assert (results[0]["auc"] != results[1]["auc"]).any()  # only the final score sees the test labels


@pytest.mark.parametrize("ratings", [False, True])
@pytest.mark.parametrize("poisoned", ["support", "test"])
def test_support_rows_move_their_own_users_profile_and_test_rows_nothing(tmp_path, poisoned, ratings):
    """Other items in cold users' rows: no codeword moves, nor any profile but, by support rows, their own."""
    import argparse

    write_table(tmp_path / "raw")
    run_pipeline(tmp_path / "one", tmp_path / "raw", stages=1, split=["cold-user"])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    options = argparse.Namespace(run_dir=str(tmp_path / "two"), seed=0)
    (table,) = read_artifacts(options, "interactions.parquet")
    cold = sorted(set(table.loc[table["split"] == "support", "user"]))
    rows = (table["split"] == poisoned) & table["user"].isin(cold[1:])  # one of them stays as he is
    table.loc[rows, "item"] = (table.loc[rows, "item"] + 7) % (table["item"].max() + 1)
    if poisoned == "support":  # and fewer of them
        table.loc[table.index[rows & (table["user"] == cold[-1])][:2], "split"] = "test"
    write_interactions(options, table)
    stored, results = [], []
    for name in ("one", "two"):
        for script in list(SMALL)[:3]:
            run_stage(script, "--run-dir", tmp_path / name, *SMALL[script],
                      *(RATINGS.get(script, []) if ratings else []))
        stored.append(torch.load(tmp_path / name / "profiles.pt", weights_only=True))
        results.append(pd.read_parquet(tmp_path / name / "results.parquet").query("features != 'random'"))
    moved = (stored[0]["profiles"] != stored[1]["profiles"]).any(-1).any(-1)
    moved = moved.any(0) if ratings else moved
    assert moved.nonzero()[:, 0].tolist() == (cold[1:] if poisoned == "support" else [])
    assert stored[0]["has_evidence"].all()
    for name in ("codebook.pt", "tiny_llm/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    same = ["model", "features", "seed", "rows", "valid_auc", "valid_logloss", "best_epoch"]
    pd.testing.assert_frame_equal(results[0][same], results[1][same], check_exact=True)


def test_items_that_only_test_rows_have_leave_no_trace(small_run, tmp_path):
    """At the artifacts themselves: a title that no train or valid row has may say anything."""
    import argparse

    profiles = []
    for title in ("iron skillet", "poison"):
        run = tmp_path / title.split()[0]
        run.mkdir()
        for name in ("interactions", "items", "users"):
            for suffix in (".parquet", ".parquet.json"):
                shutil.copy(small_run[1] / f"{name}{suffix}", run)
        options = argparse.Namespace(run_dir=str(run), seed=0)
        interactions, items = read_artifacts(options, "interactions.parquet", "items.parquet")
        interactions.loc[interactions["item"] == 3, "split"] = "test"
        items.loc[3, "title"] = title
        write_artifact(options, "items.parquet", items)
        write_interactions(options, interactions)
        run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--tiny-steps", 4,
                  "--shared-steps", 3, "--map-steps", 3, "--heldout", 60)
        profiles.append((run / "profiles.pt").read_bytes())
    assert profiles[0] == profiles[1]


@pytest.mark.parametrize("script", STAGES)
def test_unknown_options_are_refused(script, capsys):
    with pytest.raises(SystemExit) as stop:
        STAGES[script].parse_args(["--no-such-option", "1"])
    assert stop.value.code == 2 and "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("script, option, value", [
    ("01_prepare.py", "--min-interactions", "0"), ("03_quantize.py", "--run-dir", ""),
    ("02_infer_profiles.py", "--heldout", "-5"),
    ("02_infer_profiles.py", "--pull", "-1"), ("03_quantize.py", "--beta", "nan"),
    ("04_train_ctr.py", "--batch-size", "0"),
    ("04_train_ctr.py", "--dropout", "1.5"), ("05_case_study.py", "--num-users", "many")])
def test_numbers_out_of_range_are_refused(script, option, value, capsys):
    with pytest.raises(SystemExit) as stop:
        STAGES[script].parse_args([option, value])
    assert stop.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize("script", STAGES)
def test_help_tells_stage_inputs_outputs_and_an_example(script, capsys):
    with pytest.raises(SystemExit):
        STAGES[script].parse_args(["--help"])
    told = capsys.readouterr().out
    for part in (f"Stage {script[1]} of 5", "Reads", "Writes", f"Example: python {script}", "--run-dir",
                 "--seed"):
        assert part in told
    assert not re.search(r"\n  --[a-z-]+( [A-Z.\[\] ]+)?\n  --", told), "an option without help"


def commands_of(text):
    """Stages and their options in the bash blocks of a text, in order"""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|\||\bdo\b", line.split(" #")[0]):
                if (match := re.match(r"\s*python (0\d_\w+\.py)(.*)", part)):
                    yield match[1], match[2]


def test_every_command_in_the_readme_parses():
    commands = list(commands_of((Path(ROOT) / "README.md").read_text()))
    assert len(commands) >= 8
    for script, options in commands:
        if "$" not in options:
            STAGES[script].parse_args(shlex.split(options))


def section_of(title):
    return (Path(ROOT) / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_quick_start_runs(tmp_path):
    assert 'for stage in 0*.py; do python "$stage" || break; done' in section_of("Quick start")
    fast = {**SMALL, "04_train_ctr.py": ["--models", "dcn", "--seeds", 1, "--epochs", 2]}
    for script in STAGES:
        run_stage(script, *fast.get(script, []), "--run-dir", tmp_path / "run")
    assert (tmp_path / "run" / "report.html").exists()


def test_the_commands_for_own_data_run_and_the_same_seed_gives_the_same_bits(small_run, tmp_path):
    """In order, as they stand and as processes, with the small numbers of the run that they must equal"""
    raw, run = small_run
    section = section_of("Your own data")
    commands = [(script, shlex.split(options)) for script, options in commands_of(section)]
    assert [script for script, _ in commands] == list(STAGES)
    for script, options in commands:
        options = [str(raw) if word == "data/mine" else word for word in options]
        assert options[options.index("--run-dir") + 1] == "runs/mine"  # given twice: the last one counts
        run_process(script, *options, *SMALL.get(script, []), "--run-dir", tmp_path / "again")
    names = [name for name in MADE_BY if not name.startswith(
        ("figure", "new_", "train_codes", "item_", "baseline-", "pepler", "peapod"))]
    assert len(names) == 11
    again = tmp_path / "again"
    different = [name for name in names if (run / name).read_bytes() != (again / name).read_bytes()]
    assert not different


def test_the_tree_holds_what_the_readme_says_and_nothing_else():
    allowed = {*STAGES, "common.py", "userip", "baselines", "docs", "tests", "requirements.txt", "README.md",
               "LICENSE", "assets", "runs", "__pycache__"}
    found = {path.name for path in Path(ROOT).iterdir() if not path.name.startswith(".")}
    assert found - allowed <= {"v", "venv"}


def test_requirements_pin_exact_versions_of_all_that_is_imported():
    lines = (Path(ROOT) / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    imported = set()
    for path in [path for folder in (".", "userip", "baselines", "tests")
                 for path in Path(ROOT, folder).glob("*.py")]:
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    packages = {"sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}
    third_party = {"torch", "transformers", "numpy", "pandas", "sklearn", "matplotlib", "tqdm", "pytest",
                   "scipy", "tokenizers", "huggingface_hub", "pyarrow", "msgspec", "hypothesis"}
    for name in imported & third_party:
        assert packages.get(name, name) in pinned, name
    assert torch.__version__.split("+")[0]


def test_processes_leave_with_code_2_and_one_line(tmp_path):
    line = run_process("02_infer_profiles.py", "--run-dir", tmp_path, ok=False)
    assert line.startswith("02_infer_profiles.py: error:") and "python 01_prepare.py --run-dir" in line
