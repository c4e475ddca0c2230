"""How fast is stage 2, how much memory does it take, against the obvious ways?

    python tests/bench_inference.py [--quick]

Prints tables, medians of interleaved repetitions, and as its last line one JSON object (null: not measured).

Speed: personal steps of AdamW on an LLM of GPT-2's shape with random weights (on a GPU with room
Llama-2-7B's, too), in the dtype and with the settings of the stage, histories as long as those of Amazon's
games (5.5 train rows a user, 11 tokens a title). The naive loop: one forward pass of Hugging Face's model, as
it is loaded, with all logits over a padded batch of 8 texts, the prompt computed anew for each, a dense AdamW
over all users; `mixed` (on a CPU) is ours with --dtype mixed; `frozen` is the naive loop with
requires_grad_(False) for the LLM, which is one line more than people write. PEFT's prompt tuning (where peft
is installed) has one prompt per adapter, in front of the text, without the mask: batch 1, with GPT-2's shape
only. All take the same steps; ours and the naive loop must come to the same NLL (1e-4; in bfloat16 and mixed
1e-3). Ours works on blocks: on a CPU 64 users (the stage's has 128; --quick 32), on a GPU 1,024 as in the
stage. What the others take for a text does not depend on how many users there are: they have 8 (--quick 4, on
a GPU 32) who are as all are in the mean; a user is as many texts as users have on average.

Memory and the score method: whole runs of the stage with an LLM of width 768 and one small layer, so that what
users cost is seen; memory in blocks of 1,024 users, titles only.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import NAME_TEXTS, ROOT, TASK_TEXT, bpe_tokenizer, infer  # noqa: E402

from userip.artifacts import write_artifact  # noqa: E402
from userip.evidence import FIELDS, Route, Texts  # noqa: E402
from userip.llm import fuse, mix  # noqa: E402
from userip.prompt import Prompt  # noqa: E402
from userip.setup import tokens_that_fit  # noqa: E402

ALL_USERS = 3284  # as many as games has: the dense AdamW moves them all
Pairs = collections.namedtuple("Pairs", "user text")  # whose text it is, and which: int64 [R] each


def games_like(num_users, vocabulary, evidence, seed=0):
    """Users, each with some titles of random tokens: a Route, Pairs. history: a user's titles as one text"""
    rng = np.random.default_rng(seed)
    counts = rng.geometric(1 / 3.5, num_users) + 2  # mean 5.5, at least 3
    lengths = np.clip(rng.lognormal(2.27, 0.47, counts.sum()).astype(int), 3, 40)  # mean 11, 5 to 21
    user = np.repeat(np.arange(num_users), counts)
    if evidence == "history":
        lengths, user = np.bincount(user, lengths).astype(int), np.arange(num_users)
    rows = [torch.from_numpy(rng.integers(vocabulary, size=length)) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    length = torch.from_numpy(lengths)
    field = torch.where(torch.arange(ids.shape[1]) < length[:, None], 0, -1)
    may_read = torch.ones(len(NAME_TEXTS), dtype=torch.bool)
    route = Route(("title",), may_read, 1, [], Texts(ids, field, length))
    return route, Pairs(torch.from_numpy(user), torch.arange(len(user)))


def typical_users(route, pairs, count):
    """`count` users who have, together, as many texts and tokens as users have on average: int64 [count],
    the best of 1,000 draws
    """
    length = route.texts.length[pairs.text].double()
    had = torch.stack([torch.bincount(pairs.user).double(), torch.bincount(pairs.user, length)], 1)  # [N, 2]
    draw = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.randperm(len(had), generator=draw)[:count] for _ in range(1000)])
    away = (had[draws].mean(1) / had.mean(0) - 1).abs().sum(1)  # [1000]
    return draws[away.argmin()].sort().values


def llm_of_shape(shape, device):
    """An LLM of that shape with random weights, as transformers builds it, and a tokenizer"""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    smollm2 = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                   num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    with torch.device(device):  # the defaults of LlamaConfig are Llama-2-7B's shape
        model = GPT2LMHeadModel(GPT2Config()) if shape == "gpt2" else LlamaForCausalLM(
            LlamaConfig(**smollm2 if shape == "smollm2" else {}))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False), bpe_tokenizer("gpt2" if shape == "gpt2" else "llama")


def naive_loop(prompt, start, route, pairs, lr, num_steps):
    """As one writes it down: all logits, padded batches of 8, dense AdamW over all users -> θ of ours"""
    everyone = torch.zeros(ALL_USERS, *start.shape[1:], device=prompt.device)
    everyone[:len(start)] = start
    everyone.requires_grad_()
    optimizer = torch.optim.AdamW([everyone], lr=lr, weight_decay=0.0)
    length = len(prompt.segment)
    for _ in range(num_steps):
        optimizer.zero_grad()
        for rows in torch.arange(len(pairs.user)).split(8):
            texts = route.texts.select(pairs.text[rows])
            ids, field = texts.ids.to(prompt.device), texts.field.to(prompt.device)
            may_read = route.may_read.to(prompt.device).expand(len(ids), -1)
            embeddings, mask, position = prompt.inputs(everyone[pairs.user[rows]], ids, may_read)
            logits = prompt.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                                  use_cache=False).logits  # [8, L + T, V]
            labels = F.pad(torch.where(field < 0, -100, ids), (length, 0), value=-100)
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(),
                            reduction="sum").backward()
        optimizer.step()
    return everyone.detach()[:len(start)]


def ours(args, prompt, start, route, pairs, lr, num_steps):
    options = argparse.Namespace(lr=lr, tokens_per_batch=args.tokens_per_batch, pull=0.0, steps=num_steps)
    noise = torch.zeros(start.shape[1], start.shape[2], start.shape[2])
    shared = argparse.Namespace(soft=start[0], weights=torch.ones(len(FIELDS)), noise=noise, prior=[])
    torch.use_deterministic_algorithms(True)  # as the stage does
    found = infer.infer_block(argparse.Namespace(args=options, prompt=prompt), shared,
                              [(route, pairs.text, pairs.user)], start)
    torch.use_deterministic_algorithms(False)
    return found


def peft_loop(prompt, tokenizer, route, pairs, lr, num_steps):
    """A function that tunes PEFT's prompt of one user after another; None where peft is not installed"""
    try:
        from peft import PromptTuningConfig, TaskType, get_peft_model
    except ImportError:
        return None
    names = torch.tensor(tokenizer(" ".join([*NAME_TEXTS, TASK_TEXT]), add_special_tokens=False).input_ids)
    model = get_peft_model(copy.deepcopy(prompt.model), PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(NAME_TEXTS)))

    def tune():
        for user in pairs.user.unique():
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
            for _ in range(num_steps):
                optimizer.zero_grad()
                for row in pairs.text[pairs.user == user]:
                    ids = torch.cat([names, route.texts.ids[row, :route.texts.length[row]]])[None]
                    ids = ids.to(prompt.device)
                    labels = ids.clone()
                    labels[:, :len(names)] = -100
                    model(input_ids=ids, labels=labels).loss.backward()
                optimizer.step()

    return tune


def peak_of(way, device):
    """How far a call lifts the memory in use, beside the LLM, in MiB as text; "–" where it cannot be told"""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}"
    status = lambda key: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status")
                              if line.startswith(key))
    try:  # Linux: the high-water mark can be reset
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed goes back first
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        way()
        return "–"
    way()
    return f"{max(0.0, status('VmHWM') - before):,.0f}"


def matmul_rate(prompt, rounds=8):
    """FLOP/s of this machine's matrix product, in the dtype of the LLM's products, at the size of its MLP"""
    width = prompt.embedding.shape[1]
    x, w = (torch.randn(*size, device=prompt.device).to(prompt.head.weight.dtype)
            for size in ((4096, width), (width, 4 * width)))
    wait = torch.cuda.synchronize if prompt.device.type == "cuda" else lambda: None
    taken = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        for _ in range(5):
            x @ w
        wait()
        taken.append((time.perf_counter() - started) / 5)
    return 2 * 4096 * width * 4 * width / statistics.median(taken)


def speed(args, shape, device):
    """A table of the ways, for items and for histories: {(evidence, way): figures}"""
    model, tokenizer = llm_of_shape(shape, device)
    profiles = dict(zip(("hobby", "background"), NAME_TEXTS))
    prompt_of = lambda model: Prompt((model, tokenizer), profiles, TASK_TEXT)
    same_weights = {id(value): value for value in model.parameters()}
    quick = fuse(copy.deepcopy(model, same_weights))
    plain, prompt = prompt_of(model), prompt_of(quick)
    prompts = {"ours": prompt}
    if device == "cpu":
        mixed = fuse(copy.deepcopy(model, same_weights))
        mix(mixed)
        prompts["mixed"] = Prompt((mixed, tokenizer), profiles, TASK_TEXT)
    args.tokens_per_batch = tokens_that_fit(prompt)

    def unfrozen(start, *arguments):
        model.requires_grad_(True)
        found = naive_loop(plain, start, *arguments)
        model.zero_grad(), model.requires_grad_(False)
        return found

    body = sum(value.numel() for value in prompt.body.parameters()) - prompt.embed.weight.numel()
    if shape == "gpt2":
        body -= model.transformer.wpe.weight.numel()
    result, lr = {}, 0.1 * prompt.scale
    print(f"{shape}'s shape on {device}, {prompt.embedding.dtype}, {torch.get_num_threads()} threads, "
          f"{args.users} users, {args.tokens_per_batch:,} tokens per batch\n"
          "| evidence | way | users per second and step | tokens per second | share of the matrix product | "
          "peak memory (MiB) | NLL after 2 steps | ratio |\n|---|---|---|---|---|---|---|---|")
    for evidence in ("items",) if args.quick else ("items", "history"):
        route, pairs = games_like(args.users, model.config.vocab_size, evidence)
        chosen = typical_users(route, pairs, args.users_of_others)
        mine = torch.isin(pairs.user, chosen)
        few = Pairs(torch.searchsorted(chosen, pairs.user[mine]), pairs.text[mine])
        start = prompt.scale * torch.randn(args.users, 2, prompt.embedding.shape[1],
                                           generator=torch.Generator().manual_seed(0))
        of_few = start[chosen].to(device)
        ways = {"naive": lambda steps=1: unfrozen(of_few, route, few, lr, steps),
                **{name: lambda steps=1, each=each: ours(args, each, start, route, pairs, lr, steps)
                   for name, each in prompts.items()}}
        if not args.quick:
            ways["frozen"] = lambda steps=1: naive_loop(plain, of_few, route, few, lr, steps)
        peft = None if args.quick or shape != "gpt2" else peft_loop(plain, tokenizer, route, few, lr, 1)
        ways |= {"peft": peft} if peft else {}
        taken, rates, nll, peaks, found = {name: [] for name in ways}, {}, {}, {}, {}
        for name, way in ways.items():  # a first, slow call of each, of two steps where θ comes back
            two_steps = lambda name=name, way=way: found.update({name: way() if name == "peft" else way(2)})
            peaks[name] = peak_of(two_steps, device)
        found |= {name: found[name][chosen] for name in prompts}
        for name in ("naive", *prompts):
            with torch.no_grad():
                nll[name] = sum(float(prompt.loss(found[name], route, few.text[rows], torch.ones(len(FIELDS)),
                                                  few.user[rows].to(device)))
                                for rows in torch.arange(len(few.text)).split(64))
        for _ in range(args.rounds):
            for name in ways:
                rates.setdefault(name, []).append(matmul_rate(prompts.get(name, prompt)))
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                if device == "cuda":
                    torch.cuda.synchronize()
                taken[name].append(time.perf_counter() - started)
        rows = {name: (pairs if name in prompts else few).text for name in ways}
        tokens = {name: int(route.texts.length[row].sum()) for name, row in rows.items()}
        users = {name: len(row) / len(pairs.text) * args.users for name, row in rows.items()}
        per_user = {name: [s / users[name] for s in seconds] for name, seconds in taken.items()}
        flops = 4 * (body + prompt.head.weight.numel())  # a token's: forward, and backward to the θ
        for name, seconds in taken.items():
            took = statistics.median(seconds)
            ratio = statistics.median(a / b for a, b in zip(per_user["naive"], per_user[name]))
            share = statistics.median(
                tokens[name] * flops / s / rate for s, rate in zip(seconds, rates[name]))
            result[evidence, name] = {"ratio": ratio, "share": share}
            told = f"{nll[name] / tokens['naive']:.5f}" if name in nll else "–"
            print(f"| {evidence} | {name} | {users[name] / took:.2f} | {tokens[name] / took:,.0f} | "
                  f"{share:.0%} | {peaks[name]} | {told} | {ratio:.2f} |", flush=True)
        least = 1e-3 if prompt.embedding.dtype == torch.bfloat16 else 1e-4
        for name in prompts:
            most = 1e-3 if name == "mixed" else least
            assert abs(nll["naive"] / nll[name] - 1) < most, f"the ways naive and {name} differ in NLL"
    return result


# ----------------------------------------------------------------------------------------------------------
# whole runs of the stage: memory by users, time by users
# ----------------------------------------------------------------------------------------------------------


def save_wide_llm(folder):
    """An LLM of width 768 whose one layer costs little: what users cost shows"""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = bpe_tokenizer("gpt2")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=16, head_dim=16,
                         num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                         max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_run(folder, num_users, num_items, of_user):
    """The artifacts of stage 1: each user has `of_user` random items, one of them to validate"""
    args, rng = argparse.Namespace(run_dir=folder, seed=0), np.random.default_rng(0)
    user = np.repeat(np.arange(num_users), of_user)
    split = np.where(np.arange(len(user)) % of_user == of_user - 1, "valid", "train")
    interactions = pd.DataFrame({
        "user": user, "item": rng.integers(num_items, size=len(user)), "rating": np.float32(5),
        "label": np.int8(1), "timestamp": 0, "split": pd.Categorical(split)})
    interactions["split"] = interactions["split"].astype(str)
    item = np.arange(num_items)
    items = pd.DataFrame({"item": item, "item_id": item.astype(str), "title": [f"racer {k}" for k in item],
                          "category": None, "brand": [f"Acme {k % 9}" for k in item], "price": np.nan})
    items["category"] = items["category"].astype(object)
    write_artifact(args, "interactions.parquet", interactions, rows=len(user))
    write_artifact(args, "items.parquet", items)


def run_stage_2(folder, llm, *options):
    """The stage in a process of its own -> seconds of inference, peak memory in bytes, seconds in all"""
    command = [sys.executable, ROOT / "02_infer_profiles.py", "--run-dir", folder, "--llm", llm,
               "--heldout", 50, "--shared-steps", 5, *options]
    # a process between, whose only child is the stage: its peak is that of the children
    told = subprocess.run([sys.executable, "-c", "import resource, subprocess, sys; "
                           "code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
                           "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)",
                           *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    sidecar = json.loads((folder / "profiles.pt.json").read_text())
    return sidecar["inference_seconds"], 1024 * int(told.stdout.split()[-1]), sidecar["seconds"]


def memory_by_users(args, folder, llm):
    """Peak memory of --method gradient at 2,000 and at 100,000 users: their ratio"""
    peaks = []
    for num_users in (2_000, 100_000):
        run = folder / f"gradient-{num_users}"
        write_run(run, num_users, 500, 3)
        seconds, peak, _ = run_stage_2(run, llm, "--method", "gradient", "--steps", 1, "--batch-size", 1024,
                                       "--route", "title", "title")
        print(f"gradient, {num_users:,} users, D 768: peak {peak / 2**20:,.0f} MiB, {seconds:.0f} s",
              flush=True)
        peaks.append(peak)
    return peaks[1] / peaks[0]


def score_by_users(args, folder, llm):
    """Seconds of the score method at 2,000 and 20,000 users, the same catalogue: the median ratio"""
    counts = (2_000, 20_000)
    for num_users in counts:
        write_run(folder / f"score-{num_users}", num_users, 3_000, 6)
    taken = []
    for _ in range(1 if args.quick else 3):
        taken.append([run_stage_2(folder / f"score-{num_users}", llm, "--map-steps", 150,
                                  "--shared-steps", 100)[0] for num_users in counts])
        told = ", ".join(f"{users:,} users {s:.1f} s" for users, s in zip(counts, taken[-1]))
        print(f"score, 3,000 items, D 768: {told}", flush=True)
    return statistics.median(many / few for few, many in taken)


def million_users(folder, llm):
    """Seconds of the score method for a million users of 20 items each, from the first row to profiles.pt"""
    run = folder / "million"
    write_run(run, 1_000_000, 20_000, 20)
    seconds, peak, whole = run_stage_2(run, llm)
    print(f"score, 1,000,000 users of 20 items, 20,000 items, D 768: {seconds:.0f} s of inference with the "
          f"catalogue, {whole:.0f} s in all, peak {peak / 2**30:.1f} GiB")
    return whole


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False
    parser.add_argument("--quick", action="store_true",
                        help="few users, items only, no frozen loop, no PEFT: under 5 minutes on two cores")
    parser.add_argument("--only", choices=["speed", "memory", "score", "million"], help="one part alone")
    parser.add_argument("--shape", choices=["gpt2", "smollm2", "llama"],
                        help="one shape alone; llama: on a GPU; smollm2: when it is asked for")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if args.shape == "llama" and not cuda:
        parser.error("--shape llama: Llama-2-7B's shape is for a GPU, and there is none")
    args.users, args.users_of_others = (1024, 32) if cuda else (32, 4) if args.quick else (64, 8)
    wanted = lambda part: args.only in (None, part)
    figures = dict.fromkeys(("speedup_over_naive", "matmul_share", "memory_ratio_100k_2k",
                             "score_time_ratio_10x_users", "speedup_over_frozen",
                             "speedup_over_naive_history", "speedup_over_peft", "million_users_seconds",
                             "llama_speedup_over_naive", "llama_matmul_share", "mixed_speedup_over_naive",
                             "mixed_matmul_share"))
    with torch.device("cpu"):
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    if wanted("speed") and args.shape != "llama":
        found = speed(args, args.shape or "gpt2", "cuda" if cuda else "cpu")
        figures |= {"speedup_over_naive": found["items", "ours"]["ratio"],
                    "matmul_share": found["items", "ours"]["share"]}
        if ("items", "frozen") in found:
            figures["speedup_over_frozen"] = (found["items", "ours"]["ratio"]
                                              / found["items", "frozen"]["ratio"])
        if ("history", "ours") in found:
            figures["speedup_over_naive_history"] = found["history", "ours"]["ratio"]
        if ("items", "peft") in found:
            figures["speedup_over_peft"] = found["items", "ours"]["ratio"] / found["items", "peft"]["ratio"]
        if ("items", "mixed") in found:
            figures |= {"mixed_speedup_over_naive": found["items", "mixed"]["ratio"],
                        "mixed_matmul_share": found["items", "mixed"]["share"]}
    has_room = cuda and torch.cuda.mem_get_info()[0] > 40 * 2**30
    if wanted("speed") and args.shape in (None, "llama") and has_room:
        found = speed(args, "llama", "cuda")["items", "ours"]
        figures |= {"llama_speedup_over_naive": found["ratio"], "llama_matmul_share": found["share"]}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with contextlib.redirect_stderr(io.StringIO()):
            save_wide_llm(folder / "llm")
        if wanted("memory"):
            figures["memory_ratio_100k_2k"] = memory_by_users(args, folder, folder / "llm")
        if wanted("score"):
            figures["score_time_ratio_10x_users"] = score_by_users(args, folder, folder / "llm")
        if args.only == "million":
            figures["million_users_seconds"] = million_users(folder, folder / "llm")
    print(json.dumps({key: value if value is None else round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
