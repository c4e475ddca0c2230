"""Artifacts with a digest that matches, as another tool may write them: refused by name, in one line."""

import json
import shutil
import types

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import SMALL, dies, read_raw, run_stage, write_ml_100k
from userip.artifacts import MADE_BY, read_artifacts, sha256_of


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
    (lambda s: s | {"noise": s["noise"][0]}, "3 axes"), (lambda s: [1, 2], "has no dict"),
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


def asymmetric(stored):
    noise = stored["noise"].clone()
    noise[0, 0, 1] += noise.diagonal(dim1=1, dim2=2).sum()
    return stored | {"noise": noise}


def of_part(change):
    """A change of the hobby's part of codebook.pt"""
    return lambda stored: stored | {"hobby": stored["hobby"] | change(stored["hobby"])}


ALL = ("interactions.parquet", "items.parquet", "users.parquet", "scores.pt", "profiles.pt", "codebook.pt",
       "feature_bank.parquet", "results.parquet", "results.md")
FOREIGN = [
    *(("profiles.pt", lambda s, key=key, kind=kind: s | {key: s[key].to(kind)}, f"no tensor {key} of")
      for key, kind in (("profiles", torch.float64), ("shared", torch.float16), ("gain", torch.int64),
                        ("noise", torch.float64), ("num_evidence", torch.float32), ("has_evidence", torch.uint8))),
    *(("profiles.pt", lambda s, key=key, value=value: s | {key: value}, problem) for key, value, problem in (
        ("names", ["hobby"], "no list names of the right length"), ("names", [1, 2], "names[0] 1, not str"),
        ("names", "ab", "no list names"), ("names", ["hobby", "hobby"], "no words or not unlike"),
        ("names", ["hobby", "user"], "no words or not unlike"), ("names", ["a", "b"], "has the profiles"),
        ("texts", ["one"], "no list texts"), ("texts", [None, None], "texts[0] None"), ("llm", 7, "llm 7, not str"),
        ("tiny_llm", None, "tiny_llm None"), ("fold", [0, 1], "no tensor"), ("prior", [1], "no dict prior"), ("prior", {}, "prior of other profiles"),
        ("prior", {"hobby": {}}, "no tensor prior hobby codebook"))),
    ("profiles.pt", lambda s: {key: s[key] for key in s if key != "texts"}, "no list texts"),
    ("profiles.pt", lambda s: s | {"num_evidence": s["num_evidence"] - 99}, "below 0"),
    ("profiles.pt", lambda s: s | {"habits": torch.zeros(s["gain"].shape)}, "rating habits without --ratings"),
    ("profiles.pt", lambda s: s | {"profiles": s["profiles"].requires_grad_()}, "no tensor profiles"),
    ("profiles.pt", lambda s: s | {"profiles": s["profiles"].to_sparse()}, "no tensor profiles"),
    ("profiles.pt", lambda s: s | {"noise": -s["noise"]}, "no covariance"),
    ("profiles.pt", asymmetric, "no covariance"),
    *(("scores.pt", lambda s, key=key, value=value: s | {key: value}, problem) for key, value, problem in (
        ("names", None, "no list names"), ("num_verdicts", [1, 0], "num_verdicts[1] 0"),
        ("num_verdicts", [1, 2], "unlike numbers of items"), ("told", [True, True], "no tensor told[0]"),
        ("lift", torch.zeros(2, 9, 3), "does not fit"), ("pull", torch.zeros(2).double(), "no tensor pull"))),
    ("scores.pt", lambda s: s | {"tables": [table[:9] for table in s["tables"]]}, "does not fit"),
    ("codebook.pt", lambda s: {}, "has the profiles"), ("codebook.pt", lambda s: {1: 2}, "other keys than texts"),
    ("codebook.pt", of_part(lambda part: {"mean": part["mean"].double()}), "no tensor hobby mean of float32"),
    ("codebook.pt", of_part(lambda part: {"mean": part["mean"][:9], "transform": part["transform"][:9]}),
     "but one of"),
    ("codebook.pt", of_part(lambda part: {"usage": part["usage"].float()}), "no tensor hobby usage of int64"),
    ("codebook.pt", of_part(lambda part: {"codebook": part["codebook"][:1], "usage": part["usage"][:1]}),
     "but one of"),
    ("interactions.parquet", lambda f: f.assign(label=1 - f["label"]), "labels other than rating > --threshold"),
    ("interactions.parquet", lambda f: pd.concat([f.iloc[:1], f], ignore_index=True), "an item twice"),
    ("interactions.parquet", lambda f: f.iloc[::-1].reset_index(drop=True), "not sorted"),
    ("interactions.parquet", lambda f: f[f["item"] != 3].reset_index(drop=True), "leaves out a number"),
    ("interactions.parquet", lambda f: f.assign(user=f["user"].astype("int32")), "not whole (int64)"),
    ("interactions.parquet", lambda f: f.set_index(f.index + 1), "an index"),
    ("interactions.parquet", lambda f: f.assign(review=1), "column review holds no texts"),
    ("users.parquet", lambda f: f.assign(gender=[["F"]] * len(f)), "lists in a column"),
    ("results.parquet", lambda f: f.iloc[1:].reset_index(drop=True), "begin with the base rate"),
    ("results.parquet", lambda f: f.assign(lr=np.nan), "what was chosen"),
    ("results.parquet", lambda f: f.assign(model="resnet"), "'resnet' in column model"),
    ("results.parquet", lambda f: f.drop(columns="start"), "no column start")]


@pytest.mark.parametrize("name, change, problem", FOREIGN)
def test_what_no_stage_writes_is_refused_by_name(small_run, tmp_path, capsys, name, change, problem):
    run = copy_of(small_run, tmp_path)
    path = run / name
    overwrite(run, name, change(pd.read_parquet(path) if path.suffix == ".parquet" else torch.load(path)))
    if name == "interactions.parquet":  # the run that all artifacts belong to
        digest = json.loads((run / f"{name}.json").read_text())["run"]
        assert digest == sha256_of(path)
    line = dies(capsys, read_artifacts, types.SimpleNamespace(run_dir=str(run)), *ALL)
    assert name in line and problem in line, line


@pytest.mark.parametrize("name, keys, value, problem", [
    ("profiles.pt", "inputs", {"items.parquet": 5}, "inputs items.parquet 5, not str"),
    ("profiles.pt", "inputs", [], "no dict inputs"), ("profiles.pt", "seed", "0", "seed '0'"),
    ("profiles.pt", "options route", "none", "no list options route"),
    ("profiles.pt", "options route", ["title"], "--route is not a list for each"),
    ("profiles.pt", "options route", [None], "options route[0] None"),
    ("profiles.pt", "options ratings", 1, "options ratings 1, not bool"),
    ("profiles.pt", "heldout_nll own", None, "heldout_nll own None"),
    ("profiles.pt", "heldout_nll own_minus_shared", [1.0], "no list heldout_nll own_minus_shared"),
    ("interactions.parquet", "options threshold", "3", "options threshold '3'"),
    ("interactions.parquet", "split_seed", -1, "split_seed -1, not int from 0"),
    ("users.parquet", "bayes_ari", {"hobby": "x"}, "bayes_ari hobby 'x'"),
    ("feature_bank.parquet", "codes", [4, "3"], "codes[1] '3'"), ("feature_bank.parquet", "codes", [2], "no list codes"),
    ("feature_bank.parquet", "names", [[], []], "names[0] []"), ("feature_bank.parquet", "has_folds", True, "folds"),
    ("feature_bank.parquet", "hobby_perplexity", None, "hobby_perplexity None"),
    ("feature_bank.parquet", "hobby_perplexity", float("nan"), "hobby_perplexity nan"),
    ("feature_bank.parquet", "hobby_share_of_bayes", 0.5, "hobby_vs_true_hobby None"),
    ("results.parquet", "gains", {"dcn": {"auc_gain": 0.1}}, "gains dcn auc_half_interval None"),
    ("results.parquet", "options models", [], "no list options models"),
    ("results.parquet", "options fields", [3], "--fields are no names"),
    ("results.parquet", "options models", ["resnet"], "options models[0] 'resnet'"),
    ("results.parquet", "options dropout", 1.0, "options dropout 1.0, not float from 0"),
    ("results.parquet", "options hidden", [16, True], "options hidden[1] True")])
def test_a_sidecar_with_odd_facts_is_refused_by_name(small_run, tmp_path, capsys, name, keys, value, problem):
    run = copy_of(small_run, tmp_path)
    path = run / f"{name}.json"
    sidecar = part = json.loads(path.read_text())
    *first, last = keys.split()
    for key in first:
        part = part[key]
    part[last] = value
    path.write_text(json.dumps(sidecar))
    line = dies(capsys, read_artifacts, types.SimpleNamespace(run_dir=str(run)), *ALL)
    assert name in line and problem in line and MADE_BY[name] in line, line


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


def test_columns_without_any_value_pass(tmp_path):
    """MovieLens knows no brand and no price"""
    write_ml_100k(tmp_path / "raw")
    read_raw(tmp_path, "ml-100k", "--min-interactions", 1)
    (items,) = read_artifacts(types.SimpleNamespace(run_dir=tmp_path / "run"), "items.parquet")
    assert items["brand"].isna().all() and len(items)


def test_what_stages_write_passes(small_run):
    names = ("interactions.parquet", "items.parquet", "users.parquet", "profiles.pt", "codebook.pt",
             "feature_bank.parquet", "results.parquet")
    assert len(read_artifacts(types.SimpleNamespace(run_dir=str(small_run[1])), *names)) == len(names)
