"""LLMs side by side: words find the planted truth without an LLM, and a line of the table says what was measured."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import compare_llms
from conftest import run_stage, save_llm
from llm_cases import fresh


def test_words_in_place_of_scores_find_the_planted_truth(tmp_path):
    run_stage("01_prepare.py", "--run-dir", tmp_path)
    compare_llms.profiles_of_words(tmp_path)
    run_stage("03_quantize.py", "--run-dir", tmp_path, "--stability", 0)
    facts = json.loads((tmp_path / "feature_bank.parquet.json").read_text())
    assert min(facts[f"{name}_share_of_bayes"] for name in ("hobby", "background")) > 0.9


def folder_of(path, rows, **facts):
    """What stages 3 and 4 leave: rows of (features, AUC of two seeds)"""
    path.mkdir()
    pd.DataFrame([{"model": "dcn", "features": name, "split_seed": 0, "seed": seed, "auc": auc[seed],
                   "logloss": 1 - auc[seed]}
                  for name, auc in rows.items() for seed in (0, 1)]).to_parquet(path / "results.parquet")
    facts = {"names": ["hobby"], "hobby_stability": 0.912, "probe_gender": None, **facts}
    for name in ("feature_bank", "item_bank"):
        (path / f"{name}.parquet.json").write_text(json.dumps(facts))
    pd.DataFrame({"split": ["train"] * 8 + ["test"]}).to_parquet(path / "interactions.parquet")
    return path


def test_a_line_holds_means_and_differences_to_the_control_and_to_words(tmp_path):
    args = SimpleNamespace(evidence="titles", models=["dcn"])
    first = [folder_of(tmp_path / "llm", {"codes": (0.75, 0.77), "random": (0.70, 0.71)})]
    words = [folder_of(tmp_path / "words", {"codes": (0.72, 0.74)})]  # needs no control of its own
    stability, probes, figures, to_random, to_words = compare_llms.line_of(args, first, first, words)
    assert (stability, probes, figures) == ("0.912", "– · –", "0.7600 · 0.2400")
    assert to_random.startswith("+0.0550 ± ") and to_words == "+0.0300 ± 0.0000 · -0.0300 ± 0.0000"
    *_, to_random, to_words = compare_llms.line_of(args, words, first, words)
    assert to_random.startswith("+0.0250 ± ") and to_words == "–"  # words against themselves
    with pytest.raises(KeyError):
        compare_llms.line_of(SimpleNamespace(evidence="titles", models=["pnn"]), first, first, words)


def test_with_ratings_each_set_is_compared_with_the_first_llms_sets_and_with_itself_by_words(tmp_path):
    args = SimpleNamespace(evidence="ratings", models=["dcn"])
    first = [folder_of(tmp_path / "tiny", {"codes+items": (0.75, 0.75), "codes+items+taste": (0.76, 0.76),
                                           "random+random": (0.70, 0.70), "leniency16+tfidf": (0.72, 0.72)})]
    parts = [[folder_of(tmp_path / name, {"codes+items": (0.75 + gain, 0.75 + gain),
                                          "codes+items+taste": (0.80 + gain, 0.80 + gain)}, correlation=gain)]
             for name, gain in (("llm", 0.04), ("words", 0.01))]
    cells = compare_llms.line_of(args, parts[0], first, parts[1])
    assert cells[:2] == ["0.040", "0.7900 · 0.2100"]
    assert [cell.split(" ± ")[0] for cell in cells[2:5]] == ["+0.0900", "+0.0700", "+0.0300"]
    assert cells[5].startswith("0.8400") and [cell[:7] for cell in cells[6:]] == ["+0.1200", "+0.0300"]


def test_one_pass_over_the_items_serves_all_splits(small_run, tmp_path, monkeypatch):
    data, cache = fresh(small_run, tmp_path / "data"), tmp_path / "vectors.pt"
    save_llm(tmp_path / "llm", "gpt2")
    vectors = compare_llms.vectors_of_items(str(tmp_path / "llm"), data, cache)
    items = pd.read_parquet(data / "items.parquet")
    assert len(vectors) == len(items) and vectors.std(0).min() > 0
    monkeypatch.setattr(compare_llms, "infer_items", lambda run, soft: vectors + 1)
    assert torch.equal(compare_llms.vectors_of_items(str(tmp_path / "llm"), data, cache), vectors)
    torch.save({"vectors": vectors, "item_id": items["item_id"].tolist()[::-1]}, cache)  # of other items
    assert torch.equal(compare_llms.vectors_of_items(str(tmp_path / "llm"), data, cache), vectors + 1)
    assert not list(data.glob("progress*/*"))
