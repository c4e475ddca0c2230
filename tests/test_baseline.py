"""What the four baselines refuse alike; more of the room is tested with KAR, in test_kar.py."""

import importlib
from types import SimpleNamespace

import pandas as pd
import pytest

from baseline_cases import prepared_run
from conftest import dies, save_llm
from userip import baseline, explanations


@pytest.mark.parametrize("name", ["kar", "rella", "pepler", "peapod"])
def test_a_run_without_stage_1_names_the_command(name, tmp_path, capsys):
    script = importlib.import_module(f"baselines.{name}")
    args = script.parse_args(["--run-dir", str(tmp_path / "nothing")])
    assert "01_prepare.py" in dies(capsys, script.main, args)


@pytest.mark.parametrize("name, options", [
    ("kar", ["--text", "history", "--new-tokens", "9"]), ("peapod", ["--variant", "shared", "--rank", "5"]),
    ("peapod", ["--variant", "neighbours", "--pool", "5"]), ("pepler", ["--head", "mf", "--hidden", "5"]),
    ("pepler", ["--text-weight", "0", "--text-rows", "5"]), ("rella", ["--shots", "0", "--rank", "5"]),
    *((name, ["--llm", "gpt2", "--tiny-steps", "5"]) for name in ("kar", "rella", "pepler", "peapod"))])
def test_options_that_nothing_reads_are_refused(name, options, capsys):
    script = importlib.import_module(f"baselines.{name}")
    assert f"{options[2]} means nothing" in dies(capsys, script.parse_args, options)


def test_a_prompt_that_all_share_is_not_the_profile(capsys):
    peapod = importlib.import_module("baselines.peapod")
    assert "behind another" in dies(capsys, peapod.parse_args, ["--variant", "shared", "pool"])
    assert peapod.parse_args(["--variant", "shared"]).variant == ["shared"]


@pytest.mark.parametrize("name, option, choice", [("kar", "text", "history"), ("rella", "retrieval", "latest"),
                                                  ("pepler", "head", "mf"), ("peapod", "variant", "pool")])
def test_what_is_listed_twice_is_trained_once(name, option, choice):
    script = importlib.import_module(f"baselines.{name}")
    assert vars(script.parse_args([f"--{option}", choice, choice]))[option] == [choice]


def test_seconds_of_a_piece_are_counted_once_and_are_those_of_its_making(tmp_path, monkeypatch):
    now = iter([100.0, 107.0])
    monkeypatch.setattr(baseline.time, "time", lambda: next(now))
    finished = baseline.Finished(SimpleNamespace(run_dir=tmp_path), "kar", {})
    for _ in range(2):
        assert finished.compute(["a"], lambda: 5) == 5 and finished.seconds == 7.0
    again = baseline.Finished(SimpleNamespace(run_dir=tmp_path), "kar", {})
    assert again.compute(["a"], lambda: 6) == 5 and again.seconds == 7.0


def test_prompts_that_lose_their_beginning_are_told(llm, capsys):
    llm = SimpleNamespace(tokenizer=llm[1], context=8)
    baseline.tell_of_cut(llm, ["a job", "red racer " * 9], 2, "lower --max-history")
    assert "1 of 2 prompts are longer than the 8 tokens" in capsys.readouterr().out
    llm.context = 999
    baseline.tell_of_cut(llm, ["a job", "red racer " * 9], 2, "lower --max-history")
    assert not capsys.readouterr().out


def test_a_llm_in_other_arithmetic_is_another_one(tmp_path):
    script, run = importlib.import_module("baselines.kar"), prepared_run(tmp_path)
    options = "--run-dir", run, "--llm", save_llm(tmp_path / "llm", "llama"), "--dtype"
    llms = [baseline.load_baseline_llm(script.parse_args([*map(str, options), dtype]), None, [])
            for dtype in ("float32", "mixed")]
    assert len({llm.digest for llm in llms}) == 2


def test_without_a_column_of_reviews_there_are_none(tmp_path):
    run = prepared_run(tmp_path)
    args, path = SimpleNamespace(run_dir=run), run / "interactions.parquet"
    frame = pd.read_parquet(path).assign(review="Good. More.")
    frame.to_parquet(path)
    assert explanations.first_sentences(args).tolist() == ["Good."] * len(frame)
    frame.drop(columns="review").to_parquet(path)
    assert explanations.first_sentences(args).tolist() == [""] * len(frame)


@pytest.mark.parametrize("name, option", [("kar", "--new-tokens"), ("peapod", "--soft-tokens")])
def test_prompts_beyond_the_context_are_refused_at_once(name, option, tmp_path, capsys):
    script, run = importlib.import_module(f"baselines.{name}"), prepared_run(tmp_path)
    options = "--run-dir", run, "--llm", save_llm(tmp_path / "llm", "llama"), option, 250  # it reads 256
    error = dies(capsys, script.main, script.parse_args([str(part) for part in options]))
    assert f"{option} 250" in error and "reads 256 at most" in error
