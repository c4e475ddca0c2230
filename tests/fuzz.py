"""Damaged files through the stages: python tests/fuzz.py [--reader NAME] [--files 1000] [--seed 0]

Each file is a small one in a published format, damaged at random: bytes flipped, cut, repeated, swapped,
replaced by what breaks parsers; `only-users` is the table of new users of stage 2; `artifacts`, `bank`,
`report` and `scores` are what stages 3, 4, 5 and 2 --only-users read, half of it with digests that match. The
stage must end with exit code 0, or with 2 and one line on stderr; within 5 seconds (20 where it trains); with
at most 1 GiB more memory; without a traceback or a file half written. Each runs in a process of its own.
Prints how many were read and refused; exit code 1 if one failed: its damaged folder is kept and named.
"""

import argparse
import contextlib
import gzip
import io
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import (STAGES, run_pipeline, write_amazon, write_ml_1m, write_ml_100k,  # noqa: E402
                      write_nete, write_table, write_yelp)
from userip.artifacts import sha256_of  # noqa: E402



def write_run(folder):
    """A run of four stages in folder/run, and a table of new users in folder/raw"""
    write_table(folder / "table", 30, 20, suffix=".csv")
    run_pipeline(folder / "run", folder / "table", stages=4)
    (folder / "raw").mkdir()
    (folder / "raw/new.csv").write_text("user_id,item_id,rating\n" + "".join(
        f"n{row % 7},i{row % 20:03d},{row % 5}\n" for row in range(60)))


def reader(dataset, write, *options):
    """A function that writes the raw data into folder/raw, and the stage that reads it"""
    return (lambda folder: write(folder / "raw"),
            lambda folder: ("01_prepare.py", "--dataset", dataset, "--raw", folder / "raw", *options))


def write_old_nete(folder):
    """NETE with a pickle of protocol 2, whose opcodes stand in no frames: others may be put between them"""
    write_nete(folder)
    path = folder / "reviews.pickle"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), 2))


LENIENT = "--min-interactions", 1, "--max-bad", 1
READERS = {
    "amazon-2014": reader("games", lambda raw: write_amazon(raw, 2014, suffix=""), *LENIENT),
    "amazon-2018": reader("games", lambda raw: write_amazon(raw, 2018, suffix=""), *LENIENT),
    "amazon-2018-gz": reader("games", lambda raw: write_amazon(raw, 2018), *LENIENT),
    "amazon-2023": reader("games", lambda raw: write_amazon(raw, 2023, suffix=""), *LENIENT),
    "yelp": reader("yelp", write_yelp, *LENIENT),
    "nete": reader("nete", write_nete),
    "nete-2": reader("nete", write_old_nete),
    "ml-100k": reader("ml-100k", write_ml_100k, *LENIENT[:2]),
    "ml-1m": reader("ml-1m", write_ml_1m, *LENIENT[:2]),
    **{f"table{suffix}": reader("table", lambda raw, suffix=suffix: write_table(raw, 20, 20, suffix=suffix),
                                *LENIENT[:2]) for suffix in (".csv", ".csv.gz", ".tsv", ".parquet")},
    "only-users": (write_run, lambda run: ("02_infer_profiles.py", "--only-users", run / "raw/new.csv")),
    "artifacts": (write_run, lambda _: ("03_quantize.py", "--codes", 2, 2, "--epochs", 1, "--stability", 0)),
    "bank": (write_run, lambda _: ("04_train_ctr.py", "--models", "dcn", "--seeds", 1, "--epochs", 1)),
    "report": (write_run, lambda _: ("05_case_study.py", "--num-users", 2, "--num-scored", 4)),
    "scores": (write_run, lambda run: ("02_infer_profiles.py", "--only-users", run / "raw/new.csv")),
}
DAMAGED = {"artifacts": ("interactions.parquet", "users.parquet", "profiles.pt"),
           "bank": ("interactions.parquet", "users.parquet", "feature_bank.parquet"),
           "report": ("profiles.pt", "codebook.pt", "feature_bank.parquet", "results.parquet", "results.md"),
           "scores": ("scores.pt", "profiles.pt", "items.parquet")}
TOKENS = (b'"', b'""', b"'", b"\\", b'\\"', b"\n", b"\r\n", b"\r", b"\n\n", b"\t", b",", b"::", b"|", b"\x00",
          b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"nan", b"inf", b"-1", b"1e39", b"1e400",
          b"9" * 40, b"{", b"}", b"[" * 200, b"null", b"<b>", b"\x1b[31m", b"=cmd|' /C calc'!A0", b" ",
          b"\x1f\x8b", "é".encode("latin-1"), "\u2028".encode(), b"\\\\", b"\\t", b"['a' 'b']", b'["a", "b"]')
VALUES = (b"true", b'{"a": 1}', b"[[1]]", b"7", b"2.5", b"null", b"[]", b'["a", "b"]', b'" "', b'"\\u0000"',
          b'"\\ud800"', b"NaN", b"1e999", b"[" * 900 + b"]" * 900)
HARMFUL = (b"cposix\n_exit\n(I7\ntR.", b"cos\nsystem\n(S'exit'\ntR0", b"cbuiltins\neval\n(S'1'\ntR0",
           b"(S'exit'\niposix\nsystem\n0", b"\x80\x02cbuiltins\ngetattr\n0", b"2" * 99, b"\x95" + b"\xff" * 8)


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
            lambda: convert(content, rng),
        ])()
    return content


def convert(content, rng):
    """bytes -> the same in another encoding or with other line ends, or with another value of a JSON field"""
    fields = [match.span(1) for match in re.finditer(rb'": ("[^"]*"|[\d.]+|\[[^]]*\])', content)]
    if fields and rng.random() < 0.9:
        first, last = rng.choice(fields)
        return content[:first] + rng.choice(VALUES) + content[last:]
    return rng.choice([content.decode("latin-1").encode("utf-16"), content.decode("latin-1").encode("utf-16-le"),
                       content.replace(b"\n", b"\r"), content.replace(b"\t", b'"\t"')])


def damage_folder(folder, name, rng):
    """Damage one file of raw data, within its compression half of the time, or an artifact or its sidecar"""
    paths = [path for path in folder.glob("raw/**/*") if path.is_file()]
    if name in DAMAGED:
        paths = [folder / f"run/{artifact}{end}" for artifact in DAMAGED[name] for end in ("", ".json")]
    path = rng.choice(sorted(paths))
    content = path.read_bytes()
    if path.suffix == ".gz" and rng.random() < 0.5:
        path.write_bytes(gzip.compress(damage(gzip.decompress(content), rng), 1))
        return
    if name == "nete-2" and path.suffix == ".pickle":
        position = rng.choice([position for *_, position in pickletools.genops(content)])
        path.write_bytes(content[:position] + rng.choice(HARMFUL) + content[position:])
        return
    before = sha256_of(path)
    path.write_bytes(damage(content, rng))
    if name in DAMAGED and path.suffix != ".json" and rng.random() < 0.5:
        for sidecar in folder.glob("run/*.json"):
            sidecar.write_text(sidecar.read_text().replace(before, sha256_of(path)))


def run(command, folder):
    """A stage in this process -> its fault as text, "read" or "refused" """
    script, *options = map(str, command)
    printed, complaint, code = io.StringIO(), io.StringIO(), 0
    before = set((folder / "run").iterdir()) if (folder / "run").exists() else set()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        try:
            STAGES[script].main(STAGES[script].parse_args([*options, "--run-dir", str(folder / "run")]))
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            return traceback.format_exc()
    lines = complaint.getvalue().strip().splitlines()
    written = sorted(path.name for path in set(folder.glob("run/*")) - before)
    if code not in (0, 2) or len(lines) != (1 if code else 0):
        return f"exit code {code}: {complaint.getvalue()}"
    if code and written or any(name.endswith(".tmp") for name in written):
        return f"exit code {code}, but there are {written}"
    if not complaint.getvalue().replace("\n", "").isprintable():
        return f"control characters on the screen: {complaint.getvalue()!r}"
    return "refused" if code else "read"


def attempt(command, folder, seconds, memory=1 << 30):
    """`run` in a child process with limits -> its result"""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.close(receiver)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)  # ends the process, whatever it does
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = run(command, folder)
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
    write, command = READERS[name]
    counts, faults, seconds = {"read": 0, "refused": 0}, [], 20 if name in DAMAGED else 5
    with tempfile.TemporaryDirectory() as root:
        good, first = Path(root) / "good", Path(root) / "first"
        with contextlib.redirect_stdout(io.StringIO()):
            write(good)
        shutil.copytree(good, first)
        assert run(command(first), first) == "read"  # and all is imported before the first fork
        for number in range(num_files):
            folder = Path(root) / str(number)
            shutil.copytree(good, folder)
            damage_folder(folder, name, random.Random(f"{name} {seed} {number}"))
            result = attempt(command(folder), folder, seconds)
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
    warnings.simplefilter("ignore")  # as a stage does when it is run as a program
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", choices=READERS, help="one reader only")
    parser.add_argument("--files", type=int, default=1000, help="files for each reader")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    main(parser.parse_args())
