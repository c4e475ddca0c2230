"""The frozen LLM: a hub name, a folder, a GGUF file, or a tiny one, pretrained on the spot on train items."""

import hashlib
import importlib.util
import json
import re
import shutil
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)
from transformers.pytorch_utils import Conv1D

from userip.artifacts import fail

GGUF_PACKAGES = ("gguf", "accelerate")  # which transformers needs to read such a file
STAMP = "made_from.txt"  # in the tiny LLM's folder: the digest of what it was made from
TINY = {"batch": 24, "length": 96, "lr": 2e-3, "width": 128, "layers": 4, "vocabulary": 2048, "context": 512}


def load_llm(args, llm, device="cpu", dtype=torch.float32, **model_options):
    """Hub name, folder, GGUF file or "tiny" (run_dir/tiny_llm) -> frozen model of this dtype, tokenizer"""
    source, file = Path(args.run_dir) / "tiny_llm" if llm == "tiny" else llm, {}
    if llm.lower().endswith(".gguf"):
        source, file, missing = Path(llm).parent, {"gguf_file": Path(llm).name}, []
        if not Path(llm).is_file():
            fail(f"--llm {llm}: there is no such file")
        if missing := [name for name in GGUF_PACKAGES if importlib.util.find_spec(name) is None]:
            fail(f"--llm {llm}: a GGUF file needs one more package: `pip install {' '.join(missing)}`")
    elif Path(source).is_file():
        fail(f"--llm {llm}: this file is no GGUF file; give a folder, a GGUF file or a hub name")
    elif llm != "tiny" and Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        fail(f"--llm {llm}: no config.json in it; give a folder that save_pretrained wrote for both model "
             f"and tokenizer")
    elif (llm == "tiny" or llm.startswith(("/", ".", "~"))) and not Path(source).is_dir():
        fail(f"--llm {llm}: there is no folder {source}; "
             + ("run stage 2 again" if llm == "tiny" else "give a folder, a GGUF file or a hub name"))
    part = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **file)
        part = "weights"
        try:  # eager attention would take the mask of Fig. 4 for numbers, whatever the folder's config says
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, **file, **{"attn_implementation": "sdpa"} | model_options)
        except ValueError:  # an architecture without it: Prompt.check_mask decides
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **file)
    except Exception as error:  # for one cause transformers raises OSError, ValueError, KeyError and others
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        fail(f"--llm {llm}: no {part} could be loaded ({reason}); give a folder that save_pretrained "
             f"wrote for both model and tokenizer, a hub name, or --llm tiny")
    if not tokenizer.is_fast or len(tokenizer) < 3:
        fail(f"--llm {llm}: no tokenizer.json in it, which tells the tokens' positions in the text; "
             f"save a fast tokenizer there")
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        fail(f"--llm {llm}: the tokenizer has {len(tokenizer):,} tokens but the model embeds only "
             f"{num_embeddings:,}; they do not belong together")
    return fuse(model).to(device).eval().requires_grad_(False), tokenizer


def fuse(model):
    """The model with GPT-2's GELU and Llama's RMSNorm in one call each instead of six to eight"""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


class MixedLinear(nn.Module):
    """A linear layer with its product in bfloat16, float32 before and behind it: [..., in] -> [..., out]"""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight  # [out, in]
        self.weight = nn.Parameter(weight.bfloat16().contiguous(), requires_grad=False)
        self.bias, self.out_features = layer.bias, len(weight)

    def forward(self, inputs):
        outputs = F.linear(inputs.bfloat16(), self.weight).float()
        return outputs if self.bias is None else outputs + self.bias


def mix(model):
    """Replace the model's linear layers by MixedLinear -> a function that puts them back. Embeddings, norms,
    softmax and attention stay in float32.
    """
    replaced = [(module, name, child) for module in model.modules()
                for name, child in module.named_children() if isinstance(child, (nn.Linear, Conv1D))]
    for module, name, child in replaced:
        setattr(module, name, MixedLinear(child))

    def restore():
        for module, name, child in replaced:
            setattr(module, name, child)

    return restore


def multiplies_bfloat16():
    """Does this machine's CPU multiply bfloat16 in hardware? As Linux lists it; elsewhere False"""
    path = Path("/proc/cpuinfo")
    return path.is_file() and bool(re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", path.read_text()))


def choose_llm():
    """--llm auto: Llama-2-7B with CUDA and weights, GPT-2 if here or reachable, or tiny -> name, reason"""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    llama = "meta-llama/Llama-2-7b-hf"
    is_here = lambda repository, file: isinstance(try_to_load_from_cache(repository, file), str)
    index_files = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    if torch.cuda.is_available() and any(is_here(llama, file) for file in index_files):
        return llama, "CUDA and its weights are on this machine"
    if is_here("gpt2", "model.safetensors"):
        return "gpt2", "its weights are on this machine"
    if not HF_HUB_OFFLINE:
        hub = urlsplit(ENDPOINT)
        try:
            socket.create_connection((hub.hostname, hub.port or 443), timeout=3).close()
            return "gpt2", f"it can be fetched from {hub.netloc}"
        except OSError:
            pass
    return "tiny", ("no other LLM is on this machine and the model hub cannot be reached; "
                    "it is pretrained on the train items")


def check_tiny_llm(args, stored):
    """The LLM of profiles.pt must still be there, if it is the tiny one of this run"""
    if stored["llm"] == "tiny" and tiny_stamp(args.run_dir) != stored["tiny_llm"]:
        fail(f"{args.run_dir}/tiny_llm is not the LLM that profiles.pt was inferred with: run `python "
             f"02_infer_profiles.py --run-dir {args.run_dir}` again, with the options in profiles.pt.json")


def tiny_stamp(run_dir):
    """The digest of what run_dir/tiny_llm was made from; "" where there is none"""
    path = Path(run_dir) / "tiny_llm" / STAMP
    return path.read_text(errors="replace") if path.is_file() else ""


def train_tokenizer(texts):
    """A byte-level BPE tokenizer of GPT-2's kind"""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=TINY["vocabulary"], min_frequency=5, show_progress=False,
                                  special_tokens=["<|endoftext|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def pretrain_tiny(folder, histories, prompt_texts, num_steps, seed):
    """A 4-layer GPT-2 of width 128, pretrained on the train items' texts -> loss by step

    histories: a list of texts per user, read in random order, so that the LLM learns which go together, as a
    large one knows from the world; random offsets train all positions. prompt_texts: the profiles' texts and,
    last, the task text.
    """
    rng = np.random.default_rng([seed, 3])
    corpus = [text for history in histories for text in history]
    corpus += (1 + len(corpus) // 50) * prompt_texts  # often enough to become whole words
    tokenizer = train_tokenizer(corpus)
    ids_of = {text: tokenizer(text).input_ids for text in sorted(set(corpus))}
    opening = [tokenizer.bos_token_id, *tokenizer(prompt_texts[-1]).input_ids]

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=TINY["context"], n_embd=TINY["width"],
                        n_layer=TINY["layers"], n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY["lr"], weight_decay=0.01, betas=(0.9, 0.95),
                                  fused=True)
    warmup = min(0.9, max(0.1, 1.5 / num_steps))  # share of the steps; less than one step would divide by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY["lr"], num_steps, pct_start=warmup)
    num_tokens, stream, curve = TINY["batch"] * TINY["length"], [], []
    for _ in tqdm(range(num_steps), desc="pretrain tiny", unit="step", mininterval=2):
        while len(stream) < num_tokens:
            for user in rng.permutation(len(histories)):
                order = rng.permutation(len(histories[user]))
                stream += opening + [token for index in order for token in ids_of[histories[user][index]]]
        tokens = torch.tensor(stream[:num_tokens]).view(TINY["batch"], TINY["length"])  # [B, T]
        del stream[:num_tokens]
        offset = torch.from_numpy(rng.integers(TINY["context"] - TINY["length"], size=(TINY["batch"], 1)))
        logits = model(tokens, position_ids=offset + torch.arange(TINY["length"])).logits  # [B, T, V]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return curve


def make_tiny_llm(args, histories, prompt_texts):
    """run_dir/tiny_llm, pretrained on this run's train rows; kept if the same texts and seed made it"""
    recipe = json.dumps([histories, prompt_texts[:-1], prompt_texts[-1], args.tiny_steps, args.seed, TINY])
    digest = hashlib.sha256(recipe.encode()).hexdigest()
    folder = Path(args.run_dir) / "tiny_llm"
    if tiny_stamp(args.run_dir) == digest:
        print(f"tiny LLM: {folder} was made from the same texts, kept")
        return
    started = time.time()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        curve = pretrain_tiny(temporary, histories, prompt_texts, args.tiny_steps, args.seed)
        (temporary / "curve.json").write_text(json.dumps(curve))
        (temporary / STAMP).write_text(digest)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error):  # safetensors has an error of its own
            fail(f"cannot write {folder}: {error}; free some space or choose another --run-dir")
        raise
    print(f"tiny LLM: pretrained on {sum(map(len, histories)):,} texts of train rows in "
          f"{time.time() - started:.0f} s, loss {curve[-1]:.3f}")
