"""What at least two stages share: artifacts with sidecars, the prompt's mask, LLM, VQ layer, DCN, metrics.

Shapes use one letter per meaning (README, "Letters"): B rows, N users, M items, P profile names, T tokens,
D width of the LLM, K codes, C width of a codeword, F fields, E width of a field's embedding.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shlex
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------------------------------
# what every stage does first and what it says when a user errs
# ----------------------------------------------------------------------------------------------------------


def fail(message):
    """Say what, where and what to do in one line; exit code 2: no traceback for a user's mistake."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def stage_parser(doc):
    """A parser whose --help is the stage's docstring; unknown and abbreviated options are refused."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}; see --help")  # one line, without the usage block
    parser.add_argument("--run-dir", type=_named, default="runs/demo", help="folder of this run's artifacts")
    return parser


def _named(text):
    """The type of an option that names a folder: an unset shell variable must not mean the current one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def at_least(minimum, kind=int):
    """The type of an option whose number must not be smaller: argparse then refuses it with one line."""

    def parse(text):
        value = kind(text)
        if not value >= minimum:  # so put, it refuses nan, too
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {minimum}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def options_text(options):
    """A preset as one would type it: {"lr": 0.1, "whiten": False} -> "--lr 0.1 --no-whiten"."""
    text = lambda value: shlex.join(map(str, value if isinstance(value, list) else [value]))
    return " ".join(f"--no-{key}" if value is False else f"--{key.replace('_', '-')} {text(value)}"
                    for key, value in options.items())


def parse_with_presets(parser, argv, **presets):
    """Parse; a preset asked for (--paper) sets its options first, so that what is typed overrides it."""
    chosen = parser.parse_args(argv)
    for name, options in presets.items():
        if getattr(chosen, name):
            parser.set_defaults(**options)
            print(f"--{name} = {options_text(options)}")
    return parser.parse_args(argv)


def start_stage(args):
    """Seed every generator and say what runs. torch stays deterministic, on CUDA, too: same seed, same bits,
    without the NaN that it would write into all new memory to show who reads it too early.
    """
    if args.seed >= 2**32:
        fail(f"--seed {args.seed}: it must be below 2**32 = {2**32}")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else runs on CUDA may differ
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    options = " ".join(f"{key}={value}" for key, value in sorted(vars(args).items()) if value is not None)
    print(f"{Path(sys.argv[0]).name} | {options}")


# ----------------------------------------------------------------------------------------------------------
# artifacts: written whole or not at all, each with a sidecar that says where it came from
# ----------------------------------------------------------------------------------------------------------

MADE_BY = {
    "interactions.parquet": "01_prepare.py",
    "items.parquet": "01_prepare.py",
    "users.parquet": "01_prepare.py",
    "prepare.json": "01_prepare.py",
    "scores.pt": "02_infer_profiles.py",
    "profiles.pt": "02_infer_profiles.py",
    "new_profiles.pt": "02_infer_profiles.py --only-users FILE",
    "codebook.pt": "03_quantize.py",
    "train_codes.parquet": "03_quantize.py",
    "new_codes.parquet": "03_quantize.py --apply",
    "feature_bank.parquet": "03_quantize.py",
    "results.parquet": "04_train_ctr.py",
    "results.md": "04_train_ctr.py",
    "figure5.png": "04_train_ctr.py",
    "figure6.png": "04_train_ctr.py",
    "report.html": "05_case_study.py",
}


def sha256_of(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_streamed(value, file):
    """torch.save of a dict, some of whose float32 tensors need not fit into memory: these are objects with a
    `shape` and with `blocks()`, which yields them part after part.

    torch writes zeros for them, first in the file (pages that nobody touched take no memory); then the parts
    are written over them. (The file is a zip without compression; its checksums, which torch does not read,
    are not those of the parts.)
    """
    streamed = {key: part for key, part in value.items() if hasattr(part, "blocks")}
    torch.save({key: torch.from_numpy(np.zeros(part.shape, np.float32)) for key, part in streamed.items()}
               | {key: part for key, part in value.items() if key not in streamed}, file)
    file.flush()
    for index, part in enumerate(streamed.values()):
        with zipfile.ZipFile(file.name) as archive:
            entry = archive.getinfo(f"archive/data/{index}")
        with open(file.name, "rb") as again:
            again.seek(entry.header_offset + 26)  # the length of the name and of what follows it
            skip = sum(struct.unpack("<HH", again.read(4)))
        file.seek(entry.header_offset + 30 + skip)
        for block in part.blocks():
            file.write(block.contiguous().numpy().data)
    file.seek(0, os.SEEK_END)


def _write_value(value, file, suffix):
    """Write an artifact into an open file: frames as parquet, text as UTF-8, a dict of tensors as a torch
    file, bytes as they are.
    """
    if suffix == ".parquet":
        writer = None
        is_frame = isinstance(value, pd.DataFrame)
        for table in [pa.Table.from_pandas(value, preserve_index=False)] if is_frame else value:
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()
    elif suffix == ".pt":
        _write_streamed(value, file)  # into an open file: given a path, torch writes its *name* into it
    else:
        file.write(value if isinstance(value, bytes) else value.encode())


@contextlib.contextmanager
def whole_file(path):
    """An open binary file under a temporary name, renamed to `path` at the end: a reader never sees half a
    file.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            fail(f"cannot write {path}: {error.strerror}; free some space or choose another --run-dir")
        raise


def write_artifact(args, name, value, inputs=(), **facts):
    """Write `value` as run_dir/name with a sidecar name.json; `inputs` name the artifacts it was made from.

    value: a data frame, or an iterator of arrow tables (row groups that need not fit into memory together); a
    text; or a dict of tensors and plain values (see _write_streamed for large ones). `facts` (counts, the
    numbers the stage printed, seconds) go into the sidecar as they are. The sidecar comes to its place first
    with the digest of what follows, so that a kill in between is found out by `read_artifacts`.
    """
    run_dir = Path(args.run_dir)
    with whole_file(run_dir / name) as file:
        _write_value(value, file, Path(name).suffix)
        file.flush()
        sidecar = {
            "artifact": name,
            "stage": MADE_BY[name],
            "options": vars(args),
            "seed": args.seed,
            "sha256": sha256_of(file.name),
            "inputs": {other: sha256_of(run_dir / other) for other in inputs},
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            **facts,
        }
        with whole_file(run_dir / f"{name}.json") as sidecar_file:
            sidecar_file.write(json.dumps(sidecar, indent=2, default=_plain).encode() + b"\n")
    return run_dir / name


def _version(package):
    from importlib.metadata import version  # reads metadata only: importing transformers costs seconds

    return version(package)


def _plain(value):
    """numpy and torch scalars and arrays, paths: what json does not know."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def read_sidecar(args, name):
    """run_dir/name.json as a dict; exit code 2 with the command that makes it when it is missing."""
    path = Path(args.run_dir) / f"{name}.json"
    for needed in (path.parent / name, path):
        if not needed.exists():
            fail(f"{needed} is missing: run `python {MADE_BY[name]} --run-dir {args.run_dir}` first, with "
                 f"the options of your run")
    try:
        sidecar = json.loads(path.read_text())
        sidecar["sha256"], sidecar["inputs"], sidecar["options"]
        return sidecar
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is not what a stage writes: run `python {MADE_BY[name]} --run-dir {args.run_dir}` "
             f"again")


def _read_frame(path):
    """A parquet artifact without the texts of the reviews, which may be gigabytes and which no stage
    needs.
    """
    names = [name for name in pq.read_schema(path).names if name != "review"]
    return pq.read_table(path, columns=names, use_threads=False).to_pandas(self_destruct=True)


def read_artifacts(args, *names):
    """Read artifacts of one run and check that they belong together: a list of data frames, dicts and texts.

    Each must have the digest that its sidecar tells, and each must have been made from the very files that
    lie beside it: artifacts of two data sets or seeds never mix silently.
    """
    run_dir = Path(args.run_dir)
    sidecars = {name: read_sidecar(args, name) for name in names}
    digests = {}

    def digest(name):
        if name not in digests:
            digests[name] = sha256_of(run_dir / name)
        return digests[name]

    for name, sidecar in sidecars.items():
        again = f"run `python {MADE_BY[name]} --run-dir {run_dir}` again, with the options in {name}.json"
        if digest(name) != sidecar["sha256"]:
            fail(f"{run_dir / name} is not the file that {name}.json describes (cut short or replaced): "
                 f"{again}")
        for other, told in sidecar["inputs"].items():
            if not (run_dir / other).exists() or digest(other) != told:
                found = f"{digest(other)[:8]}" if (run_dir / other).exists() else "missing"
                fail(f"two runs are mixed: {run_dir / name} was made from another {other} (digest "
                     f"{told[:8]}), but {run_dir / other} is {found}: {again}")

    read_tensors = lambda path: torch.load(path, weights_only=True)
    readers = {".parquet": _read_frame, ".pt": read_tensors, ".md": Path.read_text}
    values = [readers[Path(name).suffix](run_dir / name) for name in names]
    pa.default_memory_pool().release_unused()  # what reading took and a frame does not hold
    return values


# ----------------------------------------------------------------------------------------------------------
# the frozen LLM and the Fig. 4 mask
# ----------------------------------------------------------------------------------------------------------


def load_llm(args, llm, device="cpu", **options_of_model):
    """Hub name, folder or "tiny" -> (model, tokenizer): frozen, in eval mode, bfloat16 on CUDA, else float32.

    "tiny" is the one that stage 2 pretrained into run_dir/tiny_llm. Exits with code 2 when a folder lacks
    weights or tokenizer, or a hub name cannot be had.
    """
    source = Path(args.run_dir) / "tiny_llm" if llm == "tiny" else llm
    if (llm == "tiny" or llm.startswith(("/", ".", "~"))) and not Path(source).is_dir():
        fail(f"--llm {llm}: there is no folder {source}; "
             + ("run stage 2 again" if llm == "tiny" else "give a folder or a hub name"))
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds: only where a LLM is needed

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for what, loader, options in (("tokenizer", AutoTokenizer, {}),
                                  ("weights", AutoModelForCausalLM, {"dtype": dtype, **options_of_model})):
        try:
            loaded = loader.from_pretrained(source, **options)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... for one cause
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            fail(f"--llm {llm}: no {what} could be loaded ({reason}); give a folder that save_pretrained "
                 f"wrote for both model and tokenizer, a hub name, or --llm tiny")
        if what == "tokenizer":
            tokenizer = loaded
    if not tokenizer.is_fast or len(tokenizer) < 3:
        fail(f"--llm {llm}: no tokenizer.json in it, which tells the tokens' places in the text; "
             f"save a fast tokenizer there")
    model = _fuse(loaded).to(device).eval().requires_grad_(False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(f"--llm {llm}: the tokenizer has {len(tokenizer):,} tokens but the model embeds only "
             f"{model.get_input_embeddings().num_embeddings:,}; they do not belong together")
    return model, tokenizer


def _fuse(model):
    """The model with GPT-2's GELU and Llama's RMSNorm in one call each instead of six to eight: the same
    functions, in a fraction of the time and of the memory traffic.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
            elif type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def fig4_mask(segment, is_soft, sees, is_causal=False):
    """Who may attend to whom (Fig. 4): segment [T], is_soft [T], sees [B, P] -> bool [B, 1, T, T], True: may.

    segment: k in 0..P-1 for the name and soft tokens of profile k, P for the task text, P + 1 for evidence.
    Always causal; name and soft tokens of one profile see only each other; the task text sees only itself,
    but for its last token, which predicts the first evidence token; the evidence sees everything before it.
    sees[b, k]: may row b read θ_k at all? (routing; all True = the figure as printed). is_causal: plain
    causal instead, for the ablation.
    """
    num_profiles, length = sees.shape[1], len(segment)
    query, key = segment[:, None], segment[None, :]  # [T, 1], [1, T]
    reader = segment > num_profiles
    reader[(segment == num_profiles).nonzero().max()] = True  # the last task token
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    allowed = causal & ((query == key) | reader[:, None] | is_causal)  # [T, T]
    # [T, P]: which profile each place belongs to, if any
    owner = F.one_hot(segment.clamp(max=num_profiles), num_profiles + 1)[:, :num_profiles]
    hidden = is_soft & (sees.float() @ owner.T.float() == 0)  # [B, T] soft tokens this row may not read
    return (allowed & ~(hidden[:, None, :] & reader[:, None]))[:, None]


# ----------------------------------------------------------------------------------------------------------
# modules
# ----------------------------------------------------------------------------------------------------------


class VectorQuantizer(nn.Module):
    """Codebook with straight-through estimator (eq. 5, 6): z [B, C] -> quantized [B, C], codes [B], loss [].

    loss = ||sg[z] - e||² + beta ||z - sg[e]||², summed over C, mean over B: a mean over C would shrink the
    terms by the width. quantized = z + sg[e - z]: its value is the codeword, its gradient goes to z.
    """

    def __init__(self, codebook, beta=0.25):
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())  # [K, C]
        self.beta = beta

    def forward(self, z):
        codes = torch.cdist(z.detach(), self.codebook.detach()).argmin(1)  # [B], eq. 6
        chosen = self.codebook[codes]  # [B, C]
        codebook_term = (z.detach() - chosen).square().sum(1).mean()
        commitment_term = (z - chosen.detach()).square().sum(1).mean()
        return z + (chosen - z).detach(), codes, codebook_term + self.beta * commitment_term


class DCN(nn.Module):
    """Deep & Cross Network (Wang et al., 2017) on embedded fields: x_0 [B, X] -> logits [B].

    x_{l+1} = x_0 (w_lᵀ x_l) + b_l + x_l  beside an MLP on x_0;  logit = wᵀ [x_L ; MLP(x_0)].
    """

    def __init__(self, input_dim, num_layers=3, hidden=(16, 16), dropout=0.2):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(num_layers, input_dim) / math.sqrt(input_dim))
        self.biases = nn.Parameter(torch.zeros(num_layers, input_dim))
        self.mlp = MLP(input_dim, hidden, dropout)
        self.head = nn.Linear(input_dim + hidden[-1], 1)

    def cross(self, x_0):
        """x_0 [B, X] -> x_L [B, X]"""
        x = x_0
        for weight, bias in zip(self.weights, self.biases):
            x = x_0 * (x @ weight)[:, None] + bias + x
        return x

    def forward(self, x_0, keep=None):
        return self.head(torch.cat([self.cross(x_0), self.mlp(x_0, keep)], 1)).squeeze(1)


class MLP(nn.Module):
    """Linear, ReLU, dropout for each width in `hidden`: [B, input_dim] -> [B, hidden[-1]]

    keep [B, sum(hidden)]: the dropout's factors, 0 or 1 / (1 - p), where the caller draws them (many models
    trained at once, each with noise of its own); else they are drawn here, in training.
    """

    def __init__(self, input_dim, hidden, dropout=0.0):
        super().__init__()
        self.hidden = list(hidden)
        self.layers = nn.ModuleList(nn.Linear(*dims) for dims in zip([input_dim, *hidden], hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, keep=None):
        parts = [None] * len(self.hidden) if keep is None else keep.split(self.hidden, 1)
        for layer, part in zip(self.layers, parts):
            x = layer(x).relu()
            x = self.dropout(x) if part is None else x * part
        return x


# ----------------------------------------------------------------------------------------------------------
# metrics
# ----------------------------------------------------------------------------------------------------------


def logloss(labels, probabilities):
    """Mean binary cross-entropy in nats; labels [B] of 0 and 1, probabilities [B] or one number for all."""
    probabilities = np.clip(np.broadcast_to(probabilities, np.shape(labels)), 1e-7, 1 - 1e-7)
    return float(-np.where(np.asarray(labels) == 1, np.log(probabilities), np.log1p(-probabilities)).mean())


def with_interval(mean, half):
    """A difference and half of its 95% interval as text; a single run has none."""
    return f"{mean:+.4f} ± {half:.4f}" if half == half else f"{mean:+.4f} (one run, no interval)"


def usage_of(codes, num_codes):
    """codes [N] -> users per code [K], perplexity (1: one has all, K: all alike). Unknown (K) is left out."""
    counts = np.bincount(codes[codes < num_codes], minlength=num_codes)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return counts, float(np.exp(-(shares * np.log(shares)).sum()))
