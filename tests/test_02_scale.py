"""Stage 2 at scale: shortcuts that change no number, nothing lost, several processes, little memory."""

import argparse
import copy
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
from types import SimpleNamespace

import pytest
import torch

import common
from conftest import NAME_TEXTS, ROOT, TASK_TEXT, dies, infer, run_process, run_stage, save_llm
from test_02_infer_profiles import events_of, prompt_of, soft_for, streams_of, texts_of


@pytest.fixture(scope="module")
def llm(llm_folder):
    return common.load_llm(argparse.Namespace(run_dir="unused"), str(llm_folder))


# --- shortcuts: each gives the numbers of the long way ---------------------------------------------------


@pytest.mark.parametrize("num_soft", [1, 2])
@pytest.mark.parametrize("sees", [[True, True], [True, False], [False, True], [False, False]])
def test_keys_made_once_give_the_hidden_states_of_the_whole_prompt(llm, sees, num_soft):
    prompt, texts = prompt_of(llm, num_soft=num_soft), texts_of(llm)
    owner, sees = torch.tensor([0, 1, 1, 0, 2]), torch.tensor(sees)
    results = []
    for way in (prompt.hidden_of_all, prompt.hidden_of_text):
        soft = soft_for(prompt, 3).requires_grad_()
        hidden = way(soft, texts.ids, sees, owner)
        is_text = torch.arange(texts.ids.shape[1]) < texts.length[:, None]
        loss = hidden[is_text].square().sum() + 0 * soft.sum()  # sees no θ: no gradient, but no error
        results.append((hidden[is_text], torch.autograd.grad(loss, soft)[0]))
    for long, short in zip(*results):
        assert torch.allclose(long, short, atol=1e-5)
    assert bool(results[1][1].abs().sum() > 0) == bool(sees.any())


def test_the_loss_in_chunks_is_cross_entropy_and_so_is_its_gradient(llm, monkeypatch):
    prompt = prompt_of(llm)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(prompt.head.out_features, (50,), generator=generator)
    weight = torch.rand(50, generator=generator)
    for chunk, scale in ((1, 1), (7 * prompt.head.out_features, 1), (2**25, 1), (2**25, 1e4)):
        monkeypatch.setattr(infer, "CHUNK", chunk)
        hidden = (scale * torch.randn(50, prompt.head.in_features, generator=generator)).requires_grad_()
        ours = infer.HeadNLL.apply(hidden, prompt.head, target)
        plain = torch.nn.functional.cross_entropy(prompt.head(hidden), target, reduction="none")
        assert torch.allclose(ours, plain, atol=1e-5)
        (mine,), (theirs,) = (torch.autograd.grad((nll * weight).sum(), hidden) for nll in (ours, plain))
        assert torch.allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("mask, most", [("causal", 0), ("fig4", 0), ("fig4", 8), ("fig4", 128)])
@pytest.mark.parametrize("max_tokens", [30, 4096])
def test_the_gradient_of_a_step_is_that_of_the_naive_loop(llm, mask, most, max_tokens):
    """Text by text, the whole prompt, all logits, plain cross-entropy; fields weighted."""
    prompt, (stream, _) = prompt_of(llm, mask=mask), streams_of(llm)
    weights = torch.arange(1.0, 1 + len(infer.FIELDS))
    rows, owner = torch.tensor([0, 3, 2, 3, 4, 0]), torch.tensor([0, 0, 1, 2, 2, 2])
    soft = soft_for(prompt, 4).requires_grad_()  # the fourth user has no text
    soft.grad = torch.ones_like(soft)
    args = argparse.Namespace(tokens_per_batch=max_tokens)
    texts, whose = infer.cut(stream.texts, rows), owner
    if most:
        texts, whose = infer.side_by_side(texts, owner, most)
        assert 3 == len(whose) if most > 8 else 3 < len(whose) < 6
        assert texts.length.sum() == stream.texts.length[rows].sum()
    infer.add_gradient(args, prompt, soft, stream._replace(texts=texts), whose, weights)
    loss = 0.0
    for row, user in zip(rows, owner):
        length = int(stream.texts.length[row])
        ids, field = stream.texts.ids[row, :length], stream.texts.field[row, :length]
        embeddings, allowed, position = prompt.inputs(soft[user][None], ids[None], stream.sees[None])
        logits = llm[0](inputs_embeds=embeddings, attention_mask=allowed, position_ids=position).logits
        nll = torch.nn.functional.cross_entropy(logits[0, -length - 1:-1], ids, reduction="none")
        loss = loss + (weights[field] * nll).sum()
    (expected,) = torch.autograd.grad(loss, soft)
    assert torch.allclose(soft.grad - 1, expected, atol=1e-5) and expected[3].abs().max() == 0


def test_batches_hold_texts_of_about_equal_length_and_no_more_tokens_than_allowed(llm):
    prompt, draw = prompt_of(llm), torch.Generator().manual_seed(0)
    length = torch.randint(3, 41, (600,), generator=draw)
    texts = infer.Texts(torch.zeros(600, 40), None, length)
    rows = torch.randperm(600, generator=draw)
    found = list(infer.batches(prompt, texts, rows, 2000))
    assert sorted(torch.cat(found).tolist()) == list(range(600))
    tokens = [len(index) * (len(prompt.segment) + int(length[rows[index]].max())) for index in found]
    padded = sum(len(index) * int(length[rows[index]].max()) for index in found)
    assert max(tokens) <= 2000 and padded < 1.15 * int(length.sum()) and len(found) < 60
    assert [len(index) for index in infer.batches(prompt, texts, rows[:5], 1)] == [1] * 5


def test_no_logits_of_all_rows_are_ever_held(llm, monkeypatch):
    prompt, sizes = prompt_of(llm), []
    monkeypatch.setattr(infer, "CHUNK", 4 * prompt.head.out_features)
    prompt.head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    infer.HeadNLL.apply(torch.randn(50, prompt.head.in_features), prompt.head, torch.zeros(50).long())
    prompt.head._forward_hooks.clear()
    assert max(sizes) <= 5 and sum(sizes) == 50


@pytest.mark.parametrize("architecture, slow", [("gpt2", "NewGELUActivation"), ("llama", "LlamaRMSNorm")])
def test_fused_calls_change_nothing(tmp_path, architecture, slow):
    """Nothing is left in small calls, the weights are the same ones, and so are NLL and gradient."""
    from transformers import AutoModelForCausalLM

    folder = save_llm(tmp_path / "llm", architecture)
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for value in model.parameters():  # norms are saved as ones
        value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    fused = common._fuse(copy.deepcopy(model, {id(value): value for value in model.parameters()}))
    kinds = lambda model: [type(module).__name__ for module in model.modules()]
    assert slow in kinds(model) and slow not in kinds(fused)
    assert all(one is two for one, two in zip(model.parameters(), fused.parameters(), strict=True))
    found = []
    for each in (model, fused):
        embeddings = torch.randn(3, 7, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        logits = each(inputs_embeds=embeddings.requires_grad_(), use_cache=False).logits
        loss = logits.logsumexp(2).sum()
        found.append((loss, *torch.autograd.grad(loss, embeddings)))
    for one, two in zip(*found):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def test_more_processes_than_gpus_share_them(monkeypatch):
    chosen = []
    for key, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(infer.dist, "init_process_group", lambda *args, **options: None)
    assert infer.join_processes() == (0, 4) and chosen == [1]


def test_a_llm_that_changes_its_logits_behind_the_head_is_refused(llm, capsys, monkeypatch):
    model, tokenizer = llm
    plain = type(model).forward

    def scaled(self, *arguments, **options):
        output = plain(self, *arguments, **options)
        return type(output)(**dict(output) | {"logits": 0.5 * output.logits})

    monkeypatch.setattr(type(model), "forward", scaled)
    line = dies(capsys, infer.Prompt, model, tokenizer, ["a", "b"], NAME_TEXTS, TASK_TEXT)
    assert "behind the head" in line


def test_evidence_by_blocks_is_that_of_all(llm):
    streams = streams_of(llm)
    events = events_of([2, 0, 1, 0, 2, 2, 4], [0, 1, 2, 3, 4, 1, 0])
    args = argparse.Namespace(evidence="items", max_history=2)
    make = lambda some: infer.evidence_of(args, llm[1], streams, None, some)
    evidence = infer.Evidence(*infer.sorted_by_user(events, 5), make)
    pairs_of = lambda parts: sorted((user, row) for _, pairs in parts
                                    for user, row in zip(pairs.user.tolist(), pairs.row.tolist()))
    blocks = [evidence.of(first, last) for first, last in ((0, 2), (2, 3), (3, 5))]
    assert pairs_of(sum(blocks, [])) == pairs_of(make(events))
    assert evidence.of(0, 1)[0][1].row.tolist() == [1, 3]  # in the order in which they came
    assert pairs_of(evidence.of(3, 4)) == []


def test_a_random_start_is_each_users_own_in_whatever_block_he_is(llm):
    prompt = prompt_of(llm)
    shared = soft_for(prompt, 1)[0]
    args = argparse.Namespace(start="random", init="random", seed=3)
    together = infer.start_of(args, prompt, shared, torch.arange(6))
    assert torch.equal(infer.start_of(args, prompt, shared, torch.tensor([4])), together[4:5])
    assert len({float(row[0, 0]) for row in together}) == 6
    args.seed = 4
    assert not torch.equal(infer.start_of(args, prompt, shared, torch.arange(6)), together)


def test_directions_by_blocks_of_users_are_those_of_the_covariance():
    generator = torch.Generator().manual_seed(0)
    user, row = torch.randint(60, (500,), generator=generator), torch.randint(30, (500,), generator=generator)
    tables, count = torch.randn(30, 8, generator=generator), torch.bincount(user, minlength=60)
    is_warm = torch.arange(60) % 5 > 0
    root = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    noise = root @ root.T + torch.eye(8)
    incidence = infer.incidence_of(user, row, 60, 30)
    found = [infer.project_scores(incidence, tables, count, noise, is_warm, rank=3, block=block)
             for block in (7, 2**16)]
    values, vectors = torch.linalg.eigh(noise)
    whiten = vectors * values.rsqrt() @ vectors.T
    mine = is_warm & (count > 0)
    z = (infer.sum_by_user(user, row, tables, 60) @ whiten / count.clamp(min=1).sqrt()[:, None])[mine]
    eigenvalues = torch.linalg.eigvalsh(torch.cov(z.T)).flip(0)[:3]
    for projection, values in found:
        assert torch.allclose(values, eigenvalues)
        assert torch.allclose(torch.cov((z @ torch.linalg.pinv(whiten) @ projection).T),
                              torch.diag(eigenvalues), atol=1e-8)


def test_a_streamed_tensor_is_that_of_torch_save(tmp_path):
    parts = [torch.randn(3, 2, 5) for _ in range(4)]
    value = {"names": ["a"], "other": torch.arange(7),
             "big": SimpleNamespace(shape=(12, 2, 5), blocks=lambda: parts)}
    args = argparse.Namespace(run_dir=tmp_path, seed=0)
    common.write_artifact(args, "profiles.pt", value)
    (stored,) = common.read_artifacts(args, "profiles.pt")
    assert torch.equal(stored["big"], torch.cat(parts)) and torch.equal(stored["other"], torch.arange(7))
    assert stored["names"] == ["a"] and stored["big"].dtype == torch.float32


# --- memory that does not suffice ------------------------------------------------------------------------


def progress_of(tmp_path, recipe=None, rank=0, **options):
    args = argparse.Namespace(run_dir=tmp_path, **{"tokens_per_batch": 64} | options)
    return infer.Progress(args, recipe or {"--lr": 1}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("out of memory"),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_goes_on_with_the_same_draws(tmp_path, capsys, error):
    progress, drawn = progress_of(tmp_path), []

    def make():
        drawn.append(float(torch.rand((), generator=progress.generator)))
        if progress.args.tokens_per_batch > 20:
            raise error
        return torch.tensor(drawn[-1])

    progress.keep("piece", make)
    assert progress.args.tokens_per_batch == 16 and len(set(drawn)) == 1 and len(drawn) == 3
    assert capsys.readouterr().out.count("out of memory: going on with --tokens-per-batch") == 2


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    def make():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        progress_of(tmp_path).keep("piece", make)


def test_too_little_memory_for_anything_ends_in_one_line(tmp_path, capsys):
    def make():
        raise MemoryError("out of memory")

    assert "memory does not suffice" in dies(capsys, progress_of(tmp_path).keep, "piece", make)


# --- nothing lost ----------------------------------------------------------------------------------------


def test_finished_pieces_are_found_and_the_generator_goes_on_behind_them(tmp_path, capsys):
    draws = []
    for turn in range(2):
        progress, made = progress_of(tmp_path), []
        piece = lambda: (made.append(1), torch.rand(2, generator=progress.generator))[1]
        draws.append((progress.keep("a", piece), progress.keep("b", piece),
                      torch.rand(2, generator=progress.generator)))
        assert len(made) == (0 if turn else 2)
    assert all(torch.equal(one, two) for one, two in zip(*draws))
    assert "2 pieces are done" in capsys.readouterr().out
    progress = progress_of(tmp_path, {"--lr": 2})
    assert "another --lr (1, now 2): it starts anew" in capsys.readouterr().out
    assert not list(progress.folder.glob("*.pt"))


OPTIONS = ["--llm", "tiny", "--tiny-steps", 6, "--shared-steps", 4, "--map-steps", 4, "--heldout", 60,
           "--steps", 2]


def fresh(small_run, folder):
    shutil.copytree(small_run[1], folder)
    for name in ("profiles.pt", "profiles.pt.json", "scores.pt", "scores.pt.json"):
        (folder / name).unlink()
    return folder


FORKS = multiprocessing.get_context("forkserver")  # processes that need not import torch anew
FORKS.set_forkserver_preload(["pandas", "pyarrow.parquet", "scipy.sparse", "sklearn.cluster",
                              "torch.distributed", "torch._dynamo",
                              "transformers.models.gpt2.modeling_gpt2", "matplotlib.pyplot"])


def stage_in_child(run, options):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with open(run.with_suffix(".txt"), "w", buffering=1) as file:
        sys.stdout = file
        infer.main(infer.parse_args(["--run-dir", str(run), *map(str, [*OPTIONS, *options])]))


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
               ROOT / "02_infer_profiles.py", "--run-dir", run, *OPTIONS, *options]
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
    options = ["--run-dir", run, *OPTIONS]
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
    options = ["--run-dir", run, *OPTIONS]

    def full(self, target):
        if Path(target).name == "map.pt":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(infer, "tokens_that_fit", lambda prompt: 512)
    run_stage("02_infer_profiles.py", *options, ok=False)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(infer, "tokens_that_fit", lambda prompt: 300)
    assert "going on with the unfinished run" in run_stage("02_infer_profiles.py", *options)
    assert json.loads((run / "profiles.pt.json").read_text())["options"]["tokens_per_batch"] == 512


def test_several_processes_give_the_bits_of_one_and_the_others_of_a_dead_one_go_on(small_run, tmp_path,
                                                                                   undisturbed):
    options = tuple(GRADIENT)
    run = fresh(small_run, tmp_path / "two")
    printed, complaint = torchrun(run, *options).communicate()
    assert bits(run) == undisturbed[options] and printed.count("wrote") == 1, complaint
    run = fresh(small_run, tmp_path / "score")
    torchrun(run).communicate()
    assert bits(run) == undisturbed[()]

    run = fresh(small_run, tmp_path / "dead")
    worker = torchrun(run, *options)
    wait_for_pieces(worker, run, 3, "fold-*.pt")
    ranks = subprocess.run(["pgrep", "-P", str(worker.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    worker.communicate()
    assert worker.returncode != 0 and len(list((run / "progress").glob("fold-*.pt"))) >= 3
    assert "going on with the unfinished run" in finish(run, *options)
    assert bits(run) == undisturbed[options]


def test_a_second_process_on_the_same_run_is_refused(small_run, tmp_path):
    run = fresh(small_run, tmp_path / "run")
    locked = infer.lock(run)
    line = run_process("02_infer_profiles.py", "--run-dir", run, *OPTIONS, ok=False)
    assert "another process works on" in line
    locked.close()
    infer.lock(run).close()


def test_a_changed_input_starts_anew(small_run, tmp_path, undisturbed):
    run = fresh(small_run, tmp_path / "run")
    worker = process(run, *GRADIENT)
    wait_for_pieces(worker, run, 4)
    worker.kill()
    worker.join()
    assert "another --method (gradient, now score): it starts anew" in finish(run)
    assert bits(run)[0] == undisturbed[()][0]


# --- the estimate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], GRADIENT, [*GRADIENT, "--ratings", "--folds", 2]])
def test_the_estimate_tells_tokens_flops_memory_and_time_and_writes_nothing(small_run, tmp_path, options):
    run = fresh(small_run, tmp_path / "run")
    before = sorted(path.name for path in run.iterdir())
    printed = run_stage("02_infer_profiles.py", "--run-dir", run, *OPTIONS, *options, "--estimate")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for word in ("60 users", "tokens", "FLOPs", f" s on {device}", "memory: weights", "disk: profiles.pt"):
        assert word in printed, word
    assert sorted(path.name for path in run.iterdir()) in (before, sorted([*before, ".lock"]))
    if "gradient" in options:
        count = lambda text: float(text.split(" tokens of evidence")[0].split()[-1].replace(",", ""))
        more = run_stage("02_infer_profiles.py", "--run-dir", run, *OPTIONS, *options, "--steps", 6,
                         "--estimate")
        assert count(more) == pytest.approx(3 * count(printed), rel=1e-3)
