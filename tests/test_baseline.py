"""What the four baselines refuse alike; more of the room is tested with KAR, in test_kar.py."""

import importlib

import pytest

from baseline_cases import prepared_run
from conftest import dies, save_llm


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


@pytest.mark.parametrize("name, option, choice", [("kar", "text", "history"), ("rella", "retrieval", "latest"),
                                                  ("pepler", "head", "mf"), ("peapod", "variant", "pool")])
def test_what_is_listed_twice_is_trained_once(name, option, choice):
    script = importlib.import_module(f"baselines.{name}")
    assert vars(script.parse_args([f"--{option}", choice, choice]))[option] == [choice]


@pytest.mark.parametrize("name, option", [("kar", "--new-tokens"), ("peapod", "--soft-tokens")])
def test_prompts_beyond_the_context_are_refused_at_once(name, option, tmp_path, capsys):
    script, run = importlib.import_module(f"baselines.{name}"), prepared_run(tmp_path)
    options = "--run-dir", run, "--llm", save_llm(tmp_path / "llm", "llama"), option, 250  # it reads 256
    error = dies(capsys, script.main, script.parse_args([str(part) for part in options]))
    assert f"{option} 250" in error and "reads 256 at most" in error
