"""ReLLa: retrieved histories, two logits, LoRA, calibration."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize

from baseline_cases import (finished_run, naive_auc, naive_logloss, options_of, pieces_with, poisoned,
                            rows_of, same_tensors)
from baselines import rella
from conftest import run_process, run_stage
from userip import baseline
from userip.llm import load_llm

SMALL = ("--epochs", 2, "--seeds", 1, "--shots", 12, "--num-items", 2, "--rank", 2, "--valid-rows", 40,
         "--test-rows", 50)
PROMPTS = ["The user's ratings: red racer 1 liked. Will the user like a job? Answer Yes or No:",
           "Will the user like iron skillet 2?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stage 1 and ReLLa with a saved LLM: (run directory, options). Read only."""
    return finished_run(tmp_path_factory.mktemp("rella"), "baselines/rella.py", "gpt2", SMALL)


@pytest.fixture
def own_llm(llm_folder):
    """As load_baseline_llm gives it, for one test alone"""
    model, tokenizer = load_llm(SimpleNamespace(run_dir="unused"), str(llm_folder))
    return SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu", context=256, digest="x")


def data_of(run):
    return baseline.read_data(SimpleNamespace(run_dir=run))


# --- retrieval and prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["semantic", "latest"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_retrieved_set_equals_brute_force_and_leaves_the_row_out(run, method, split):
    data, rng = data_of(run[0]), np.random.default_rng(0)
    vectors = torch.tensor(rng.normal(size=(data.num_items, 5))).float()
    rows = data.split[split].iloc[:60]
    chosen = rella.retrieve(data.history, rows, vectors, 3, method)
    for positions, row in zip(chosen, rows.itertuples()):
        others = [(position, other) for position, other in enumerate(data.history.itertuples())
                  if other.user == row.user and other.Index != row.Index]
        assert row.Index not in data.history.index[positions] and len(positions) == min(3, len(others))
        nearness = lambda other: float(vectors[other.item] @ vectors[row.item])
        order = [(nearness(other) if method == "semantic" else position, position)
                 for position, other in others]
        assert [position for _, position in sorted(order)[-3:]] == positions.tolist()
    told = {data.history.index[position] for positions in chosen for position in positions}
    assert told and not told & set(data.split["test"].index)


def test_a_prompt_tells_the_history_with_its_ratings_and_asks_for_the_target(run):
    data = data_of(run[0])
    rows, texts = data.split["valid"].iloc[:2], baseline.item_texts(data.items)
    first, alone = rella.make_prompts(data, rows, [np.array([0, 3]), np.array([], dtype=int)])
    words = ["liked" if label else "disliked" for label in data.history["label"].iloc[[0, 3]]]
    told = [f"{texts[item][:-1]} {word}." for item, word in zip(data.history["item"].iloc[[0, 3]], words)]
    target = texts[rows["item"].iloc[0]][:-1]
    assert first == f"The user's ratings: {' '.join(told)} Will the user like {target}? Answer Yes or No:"
    assert alone.startswith("The user's ratings: nothing. Will the user like ")


def test_item_vectors_are_centred_by_train_items_and_of_length_1(run):
    data = data_of(run[0])
    llm = SimpleNamespace(digest="x", device="cpu")
    pooled = torch.randn(data.num_items, 4)
    texts = baseline.item_texts(data.items)
    fake = lambda args, llm, finished, block: (pooled[[texts.index(text) for text in block]], len(block))
    original, rella.pool_in_blocks = rella.pool_in_blocks, fake
    try:
        vectors, num_tokens = rella.item_vectors(None, llm, data, None)
    finally:
        rella.pool_in_blocks = original
    is_train = data.items["item"].isin(data.split["train"]["item"]).to_numpy()
    assert not is_train.all() and num_tokens == data.num_items
    expected = pooled - pooled[torch.tensor(is_train)].mean(0)
    assert torch.allclose(vectors, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


# --- two logits -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_score_is_the_softmax_over_yes_and_no_alone(own_llm):
    yes, no, common = rella.answer_tokens(own_llm.tokenizer)
    scores, num_tokens = rella.scores_of(own_llm, PROMPTS, 1000)
    for prompt, score in zip(PROMPTS, scores):
        ids = baseline.tokenize(own_llm, [prompt], 250)[0] + common
        logits = own_llm.model(torch.tensor([ids])).logits[0, -1].double()
        expected = logits[yes].exp() / (logits[yes].exp() + logits[no].exp())
        assert float(score.sigmoid()) == pytest.approx(float(expected), abs=1e-5)
        num_tokens -= len(ids)
    assert num_tokens == 0
    head = own_llm.model.get_output_embeddings()
    is_used = {yes, no}.union(*rella.encode_prompts(own_llm, PROMPTS))
    others = [token for token in range(head.weight.shape[0]) if token not in is_used]  # GPT-2's head is tied
    head.weight[others] += 1.0
    assert torch.allclose(rella.scores_of(own_llm, PROMPTS, 1000)[0], scores, atol=1e-6)
    head.weight[yes] *= 1.5
    assert not torch.allclose(rella.scores_of(own_llm, PROMPTS, 1000)[0], scores, atol=1e-3)


def test_batches_and_pads_change_no_score(own_llm):
    prompts = PROMPTS + ["a", "café racer 3 " * 9]
    together, _ = rella.scores_of(own_llm, prompts, 10_000)
    alone = torch.cat([rella.scores_of(own_llm, [prompt], 16)[0] for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_answers_differ_and_what_they_share_goes_into_the_prompt(own_llm):
    yes, no, common = rella.answer_tokens(own_llm.tokenizer)
    shift = 1 if own_llm.tokenizer.tokenize("a")[0].startswith("▁") else 0
    for token, text in ((yes, " Yes"), (no, " No")):
        ids = own_llm.tokenizer(text[shift:], add_special_tokens=False).input_ids
        assert ids[:len(common) + 1] == [*common, token] and yes != no
    assert all(ids[len(ids) - len(common):] == common for ids in rella.encode_prompts(own_llm, PROMPTS))


# --- LoRA -------------------------------------------------------------------------------------------------


def test_lora_with_b_0_changes_nothing_and_removing_it_restores_the_llm(own_llm):
    before, _ = rella.scores_of(own_llm, PROMPTS, 1000)
    trained = rella.add_lora(own_llm.model, 4, 16.0, seed=0)
    assert torch.equal(rella.scores_of(own_llm, PROMPTS, 1000)[0], before)
    assert len(trained) == 2 * 2 * 2  # q and v, A and B, of two layers
    with torch.no_grad():
        for name, weight in trained.items():
            weight.add_(0.3)
    assert not torch.allclose(rella.scores_of(own_llm, PROMPTS, 1000)[0], before, atol=1e-3)
    rella.remove_lora(own_llm.model)
    assert torch.equal(rella.scores_of(own_llm, PROMPTS, 1000)[0], before)


def test_lora_adds_its_product_to_query_and_value_and_leaves_the_key():
    torch.manual_seed(0)
    joint = torch.nn.Linear(6, 18)
    layer = rella.LoRA(joint, 6, [6, 6, 6], (0, 2), rank=2, alpha=8.0)
    for up in layer.up:
        torch.nn.init.normal_(up.weight)
    x = torch.randn(3, 6)
    added = (layer(x) - joint(x)).view(3, 3, 6)
    for part, k in ((0, 0), (2, 1)):
        expected = 4.0 * (x @ layer.down[k].weight.T @ layer.up[k].weight.T)
        assert torch.allclose(added[:, part], expected, atol=1e-5)
    assert torch.allclose(added[:, 1], torch.zeros(3, 6), atol=1e-6)


def test_a_few_shots_are_learned_and_no_weight_of_the_llm_moves(own_llm):
    args = options_of(lr=0.1, batch_size=2, epochs=10)
    frozen = {name: weight.clone() for name, weight in own_llm.model.state_dict().items()}
    trained = rella.add_lora(own_llm.model, 4, 16.0, seed=0)
    shots = rella.encode_prompts(own_llm, [*PROMPTS, "red racer 5", "iron skillet 9"]), np.array([1, 0, 1, 0])
    yes, no, _ = rella.answer_tokens(own_llm.tokenizer)
    target = torch.tensor([yes if label else no for label in shots[1]])
    loss = lambda: torch.nn.functional.cross_entropy(rella.answer_logits(own_llm, shots[0]), target).item()
    before, state = loss(), None
    for _ in range(10):
        state = rella.train_epoch(args, own_llm, trained, state, shots, 0)
    assert state["epoch"] == 10 and loss() < before - 0.2
    rate = state["optimizer"]["param_groups"][0]["lr"]  # of the last of 20 steps: it falls linearly
    assert rate == pytest.approx(0.1 / 20)
    rella.remove_lora(own_llm.model)
    assert same_tensors(own_llm.model.state_dict(), frozen)


@pytest.mark.parametrize("option", [{"rank": 2}, {"alpha": 4.0}, {"lr": 0.001}, {"batch_size": 1},
                                    {"epochs": 20}])
def test_an_option_of_the_training_moves_what_is_trained(own_llm, option):
    shots, scores = (rella.encode_prompts(own_llm, PROMPTS), np.array([1, 0])), []
    for options in ({}, option):
        args = options_of(**{"lr": 0.05, "batch_size": 2, "rank": 4, "alpha": 16.0, "epochs": 2} | options)
        trained = rella.add_lora(own_llm.model, args.rank, args.alpha, seed=0)
        state = None
        for _ in range(2):
            state = rella.train_epoch(args, own_llm, trained, state, shots, 0)
        scores.append(rella.scores_of(own_llm, PROMPTS, 500)[0])
        rella.remove_lora(own_llm.model)
    assert not torch.allclose(*scores, atol=1e-6)


# --- evaluate ---------------------------------------------------------------------------------------------


def test_platt_equals_a_fit_of_two_numbers_and_metrics_equal_naive_ones():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=80)
    scores = 3.0 * labels + 2 * rng.normal(size=80) - 5
    sigmoid = lambda x: np.clip(1 / (1 + np.exp(-x)), 1e-12, 1 - 1e-12)
    loss = lambda two: naive_logloss(labels, sigmoid(two[0] * scores + two[1]))
    best = minimize(loss, [0.1, 0.0], method="Nelder-Mead", options={"fatol": 1e-10, "maxiter": 9999})
    probabilities = rella.platt(scores, labels)(scores)
    assert naive_logloss(labels, probabilities) == pytest.approx(best.fun, abs=1e-6)
    figures = baseline.figures_of(labels, probabilities)
    assert figures["auc"] == pytest.approx(naive_auc(labels, scores))
    assert figures["logloss"] == pytest.approx(naive_logloss(labels, probabilities))


def test_calibration_reads_valid_labels_and_test_labels_only_score(monkeypatch):
    rng = np.random.default_rng(1)
    scores = {name: rng.normal(size=40) for name in ("valid", "test")}
    labels = {name: rng.integers(2, size=40) for name in scores}
    monkeypatch.setattr(rella, "scores_in_blocks",
                        lambda args, llm, finished, key, prompts: (scores[prompts], 80, 2.0))
    sets = {name: SimpleNamespace(prompts=name, labels=labels[name]) for name in scores}
    row, seconds, tokens = rella.evaluate(None, None, None, [], sets)
    expected = rella.platt(scores["valid"], labels["valid"])(scores["test"])
    assert row["logloss"] == pytest.approx(naive_logloss(labels["test"], expected))
    assert (seconds, tokens) == (2.0, 2.0)
    raw = [1 / (1 + math.exp(-score)) for score in scores["test"]]
    assert row["uncalibrated_logloss"] == pytest.approx(naive_logloss(labels["test"], raw))
    assert row["test_rows"] == 40


def test_rows_are_capped_and_seeds_draw_other_shots_but_the_same_test_rows(run):
    data, args = data_of(run[0]), options_of(valid_rows=30, test_rows=20, num_items=2)
    vectors = torch.randn(data.num_items, 4)
    one, two = (rella.draw_sets(args, data, vectors, "latest", 10, seed) for seed in (0, 1))
    assert [len(one[name].prompts) for name in ("train", "valid", "test")] == [10, 30, 20]
    assert one["test"].prompts == two["test"].prompts and one["train"].prompts != two["train"].prompts
    assert rella.draw_sets(args, data, vectors, "latest", 0, 0)["train"].prompts == []


# --- whole runs -------------------------------------------------------------------------------------------


def test_poisoned_test_rows_change_nothing_that_was_trained(run, tmp_path):
    folder, options = run
    other = poisoned(folder, tmp_path / "poisoned")
    run_stage("baselines/rella.py", "--run-dir", other, *options)
    before, after = pieces_with(folder, "rella", "weights"), pieces_with(other, "rella", "weights")
    assert len(before) == len(after) == 2
    assert all(same_tensors(*pair) for pair in zip(before, after))
    changed = rows_of(folder, "rella")["auc"] != rows_of(other, "rella")["auc"]
    assert changed.all()
    assert rows_of(folder, "rella")["valid_auc"].equals(rows_of(other, "rella")["valid_auc"])


def test_a_killed_run_goes_on_with_the_same_bits(run, tmp_path, monkeypatch):
    folder, options = run
    other = tmp_path / "killed"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("baseline*"))
    calls = {"train_epoch": 0, "scores_of": 0}
    for name, killed in (("train_epoch", 2), ("scores_of", 4)):
        def counted(*arguments, name=name, killed=killed, function=getattr(rella, name)):
            calls[name] += 1
            if calls[name] == killed:
                raise KeyboardInterrupt
            return function(*arguments)
        monkeypatch.setattr(rella, name, counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_stage("baselines/rella.py", "--run-dir", other, *options)
    run_stage("baselines/rella.py", "--run-dir", other, *options)
    assert calls["train_epoch"] == 3 and rows_of(other, "rella").equals(rows_of(folder, "rella"))


def test_end_to_end_and_stage_4_shows_the_rows(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[1], folder)
    printed = run_process("baselines/rella.py", "--run-dir", folder, "--llm", "tiny", "--tiny-steps", 3,
                          *SMALL, "--retrieval", "semantic", "latest")
    assert "baseline-rella.parquet: 4 rows | semantic zero-shot AUC" in printed
    rows = rows_of(folder, "rella")
    assert rows["rows"].tolist() == [0, 12, 0, 12] and (rows["test_rows"] == 50).all()
    costs = pd.read_parquet(folder / "baseline-rella.parquet").set_index("features")
    assert (costs["milliseconds"] > 1000).all() and (costs["seconds"] > 0).all()
    # the latest items need no vectors, LoRA has weights of its own, and all test rows would be read
    zero, lora = costs.loc["latest zero-shot"], costs.loc["latest lora"]
    assert lora["bytes"] > zero["bytes"] < costs.loc["semantic zero-shot", "bytes"]
    assert zero["tokens_per_user"] > 10 * 50 / 60
    run_stage("04_train_ctr.py", "--run-dir", folder, "--models", "dcn", "--seeds", 1, "--epochs", 1)
    assert "| rella | latest lora | 1 | 12 | 50 |" in (folder / "results.md").read_text()


def test_what_a_user_can_get_wrong_is_refused_in_one_line(run):
    folder, options = run
    refuse = lambda *options: run_stage("baselines/rella.py", "--run-dir", folder, *options, ok=False)
    assert "--retrieval" in refuse("--retrieval", "nearest") and "--shots" in refuse("--shots", -1)
    few = refuse(*options[:2], "--test-rows", 2, "--valid-rows", 2, "--shots", 0)
    assert "have one label only: raise --" in few
