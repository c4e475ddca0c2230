import json

import pytest
import torch

from conftest import run_stage, save_llm, write_table
from llm_cases import fresh, prompt_of
from test_progress import GRADIENT, small
from userip.setup import tokens_that_fit


def test_a_system_that_does_not_tell_its_free_memory_gets_the_most_that_pays(llm, monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")
    monkeypatch.setattr("os.sysconf", unknown)
    assert tokens_that_fit(prompt_of(llm)) == 4096


@pytest.mark.parametrize("options", [[], GRADIENT, [*GRADIENT, "--ratings", "--folds", 2]])
def test_the_estimate_tells_tokens_flops_memory_and_time_and_writes_nothing(small_run, tmp_path, options):
    run = fresh(small_run, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, *small(*options), "--estimate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for word in ("60 users", "tokens", "FLOPs", f" s on {device}", "memory: weights", "disk: profiles.pt"):
        assert word in printed, word
    assert sorted(path.name for path in run.iterdir()) in (before, sorted([*before, ".lock"]))
    count = lambda text, unit=" tokens of evidence": float(text.split(unit)[0].split()[-1].replace(",", ""))
    if "gradient" in options:
        more = run_stage("02_infer_profiles.py", "--run-dir", run, *small(*options), "--steps", 6,
                         "--estimate")
        assert count(more) == pytest.approx(3 * count(printed), rel=1e-3)
    else:
        more = run_stage("02_infer_profiles.py", "--run-dir", run, *small(*options), "--items", "--estimate")
        assert count(more, " of held-out") > count(printed, " of held-out") and "of the item bank" in more


def test_all_else_costs_at_most_three_catalogues(tmp_path, monkeypatch):
    monkeypatch.setattr("userip.setup.FREE_FLOPS", 0)
    write_table(tmp_path / "raw", num_users=300, num_items=600)
    run = tmp_path / "run"
    run_stage("01_prepare.py", "--dataset", "table", "--raw", tmp_path / "raw", "--run-dir", run,
              "--min-interactions", 1)
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", save_llm(tmp_path / "llm", "gpt2"))
    tokens = json.loads((run / "profiles.pt.json").read_text())["tokens"]
    catalogue = tokens.pop("catalogue")
    assert set(tokens) == {"shared start", "field weights", "map", "step lengths", "held-out rows"}
    assert 2 * catalogue < sum(tokens.values()) <= 3 * catalogue
    assert f"catalogue {catalogue:,}" in printed
