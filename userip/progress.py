"""Nothing lost: finished pieces of a run on disk, processes that share the work, memory that is too small."""

import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from userip.artifacts import fail, sha256_of, whole_file
from userip.options import option_name, process_rank


def join_processes():
    """Rank and number of processes; with several (torchrun) only the first one prints."""
    rank, world = process_rank()
    if world > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("gloo", timeout=timedelta(days=7))  # they only wait for each other
    if rank:
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return rank, world


def digest_of_weights(model):
    """A digest by which two LLMs can be told apart: of a sample of each parameter"""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        sample = weight.flatten()[::max(1, weight.numel() // 1024)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def recipe_of(args, prompt, inputs):
    """All that decides the numbers of a run: options, digests of inputs and LLM, versions, device."""
    options = {option_name(name): value for name, value in vars(args).items() if name != "run_dir"}
    digests = {name: sha256_of(Path(args.run_dir) / name) for name in inputs}
    return options | digests | {"LLM": digest_of_weights(prompt.model), "torch": torch.__version__,
                                "transformers": transformers.__version__, "device": str(prompt.device)}


def read_recipe(path):
    """The recipe of unfinished work; an empty one where the file is damaged"""
    try:
        content = json.loads(path.read_text() if path.is_file() else "")
        return dict(content["recipe"]) if content["tokens_per_batch"] >= 1 else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Progress:
    """Finished pieces of a run in RUN_DIR/progress, so that a killed run goes on where it stood.

    recipe: all that decides the numbers; pieces of another recipe are deleted. The generator goes on behind a
    piece that was read as if it had just been computed.
    """

    def __init__(self, args, recipe, generator, rank=0, world=1):
        self.args, self.generator, self.rank, self.world = args, generator, rank, world
        self.folder = Path(args.run_dir) / "progress"
        manifest = self.manifest = self.folder / "recipe.json"
        if rank == 0:
            recipe = json.loads(json.dumps(recipe, default=str))
            before = read_recipe(manifest) if manifest.exists() else recipe
            if changed := [key for key in recipe if recipe[key] != before.get(key)]:
                print(f"unfinished work in {self.folder} had another {changed[0]} ({before.get(changed[0])}, "
                      f"now {recipe[changed[0]]}): it starts anew")
            if changed or not manifest.exists():
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                self._keep_recipe(recipe)
            else:
                num_done = len(list(self.folder.glob("*.pt")))
                print(f"going on with the unfinished run in {self.folder}: {num_done} pieces are done")
        self._wait()
        args.tokens_per_batch = json.loads(manifest.read_text())["tokens_per_batch"]

    def _keep_recipe(self, recipe):
        content = {"recipe": recipe, "tokens_per_batch": self.args.tokens_per_batch}
        with whole_file(self.manifest) as file:
            file.write(json.dumps(content).encode())

    def _wait(self):
        if self.world > 1:
            dist.barrier()

    def read(self, name, key="value"):
        """A finished piece, or the state of the generator behind it"""
        path = self.folder / f"{name}.pt"
        try:
            return torch.load(path, weights_only=True)[key]
        except Exception as error:  # what a pickle of another tool raises may be anything
            reason = [*str(error).splitlines(), type(error).__name__][0][:120]
            fail(f"{path} is no finished piece of a run ({reason}): delete {self.folder} to start anew")

    def _write(self, name, function):
        """Compute the piece, unless it is there."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            piece = {"value": self._with_less_memory(function), "generator": self.generator.get_state()}
            with whole_file(path) as file:
                torch.save(piece, file)

    def _with_less_memory(self, function):
        """function(); when memory does not suffice, again with half the tokens per batch."""
        state = self.generator.get_state()
        while True:
            try:
                return function()
            except (RuntimeError, MemoryError) as error:  # torch's own are RuntimeErrors
                if not re.search(r"out of memory|not enough memory|can't allocate", str(error), re.I):
                    raise
            self.args.tokens_per_batch //= 2  # here the error is gone, and with it all that it held
            if self.args.tokens_per_batch < 16:
                fail("memory does not suffice for 16 tokens: take a smaller LLM or a larger machine")
            print(f"out of memory: going on with --tokens-per-batch {self.args.tokens_per_batch}")
            if self.rank == 0:  # a resumed run goes on with these batches
                self._keep_recipe(read_recipe(self.manifest))
            self.generator.set_state(state)
            torch.cuda.empty_cache()

    def compute(self, name, function):
        """What function() returns, computed once, by the first process"""
        if self.rank == 0:
            self._write(name, function)
        self._wait()
        self.generator.set_state(self.read(name, "generator"))
        return self.read(name)

    def compute_blocks(self, name, blocks, unit, function):
        """function(block) for each block of indices, dealt to the processes; read as name-0, name-1, …"""
        own = range(self.rank, len(blocks), self.world)
        bar = tqdm(total=sum(len(blocks[index]) for index in own), desc=name, unit=unit, mininterval=2)
        for index in own:
            self._write(f"{name}-{index}", lambda: function(blocks[index]))
            bar.update(len(blocks[index]))
        bar.close()
        self._wait()

    def clear(self):
        """Delete the pieces: the run is done."""
        self._wait()
        if self.rank == 0:
            shutil.rmtree(self.folder)


class Profiles(NamedTuple):
    """Profiles that need not fit into memory: shape (F + 1, N, P, S D), read(fold, users [U]) -> [U, P, S D].
    Fold f has all evidence but that of fold f; the last one has all.
    """

    shape: tuple
    read: Callable

    def full(self, users):
        """Those with all evidence: [U, P, S D]"""
        return self.read(self.shape[0] - 1, users)

    def blocks(self, size=2**12):
        """All of them in order, in parts"""
        for fold in range(self.shape[0]):
            for users in torch.arange(self.shape[1]).split(size):
                yield self.read(fold, users)
