"""KAR and the room that baselines share: gates, prompts without the row itself, greedy answers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from baseline_cases import (finished_run, naive_auc, naive_logloss, options_of, pieces_with, poisoned,
                            rows_of, same_tensors)
from baselines import kar
from conftest import dies, run_process, run_stage
from ctr_data import SPLITS, small_run_of
from test_checks import overwrite
from userip import baseline
from userip.evidence import assign_folds

SMALL = ("--epochs", 2, "--seeds", 2, "--folds", 2, "--max-history", 3, "--new-tokens", 2)
TRAINING = {"lr": 0.01, "batch_size": 256, "epochs": 8, "patience": 3, "id_dropout": 0.0, "shared_experts": 1,
            "own_experts": 2, "expert_dim": 4, "folds": 2, "max_history": 3, "max_users": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Stage 1 and KAR with a saved LLM: (run directory, options). Read only."""
    return finished_run(tmp_path_factory.mktemp("kar"), "baselines/kar.py", "llama", SMALL)


def llm_of(llm):
    """As load_baseline_llm gives it"""
    return SimpleNamespace(model=llm[0], tokenizer=llm[1], device="cpu", context=256, digest="x")


def data_of(seed=0):
    """What read_data gives, of the small run of stage 4's tests"""
    run = small_run_of(seed=seed)
    split = {name: frame.sort_values(["user", "item"]) for name, frame in run.split.items()}
    history = pd.concat([split["train"], split["support"]]).sort_values(["user", "item"])
    return SimpleNamespace(split=split, labels={name: split[name]["label"].to_numpy() for name in SPLITS},
                           history=history, items=run.items.assign(price=5.0), num_users=len(run.users),
                           num_items=run.num_items, codes=torch.tensor(run.codes),
                           dropped=0, is_warm=np.isin(np.arange(len(run.users)), split["train"]["user"]),
                           is_train_item=np.isin(np.arange(run.num_items), split["train"]["item"]))


# --- adaptor ----------------------------------------------------------------------------------------------


def test_gates_sum_to_one_and_the_adaptor_equals_a_loop_over_experts():
    torch.manual_seed(0)
    experts = kar.HybridExperts(6, num_shared=2, num_own=3, expert_dim=4).eval()
    kinds = torch.randn(2, 5, 6)
    adapted = experts(*kinds)
    for kind, r in enumerate(kinds):
        every = [(group, k) for group in (experts.shared, experts.own[kind])
                 for k in range(len(group.second))]
        for row in range(5):
            logits = [float(weight.detach() @ r[row]) for weight in experts.gates[kind].weight]
            gate = np.exp(logits) / np.exp(logits).sum()
            assert len(gate) == 5 and gate.sum() == pytest.approx(1)
            expected = 0
            for g, (group, k) in zip(gate, every):
                own = slice(32 * k, 32 * k + 32)
                hidden = group.first.weight[own] @ r[row] + group.first.bias[own]
                expected = expected + g * (hidden.relu() @ group.second[k])
            assert torch.allclose(adapted[kind][row], expected, atol=1e-5)
    with torch.no_grad():  # a shared expert moves both kinds, an own one its own kind only
        experts.own[0].second += 1
        moved = experts(*kinds)
        assert not torch.equal(moved[0], adapted[0]) and torch.equal(moved[1], adapted[1])
        experts.shared.second += 1
        assert not torch.equal(experts(*kinds)[1], moved[1])


@torch.no_grad()
def test_experts_start_small_beside_the_embeddings_of_frequent_ids():
    """Else training does not leave the saddle point where it starts: on planted data AUC was .55, now .67"""
    experts = kar.HybridExperts(64, 2, 2, 16).eval()
    outputs = torch.cat(experts(torch.randn(500, 64), torch.randn(500, 64)))
    assert 0.005 < outputs.std() < 0.2 * kar.START


def test_the_dense_fields_reach_the_logits_and_without_them_it_is_a_dcn():
    torch.manual_seed(0)
    plain = kar.KAR(torch.ones(9)).eval()
    ids = torch.tensor([[0, 5], [1, 6]])
    assert torch.allclose(plain(ids), plain.dcn(plain.table(ids).flatten(1)))
    model = kar.KAR(torch.ones(9), kar.HybridExperts(3, 1, 1, 2), 2).eval()
    r_u, r_i = torch.randn(2, 3), torch.randn(2, 3)
    logits = model(ids, r_u, r_i)
    assert (model(ids, r_u + 1, r_i) != logits).all() and (model(ids, r_u, r_i + 1) != logits).all()


# --- prompts and vectors ----------------------------------------------------------------------------------


def test_prompts_equal_a_plain_loop_over_users():
    data, args = data_of(), options_of(max_history=3)
    texts = kar.user_prompts(args, data, data.history)
    for user in (0, 7, 285):
        own = data.history[data.history["user"] == user].tail(3)
        named = {label: "; ".join(data.items["title"][item] for item, of_row in zip(own["item"], own["label"])
                                  if of_row == label) or "nothing" for label in (0, 1)}
        assert texts[user] == f"The user liked: {named[1]}. The user disliked: {named[0]}."
    only_liked = kar.user_prompts(args, data, data.history[data.history["label"] == 1])
    assert all("disliked: nothing." in text for text in only_liked)


def test_a_train_row_reads_a_text_without_its_own_rating(monkeypatch):
    """Vectors here are how many titles were told, times 1000 plus the user: they say who reads what"""
    data, args = data_of(), options_of(**TRAINING | {"max_history": 99})
    asked = []
    monkeypatch.setattr(kar, "encode", lambda args, llm, finished, prompts, question: (
        asked.append(prompts), (torch.arange(len(prompts), dtype=torch.float32)[:, None], 0))[1])
    monkeypatch.setattr(kar, "standardized", lambda vectors, is_fitted: vectors)
    users, items, fold, _ = kar.knowledge(args, None, data, None, "history")
    assert users.shape == (3, data.num_users, 1)
    assert np.array_equal(fold, assign_folds(data.split["train"], 2, 0))
    reader = kar.Reader(data, (users, items, fold), "cpu")
    train = data.split["train"]
    for row in (0, 11, 500):
        _, (r_u, _) = reader.read("train", torch.tensor([row]))
        prompt, user = asked[0][int(r_u)], train["user"].iloc[row]
        left = train[(train["user"] == user) & (fold != fold[row])]
        assert prompt == kar.user_prompts(args, data, left)[user] and fold[row] not in fold[
            np.isin(train.index, left.index)]
    _, (r_u, _) = reader.read("test", torch.tensor([0]))
    user = data.split["test"]["user"].iloc[0]
    assert asked[0][int(r_u)] == kar.user_prompts(args, data, data.history)[user]


def test_the_llm_writes_about_max_users_and_the_others_have_the_mean(monkeypatch, capsys):
    data, args = data_of(), options_of(**TRAINING | {"max_users": 7})
    asked = []
    monkeypatch.setattr(kar, "encode", lambda args, llm, finished, prompts, question: (
        asked.append(prompts), (torch.randn(len(prompts), 3), 7 * len(prompts)))[1])
    users, items, _, num_tokens = kar.knowledge(args, None, data, None, "history")
    chosen = kar.capped(data.num_users, 7, args.seed)
    every = kar.user_prompts(args, data, data.history)
    assert asked[0][-7:] == [every[user] for user in chosen] and len(asked[0]) == 7 * (args.folds + 1)
    is_asked = np.isin(np.arange(data.num_users), chosen)
    assert (users[:, is_asked] != 0).all() and (users[:, ~is_asked] == 0).all()
    assert torch.allclose(users[:, data.is_warm & is_asked].mean((0, 1)), torch.zeros(3), atol=1e-5)
    assert num_tokens == pytest.approx(7 * (args.folds + 1) + 7 * data.num_items / data.num_users)
    data.is_warm[:] = False
    assert "take more" in dies(capsys, kar.knowledge, args, None, data, None, "history")


def test_vectors_are_standardized_by_the_fitted_ones_alone():
    vectors, is_fitted = torch.randn(6, 3), torch.tensor([True, True, True, True, False, False])
    scaled = kar.standardized(vectors, is_fitted)
    assert torch.allclose(scaled[:4].mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(scaled[:4].std(0, correction=0), torch.ones(3), atol=1e-5)
    moved = torch.cat([vectors[:4], 99 * vectors[4:]])
    assert torch.equal(kar.standardized(moved, is_fitted)[:4], scaled[:4])


@torch.no_grad()
def test_an_answer_equals_greedy_decoding_of_one_prompt_without_cache(llm):
    prompts = ["The user liked: red racer 1.", "The user liked: iron skillet 2; café racer 3. And a job"]
    texts, num_tokens = baseline.answer(llm_of(llm), prompts, 4, 500)
    total = 0
    for prompt, text in zip(prompts, texts):
        ids = baseline.tokenize(llm_of(llm), [prompt], 256)[0]
        start = len(ids)
        for _ in range(4):
            ids.append(int(llm[0](torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == llm[1].decode(ids[start:], skip_special_tokens=True)
        total += len(ids)
    assert num_tokens == total


@torch.no_grad()
def test_a_mean_pool_equals_that_of_each_text_alone(llm):
    texts = ["red racer 1", "iron skillet 2 by Acme for $3 and more", "a", ""]
    pooled, num_tokens = baseline.mean_pool(llm_of(llm), texts, 16)
    for text, vector in zip(texts, pooled):
        ids = torch.tensor([baseline.tokenize(llm_of(llm), [text], 256)[0]])
        assert torch.allclose(vector, llm[0].base_model(ids).last_hidden_state[0].mean(0), atol=1e-5)
        num_tokens -= ids.numel()
    assert num_tokens == 0
    cut = baseline.tokenize(llm_of(llm), ["a b c d e f g h i j k"], 4)[0]
    assert len(cut) == 4 and cut[-1] == baseline.tokenize(llm_of(llm), ["a b c d e f g h i j k"], 99)[0][-1]


# --- training and figures ---------------------------------------------------------------------------------


def test_figures_equal_naive_ones():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(2, size=60), np.round(rng.random(60) * 0.9 + 0.05, 1)
    figures = baseline.figures_of(labels, probabilities, "valid_")
    assert figures["valid_auc"] == pytest.approx(naive_auc(labels, probabilities))
    assert figures["valid_logloss"] == pytest.approx(naive_logloss(labels, probabilities))


def test_vectors_that_tell_the_taste_are_learned_and_dealt_ones_are_not():
    data, args = data_of(), options_of(**TRAINING)
    users = torch.nn.functional.one_hot(data.codes[:, 0], 4).float().expand(3, -1, -1)
    items = torch.nn.functional.one_hot(torch.arange(20) % 4, 4).float()
    vectors = users, items, assign_folds(data.split["train"], 2, 0)
    told = kar.train(args, data, vectors, 0)["row"]
    dealt = kar.train(args, data, kar.dealt(data, vectors, 0), 0)["row"]
    assert told["auc"] > 0.8 > dealt["auc"] + 0.1


@pytest.mark.parametrize("option", [{"lr": 0.02}, {"batch_size": 64}, {"id_dropout": 0.5}, {"epochs": 1},
                                    {"shared_experts": 2}, {"own_experts": 1}, {"expert_dim": 2}])
def test_an_option_of_the_training_moves_what_is_trained(option):
    data = data_of()
    vectors = torch.randn(3, data.num_users, 4), torch.randn(20, 4), assign_folds(data.split["train"], 2, 0)
    rows = [kar.train(options_of(**TRAINING | {"epochs": 2} | options), data, vectors, 0)["row"]
            for options in ({}, option)]
    assert rows[0]["valid_logloss"] != rows[1]["valid_logloss"]


def test_ids_are_dropped_of_users_and_where_items_are_cold_of_items(monkeypatch):
    seen, forward = [], kar.KAR.forward
    monkeypatch.setattr(kar.KAR, "forward", lambda self, ids, *vectors: (
        seen.append(ids.clone()), forward(self, ids, *vectors))[1])
    for dropped in (0, 1):
        seen.clear()
        data, args = data_of(), options_of(**TRAINING | {"epochs": 1, "id_dropout": 0.9})
        train = data.split["train"]
        data.split["train"] = train[train["item"] != 19]  # a cold item
        data.labels["train"], data.dropped = data.split["train"]["label"].to_numpy(), dropped
        reader = kar.Reader(data, (), "cpu")
        ids = reader.ids["train"]
        assert not (ids == reader.unknown).any()  # so that nothing but dropping trains its row
        state = kar.train(args, data, (), 0)["state"]["table.weight"]
        untrained = kar.start_model(args, reader, 0).state_dict()["table.weight"]
        assert (seen[0] == reader.unknown).any(0).tolist() == [dropped == 0, dropped == 1]
        moved = (state != untrained).any(1)
        assert moved[reader.unknown] and moved[ids[:, 0]].all() and moved[ids[:, 1]].all()
        assert (reader.unknown >= ids[:, 1].min()) == bool(dropped)  # rows of items stand behind those of users


def test_the_best_epoch_is_restored_and_scores_test(monkeypatch):
    data, args = data_of(), options_of(**TRAINING)
    losses, predict = [], kar.predict

    def record(model, reader, name):
        probabilities = predict(model, reader, name)
        losses.append((name, naive_logloss(data.labels[name], probabilities)))
        return probabilities

    monkeypatch.setattr(kar, "predict", record)
    row = kar.train(args, data, (), 0)["row"]
    valid = [loss for name, loss in losses if name == "valid"]
    assert row["valid_logloss"] == pytest.approx(min(valid)) and row["best_epoch"] == 1 + np.argmin(valid)
    (of_test,) = [loss for name, loss in losses if name == "test"]
    assert row["logloss"] == pytest.approx(of_test)


def test_a_rate_at_which_training_diverges_is_named(capsys):
    assert "lower it" in dies(capsys, kar.train, options_of(**TRAINING | {"lr": 1e12}), data_of(), (), 0)


def test_poisoned_test_rows_change_nothing_that_was_trained(run, tmp_path):
    folder, options = run
    other = poisoned(folder, tmp_path / "poisoned")
    run_stage("baselines/kar.py", "--run-dir", other, *options)
    before, after = pieces_with(folder, "kar", "state"), pieces_with(other, "kar", "state")
    assert len(before) == len(after) == 6
    assert all(same_tensors(*pair) for pair in zip(before, after))
    assert not rows_of(folder, "kar")["auc"].equals(rows_of(other, "kar")["auc"])  # the poison is in test


def test_a_killed_run_goes_on_with_the_same_bits_and_asks_the_llm_nothing_twice(run, tmp_path, monkeypatch):
    folder, options = run
    other = tmp_path / "killed"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("baseline*"))
    calls = {"answer": 0, "train": 0}
    for name in calls:
        def counted(*arguments, name=name, function=getattr(kar, name)):
            calls[name] += 1
            if calls[name] == 3:
                raise KeyboardInterrupt
            return function(*arguments)
        monkeypatch.setattr(kar, name, counted)
    for _ in range(2):  # killed while the LLM answers, then while models train
        with pytest.raises(KeyboardInterrupt):
            run_stage("baselines/kar.py", "--run-dir", other, *options)
    run_stage("baselines/kar.py", "--run-dir", other, *options)
    pieces = [torch.load(path)["value"] for path in (folder / "baselines/kar").glob("*.pt")]
    num_blocks = len([piece for piece in pieces if isinstance(piece, tuple) and isinstance(piece[0], list)])
    assert calls == {"answer": num_blocks + 1, "train": 7}
    assert rows_of(other, "kar").equals(rows_of(folder, "kar"))


def test_another_text_or_seed_changes_what_it_should(run, tmp_path, monkeypatch):
    folder, options = run
    before = rows_of(folder, "kar")
    assert before.groupby("features")["auc"].nunique().max() == 2  # seeds differ
    kinds = "history", "generated"  # vectors of `history`, the first, are what `random` deals
    other = shutil.copytree(folder, tmp_path / "other")
    trained = []
    monkeypatch.setattr(kar, "train", lambda args, data, vectors, seed, train=kar.train: (
        trained.append(seed), train(args, data, vectors, seed))[1])
    run_stage("baselines/kar.py", "--run-dir", other, *options, "--text", *kinds)
    after = rows_of(other, "kar")
    auc = lambda rows, name: rows.loc[rows["features"] == name, "auc"].tolist()
    assert len(trained) == 4 and all(auc(before, name) == auc(after, name) for name in ("none", "generated"))
    assert auc(after, "random") != auc(before, "random") and auc(after, "history") != auc(after, "generated")
    tokens, held = (before.groupby("features")[name].first() for name in ("tokens_per_user", "bytes"))
    assert tokens["none"] == 0 and tokens["random"] == tokens["generated"] > 9
    assert held["generated"] > held["none"] > 0
    modes = json.loads((folder / "baseline-kar.parquet.json").read_text())["modes"]
    held = {name: mode["megabytes"] for name, mode in modes.items()}
    assert held["DCN + KAR, adaptor online"] > held["DCN + bank"] > held["DCN"]


# --- as users run it --------------------------------------------------------------------------------------


def test_end_to_end_and_stage_4_shows_the_rows_of_its_split_only(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[1], folder)
    printed = run_process("baselines/kar.py", "--run-dir", folder, "--llm", "tiny", "--tiny-steps", 3, *SMALL,
                          "--id-dropout", 0.3)
    assert "baseline-kar.parquet: 6 rows | none AUC" in printed and "less time" in printed
    few = "--models", "dcn", "--seeds", 1, "--epochs", 1
    run_stage("04_train_ctr.py", "--run-dir", folder, *few)
    text, rows = (folder / "results.md").read_text(), rows_of(folder, "kar")
    mean = rows[rows["features"] == "generated"]["auc"].mean()
    assert "## LLM-based baselines" in text and f"| kar | generated | 2 | {rows['rows'][0]} |" in text
    assert f"{mean:.4f} ± " in text
    assert "baseline-kar.parquet" in json.loads((folder / "results.md.json").read_text())["inputs"]
    run_stage("05_case_study.py", "--run-dir", folder, "--num-users", 1)
    assert f"{mean:.4f} ± " in (folder / "report.html").read_text()
    # another split: the rows are left out, by the digest of its interactions
    sidecar = folder / "baseline-kar.parquet.json"
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(content | {"run": "0" * 64}))
    assert "left out" in run_stage("04_train_ctr.py", "--run-dir", folder, *few)
    assert "LLM-based" not in (folder / "results.md").read_text()
    sidecar.write_text(json.dumps(content))
    frame = pd.read_parquet(folder / "baseline-kar.parquet")
    overwrite(folder, "baseline-kar.parquet", frame.drop(columns="bytes"))
    assert "baseline-kar.parquet" in run_stage("04_train_ctr.py", "--run-dir", folder, *few, ok=False)


def test_what_a_user_can_get_wrong_is_refused_in_one_line(run, tmp_path, capsys):
    folder, options = run
    refuse = lambda *options: run_stage("baselines/kar.py", "--run-dir", tmp_path, *options, ok=False)
    assert "--folds" in refuse("--folds", 1)
    finished = baseline.Finished(SimpleNamespace(run_dir=tmp_path), "kar", {})
    assert finished.compute(["a"], lambda: 1) == finished.compute(["a"], lambda: 2) == 1
    next((tmp_path / "baselines/kar").glob("*.pt")).write_bytes(b"PK damaged")
    assert "delete it" in dies(capsys, finished.compute, ["a"], lambda: 2)
