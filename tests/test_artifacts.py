import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from conftest import HELDOUT, dies
from userip.artifacts import lock, read_artifacts, read_sidecar, sha256_of, write_artifact


def options_of(run_dir, seed=0):
    return argparse.Namespace(run_dir=str(run_dir), seed=seed)


def profiles_of(num_users, seed=0):
    return {"profiles": torch.ones(num_users, 1, 3) + seed, "shared": torch.ones(1, 3), "gain": torch.ones(num_users, 1),
            "noise": torch.eye(3)[None], "num_evidence": torch.ones(num_users, 1, dtype=torch.long),
            "has_evidence": torch.ones(num_users, dtype=torch.bool), "names": ["a"], "texts": ["a"],
            "llm": "tiny", "tiny_llm": ""}


def write_pair(run_dir, seed=0):
    frame = pd.DataFrame({"user": [0, 1], "item": [1, 0], "rating": 3.0, "label": 0, "timestamp": seed,
                          "split": "train"})
    args = options_of(run_dir, seed)
    write_artifact(args, "interactions.parquet", frame, dataset="x")
    write_artifact(args, "profiles.pt", profiles_of(2, seed), inputs=["interactions.parquet"], heldout_nll=HELDOUT)


def test_artifacts_come_back_as_written_and_say_where_they_come_from(tmp_path):
    write_pair(tmp_path)
    frame, stored = read_artifacts(options_of(tmp_path), "interactions.parquet", "profiles.pt")
    assert frame["item"].tolist() == [1, 0] and torch.equal(stored["profiles"], torch.ones(2, 1, 3))
    sidecar = read_sidecar(options_of(tmp_path), "profiles.pt")
    assert sidecar["inputs"]["interactions.parquet"] == sha256_of(tmp_path / "interactions.parquet")
    assert sidecar["stage"] == "02_infer_profiles.py" and sidecar["torch"] == torch.__version__
    assert not list(tmp_path.glob(".*tmp"))


def test_a_missing_artifact_names_the_command_that_makes_it(tmp_path, capsys):
    line = dies(capsys, read_artifacts, options_of(tmp_path), "feature_bank.parquet")
    assert "feature_bank.parquet" in line and f"python 03_quantize.py --run-dir {tmp_path}" in line


def test_artifacts_of_two_runs_never_mix(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name, seed)
    for name in ("profiles.pt", "profiles.pt.json"):
        os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    line = dies(capsys, read_artifacts, options_of(tmp_path / "a"), "interactions.parquet", "profiles.pt")
    assert "profiles.pt" in line and "interactions.parquet" in line


def test_new_interactions_void_the_items_and_users_beside_them(tmp_path, capsys):
    """Stage 1 killed behind its first file, over an older run whose interactions were the same"""
    write_pair(tmp_path)
    (tmp_path / "items.parquet.json").write_text("{}")
    write_pair(tmp_path)
    assert "items.parquet is missing" in dies(capsys, read_artifacts, options_of(tmp_path), "items.parquet")
    assert not (tmp_path / "items.parquet.json").exists()


def test_a_sidecar_that_is_missing_is_named_and_not_the_file_that_is_there(tmp_path, capsys):
    write_pair(tmp_path)
    (tmp_path / "profiles.pt.json").unlink()
    line = dies(capsys, read_artifacts, options_of(tmp_path), "profiles.pt")
    assert "profiles.pt is there, but profiles.pt.json beside it is missing" in line


def test_a_file_cut_short_is_found_out(tmp_path, capsys):
    write_pair(tmp_path)
    path = tmp_path / "profiles.pt"
    path.write_bytes(path.read_bytes()[:-10])
    assert "profiles.pt" in dies(capsys, read_artifacts, options_of(tmp_path), "profiles.pt")


def test_a_full_disk_leaves_the_old_artifact_whole(tmp_path, capsys, monkeypatch):
    write_pair(tmp_path)
    before = (tmp_path / "interactions.parquet").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    arguments = options_of(tmp_path), "interactions.parquet", pd.DataFrame({"user": [9]})
    assert "No space left" in dies(capsys, write_artifact, *arguments)
    monkeypatch.undo()
    assert (tmp_path / "interactions.parquet").read_bytes() == before and not list(tmp_path.glob(".*"))
    assert len(read_artifacts(options_of(tmp_path), "interactions.parquet")[0]) == 2


@pytest.mark.parametrize("name, make", [
    (".lock", os.mkfifo), (".lock", os.mkdir), ("tiny_llm", os.mkfifo), ("tiny_llm", Path.touch), ("progress", os.mkfifo),
    ("report", Path.touch), ("finished", os.mkfifo)])
def test_a_pipe_or_folder_in_place_of_a_file_or_the_other_way_round_is_refused(tmp_path, capsys, name, make):
    make(tmp_path / name)
    line = dies(capsys, lock(tmp_path).__enter__)
    assert str(tmp_path / name) in line and "move away what is there" in line


def test_a_pipe_in_place_of_a_temporary_file_or_an_artifact_gives_way(tmp_path):
    for name in ("items.parquet", ".items.parquet.tmp", "items.parquet.json"):
        os.mkfifo(tmp_path / name)
    frame = pd.DataFrame({"item": [0], "item_id": "a", "title": "b", "category": None, "brand": None, "price": None})
    write_artifact(options_of(tmp_path), "items.parquet", frame.astype({"price": float}))
    assert len(read_artifacts(options_of(tmp_path), "items.parquet")[0]) == 1


def test_the_same_value_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name)
    assert (tmp_path / "a/profiles.pt").read_bytes() == (tmp_path / "b/profiles.pt").read_bytes()


def test_a_streamed_tensor_is_that_of_torch_save(tmp_path):
    parts = [torch.randn(3, 2, 5) for _ in range(4)]
    value = {"names": ["a"], "other": torch.arange(7),
             "big": SimpleNamespace(shape=(12, 2, 5), blocks=lambda: parts)}
    args = argparse.Namespace(run_dir=tmp_path, seed=0)
    write_artifact(args, "profiles.pt", value)
    stored = torch.load(tmp_path / "profiles.pt", weights_only=True)
    assert torch.equal(stored["big"], torch.cat(parts)) and torch.equal(stored["other"], torch.arange(7))
    assert stored["names"] == ["a"] and stored["big"].dtype == torch.float32
