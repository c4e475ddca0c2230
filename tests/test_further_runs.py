"""Further splits and codebook sizes: stages 1 to 3 repeated with the options of the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from conftest import STAGES, dies, run_stage
from userip import further_runs
from userip.artifacts import write_artifact
from userip.further_runs import command_line, read_json


def test_runs_that_cannot_be_repeated_are_refused_before_anything_is_trained(small_run, tmp_path):
    shutil.copytree(small_run[1], tmp_path / "run")
    path = tmp_path / "run/profiles.pt.json"
    sidecar = json.loads(path.read_text())
    sidecar["options"]["prior"] = "run/codebook.pt"
    path.write_text(json.dumps(sidecar))
    for more in (("--splits", 2), ("--codebook-sizes",)):
        line = run_stage("04_train_ctr.py", "--run-dir", tmp_path / "run", *more, ok=False)
        assert more[0] in line and "--prior" in line and not (tmp_path / "run/split-1").exists()


def test_a_switch_that_is_off_stays_off_on_a_command_line():
    quantize = STAGES["03_quantize.py"]
    for argv in ([], ["--no-whiten"], ["--released"], ["--no-whiten", "--codes", "3", "4"]):
        options = vars(quantize.parse_args(argv))
        assert vars(quantize.parse_args(command_line(options))) == options


def test_options_become_a_command_line_again():
    options = {"run_dir": "x", "paper": True, "codes": [4, 3], "raw": None, "columns": [], "strict": False,
               "beta": 0.0, "download": ""}
    assert command_line(options) == ["--run-dir", "x", "--paper", "--codes", "4", "3", "--beta", "0.0"]


def test_further_splits_are_made_by_the_stages_with_the_same_options(small_run, tmp_path, monkeypatch):
    """Another split has rows and codes of its own; it is made once, and again when the options differ."""
    def in_this_process(command):
        run_stage(Path(command[1]).name, *command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(further_runs.subprocess, "run", in_this_process)
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    argv = ("04_train_ctr.py", "--run-dir", run, "--models", "dcn", "--seeds", 2, "--epochs", 1,
            "--splits", 2)
    printed = run_stage(*argv)
    assert "split-1: 01_prepare.py" in printed and "split-1: 03_quantize.py" in printed
    results = pd.read_parquet(run / "results.parquet")
    assert set(results["split_seed"]) == {0, 1} and len(results) == 2 * (1 + 2 + 3 * 2)
    first, second = (pd.read_parquet(folder / "interactions.parquet") for folder in (run, run / "split-1"))
    assert first.drop(columns="split").equals(second.drop(columns="split"))
    assert (first["split"] != second["split"]).any()
    for name in ("interactions.parquet", "profiles.pt", "feature_bank.parquet"):
        one, two = (json.loads((folder / f"{name}.json").read_text())["options"]
                    for folder in (run, run / "split-1"))
        assert {key for key in one if one[key] != two[key]} <= {"run_dir", "split_seed"}
    again = run_stage(*argv)
    assert "01_prepare.py" not in again and "finished before" in again
    assert pd.read_parquet(run / "results.parquet").equals(results)
    assert "Nadeau" in (run / "results.md").read_text()
    path = run / "split-1/profiles.pt.json"  # as if memory had not sufficed for the batch that was asked for
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"options": stored["options"] | {"tokens_per_batch": 77}}))
    assert "02_infer_profiles.py" not in run_stage(*argv)
    # as after a kill between stages 1 and 2: the options are as asked for, but stage 2 has read other rows
    path = run / "split-1/interactions.parquet"
    sidecar = json.loads((run / "split-1/interactions.parquet.json").read_text())
    facts = {key: sidecar[key] for key in ("split_seed", "split", "dataset", "interactions")}
    write_artifact(SimpleNamespace(**sidecar["options"]), path.name, pd.read_parquet(path).iloc[:-1], **facts)
    monkeypatch.setattr(further_runs.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    assert "02_infer_profiles.py failed" in run_stage(*argv, ok=False)


def test_a_json_file_that_cannot_be_read_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert read_json(path) is None
    path.write_text('[{"auc": 1}]')
    assert read_json(path) == [{"auc": 1}]
    for content in (b"\xff\xfe", b'[{"auc"'):
        path.write_bytes(content)
        assert "move it away" in dies(capsys, read_json, path)
    path.unlink()
    path.mkdir()
    assert "cannot read" in dies(capsys, read_json, path)
