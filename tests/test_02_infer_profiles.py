import argparse
import hashlib
import json
import socket

import numpy as np
import pandas as pd
import pytest
import torch

import common
from conftest import NAME_TEXTS, TASK_TEXT, dies, infer, run_stage, save_llm

ITEMS = pd.DataFrame({"title": ["red racer 1", "iron skillet 2", "café racer 3", "a job", "sport"],
                      "category": ["Games", "Kitchen", "Games", None, "Games"],
                      "brand": ["Acme", None, "Acme", "Bolt", "Bolt"],
                      "price": [3.0, 12.99, None, 140.0, 5.5]})
FIELD_SETS = [("title", "category"), ("brand", "price")]


@pytest.fixture(scope="module")
def llm(llm_folder):
    return common.load_llm(argparse.Namespace(run_dir="unused"), str(llm_folder))


def prompt_of(llm, names=tuple(NAME_TEXTS), task=TASK_TEXT):
    return infer.Prompt(*llm, [f"n{k}" for k in range(len(names))], names, task)


def texts_of(llm, fields=infer.FIELDS):
    return infer.tokenize(llm[1], [infer.pieces_of(item, fields) for item in ITEMS.itertuples()])


def streams_of(llm, fields=FIELD_SETS):
    sees = torch.eye(2, dtype=torch.bool) if len(fields) == 2 else [torch.ones(2, dtype=torch.bool)]
    return [infer.Stream(each, seen, texts_of(llm, each)) for each, seen in zip(fields, sees)]


def soft_for(prompt, rows, seed=0):
    shape = rows, prompt.num_profiles, prompt.embedding.shape[1]
    return prompt.scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- evidence -------------------------------------------------------------------------------------------


def test_an_items_text_leaves_out_what_is_missing():
    told = [infer.text_of(infer.pieces_of(item, infer.FIELDS)) for item in ITEMS.itertuples()]
    assert told == [" Games: red racer 1 by Acme for $3.", " Kitchen: iron skillet 2 for $13.",
                    " Games: café racer 3 by Acme.", " a job by Bolt for $140.",
                    " Games: sport by Bolt for $5.5."]
    brands = [infer.text_of(infer.pieces_of(item, ("brand",))) for item in ITEMS.itertuples()]
    assert brands == [" by Acme.", "", " by Acme.", " by Bolt.", " by Bolt."]


def test_every_token_knows_its_field_and_the_texts_are_whole(llm):
    tokenizer = llm[1]
    texts = texts_of(llm)
    for row, item in enumerate(ITEMS.itertuples()):
        field = texts.field[row]
        decode = lambda mask: tokenizer.decode(texts.ids[row][mask]).strip()
        assert decode(field == infer.FIELDS.index("title")) == item.title
        assert decode(field >= 0) == infer.text_of(infer.pieces_of(item, infer.FIELDS)).strip()
        present = {name for name in infer.FIELDS if infer.text_of(infer.pieces_of(item, (name,)))}
        assert {infer.FIELDS[index] for index in set(field.tolist()) - {-1}} == present


def test_routes_follow_the_option_and_the_data():
    args = argparse.Namespace(route=["title+category", "brand+price"])
    routes = lambda items: {key: sees.tolist() for key, sees in infer.routes_of(args, items, ["a", "b"])}
    assert routes(ITEMS) == {("title", "category"): [True, False], ("brand", "price"): [False, True]}
    bare = ITEMS.assign(brand=None, price=None, category=None)  # titles only: both are told the titles
    assert routes(bare) == {("title",): [True, True]}
    args.route = ["none"]
    assert routes(ITEMS) == {infer.FIELDS: [True, True]}


def test_only_train_rows_are_evidence_and_histories_keep_the_latest(llm):
    train = pd.DataFrame({"user": [0, 0, 0, 2], "item": [0, 1, 2, 4]})
    streams = streams_of(llm)
    args = argparse.Namespace(evidence="items", max_history=2)
    (_, first), (_, second) = infer.evidence_of(args, llm[1], ITEMS, streams, train)
    assert first.user.tolist() == [0, 0, 0, 2] and first.row.tolist() == [0, 1, 2, 4]
    assert second.row.tolist() == [0, 1, 2, 4]
    args.evidence = "history"
    (stream, pairs), _ = infer.evidence_of(args, llm[1], ITEMS, streams, train)
    assert pairs.user.tolist() == [0, 2]
    told = llm[1].decode(stream.texts.ids[0][stream.texts.field[0] >= 0])
    assert told.strip() == "Kitchen: iron skillet 2. Games: café racer 3."


# --- the prompt under the mask of Fig. 4 ----------------------------------------------------------------


def hidden_of_block(llm, prompt, soft, block, texts, sees):
    """All layers' hidden states at the name and soft tokens of one profile: [layers, B, L_k, D]"""
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees.expand(len(texts.ids), -1))
    output = llm[0](inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                    output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, :, (prompt.segment == block).nonzero()[:, 0]]


@pytest.mark.parametrize("block", [0, 1])
def test_a_profile_is_blind_to_the_other_name_the_other_soft_token_and_the_task(llm, block):
    texts = texts_of(llm)
    sees = torch.ones(2, dtype=torch.bool)
    prompt = prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, block, texts, sees)
    other_soft = soft.clone()
    other_soft[:, 1 - block] += 1.0
    assert torch.equal(before, hidden_of_block(llm, prompt, other_soft, block, texts, sees))
    other_name = ["her job is" if k != block else NAME_TEXTS[k] for k in range(2)]
    longer_task = "a much longer task text: a job or a sport and a job or a sport"
    for names, task in ((other_name, TASK_TEXT), (NAME_TEXTS, "a job or a sport"), (NAME_TEXTS, longer_task)):
        after = hidden_of_block(llm, prompt_of(llm, names, task), soft, block, texts, sees)
        # the same numbers, computed in a sequence of another length: kernels may add in another order
        assert torch.allclose(before, after, atol=1e-6, rtol=0)
    own_soft = soft.clone()
    own_soft[:, block] += 1.0
    assert not torch.allclose(before, hidden_of_block(llm, prompt, own_soft, block, texts, sees), atol=1e-3)


def test_a_name_or_task_of_equal_length_changes_no_bit_of_the_other_profile(llm):
    texts = texts_of(llm)
    sees, prompt = torch.ones(2, dtype=torch.bool), prompt_of(llm)
    soft = soft_for(prompt, 5)
    before = hidden_of_block(llm, prompt, soft, 0, texts, sees)
    for place in (int((prompt.segment == 1).nonzero()[0]) + 1, int((prompt.segment == 2).nonzero()[-1])):
        changed = prompt_of(llm)
        changed.embedding[place] += 1.0  # another token of the other name, of the task text
        assert torch.equal(before, hidden_of_block(llm, changed, soft, 0, texts, sees))


def test_routed_evidence_is_blind_to_the_other_profile(llm):
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    soft = soft_for(prompt, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(prompt.nll(soft, first.texts, first.sees).sum(), soft)
    assert gradient[:, 1].abs().max() == 0 and gradient[:, 0].abs().max() > 0


def test_the_first_evidence_token_depends_on_the_profile(llm):
    """The last task token predicts it: blind, the category could not depend on θ."""
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    nll = [prompt.nll(soft_for(prompt, 5, seed), first.texts, first.sees)[:, 0] for seed in (0, 1)]
    assert (nll[0] - nll[1]).abs().min() > 1e-6


def test_padding_changes_nothing(llm):
    prompt, (first, _) = prompt_of(llm), streams_of(llm)
    soft = soft_for(prompt, 5)
    together = prompt.nll(soft, first.texts, first.sees)
    for row in range(5):
        alone = infer.cut(first.texts, torch.tensor([row]))
        nll = prompt.nll(soft[row:row + 1], alone, first.sees)[0]
        assert torch.allclose(together[row, :len(nll)], nll, atol=1e-5)
        assert together[row, len(nll):].abs().sum() == 0
    junk = infer.Texts(torch.where(first.texts.field < 0, 7, first.texts.ids), first.texts.field)
    assert torch.equal(prompt.nll(soft, junk, first.sees), together)


def test_the_loss_is_the_llms_own(llm):
    model, prompt, texts = llm[0], prompt_of(llm), texts_of(llm)
    sees = torch.ones(5, 2, dtype=torch.bool)
    soft = soft_for(prompt, 5)
    embeddings, mask, position = prompt.inputs(soft, texts.ids, sees)
    labels = torch.where(texts.field < 0, -100, texts.ids)
    labels = torch.nn.functional.pad(labels, (len(prompt.segment), 0), value=-100)
    own = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position, labels=labels).loss
    ours = prompt.nll(soft, texts, sees)
    assert float(ours.sum() / (texts.field >= 0).sum()) == pytest.approx(float(own), rel=1e-5)


def test_bos_opens_each_stream_where_the_llm_has_one(llm):
    prompt, tokenizer = prompt_of(llm), llm[1]
    starts = [int((prompt.segment == k).nonzero()[0]) for k in range(3)]
    with torch.no_grad():
        bos = prompt.embed(torch.tensor(tokenizer.bos_token_id))
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert all(torch.equal(prompt.embedding[start], bos) == has_bos for start in starts)


# --- score and gradient ---------------------------------------------------------------------------------


def weights_of(seed=0):
    return 0.5 + torch.rand(len(infer.FIELDS), generator=torch.Generator().manual_seed(seed))


def test_scores_are_the_gradients_of_single_items(llm):
    prompt, weights = prompt_of(llm), weights_of()
    shared = soft_for(prompt, 1)[0]
    for stream in streams_of(llm):
        rows = (infer.lengths_of(stream.texts) > 0).nonzero()[:, 0]
        scores = infer.scores_of(prompt, stream, rows, shared, weights, 100, "test")
        for place, row in enumerate(rows):
            soft = shared[None].clone().requires_grad_()
            loss = 0.0
            nll = prompt.nll(soft, infer.cut(stream.texts, row[None]), stream.sees)[0]
            for token in range(len(nll)):
                loss = loss + weights[stream.texts.field[row, token]] * nll[token]
            (gradient,) = torch.autograd.grad(-loss, soft)
            assert torch.allclose(scores[place], gradient[0], atol=1e-5)


def test_sums_by_user_equal_a_double_loop():
    stream = infer.Stream((), None, infer.Texts(torch.zeros(4, 1), None))
    pairs = infer.Pairs(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 3, 0, 1, 2]))
    of_row = torch.randn(4, 3)
    total = infer.sum_by_user(stream, pairs, of_row, 3)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for user, row in zip(pairs.user, pairs.row):
        expected[user] += of_row[row].double()
    assert torch.allclose(total, expected)


def test_field_weights_bring_all_fields_to_the_same_noise(llm):
    args = argparse.Namespace(tokens_per_batch=500)
    prompt, streams = prompt_of(llm), streams_of(llm)
    shared = soft_for(prompt, 1)[0]
    generator = torch.Generator().manual_seed(0)
    weights = infer.field_weights(args, prompt, streams, torch.ones(5), shared, generator)
    for stream in streams:
        for field in stream.fields:
            only = torch.zeros(len(infer.FIELDS))
            only[infer.FIELDS.index(field)] = weights[infer.FIELDS.index(field)]
            rows = (infer.lengths_of(stream.texts) > 0).nonzero()[:, 0]
            scores = infer.scores_of(prompt, stream, rows, shared, only, 500, "test")
            noise = float((scores - scores.mean(0)).square().sum((1, 2)).mean())
            assert noise == pytest.approx(1, rel=1e-3)


def gradient_case(llm, **changes):
    """Three users with histories of unequal length; inference of those users by gradient."""
    args = argparse.Namespace(**{"lr": 0.01, "batch_size": 2, "tokens_per_batch": 200} | changes)
    prompt, streams = prompt_of(llm), streams_of(llm)
    pairs = infer.Pairs(torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 3, 2, 3, 4, 0]))
    evidence = [(stream, pairs) for stream in streams]
    shared = soft_for(prompt, 1)[0]
    noise = torch.eye(shared.shape[1]).expand(2, -1, -1)

    def infer_users(users, pull=0.5, num_steps=3, start=None):
        start = shared.expand(3, -1, -1) if start is None else start
        return infer.infer_by_gradient(args, prompt, evidence, weights_of(), start, shared, noise, pull,
                                       num_steps, torch.tensor(users))

    return infer_users, shared


def test_a_user_alone_gets_what_the_block_gives(llm):
    infer_users, _ = gradient_case(llm)
    together = infer_users([0, 1, 2])
    for user in range(3):
        assert torch.allclose(infer_users([user])[0], together[user], atol=1e-5)


def test_block_size_and_token_budget_change_no_profile(llm):
    together = gradient_case(llm)[0]([0, 1, 2])
    for changes in ({"batch_size": 1}, {"batch_size": 3}, {"tokens_per_batch": 1}):
        assert torch.allclose(gradient_case(llm, **changes)[0]([0, 1, 2]), together, atol=1e-5)


def test_pull_steps_lr_and_start_move_the_profiles(llm):
    users = [0, 1, 2]
    infer_users, shared = gradient_case(llm)
    base = infer_users(users)
    drift = lambda **options: float((infer_users(users, **options) - shared).norm())
    assert 0 < drift(pull=1e4) and not torch.equal(infer_users(users, pull=5.0), base)
    assert drift(num_steps=8, pull=1e4) < drift(num_steps=8, pull=0.0)
    assert not torch.equal(infer_users(users, num_steps=1), base)
    assert not torch.equal(gradient_case(llm, lr=0.02)[0](users), base)
    assert not torch.equal(infer_users(users, start=shared.expand(3, -1, -1) + 0.01), base)


def test_the_shared_point_and_personal_steps_lower_the_nll_and_leave_the_llm_untouched(llm):
    model = llm[0]
    content = lambda: b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    digest = lambda: hashlib.sha256(content()).hexdigest()
    before = digest()
    prompt, streams = prompt_of(llm), streams_of(llm)
    pairs = infer.Pairs(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 4, 2, 3]))
    evidence = [(stream, pairs) for stream in streams]
    args = argparse.Namespace(shared_steps=25, tokens_per_batch=2000, lr=0.02, batch_size=8)
    ones = torch.ones(len(infer.FIELDS))
    nll = lambda soft: float(sum(infer.weighted_nll(prompt, soft[pairs.user], stream, pairs.row, ones)
                                 for stream in streams))
    shared = infer.fit_shared(args, prompt, evidence, ones, torch.Generator().manual_seed(0))
    start, everyone = soft_for(prompt, 1).expand(3, -1, -1), shared.expand(3, -1, -1)
    noise = torch.zeros(2, shared.shape[1], shared.shape[1])
    own = infer.infer_by_gradient(args, prompt, evidence, ones, everyone, shared, noise, 0.0, 10,
                                  torch.arange(3))
    assert nll(own) < nll(everyone) < nll(start)
    assert digest() == before and not any(parameter.requires_grad for parameter in model.parameters())


def test_the_map_never_sees_the_item_that_it_foretells(llm):
    """Users of a single item: with it left out nothing is known of them, and the map cannot learn."""
    prompt, streams = prompt_of(llm), streams_of(llm)
    train = pd.DataFrame({"user": range(5), "item": range(5)})
    of_item = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    args = argparse.Namespace(map_steps=3, tokens_per_batch=500, evidence="items")
    shared = soft_for(prompt, 1)[0]

    def fitted(total):
        at = infer.Coordinates(total, of_item, torch.ones(5, 2), torch.ones(2), torch.ones(2))
        return infer.fit_map(args, prompt, streams, train, shared, at, torch.Generator().manual_seed(0))

    assert fitted(of_item).abs().max() == 0 and fitted(3 * of_item).abs().max() > 0


def test_users_who_choose_and_users_who_report_are_not_the_same(llm):
    rows = pd.DataFrame({"user": [0, 1, 2, 3, 3, 4], "item": [0, 1, 2, 3, 4, 0]})
    rows["split"] = 5 * ["valid"] + ["test"]
    tune, report = infer.heldout_rows(rows, streams_of(llm), 100, seed=0)
    assert sorted(tune[0].tolist()) == [0, 2] and sorted(report[0].tolist()) == [1, 3, 3]
    assert report[1].tolist() == [1, 3, 4]


def test_a_user_interval_is_that_of_the_ratio():
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(5, 15, size=4000)).float()
    difference = -0.1 * tokens + torch.tensor(rng.standard_normal(4000)).float()
    mean, half = infer.interval(difference, tokens)
    assert abs(mean + 0.1) < half < 0.01
    assert half == pytest.approx(1.96 / np.sqrt(4000) / float(tokens.mean()), rel=0.05)


# --- the whole stage ------------------------------------------------------------------------------------


def infer_run(small_run, tmp_path, *options, ok=True):
    """Stage 2 on a copy of the small run's stage 1, tiny LLM kept where the texts are the same."""
    import shutil

    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(small_run[1], run)
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--tiny-steps", 6, "--shared-steps", 4,
                        "--map-steps", 4, "--heldout", 60, "--steps", 2, *options, ok=ok)
    if not ok:
        return printed
    stored = torch.load(run / "profiles.pt", weights_only=True)
    return printed, stored, json.loads((run / "profiles.pt.json").read_text())


def test_profiles_hold_what_the_readme_says(small_run):
    stored = torch.load(small_run[1] / "profiles.pt", weights_only=True)
    assert stored["profiles"].shape == (60, 2, 128) and stored["profiles"].dtype == torch.float32
    assert stored["noise"].shape == (2, 128, 128) and stored["has_evidence"].all()
    assert stored["names"] == ["hobby", "background"]
    figures = json.loads((small_run[1] / "profiles.pt.json").read_text())["heldout_nll"]
    assert {"none", "shared", "shuffled", "own", "own_minus_shared", "own_minus_shuffled"} == set(figures)


THREE_PROFILES = ("--profiles", "hobby=This user's hobby is", "job=her job is", "sport=This user's sport is")


@pytest.mark.parametrize("options", [("--paper",), ("--method", "gradient"), ("--evidence", "history"),
                                     THREE_PROFILES])
def test_methods_evidence_and_any_number_of_profiles_run(small_run, tmp_path, options):
    _, stored, sidecar = infer_run(small_run, tmp_path, "--llm", "tiny", *options)
    assert stored["profiles"].shape[1] == len(stored["names"]) == (3 if "--profiles" in options else 2)
    assert torch.isfinite(stored["profiles"]).all() and (stored["profiles"].std(0) > 0).any()
    assert np.isfinite(sidecar["heldout_nll"]["own"])


def test_a_saved_llm_of_either_architecture_runs(small_run, tmp_path, llm_folder):
    """GPT-2 and Llama, each saved to a folder with its tokenizer, as users have them."""
    before = {path.name: common.sha256_of(path) for path in llm_folder.iterdir()}
    printed, stored, _ = infer_run(small_run, tmp_path, "--llm", llm_folder)
    assert stored["profiles"].shape == (60, 2, 32) and stored["llm"] == str(llm_folder)
    assert before == {path.name: common.sha256_of(path) for path in llm_folder.iterdir()}
    assert "own - shuffled" in printed


def test_task_text_route_and_names_move_the_profiles(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    base = infer_run(small_run, tmp_path, "--llm", llm)[1]["profiles"]
    for options in (("--task-text", "a job"), ("--route", "none"), ("--route", "title", "price"),
                    ("--field-weights", "none"), ("--pull", 500),
                    ("--profiles", "hobby=This user's hobby is", "job=her job is"), ("--seed", 1)):
        profiles = infer_run(small_run, tmp_path, "--llm", llm, *options)[1]["profiles"]
        assert not torch.equal(profiles, base), options


def test_auto_says_which_llm_and_why_within_seconds(monkeypatch):
    monkeypatch.setattr(infer, "try_to_load_from_cache", lambda repository, name: None)
    monkeypatch.setattr(infer, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(infer, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert infer.choose_llm()[0] == "gpt2"  # a hub answers: GPT-2 can be fetched
    assert infer.choose_llm()[0] == "tiny"  # nobody listens any more
    only_gpt2 = lambda repository, name: "/cache/x" if repository == "gpt2" else None
    monkeypatch.setattr(infer, "try_to_load_from_cache", only_gpt2)
    assert infer.choose_llm() == ("gpt2", "its weights are on this machine")
    monkeypatch.setattr(infer, "try_to_load_from_cache", lambda repository, name: "/cache/x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert infer.choose_llm()[0] == "meta-llama/Llama-2-7b-hf"


def test_the_score_method_finds_a_planted_hobby(tmp_path):
    """The planted world with a hastily pretrained LLM: stages 1 to 3 still find half of what can be found."""
    run_stage("01_prepare.py", "--run-dir", tmp_path, "--seed", 5)
    run_stage("02_infer_profiles.py", "--run-dir", tmp_path, "--llm", "tiny", "--tiny-steps", 60,
              "--shared-steps", 40, "--map-steps", 5, "--heldout", 200)
    run_stage("03_quantize.py", "--run-dir", tmp_path, "--epochs", 3)
    figures = json.loads((tmp_path / "feature_bank.parquet.json").read_text())
    assert figures["hobby_share_of_bayes"] > 0.5 and figures["background_share_of_bayes"] > 0.5
    assert abs(figures["hobby_vs_true_background"]) < 0.05 and abs(figures["background_vs_true_hobby"]) < 0.05


# --- bad input ------------------------------------------------------------------------------------------


def test_a_folder_without_weights_or_tokenizer(small_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no tokenizer" in infer_run(small_run, tmp_path, "--llm", empty, ok=False)
    llm = save_llm(tmp_path / "llm", "gpt2")
    (llm / "model.safetensors").unlink()
    line = infer_run(small_run, tmp_path, "--llm", llm, ok=False)
    assert "no weights" in line and "--llm" in line


def test_a_text_longer_than_the_context(llm, capsys):
    prompt = prompt_of(llm)
    long = infer.tokenize(llm[1], [[("title", " racer")], [("title", " red racer" * 200)]])
    line = dies(capsys, prompt.check_context, long, "item", "shorten it")
    assert "item 1 needs" in line and "256" in line and "shorten it" in line


@pytest.mark.parametrize("options, complaint", [
    (["--profiles", "hobby"], "NAME=TEXT"), (["--profiles", "a=x", "a=y"], "differ"),
    (["--route", "colour", "price"], "--route"), (["--route", "title"], "--route"),
    (["--task-text", " "], "--task-text"), (["--method", "magic"], "--method"),
    (["--meth", "score"], "--meth")])
def test_options_that_make_no_sense_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.parse_args(options)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_preset_gives_way_to_what_is_typed():
    args = infer.parse_args(["--paper", "--steps", "3"])
    assert args.steps == 3 and args.lr == 0.001 and args.method == "gradient" and args.route == ["none"]


def test_a_missing_predecessor_is_named(tmp_path):
    assert "python 01_prepare.py" in run_stage("02_infer_profiles.py", "--run-dir", tmp_path, ok=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_llm_is_bfloat16_and_the_profiles_float32(small_run, tmp_path):
    _, stored, _ = infer_run(small_run, tmp_path, "--llm", save_llm(tmp_path / "llm", "llama"))
    assert stored["profiles"].dtype == torch.float32 and torch.isfinite(stored["profiles"]).all()
