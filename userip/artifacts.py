"""Artifacts: files of a run, written whole or not at all, each with a sidecar that says how it was made."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from userip.checks import BASELINES, find_problem, find_sidecar_problem

MADE_BY = {name: command for command, names in {
    "01_prepare.py": "interactions.parquet items.parquet users.parquet prepare.json",
    "02_infer_profiles.py": "scores.pt profiles.pt item_vectors.pt",
    "02_infer_profiles.py --only-users FILE": "new_profiles.pt",
    "02_infer_profiles.py --only-items FILE": "new_item_vectors.pt",
    "03_quantize.py": "codebook.pt train_codes.parquet item_codebook.pt item_bank.parquet "
                      "feature_bank.parquet",
    "03_quantize.py --apply": "new_codes.parquet",
    "03_quantize.py --apply items": "new_item_codes.parquet",
    "04_train_ctr.py": "results.parquet results.md",
    "05_case_study.py": "report.html",
    "baselines/peapod.py": "peapod.parquet",
    **{f"baselines/{name}.py": f"baseline-{name}.parquet" for name in BASELINES},
}.items() for name in names.split()}  # artifact -> the command that makes it
WARNINGS = []  # what `warn` printed in this process; stage 1 clears it at its start and stores it at its end


def fail(message):
    """Say what is wrong, where, and what to do, in one line, with exit code 2 and no traceback."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(message).split()))
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    raise SystemExit(2)


def warn(message):
    """Print a warning and keep it in WARNINGS."""
    print(f"warning: {message}")
    WARNINGS.append(message)


def check_finite(values, where, cure):
    """Stop at the first tensor that holds nan or infinity."""
    if not torch.isfinite(values).all():
        fail(f"numbers are no longer finite in {where}: {cure}; what was finished before is kept")


@contextlib.contextmanager
def lock(run_dir):
    """Two processes on one run directory would spoil each other's files: the second is refused."""
    folder, path = Path(run_dir), Path(run_dir) / ".lock"
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for entry in (path, *(folder / name for name in ("tiny_llm", "progress", "report", "finished"))):
        kind, is_right = ("file", entry.is_file()) if entry == path else ("folder", entry.is_dir())
        if entry.exists() and not is_right:  # a pipe would wait for ever
            fail(f"{entry} must be a {kind}: move away what is there")
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it however a process ends
        except OSError:
            fail(f"another process works on {run_dir} ({path} is locked): wait for it, or take another "
                 f"--run-dir")
        try:
            yield
        finally:
            if is_new and [*folder.iterdir()] == [path]:  # nothing came of it
                path.unlink()
                folder.rmdir()


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path):
    """An open binary file under a temporary name, renamed to `path` at the end: nobody reads half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # what a kill has left
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


def _write_tensors(tensors, file):
    """torch.save of a dict of tensors and plain values. A float32 tensor that does not fit into memory is an
    object with a `shape` and with `blocks()`, which yields its parts in order: torch writes zeros for it
    (untouched pages take no memory), then the parts are written over them. (Checksums are never read.)
    """
    streamed = {key: part for key, part in tensors.items() if hasattr(part, "blocks")}
    zeros = {key: torch.from_numpy(np.zeros(part.shape, np.float32)) for key, part in streamed.items()}
    torch.save(zeros | {key: part for key, part in tensors.items() if key not in streamed}, file)
    file.flush()
    written = torch._C.PyTorchFileReader(file.name)
    for index, part in enumerate(streamed.values()):
        file.seek(written.get_record_offset(f"data/{index}"))
        for block in part.blocks():
            file.write(block.contiguous().numpy())
    file.seek(0, os.SEEK_END)


def _write_value(value, file):
    """value: text, bytes, a data frame, an iterator of arrow tables (row groups that need not fit into memory
    together), or a dict for `_write_tensors`.
    """
    if isinstance(value, dict):  # into an open file: given a path, torch writes its *name* into it
        _write_tensors(value, file)
    elif isinstance(value, (str, bytes)):
        file.write(value if isinstance(value, bytes) else value.encode())
    else:
        is_frame, writer = isinstance(value, pd.DataFrame), None
        for table in [pa.Table.from_pandas(value, preserve_index=False)] if is_frame else value:
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()


def write_artifact(args, name, value, inputs=(), **facts):
    """Write `value`, see `_write_value`, as run_dir/name with a sidecar name.json; returns its path.

    inputs: names of the artifacts that it was made from. facts (counts, printed numbers, seconds) go into the
    sidecar. It is renamed first, with the digest of what follows: `read_artifacts` notices a kill in between.
    """
    run_dir = Path(args.run_dir)
    with whole_file(run_dir / name) as file:
        _write_value(value, file)
        file.flush()
        sidecar = {
            "artifact": name,
            "stage": MADE_BY[name],
            "options": vars(args),
            "seed": args.seed,
            "sha256": sha256_of(file.name),
            "inputs": {input_name: sha256_of(run_dir / input_name) for input_name in inputs},
            "torch": torch.__version__,
            "transformers": version("transformers"),  # metadata only: importing it costs seconds
            **facts,
        }
        sidecar["run"] = sidecar["sha256"] if name == "interactions.parquet" else run_of(run_dir)
        # numpy and torch scalars and arrays, and paths, are what json does not know
        plain = lambda value: value.tolist() if hasattr(value, "tolist") else str(value)
        if name == "interactions.parquet":  # a kill must not leave it beside an older run's items
            for other in ("items", "users"):
                (run_dir / f"{other}.parquet.json").unlink(missing_ok=True)
        with whole_file(run_dir / f"{name}.json") as sidecar_file:
            sidecar_file.write(json.dumps(sidecar, indent=2, default=plain).encode() + b"\n")
    return run_dir / name


def read_sidecar(args, name):
    """run_dir/name.json as a dict; exit code 2 with the command that makes it when it is missing."""
    path, beside = Path(args.run_dir) / name, Path(args.run_dir) / f"{name}.json"
    problem = f"{path} is missing"
    if path.exists():
        problem = f"{path} is there, but {name}.json beside it is missing"
    if beside.is_file():
        try:
            sidecar = json.loads(beside.read_text())
            fault = find_sidecar_problem(name, sidecar)
        except (OSError, ValueError, RecursionError) as error:
            fault = f"is no JSON: {error}"
        problem = fault and f"{beside} is not what a stage writes ({fault})"
    if problem:
        fail(f"{problem}: run `python {MADE_BY[name]} --run-dir {args.run_dir}` first, with the options of "
             f"your run")
    return sidecar


def _read_frame(path):
    """A parquet artifact without the reviews' texts, which may be gigabytes and which no stage reads here."""
    schema = pq.read_schema(path)
    columns = [name for name in schema.names if name != "review"]
    texts = pa.string(), pa.large_string(), pa.null()
    if len(columns) < len(schema) and schema.field("review").type not in texts:
        raise ValueError("its column review holds no texts")
    return pq.read_table(path, columns=columns, use_threads=False).to_pandas(self_destruct=True)


def read_artifacts(args, *names):
    """Artifacts of one run: a list of data frames, dicts and texts. Each must have its sidecar's digest and
    have been made from the very files beside it: two data sets or seeds never mix silently.
    """
    run_dir = Path(args.run_dir)
    digest_of = functools.cache(lambda path: sha256_of(path) if path.is_file() else "missing")
    sidecars = {name: read_sidecar(args, name) for name in names}
    advice = {name: f"run `python {MADE_BY[name]} --run-dir {run_dir}` again, with the options in {name}.json"
              for name in names}
    for name, sidecar in sidecars.items():
        for file, digest in [(name, sidecar["sha256"]), *sidecar["inputs"].items()]:
            if (found := digest_of(run_dir / file)) != digest:
                fail(f"two runs are mixed, or a file is damaged: {name}.json names {file} with digest "
                     f"{digest[:8]}, but {run_dir / file} is {found[:8]}: {advice[name]}")
        if sidecar.get("run") != (run := run_of(run_dir)):
            fail(f"two runs are mixed: {run_dir / name} belongs to run {str(sidecar.get('run'))[:8]}, but "
                 f"interactions.parquet to {str(run)[:8]}: {advice[name]}")
    readers = {".parquet": _read_frame, ".pt": lambda path: torch.load(path, "cpu", weights_only=True),
               ".md": Path.read_text}
    artifacts = {}
    for name in names:
        try:
            artifacts[name] = readers[Path(name).suffix](run_dir / name)
        except Exception as error:  # a file of another tool may raise anything; nothing in it is run
            reason = [*str(error).strip().splitlines(), type(error).__name__][0][:120]
            fail(f"{run_dir / name} cannot be read ({reason}): {advice[name]}")
    try:
        found = find_problem(artifacts, sidecars)
    except Exception as error:  # a file of another tool may hold anything
        found = names[0], f"or one read with it cannot be checked ({type(error).__name__}: {error})"
    if found:
        name, problem = found
        fail(f"{run_dir / name} {problem}: it is not what a stage writes; {advice[name]}")
    pa.default_memory_pool().release_unused()  # what reading took and a frame does not hold
    return list(artifacts.values())


def run_of(run_dir):
    """The digest of the run that an artifact in run_dir belongs to, that of its interactions; None before"""
    path = Path(run_dir) / "interactions.parquet.json"
    try:
        return json.loads(path.read_text() if path.is_file() else "")["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
