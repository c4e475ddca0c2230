import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT, STAGES, dies, infer, run_stage
from llm_cases import fast, fresh
from userip.artifacts import lock
from userip.options import process_rank, run_program
from userip.progress import Progress, join_processes


def test_more_processes_than_gpus_share_them(monkeypatch):
    chosen = []
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    assert join_processes() == (0, 4) and chosen == [1]


def progress_of(tmp_path, recipe=None, rank=0, **options):
    args = argparse.Namespace(run_dir=tmp_path, **{"tokens_per_batch": 64} | options)
    return Progress(args, recipe or {"--lr": 1}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("out of memory"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_goes_on_with_the_same_draws(tmp_path, capsys, error):
    progress, drawn = progress_of(tmp_path), []

    def make():
        drawn.append(float(torch.rand((), generator=progress.generator)))
        if progress.args.tokens_per_batch > 20:
            raise error
        return torch.tensor(drawn[-1])

    progress.compute("piece", make)
    assert progress.args.tokens_per_batch == 16 and len(set(drawn)) == 1 and len(drawn) == 3
    assert capsys.readouterr().out.count("out of memory: going on with --tokens-per-batch") == 2
    resumed = progress_of(tmp_path)  # with the batches of the run that was killed
    assert resumed.args.tokens_per_batch == 16


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    def make():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        progress_of(tmp_path).compute("piece", make)


def test_too_little_memory_for_anything_ends_in_one_line(tmp_path, capsys):
    def make():
        raise MemoryError("out of memory")

    assert "memory does not suffice" in dies(capsys, progress_of(tmp_path).compute, "piece", make)


def test_finished_pieces_are_found_and_the_generator_goes_on_behind_them(tmp_path, capsys):
    draws = []
    for turn in range(2):
        progress, made = progress_of(tmp_path), []
        piece = lambda: (made.append(1), torch.rand(2, generator=progress.generator))[1]
        draws.append((progress.compute("a", piece), progress.compute("b", piece),
                      torch.rand(2, generator=progress.generator)))
        assert len(made) == (0 if turn else 2)
    assert all(torch.equal(one, two) for one, two in zip(*draws))
    assert "2 pieces are done" in capsys.readouterr().out
    progress = progress_of(tmp_path, {"--lr": 2})
    assert "another --lr (1, now 2): it starts anew" in capsys.readouterr().out
    assert not list(progress.folder.glob("*.pt"))


def small(*options):
    return ["--llm", "tiny", *fast(options), *options]


FORKS = multiprocessing.get_context("forkserver")  # processes that need not import torch anew
FORKS.set_forkserver_preload(["test_progress", "transformers.models.gpt2.modeling_gpt2"])


def stage_in_child(run, options):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with open(run.with_suffix(".txt"), "w", buffering=1) as file:
        sys.stdout = file
        infer.main(infer.parse_args(["--run-dir", str(run), *map(str, small(*options))]))


def process(run, *options):
    worker = FORKS.Process(target=stage_in_child, args=(run, options))
    worker.start()
    return worker


def finish(run, *options):
    """The stage to its end -> what it printed"""
    worker = process(run, *options)
    worker.join()
    assert worker.exitcode == 0
    return run.with_suffix(".txt").read_text()


def torchrun(run, *options):
    """The same by two processes of torchrun: Popen"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               ROOT / "02_infer_profiles.py", "--run-dir", run, *small(*options)]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def wait_for_pieces(worker, run, number, pattern="*.pt"):
    """Until so many pieces are done, or the worker is"""
    alive = worker.is_alive if hasattr(worker, "is_alive") else lambda: worker.poll() is None
    while alive() and len(list((run / "progress").glob(pattern))) < number:
        time.sleep(0.002)


GRADIENT = ["--method", "gradient", "--batch-size", 1]


FILES = ("profiles.pt", "scores.pt")


def bits(run):
    return [(run / name).read_bytes() for name in FILES if (run / name).exists()]


@pytest.fixture(scope="module")
def undisturbed(small_run, tmp_path_factory):
    """The files of both methods, never killed, by their options"""
    result = {}
    for options in ((), tuple(GRADIENT)):
        run = fresh(small_run, tmp_path_factory.mktemp("undisturbed") / "run")
        finish(run, *options)
        result[options] = bits(run)
    return result


def test_twenty_kills_at_random_instants_change_no_bit(small_run, tmp_path, undisturbed):
    options = tuple(GRADIENT)
    expected = undisturbed[options]
    run, draw, resumed = fresh(small_run, tmp_path / "run"), random.Random(0), 0
    progress = run / "progress"
    for _ in range(20):
        before = len(list(progress.glob("*.pt")))
        worker = process(run, *options)
        wait_for_pieces(worker, run, before + draw.randint(0, 2))  # then at a random instant of the next ones
        time.sleep(0.03 * draw.random())
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        resumed += "going on with the unfinished run" in run.with_suffix(".txt").read_text()
    assert resumed >= 10
    finish(run, *options)
    assert bits(run) == expected and not progress.exists()


def test_a_kill_before_the_rename_and_a_full_disk_lose_nothing(small_run, tmp_path, monkeypatch, undisturbed):
    expected, threads = undisturbed[()], torch.get_num_threads()
    run = fresh(small_run, tmp_path / "run")
    options = ["--run-dir", run, *small()]
    torch.set_num_threads(1)  # as in the undisturbed run: another number adds in another order
    replace = Path.replace
    names = ["shared.pt", "map.pt", "length.pt", "scores.pt", "profiles.pt"]
    for name in names:
        def full(self, target):
            if Path(target).name == name:
                raise OSError(28, "No space left on device")
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", full)
        assert "free some space" in run_stage("02_infer_profiles.py", *options, ok=False)
        assert not (run / f".{name}.tmp").exists() and not (run / name).exists()
        monkeypatch.setattr(Path, "replace", replace)
        (run / "progress" / f".{name}.tmp").write_bytes(b"half")  # what a kill leaves
    torch.set_num_threads(threads)
    finish(run)
    assert bits(run) == expected and not (run / "progress").exists()


def test_a_run_goes_on_with_its_own_batches_when_other_memory_is_free(small_run, tmp_path, monkeypatch):
    run, replace = fresh(small_run, tmp_path / "run"), Path.replace
    options = ["--run-dir", run, *small()]

    def full(self, target):
        if Path(target).name == "map.pt":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr("userip.setup.tokens_that_fit", lambda prompt: 512)
    run_stage("02_infer_profiles.py", *options, ok=False)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr("userip.setup.tokens_that_fit", lambda prompt: 300)
    assert "going on with the unfinished run" in run_stage("02_infer_profiles.py", *options)
    assert json.loads((run / "profiles.pt.json").read_text())["options"]["tokens_per_batch"] == 512


def rank_in_child(rank, store, run):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, timeout: init(
        backend, init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    infer.main(infer.parse_args(["--run-dir", str(run), *map(str, small())]))


def test_two_processes_give_the_bits_of_one(small_run, tmp_path, undisturbed):
    run = fresh(small_run, tmp_path / "run")
    ranks = [FORKS.Process(target=rank_in_child, args=(rank, tmp_path / "store", run)) for rank in (0, 1)]
    for worker in ranks:
        worker.start()
    for worker in ranks:
        worker.join()
    assert [worker.exitcode for worker in ranks] == [0, 0]
    assert bits(run) == undisturbed[()]


def test_torchrun_ends_when_a_process_dies_and_goes_on_to_the_same_bits(small_run, tmp_path, undisturbed):
    options = tuple(GRADIENT)
    run = fresh(small_run, tmp_path / "dead")
    worker = torchrun(run, *options)
    wait_for_pieces(worker, run, 3, "fold-*.pt")
    ranks = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    worker.communicate()
    assert worker.returncode != 0 and len(list((run / "progress").glob("fold-*.pt"))) >= 3
    printed, complaint = torchrun(run, *options).communicate()
    assert printed.count("wrote") == printed.count("going on with the unfinished run") == 1, complaint
    assert bits(run) == undisturbed[options]


@pytest.mark.parametrize("rank, world, expected", [
    ("1", "2", (1, 2)), ("", "", (0, 1)), ("1", None, (0, 1)), ("1", "1", (0, 1)), ("x", "2", (0, 1))])
def test_only_torchrun_makes_ranks(monkeypatch, rank, world, expected):
    """RANK alone, as a scheduler leaves it, must not open a run directory that is locked."""
    for name, text in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if text is not None:
            monkeypatch.setenv(name, text)
    assert process_rank() == expected


def test_a_second_process_on_the_same_run_is_refused(small_run, tmp_path):
    run = fresh(small_run, tmp_path / "run")
    with lock(run):
        for script in STAGES:
            worker = FORKS.Process(target=program_in_child, args=(script, run))
            worker.start()
            worker.join()
            line = run.with_suffix(".err").read_text()
            assert worker.exitcode == 2 and "another process works on" in line and line.count("\n") == 1
    with lock(run):
        pass


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK damaged"), lambda path: torch.save([1], path)])
def test_a_finished_piece_of_another_tool_is_refused_by_name(tmp_path, capsys, damage):
    args = argparse.Namespace(run_dir=str(tmp_path), tokens_per_batch=100)
    progress = Progress(args, {"a": 1}, torch.Generator())
    damage(progress.folder / "map.pt")
    line = dies(capsys, progress.compute, "map", lambda: 1)
    assert "map.pt is no finished piece" in line and f"delete {progress.folder}" in line


def test_a_damaged_recipe_starts_anew(tmp_path, capsys):
    args = argparse.Namespace(run_dir=str(tmp_path), tokens_per_batch=100)
    manifest = Progress(args, {"a": 1}, torch.Generator()).folder / "recipe.json"
    for text in ('{"recipe": {"a": 1}}', '{"recipe": {"a": 1}, "tokens_per_batch": "x"}', "[]"):
        manifest.write_text(text)
        Progress(args, {"a": 1}, torch.Generator())
        assert "it starts anew" in capsys.readouterr().out and args.tokens_per_batch == 100


def test_a_changed_input_starts_anew(small_run, tmp_path, undisturbed):
    run = fresh(small_run, tmp_path / "run")
    worker = process(run, *GRADIENT)
    wait_for_pieces(worker, run, 4)
    worker.kill()
    worker.join()
    assert "another --method (gradient, now score): it starts anew" in finish(run)
    assert bits(run)[0] == undisturbed[()][0]


LONG = {"01_prepare.py": ["--dataset", "planted"],
        "02_infer_profiles.py": ["--llm", "tiny", "--tiny-steps", "9999"],
        "03_quantize.py": ["--epochs", "9999"], "04_train_ctr.py": ["--epochs", "9999", "--patience", "9999"],
        "05_case_study.py": []}


def program_in_child(script, run):
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = (open(run.with_suffix(end), "w", buffering=1) for end in (".txt", ".err"))
    sys.argv = [script, "--run-dir", str(run), *LONG[script]]
    run_program(STAGES[script].main, STAGES[script].parse_args)


@pytest.mark.parametrize("script", STAGES)
def test_ctrl_c_ends_a_stage_with_one_line_and_keeps_what_is_finished(small_run, tmp_path, script):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    before = {path.name for path in run.iterdir()}
    worker = FORKS.Process(target=program_in_child, args=(script, run))
    worker.start()
    printed = run.with_suffix(".txt")
    while worker.is_alive() and not (printed.exists() and printed.read_text()):
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(worker.pid, signal.SIGINT)
    worker.join()
    complaint = run.with_suffix(".err").read_text().strip().splitlines()
    assert worker.exitcode == 130 and len(complaint) == 1 and "interrupted" in complaint[0], complaint
    assert {path.name for path in run.iterdir()} - before <= {".lock", "progress"}
