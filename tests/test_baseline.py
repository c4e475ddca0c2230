"""What the four baselines refuse alike; more of the room is tested with KAR, in test_kar.py."""

import importlib

import pytest

from conftest import dies


@pytest.mark.parametrize("name", ["kar", "rella", "pepler", "peapod"])
def test_a_run_without_stage_1_names_the_command(name, tmp_path, capsys):
    script = importlib.import_module(f"baselines.{name}")
    args = script.parse_args(["--run-dir", str(tmp_path / "nothing")])
    assert "01_prepare.py" in dies(capsys, script.main, args)


@pytest.mark.parametrize("name, options", [
    ("kar", ["--text", "history", "--new-tokens", "9"]), ("peapod", ["--variant", "shared", "--rank", "5"]),
    ("peapod", ["--variant", "neighbours", "--pool", "5"]), ("pepler", ["--head", "mf", "--hidden", "5"]),
    ("pepler", ["--text-weight", "0", "--text-rows", "5"])])
def test_options_that_nothing_reads_are_refused(name, options, capsys):
    script = importlib.import_module(f"baselines.{name}")
    assert f"{options[2]} means nothing" in dies(capsys, script.parse_args, options)
