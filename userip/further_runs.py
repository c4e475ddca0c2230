"""Stages 1 to 3 once more, as processes, for another split or other codebook sizes, in RUN_DIR/split-1,
RUN_DIR/codes-16-3, …: no profile may have read the rows that it is judged by.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from userip.artifacts import MADE_BY, fail, read_sidecar
from userip.options import options_text

_STAGES = {"01_prepare.py": "interactions.parquet", "02_infer_profiles.py": "profiles.pt",
           "03_quantize.py": "feature_bank.parquet"}


def read_json(path):
    """What a JSON file holds, finished rows or a sidecar; None if it does not exist"""
    try:
        return json.loads(path.read_text()) if path.exists() and not path.is_fifo() else None
    except (OSError, ValueError) as error:
        fail(f"cannot read {path}: {error}; move it away")


def check_further_runs(args, split):
    """Refuse --splits and --codebook-sizes where stages 1 to 3 cannot be repeated."""
    if args.splits > 1 and "peapod" in "+".join(args.features or []).split("+"):
        fail("--splits does not repeat baselines/peapod.py: leave peapod out, or take one run a split")
    if args.splits > 1 and split not in ("random", "cold-user", "cold-item"):
        fail(f"--splits {args.splits}: a split {split} is not drawn, so there is one only")
    if (args.splits > 1 or args.codebook_sizes) and read_sidecar(args, "profiles.pt")["options"].get("prior"):
        fail("--splits and --codebook-sizes do not repeat rounds of EM: leave them out, or run stages 2 and "
             "3 without --prior")


def further_run(args, name, first_stage, changes):
    """The folder RUN_DIR/name: a run with this one's options, but for `changes` in first_stage. Artifacts of
    earlier stages are linked. A stage is skipped if its artifact has these options and inputs.
    """
    folder = Path(args.run_dir) / name
    folder.mkdir(exist_ok=True)
    sidecar_of = lambda file: read_json(folder / f"{file}.json") or {}
    for stage, artifact in _STAGES.items():
        if stage < first_stage:
            made = [name for name, command in MADE_BY.items() if command == stage]
            for file in (f"{name}{ending}" for name in made for ending in ("", ".json")):
                (folder / file).unlink(missing_ok=True)
                if (folder.parent / file).exists():  # some methods make no scores.pt
                    (folder / file).symlink_to(Path("..") / file)
            continue
        options = read_sidecar(args, artifact)["options"] | {"run_dir": str(folder)}
        options |= changes if stage == first_stage else {}
        sidecar = sidecar_of(artifact)
        # the batch may have been halved when memory did not suffice
        others = lambda options: {key: option for key, option in (options or {}).items()
                                  if key != "tokens_per_batch"}
        if others(sidecar.get("options")) == others(options) and all(sidecar_of(file).get("sha256") == digest
                                                     for file, digest in sidecar["inputs"].items()):
            continue
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / stage), *command_line(options)]
        print(f"{folder}: {stage}", flush=True)
        if subprocess.run(command).returncode:
            fail(f"{stage} failed for {folder}: {shlex.join(command)}")
    return folder


def command_line(options):
    """The options of a sidecar as a command line: {"paper": True, "codes": [4, 3]} -> --paper --codes 4 3"""
    kept = {key: [] if option is True else option for key, option in options.items()
            if key != "download" and option not in (None, [])
            and (option is not False or key == "whiten")}  # on unless switched off
    return shlex.split(options_text(kept))
