import argparse
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from conftest import infer, run_stage, save_llm, write_interactions
from llm_cases import (events_of, fresh, infer_run, prompt_of, rating_route, routes_for, run_of, shared_of,
                       soft_for, weights_of)
from userip.evidence import FIELDS
from userip.further_runs import command_line
from userip.llm import load_llm
from userip.score import Directions, TextScores, centred_scores, find_directions


def score_case(llm, events, **options):
    """Profiles of a few users by the score method, all that users share held fixed: a function of events."""
    routes = [routes_for(llm)[0], rating_route(llm)]
    options = {"pull": 2.0, "map_steps": 3} | options
    run = run_of(llm, prompt_of(llm), routes, events, **options)
    soft, scores = soft_for(run.prompt, 1)[0], {}
    for route in routes:
        scores |= centred_scores(run, route, soft, weights_of())

    def infer_users(own, prior=()):
        fixed = SimpleNamespace(**vars(run) | {
            "progress": run_of(llm, run.prompt, routes, events, **options).progress,
            "evidence": run_of(llm, run.prompt, routes, events, own, **options).evidence})
        profiles, fitted = infer.infer_by_score(fixed, shared_of(soft, scores, prior=prior))
        return torch.cat(list(profiles.blocks())).view(profiles.shape), fitted

    return infer_users, find_directions(run, scores)[0], routes


EVENTS = ([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3], [0, 1, 2, 1, 3, 4, 0, 2, 4, 3, 0],
          [0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0])


def test_the_score_profile_is_the_shrunken_sum_of_single_items(llm, capsys):
    """A double loop over users and items: Σ over what they had, / (n + pull), mapped by B; folds left out."""
    events = events_of(*EVENTS)
    infer_users, coordinates, routes = score_case(llm, events, folds=2)
    profiles, fitted = infer_users(events)
    assert profiles.shape[:3] == (3, 4, 2)
    for fold, left_out in enumerate([0, 1, None]):
        for user in range(4):
            for k, route in enumerate(routes):
                total, number = torch.zeros(16), 0
                for index in range(11):
                    if EVENTS[0][index] == user and EVENTS[3][index] != left_out:
                        if route.texts.num_scored_tokens()[route.text_index(events)[index]]:
                            total += coordinates[k].train[route.text_index(events)[index]]
                            number += 1
                expected = fitted["shared"][k] + (total / (number + 2.0)) @ fitted["lift"][k]
                assert torch.allclose(profiles[fold, user, k], expected, atol=1e-4)


def test_evidence_of_the_left_out_fold_changes_nothing(llm, monkeypatch):
    """What all users share (directions, map, step length) held fixed."""
    monkeypatch.setattr(infer, "choose_length", lambda *arguments: torch.ones(2))
    events = events_of(*EVENTS)
    infer_users, _, _ = score_case(llm, events, folds=2)
    before = infer_users(events)[0]
    flipped = events._replace(level=torch.where(events.fold == 0, 1 - events.level, events.level))
    after = infer_users(flipped)[0]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])
    assert torch.equal(before[:, :, 0], after[:, :, 0])  # a profile that no rating tells of stays


def test_a_codebook_as_prior_pulls_each_user_to_the_codeword_nearest_to_them(llm, capsys):
    events = events_of(*EVENTS)
    infer_users, _, _ = score_case(llm, events, pull=1e6)
    plain, fitted = infer_users(events)
    prior = []
    for k in range(2):
        transform = torch.linalg.pinv(fitted["lift"][k])[:, :2]  # the first two coordinates
        codebook = 0.3 * torch.tensor([[1.0, 0], [-1, 1], [0, -1]])
        prior.append(SimpleNamespace(codebook=codebook, transform=transform, mean=fitted["shared"][k],
                                     shared=torch.zeros(2)))
    pulled, _ = infer_users(events, prior)
    for k, part in enumerate(prior):
        z = (pulled[-1, :, k] - part.mean) @ part.transform
        distance = torch.cdist(z, part.codebook).min(1).values
        assert distance.max() < 1e-2  # so strong a pull leaves all at a codeword
        plain_z = (plain[-1, :, k] - part.mean) @ part.transform
        assert torch.cdist(plain_z, part.codebook).min(1).values.min() > 0.05
    assert len(set(torch.cdist((pulled[-1, :, 0] - prior[0].mean) @ prior[0].transform,
                               prior[0].codebook).argmin(1).tolist())) > 1


GRADIENT_EVENTS = ([0, 0, 1, 2, 2, 2], [0, 3, 2, 3, 4, 0])


def gradient_case(llm, mask="fig4", **options):
    """Three users with histories of unequal length; inference of those users by gradient."""
    run = run_of(llm, prompt_of(llm, mask=mask), routes_for(llm), events_of(*GRADIENT_EVENTS),
                 **{"tokens_per_batch": 200, "pull": 0.5, "steps": 3} | options)
    soft = soft_for(run.prompt, 1)[0]
    shared = shared_of(soft, noise=torch.eye(soft.shape[1]).expand(2, -1, -1))

    def infer_users(first=0, last=3, start=None, **changes):
        vars(run.args).update({"pull": 0.5, "steps": 3} | changes)
        start = (soft.expand(3, -1, -1) if start is None else start)[first:last]
        return infer.infer_block(run, shared, run.evidence[-1].of_users(first, last), start)

    return infer_users, soft


def test_a_user_alone_gets_what_the_block_gives(llm):
    infer_users, _ = gradient_case(llm)
    together = infer_users()
    for user in range(3):
        assert torch.allclose(infer_users(user, user + 1)[0], together[user], atol=1e-5)


@pytest.mark.parametrize("mask", ["fig4", "causal"])
def test_the_token_budget_changes_no_profile(llm, mask):
    """With a budget of one token each text is alone in its batch."""
    together = gradient_case(llm, mask)[0]()
    assert torch.allclose(gradient_case(llm, mask, tokens_per_batch=1)[0](), together, atol=1e-5)


def test_pull_steps_lr_and_start_move_the_profiles(llm):
    infer_users, shared = gradient_case(llm)
    base = infer_users()
    drift = lambda **options: float((infer_users(**options) - shared).norm())
    assert 0 < drift(pull=1e4) and not torch.equal(infer_users(pull=5.0), base)
    assert drift(steps=8, pull=1e4) < drift(steps=8, pull=0.0)
    assert not torch.equal(infer_users(steps=1), base)
    assert not torch.equal(gradient_case(llm, lr=0.02)[0](), base)
    assert not torch.equal(infer_users(start=shared.expand(3, -1, -1) + 0.01), base)


def test_the_shared_point_and_personal_steps_lower_the_nll_and_leave_the_llm_untouched(llm):
    model = llm[0]
    content = lambda: b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    digest = lambda: hashlib.sha256(content()).hexdigest()
    before = digest()
    prompt, routes, events = prompt_of(llm), routes_for(llm), events_of([0, 0, 1, 2], [0, 4, 2, 3])
    run = run_of(llm, prompt, routes, events, shared_steps=25, tokens_per_batch=2000, lr=0.02, pull=0.0,
                 steps=10)
    evidence, ones = run.evidence[-1].of_events(events), torch.ones(len(FIELDS))
    nll = lambda soft: float(sum(prompt.loss(soft, route, text, ones, user)
                                 for route, text, user in evidence))
    soft, curve = infer.fit_shared_start(run, evidence, ones)
    assert len(curve) == 25 and np.mean(curve[-5:]) < np.mean(curve[:5])
    start, everyone = soft_for(prompt, 1).expand(3, -1, -1), soft.expand(3, -1, -1)
    shared = shared_of(soft, noise=torch.zeros(2, soft.shape[1], soft.shape[1]))
    shared.weights = ones
    own = infer.infer_block(run, shared, evidence, everyone)
    assert nll(own) < nll(everyone) < nll(start)
    assert digest() == before and not any(parameter.requires_grad for parameter in model.parameters())


def test_a_random_start_is_each_users_own_in_whatever_block_they_are(llm):
    prompt = prompt_of(llm)
    shared = soft_for(prompt, 1)[0]
    args = argparse.Namespace(start="random", seed=3)
    together = infer.start_of(args, prompt, shared, torch.arange(6))
    assert torch.equal(infer.start_of(args, prompt, shared, torch.tensor([4])), together[4:5])
    assert len({float(row[0, 0]) for row in together}) == 6
    args.seed = 4
    assert not torch.equal(infer.start_of(args, prompt, shared, torch.arange(6)), together)


def test_the_map_never_sees_the_item_that_it_predicts(llm):
    """Users of a single item: without it nothing is known of them, and the map cannot learn."""
    prompt, routes = prompt_of(llm), routes_for(llm)

    def fitted(items):
        run = run_of(llm, prompt, routes, events_of([0, 1, 2, 3, 4] * (len(items) // 5), items), map_steps=3)
        tables = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
        is_scored = torch.ones(5, dtype=torch.bool)
        coordinates = [TextScores(route, table, table, is_scored, None)
                       for route, table in zip(routes, tables)]
        scores = {k: TextScores(route, torch.randn(5, 32), None, is_scored, torch.eye(32))
                  for k, route in enumerate(routes)}
        shared = SimpleNamespace(soft=soft_for(prompt, 1)[0], scores=scores)
        fits = lambda is_above: infer.fit_map(run, shared, Directions(
            coordinates, torch.ones(2), start, torch.tensor(is_above).expand(2, 3)))
        return fits([True, True, False]) - fits([False] * 3)  # how far it moved from its start

    start = torch.eye(3, 32).expand(2, 3, 32)
    assert fitted([0, 1, 2, 3, 4]).abs().max() == 0
    moved = fitted([0, 1, 2, 3, 4, 1, 2, 3, 4, 0]).abs()
    assert (moved[:, :2] > 0).all() and (moved[:, 2] == 0).all()  # only directions in which users differ


def fake_nll(run, slope, bend):
    """heldout_nll as a parabola in the first number of each profile, with noise that is the row's"""
    noise = torch.randn(len(run.tune.user), generator=torch.Generator().manual_seed(0))

    def nll(_, profiles, events, is_blind=False):
        length = profiles[:, 0, 0].expand(len(events.user))
        nats = slope * length + bend * length.square() + 0.1 * noise * length + 3
        return nats[:, None].expand(-1, len(run.routes)), None

    return nll


@pytest.mark.parametrize("slope, bend, expected", [
    (-1.0, 1.0, 0.5), (-1.0, 0.6, 1 / 1.2), (-1.0, 0.1, 1.0), (1.0, 0.5, 0.05), (-0.005, 0.5, 0.05),
    (0.2, -0.05, 0.05)])
def test_the_length_is_that_of_the_likeliest_rows_and_the_shortest_if_none_surely_helps(
        llm, monkeypatch, slope, bend, expected):
    prompt = prompt_of(llm)
    run = run_of(llm, prompt, routes_for(llm), events_of(*[list(range(5)) * 8] * 2))
    monkeypatch.setattr(infer, "heldout_nll", fake_nll(run, slope, bend))
    step = torch.zeros(40, 2, 32)
    step[:, :, 0] = 1
    lengths = infer.choose_length(run, torch.zeros(2, 32), step)
    assert lengths.tolist() == pytest.approx([expected] * 2, abs=0.1)


def test_profiles_of_a_harmful_map_are_no_worse_than_the_shared_start(small_run, tmp_path, monkeypatch):
    """A map of three steps, and random directions as long as an embedding added to it"""
    fit_map, added = infer.fit_map, 0.5 * torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(infer, "fit_map", lambda *arguments: fit_map(*arguments) + added)
    run = fresh(small_run, tmp_path / "run")
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--tiny-steps", 6,
                        "--shared-steps", 4, "--map-steps", 3)
    assert "hobby 0.05, background 0.05" in printed
    mean, half = json.loads((run / "profiles.pt.json").read_text())["heldout_nll"]["own_minus_shared"]
    assert mean <= half + 1e-4  # a step in a wrong direction shrinks as its interval does: no length is enough


def test_profiles_of_a_map_of_three_steps_are_no_worse_than_the_shared_start_and_give_the_same_codes(
        small_run, tmp_path):
    banks = []
    for steps in (3, 60):
        run = fresh(small_run, tmp_path / str(steps))
        run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--tiny-steps", 6,
                  "--shared-steps", 4, "--map-steps", steps)
        mean, half = json.loads((run / "profiles.pt.json").read_text())["heldout_nll"]["own_minus_shared"]
        assert mean <= half
        run_stage("03_quantize.py", "--run-dir", run, "--codes", 2, 2, "--rec-weight", 0, "--stability", 0)
        banks.append(pd.read_parquet(run / "feature_bank.parquet"))
    for name in ("hobby", "background"):
        assert adjusted_rand_score(banks[0][name], banks[1][name]) > 0.95


def test_profiles_hold_what_the_readme_says(small_run):
    stored = torch.load(small_run[1] / "profiles.pt", weights_only=True)
    assert stored["profiles"].shape == (60, 2, 128) and stored["profiles"].dtype == torch.float32
    assert stored["noise"].shape == (2, 128, 128) and stored["has_evidence"].all()
    assert stored["names"] == ["hobby", "background"]
    figures = json.loads((small_run[1] / "profiles.pt.json").read_text())["heldout_nll"]
    assert {"none", "shared", "shuffled", "own", "own_minus_shared", "own_minus_shuffled"} == set(figures)


THREE_PROFILES = ("--profiles", "hobby=This user's hobby is", "job=her job is", "sport=This user's sport is")


@pytest.mark.parametrize("options, num_profiles", [
    (("--paper",), 2), (("--method", "gradient"), 2), (("--method", "gradient", "--evidence", "history"), 2),
    (("--released", "--evidence", "items"), 2), (("--soft-tokens", 2), 2), (THREE_PROFILES, 3),
    (("--ratings",), 3), (("--ratings", "--folds", 2, "--method", "gradient"), 3),
    (("--ratings", "--route", "title+rating", "brand+price"), 2)], ids=lambda value: str(value)[:60])
def test_methods_evidence_and_any_number_of_profiles_run(small_run, tmp_path, options, num_profiles):
    _, stored, sidecar = infer_run(small_run, tmp_path, "--llm", "tiny", *options)
    profiles, folds = stored["profiles"], sidecar["options"]["folds"]
    assert profiles.shape[:-3] == ((folds + 1,) if folds else ()) and ("fold" in stored) == bool(folds)
    assert profiles.shape[-2] == len(stored["names"]) == num_profiles
    assert profiles.shape[-1] == 128 * sidecar["options"]["soft_tokens"]
    assert torch.isfinite(profiles).all() and (profiles.std(-3) > 0).any()
    assert stored["num_evidence"].shape == profiles.shape[:-1]
    assert np.isfinite(sidecar["heldout_nll"]["own"])
    infer.parse_args(command_line(sidecar["options"]))  # as a further split repeats them


def test_the_rank_says_in_how_many_directions_profiles_differ(small_run, tmp_path):
    _, stored, _ = infer_run(small_run, tmp_path, "--llm", "tiny", "--rank", 3)
    for k in range(2):
        profiles = stored["profiles"][:, k].double()
        sizes = torch.linalg.svdvals(profiles - profiles.mean(0))
        assert sizes[2] > 1e-3 * sizes[0] and sizes[3] < 1e-4 * sizes[0]  # float32 around θ̄


def test_reviews_are_evidence_their_first_sentence_only(small_run, tmp_path):
    """Reviews that say what group a user is of; those of test rows, and second sentences, move nothing."""
    interactions = pd.read_parquet(small_run[1] / "interactions.parquet")
    profiles = []
    for poison in ("plain", "poison"):
        run = tmp_path / poison
        run.mkdir()
        for name in ("items", "users"):
            for suffix in (".parquet", ".parquet.json"):
                (run / f"{name}{suffix}").write_bytes((small_run[1] / f"{name}{suffix}").read_bytes())
        text = (np.where(interactions["user"] % 2, "I race all day. ", "I cook all day. ").astype(object)
                + poison)
        text[(interactions["split"] == "test").to_numpy()] = poison
        options = argparse.Namespace(run_dir=str(run), seed=0)
        write_interactions(options, interactions.assign(review=text))
        printed = run_stage("02_infer_profiles.py", "--run-dir", run, "--llm", "tiny", "--evidence", "review",
                            "--tiny-steps", 6, "--shared-steps", 4, "--map-steps", 4, "--heldout", 60)
        profiles.append((run / "profiles.pt").read_bytes())
    assert profiles[0] == profiles[1] and "field weights: review" in printed
    line = infer_run(small_run, tmp_path, "--evidence", "review", "--llm", "tiny", ok=False)
    assert "holds no reviews" in line and "--evidence items" in line


def test_task_text_route_and_names_move_the_profiles(small_run, tmp_path):
    llm = save_llm(tmp_path / "llm", "gpt2")
    base = infer_run(small_run, tmp_path, "--llm", llm)[1]["profiles"]
    for options in (("--task-text", "a job"), ("--route", "none"), ("--route", "title", "price"),
                    ("--field-weights", "none"), ("--pull", 500), ("--mask", "causal"),
                    ("--profiles", "hobby=This user's hobby is", "job=her job is"), ("--seed", 1)):
        profiles = infer_run(small_run, tmp_path, "--llm", llm, *options)[1]["profiles"]
        assert not torch.equal(profiles, base), options


def test_the_score_method_finds_a_planted_hobby(tmp_path):
    """The planted world with a hastily pretrained LLM: stages 1 to 3 still find half of what can be found."""
    run_stage("01_prepare.py", "--run-dir", tmp_path, "--seed", 5)
    run_stage("02_infer_profiles.py", "--run-dir", tmp_path, "--llm", "tiny", "--tiny-steps", 60,
              "--shared-steps", 40, "--map-steps", 5, "--heldout", 200)
    run_stage("03_quantize.py", "--run-dir", tmp_path, "--epochs", 3, "--stability", 0,
              "--rec-weight", 0)  # no choice of directions, which takes long and has tests of its own
    figures = json.loads((tmp_path / "feature_bank.parquet.json").read_text())
    assert figures["hobby_share_of_bayes"] > 0.5 and figures["background_share_of_bayes"] > 0.5
    assert abs(figures["hobby_vs_true_background"]) < 0.05 and abs(figures["background_vs_true_hobby"]) < 0.05


@pytest.mark.parametrize("options, complaint", [
    (["--profiles", "hobby"], "NAME=TEXT"), (["--profiles", "a=x", "a=y"], "differ"),
    (["--route", "colour", "price"], "--route"), (["--route", "title"], "--route"),
    (["--task-text", " "], "--task-text"), (["--method", "magic"], "--method"),
    (["--meth", "score"], "--meth"), (["--evidence", "history"], "--method gradient"),
    (["--profiles", "a=likes {brand}"], "not filled in"), (["--profiles", "user=x"], "feature bank"),
    (["--pull", "0"], "--pull"), (["--method", "gradient", "--lr", "0"], "--lr"),
    (["--only-users", "x.csv", "--seed", "3"], "--seed"),
    (["--paper", "--released"], "different recipes"), (["--folds", "1"], "--folds"),
    (["--ratings", "--evidence", "review"], "--ratings"),
    (["--ratings", "--prior", "codebook.pt"], "--prior cannot go with --ratings"),
    (["--ratings", "--route", "title", "price"], "rating"),
    (["--route", "title", "rating"], "--ratings"), (["--only-users", "x.csv", "--steps", "3"], "--steps")])
def test_options_that_make_no_sense_are_refused(options, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        infer.parse_args(options)
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_preset_gives_way_to_what_is_typed():
    args = infer.parse_args(["--paper", "--steps", "3"])
    assert args.steps == 3 and args.lr == 0.001 and args.method == "gradient" and args.route == ["none"]


def test_a_missing_predecessor_is_named(tmp_path):
    assert "python 01_prepare.py" in run_stage("02_infer_profiles.py", "--run-dir", tmp_path, ok=False)


def test_mixed_products_give_nearly_the_profiles_of_single_precision(small_run, tmp_path, llm_folder):
    stored = [infer_run(small_run, tmp_path / dtype, "--llm", llm_folder, "--dtype", dtype)
              for dtype in ("float32", "mixed")]
    assert "with products in bfloat16, scores of" in stored[1][0] and "mixed on cpu" in stored[1][0]
    assert "has read: check of bfloat16 " in stored[1][0]  # both passes, none of them nameless
    exact, mixed = (figures["heldout_nll"] for _, _, figures in stored)
    for key in ("none", "shared", "own"):
        assert 0 < abs(exact[key] - mixed[key]) < 1e-2, key
    exact, mixed = (part["shared"] for _, part, _ in stored)
    assert torch.nn.functional.cosine_similarity(exact, mixed).min() > 0.99


@pytest.mark.parametrize("most, expected", [(1.0, "mixed"), (0.0, "float32")])
def test_auto_takes_mixed_products_only_where_scores_agree(small_run, tmp_path, monkeypatch, llm_folder, most,
                                                           expected):
    monkeypatch.setattr("userip.setup.SMALL_LLM", 0)
    monkeypatch.setattr("userip.setup.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("userip.setup.MOST_DIFFERENCE", most)
    printed, _, figures = infer_run(small_run, tmp_path, "--llm", llm_folder)
    assert f"most for auto): {expected}" in printed and figures["options"]["dtype"] == expected


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["score", "gradient"])
def test_a_llm_in_bfloat16_gives_what_it_gives_in_single_precision(small_run, tmp_path, monkeypatch,
                                                                   architecture, method):
    """As on a GPU, where it is so by default: each dtype meets each other one, and errors stay small."""
    options = ("--llm", save_llm(tmp_path / "llm", architecture), "--method", method, "--start", "shared")
    _, single, of_single = infer_run(small_run, tmp_path / "single", *options)
    monkeypatch.setattr("userip.setup.load_llm", lambda *arguments, **options: (
        (loaded := load_llm(*arguments, **options))[0].bfloat16(), loaded[1]))
    _, half, of_half = infer_run(small_run, tmp_path / "half", *options)
    assert half["profiles"].dtype == torch.float32 and not torch.equal(half["profiles"], single["profiles"])
    for key in ("none", "shared", "own"):
        assert of_half["heldout_nll"][key] == pytest.approx(of_single["heldout_nll"][key], rel=1e-3), key
    # with random weights users do not differ: the score method moves them along noise, here and there
    compared = [each["profiles"] - each["shared"] * (method == "gradient") for each in (half, single)]
    assert torch.nn.functional.cosine_similarity(*(part.flatten() for part in compared), dim=0) > 0.9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fitted a GPU")
def test_on_a_gpu_the_llm_is_bfloat16_and_the_profiles_float32(small_run, tmp_path):
    _, stored, _ = infer_run(small_run, tmp_path, "--llm", save_llm(tmp_path / "llm", "llama"))
    assert stored["profiles"].dtype == torch.float32 and torch.isfinite(stored["profiles"]).all()
