import pytest
import torch

from conftest import run_stage
from llm_cases import fresh
from test_progress import GRADIENT, small


@pytest.mark.parametrize("options", [[], GRADIENT, [*GRADIENT, "--ratings", "--folds", 2]])
def test_the_estimate_tells_tokens_flops_memory_and_time_and_writes_nothing(small_run, tmp_path, options):
    run = fresh(small_run, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, *small(*options), "--estimate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for word in ("60 users", "tokens", "FLOPs", f" s on {device}", "memory: weights", "disk: profiles.pt"):
        assert word in printed, word
    assert sorted(path.name for path in run.iterdir()) in (before, sorted([*before, ".lock"]))
    if "gradient" in options:
        count = lambda text: float(text.split(" tokens of evidence")[0].split()[-1].replace(",", ""))
        more = run_stage("02_infer_profiles.py", "--run-dir", run, *small(*options), "--steps", 6,
                         "--estimate")
        assert count(more) == pytest.approx(3 * count(printed), rel=1e-3)
