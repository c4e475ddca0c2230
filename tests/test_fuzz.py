"""Damaged files of each kind; `python tests/fuzz.py` takes more."""

import pytest

import fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name):
    number = 4 if name == "report" else 8 if name in fuzz.DAMAGED else 30  # a stage 5 takes a second
    counts, faults = fuzz.fuzz(name, number, seed=1)
    assert not faults, (counts, faults[:2])
