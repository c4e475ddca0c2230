"""finished.jsonl: rows that were trained before, each under a digest of all that decides it."""

import json
from pathlib import Path

import torch

from userip.artifacts import fail, sha256_of

_CODE = ("04_train_ctr.py", "common.py", "userip/ctr_models.py", "userip/ctr_training.py",
         "userip/features.py")


def code_digests():
    """What of the program decides a row's figures: the files that train it; torch's version, the device"""
    digests = [sha256_of(Path(__file__).resolve().parent.parent / file) for file in _CODE]
    return [*digests, torch.__version__, "cuda" if torch.cuda.is_available() else "cpu"]


class FinishedRows(dict):
    """{key: row} of a file, one JSON object a line; what `append` adds is on disk at once."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        try:
            lines = path.read_text(errors="replace").split("\n") if path.exists() else []
        except OSError as error:
            fail(f"cannot read {path}: {error.strerror}; move it away")
        for line in filter(None, lines):
            try:
                row = json.loads(line)
                self[row.pop("key")] = row
            except (ValueError, KeyError, AttributeError, TypeError):  # cut short by a kill, or no row
                print(f"{path}: an unfinished line is left out")
        self.append({})  # a file that cannot be written must be refused before the first model, not after it

    def append(self, rows):
        """Add rows {key: row}, each on a new line: a line that a kill cut short must not swallow the next."""
        self.update(rows)
        try:
            with open(self.path, "a") as file:
                file.write("".join("\n" + json.dumps({"key": key, **row}) for key, row in rows.items()))
        except OSError as error:
            fail(f"cannot write {self.path}: {error.strerror}; rows that it holds are kept")
