"""A few hundred damaged files of each kind; tests/fuzz.py takes more."""

import pytest

import fuzz


@pytest.mark.parametrize("name", fuzz.READERS)
def test_damaged_files_are_read_or_refused_in_one_line(name):
    counts, faults = fuzz.fuzz(name, 60 if name in fuzz.DAMAGED else 300, seed=1)
    assert not faults, faults[:2]
    assert min(counts.values()) > 0
