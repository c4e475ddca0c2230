"""Artifacts with a digest that matches, as another tool may write them: refused by name, in one line."""

import json
import shutil
import types

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import SMALL, run_stage
from userip.artifacts import read_artifacts, sha256_of


def overwrite(run, name, content):
    """Put other content into an artifact, and its digest into every sidecar that names it"""
    path = run / name
    before = sha256_of(path)
    content.to_parquet(path) if isinstance(content, pd.DataFrame) else torch.save(content, path) \
        if not isinstance(content, bytes) else path.write_bytes(content)
    for sidecar in run.glob("*.json"):
        sidecar.write_text(sidecar.read_text().replace(before, sha256_of(path)))


def copy_of(small_run, tmp_path):
    return shutil.copytree(small_run[1], tmp_path / "run")


FRAMES = [
    ("interactions.parquet", lambda f: f.drop(columns="label"), "has no column label"),
    ("interactions.parquet", lambda f: f.iloc[:0], "holds no rows"),
    ("interactions.parquet", lambda f: f.assign(rating=np.nan), "finite numbers in column rating"),
    ("interactions.parquet", lambda f: f.assign(label=2), "'2' in column label"),
    ("interactions.parquet", lambda f: f.assign(user=f["user"] + 0.5), "not whole"),
    ("interactions.parquet", lambda f: f.assign(item=f["item"] - 1), "below 0"),
    ("interactions.parquet", lambda f: f.assign(item=f["item"] + 1), "leaves out a number"),
    ("interactions.parquet", lambda f: f.assign(split="holdout"), "'holdout' in column split"),
    ("interactions.parquet", lambda f: b"PAR1 not parquet", "cannot be read"),
    ("items.parquet", lambda f: f.sample(frac=1, random_state=0), "must have item 0, 1, 2, … in this order"),
    ("items.parquet", lambda f: f.assign(title=None), "rows without title"),
    ("items.parquet", lambda f: f.assign(brand=7), "something else than text in column brand"),
    ("items.parquet", lambda f: f.assign(price=np.inf), "finite numbers in column price"),
    ("interactions.parquet", lambda f: f.assign(user=f["user"].astype(float)), "not whole"),
    ("interactions.parquet", lambda f: f.assign(split="train"), "has no valid rows")]
LATER = [
    ("feature_bank.parquet", lambda f: f.sample(frac=1, random_state=0), "must have user 0, 1, 2"),
    ("feature_bank.parquet", lambda f: f.assign(hobby=7), "a code above 2 in column hobby"),
    ("feature_bank.parquet", lambda f: f.assign(hobby=0.5), "not whole"),
    ("feature_bank.parquet", lambda f: f.assign(hobby="x"), "finite numbers in column hobby"),
    ("feature_bank.parquet", lambda f: f.drop(columns="hobby"), "has no column hobby"),
    ("feature_bank.parquet", lambda f: f.iloc[:9], "number of users"),
    ("feature_bank.parquet", lambda f: f.assign(user_id=f["user_id"].to_numpy()[::-1]), "has the user_ids")]


@pytest.mark.parametrize("script, name, change, problem", [
    *(("02_infer_profiles.py", *case) for case in FRAMES), *(("04_train_ctr.py", *case) for case in LATER)])
def test_a_frame_that_no_stage_writes_is_refused_by_name(small_run, tmp_path, script, name, change, problem):
    run = copy_of(small_run, tmp_path)
    overwrite(run, name, change(pd.read_parquet(run / name)))
    line = run_stage(script, "--run-dir", run, *SMALL[script], ok=False)
    assert name in line and problem in line, line


@pytest.mark.parametrize("change, problem", [
    (lambda s: s | {"profiles": s["profiles"][:, :1]}, "does not fit"),
    (lambda s: s | {"profiles": s["profiles"] * np.nan}, "not finite"),
    (lambda s: {key: s[key] for key in s if key != "gain"}, "has no tensor gain"),
    (lambda s: s | {"noise": s["noise"][0]}, "3 axes"), (lambda s: [1, 2], "has no list names"),
    (lambda s: s | {"has_evidence": s["has_evidence"][:5], "profiles": s["profiles"][:5], "gain": s["gain"][:5],
                    "num_evidence": s["num_evidence"][:5]}, "number of users"),
    (lambda s: types.SimpleNamespace(), "cannot be read"), (lambda s: b"PK not a file of tensors", "cannot be read")])
def test_profiles_that_no_stage_writes_are_refused_by_name(small_run, tmp_path, change, problem):
    """A malicious pickle, too: torch reads tensors and plain values only."""
    run = copy_of(small_run, tmp_path)
    overwrite(run, "profiles.pt", change(torch.load(run / "profiles.pt", weights_only=True)))
    line = run_stage("03_quantize.py", "--run-dir", run, ok=False)
    assert "profiles.pt" in line and problem in line, line


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"sha256": 1}', '{"sha256": "a", "inputs": 3, "options": []}',
                                  "[" * 100_000, "\ud800"])
def test_a_sidecar_of_any_shape_is_refused(small_run, tmp_path, text):
    run = copy_of(small_run, tmp_path)
    (run / "profiles.pt.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "is not what a stage writes" in run_stage("03_quantize.py", "--run-dir", run, ok=False)


def test_a_directory_in_place_of_a_file_is_refused(small_run, tmp_path):
    run = copy_of(small_run, tmp_path)
    (run / "profiles.pt").unlink()
    (run / "profiles.pt").mkdir()
    assert "profiles.pt" in run_stage("03_quantize.py", "--run-dir", run, ok=False)


def test_an_artifact_of_another_run_put_beside_is_refused(small_run, tmp_path):
    """items.parquet with its own sidecar, of a run on other interactions; and stage 1 killed between two files"""
    run, other = copy_of(small_run, tmp_path), tmp_path / "other"
    run_stage("01_prepare.py", "--dataset", "table", "--raw", small_run[0], "--run-dir", other, "--seed", 1)
    for name in ("items.parquet", "items.parquet.json"):
        shutil.copy(other / name, run / name)
    line = run_stage("02_infer_profiles.py", "--run-dir", run, *SMALL["02_infer_profiles.py"], ok=False)
    assert "two runs are mixed" in line and "items.parquet belongs to run" in line
    for name in ("interactions.parquet", "interactions.parquet.json"):  # written first; then the kill
        shutil.copy(small_run[1] / name, other / name)
    line = run_stage("02_infer_profiles.py", "--run-dir", other, *SMALL["02_infer_profiles.py"], ok=False)
    assert "two runs are mixed" in line and "python 01_prepare.py" in line


def test_every_artifact_names_the_run_that_it_belongs_to(small_run):
    runs = {path.name: json.loads(path.read_text())["run"] for path in small_run[1].glob("*.json")
            if path.name != "prepare.json"}
    assert set(runs.values()) == {sha256_of(small_run[1] / "interactions.parquet")} and len(runs) >= 11


def test_what_stages_write_passes(small_run):
    names = ("interactions.parquet", "items.parquet", "users.parquet", "profiles.pt", "codebook.pt",
             "feature_bank.parquet", "results.parquet")
    assert len(read_artifacts(types.SimpleNamespace(run_dir=str(small_run[1])), *names)) == len(names)
