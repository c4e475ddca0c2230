"""Damaged raw files through stage 1: python tests/fuzz.py [--reader NAME] [--files 1000] [--seed 0]

Each file is a small one in a published format, damaged at random: bytes flipped, cut, repeated, swapped,
replaced by what breaks parsers. Stage 1 must end with exit code 0, or with 2 and one line on stderr; within
5 seconds; with at most 1 GiB more memory; without a traceback, a Python warning, or a file half written. Each
runs in a process of its own. Prints how many were read and refused; exit code 1 if one failed: its damaged
folder is kept and named.
"""

import argparse
import contextlib
import gzip
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import (prepare, write_amazon, write_ml_1m, write_ml_100k, write_nete,  # noqa: E402
                      write_table, write_yelp)

READERS = {  # name -> (--dataset, a function that writes its files into a folder)
    "amazon-2014": ("games", lambda raw: write_amazon(raw, 2014, suffix="")),
    "amazon-2018": ("games", lambda raw: write_amazon(raw, 2018, suffix="")),
    "amazon-2018-gz": ("games", lambda raw: write_amazon(raw, 2018)),
    "amazon-2023": ("games", lambda raw: write_amazon(raw, 2023, suffix="")),
    "yelp": ("yelp", write_yelp),
    "nete": ("nete", write_nete),
    "ml-100k": ("ml-100k", write_ml_100k),
    "ml-1m": ("ml-1m", write_ml_1m),
    "csv": ("table", lambda raw: write_table(raw, 20, 20, suffix=".csv")),
    "csv-gz": ("table", lambda raw: write_table(raw, 20, 20)),
    "tsv": ("table", lambda raw: write_table(raw, 20, 20, suffix=".tsv")),
    "parquet": ("table", lambda raw: write_table(raw, 20, 20, suffix=".parquet")),
}
TOKENS = (b'"', b'""', b"'", b"\\", b'\\"', b"\n", b"\r\n", b"\r", b"\n\n", b"\t", b",", b"::", b"|", b"\x00",
          b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"nan", b"inf", b"-1", b"1e39", b"1e400",
          b"9" * 40, b"{", b"}", b"[" * 200, b"null", b"<b>", b"\x1b[31m", b"=cmd|' /C calc'!A0", b" ",
          b"\x1f\x8b", "é".encode("latin-1"), "\u2028".encode())


def damage(content, rng):
    """bytes -> the same with one to four faults"""
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(len(content) + 1)
        last = min(len(content), first + rng.choice([1, 1, 2, 8, 60, 400]))
        part, other = content[first:last], rng.randrange(len(content) + 1)
        content = rng.choice([
            lambda: content[:first] + rng.choice(TOKENS) + content[first:],  # insert
            lambda: content[:first] + rng.choice(TOKENS) + content[last:],  # replace
            lambda: content[:first] + bytes(rng.randrange(256) for _ in part) + content[last:],
            lambda: content[:first] + content[last:],  # cut out
            lambda: content[:first],  # cut off
            lambda: content[:other] + part + content[other:],  # copy
            lambda: b"\n".join(rng.sample(lines := content.split(b"\n"), len(lines))),  # other order
        ])()
    return content


def damage_folder(raw, rng):
    """Damage one file of a folder, within its compression half of the time."""
    path = rng.choice(sorted(path for path in raw.rglob("*") if path.is_file()))
    content = path.read_bytes()
    if path.suffix == ".gz" and rng.random() < 0.5:
        path.write_bytes(gzip.compress(damage(gzip.decompress(content), rng), 1))
    else:
        path.write_bytes(damage(content, rng))


def run(dataset, folder):
    """Stage 1 in this process -> its fault as text, "read" or "refused" """
    printed, complaint, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        try:
            options = [] if dataset == "nete" else ["--min-interactions", "1"]
            options += ["--max-bad", "1"] if dataset in ("games", "yelp") else []
            prepare.main(prepare.parse_args(["--dataset", dataset, "--raw", str(folder / "raw"), "--run-dir",
                                             str(folder / "run"), *options]))
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            return traceback.format_exc()
    lines = complaint.getvalue().strip().splitlines()
    written = sorted(path.name for path in folder.glob("run/*") if path.name != ".lock")
    if code not in (0, 2) or len(lines) != (1 if code else 0):
        return f"exit code {code}: {complaint.getvalue()}"
    if code and written or any(name.endswith(".tmp") for name in written):
        return f"exit code {code}, but there are {written}"
    if not (printed.getvalue() + complaint.getvalue()).replace("\n", "").isprintable():
        return f"control characters on the screen: {printed.getvalue()!r} {complaint.getvalue()!r}"
    return "refused" if code else "read"


def attempt(dataset, folder, seconds=5, memory=1 << 30):
    """`run` in a child process with limits -> its result"""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)  # ends the process, whatever it does
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = run(dataset, folder)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        os.write(sender, (result if grown < memory else f"took {grown / 2**30:.1f} GiB").encode()[-4000:])
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as file:
        result = file.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return result or ("took too long" if status == -signal.SIGALRM else f"died of {status}")


def fuzz(name, num_files, seed):
    """Damage a reader's files so many times -> counts of "read" and "refused", faults with their folders"""
    dataset, write = READERS[name]
    counts, faults = {"read": 0, "refused": 0}, []
    with tempfile.TemporaryDirectory() as root:
        write(Path(root) / "good")
        shutil.copytree(Path(root) / "good", Path(root) / "first/raw")
        assert run(dataset, Path(root) / "first") == "read"  # and all is imported before the first fork
        for number in range(num_files):
            folder = Path(root) / str(number)
            shutil.copytree(Path(root) / "good", folder / "raw")
            damage_folder(folder / "raw", random.Random(f"{name} {seed} {number}"))
            result = attempt(dataset, folder)
            if result in counts:
                counts[result] += 1
            else:
                kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{number}-"))
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                faults.append(f"{kept}: {result}")
            shutil.rmtree(folder)
    return counts, faults


def main(args):
    failed = False
    for name in [args.reader] if args.reader else READERS:
        counts, faults = fuzz(name, args.files, args.seed)
        print(f"{name:15} {counts['read']:6,} read  {counts['refused']:6,} refused  {len(faults):,} faults "
              f"(seed {args.seed})", flush=True)
        for fault in faults[:5]:
            print(fault)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="one reader only")
    parser.add_argument("--files", type=int, default=1000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    main(parser.parse_args())
