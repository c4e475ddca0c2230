import shutil

import pandas as pd
import pytest

from conftest import run_stage, save_llm
from llm_cases import infer_run


def test_rounds_of_em_never_raise_the_objective(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    infer_run(small_run, tmp_path, "--llm", llm)
    run = tmp_path / "run"
    run_stage("03_quantize.py", "--run-dir", run, *("--codes", 2, 3, "--epochs", 2))
    totals = []
    for _ in range(2):
        printed, stored, sidecar = infer_run(small_run, tmp_path, "--llm", llm,
                                             "--prior", run / "codebook.pt")
        line = next(line for line in printed.splitlines() if line.startswith("objective"))
        before, after = (float(part.split(" = ")[1].split()[0].rstrip(";")) for part in line.split("after"))
        assert after <= before and sum(sidecar["objective"]) == pytest.approx(after, abs=1e-3)
        totals += [before, after]
        told = run_stage("03_quantize.py", "--run-dir", run)
        for line in told.splitlines():
            if "VQ loss" in line:
                first, second = (float(part.split()[0]) for part in line.split("loss ")[1].split("-> "))
                assert second <= first
    assert totals == sorted(totals, reverse=True)
    codes = pd.read_parquet(run / "feature_bank.parquet")
    assert set(codes["hobby"]) <= {0, 1} and set(codes["background"]) <= {0, 1, 2}
    assert "between seeds" not in told  # nothing is trained in a round
    for options in (["--rec-weight", 0], ["--released"]):
        line = run_stage("03_quantize.py", "--run-dir", run, *options, ok=False)
        assert options[0] in line and "--prior" in line
    line = infer_run(small_run, tmp_path, "--llm", llm, "--prior", tmp_path / "other.pt", ok=False)
    assert "--prior" in line and "codebook.pt" in line


def test_a_prior_that_is_not_there_is_named_before_a_llm_is_loaded(small_run, tmp_path):
    prior = shutil.copytree(small_run[1], tmp_path / "run") / "codebook.pt"
    prior.unlink()
    line = infer_run(small_run, tmp_path, "--llm", "./none", "--prior", prior, ok=False)
    assert "codebook.pt is missing" in line and "python 03_quantize.py" in line
