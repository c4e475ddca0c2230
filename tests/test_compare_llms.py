"""LLMs side by side: words find the planted truth without a LLM, and a line of the table says what was measured."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

import compare_llms
from conftest import run_stage


def test_words_in_place_of_scores_find_the_planted_truth(tmp_path):
    run_stage("01_prepare.py", "--run-dir", tmp_path)
    compare_llms.profiles_of_words(tmp_path)
    run_stage("03_quantize.py", "--run-dir", tmp_path, "--stability", 0)
    facts = json.loads((tmp_path / "feature_bank.parquet.json").read_text())
    assert min(facts[f"{name}_share_of_bayes"] for name in ("hobby", "background")) > 0.9


def test_a_line_holds_means_and_differences_to_the_control_and_to_words(tmp_path):
    args, folders = SimpleNamespace(evidence="titles", models=["dcn"]), []
    for name, gain in (("llm", 0.05), ("words", 0.02)):
        folder = tmp_path / name
        folder.mkdir()
        auc = [0.7 + gain, 0.72 + gain, 0.7, 0.71]  # codes, then random, of two seeds
        pd.DataFrame({"model": "dcn", "features": ["codes", "codes", "random", "random"], "seed": [0, 1, 0, 1],
                      "auc": auc, "logloss": 0.5}).to_parquet(folder / "results.parquet")
        facts = {"names": ["hobby"], "hobby_stability": 0.912, "probe_gender": None}
        (folder / "feature_bank.parquet.json").write_text(json.dumps(facts))
        pd.DataFrame({"split": ["train"] * 8 + ["test"]}).to_parquet(folder / "interactions.parquet")
        folders.append(folder)
    stability, probes, figures, to_random, to_words = compare_llms.line_of(args, folders[:1], folders[1:])
    assert (stability, probes, figures) == ("0.912", "– · –", "0.7600 · 0.5000")
    assert to_random.startswith("+0.0550 ± ") and to_words == "+0.0300 ± 0.0000 · +0.0000 ± 0.0000"
    assert compare_llms.line_of(args, folders[1:], folders[1:])[-1] == "–"  # words against themselves
    with pytest.raises(KeyError):
        compare_llms.line_of(SimpleNamespace(evidence="titles", models=["pnn"]), folders[:1], folders[1:])
