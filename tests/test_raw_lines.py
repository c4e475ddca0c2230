"""What becomes of damage in files of JSON lines."""

import gzip
import json
import re
from types import SimpleNamespace

import pytest

from conftest import read_raw, write_amazon
from userip import raw_lines


def damaged(folder, change):
    """Amazon 2018 with its lines of reviews changed: the change gets a list of lines, bytes."""
    write_amazon(folder / "raw", 2018, suffix="", oddities=False)
    path = folder / "raw/Video_Games_5.json"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(change(lines)) + b"\n")
    return len(lines)


def test_bad_lines_are_counted_by_kind_with_the_first_line_of_each(tmp_path):
    record = {"reviewerID": "A000", "asin": "B000", "overall": 5.0, "unixReviewTime": 1, "reviewText": "x"}
    without = lambda key: json.dumps({name: value for name, value in record.items() if name != key}).encode()
    bad = [b"{not json", without("overall"), without("reviewerID"), without("asin"),
           without("unixReviewTime"),
           b'{"reviewerID": "A\xff", "asin": "B000", "overall": 5.0, "unixReviewTime": 1}',
           without("overall")[:-1] + b', "overall": "five"}', b"", without("overall"),
           without("asin")[:-1] + b', "asin": ""}', b'"' + b"[" * 10, b"[" * 100_000]
    num_good = damaged(tmp_path, lambda lines: lines[:3] + bad + lines[3:])
    table, _, _, printed = read_raw(tmp_path, "games", "--max-bad", 0.2)
    assert len(table) == num_good
    assert f"{len(bad) - 1} of {num_good + len(bad)} lines are bad" in printed  # the empty line is not
    for kind in ("2 × Object missing required field `overall` - at `$` (first: line 5)",
                 "field `reviewerID` - at `$` (first: line 6)", "field `asin` - at `$` (first: line 7)",
                 "field `unixReviewTime` - at `$` (first: line 8)", "1 × not UTF-8 (first: line 9)",
                 "got `str` - at `$.overall` (first: line 10)", "JSON is malformed",
                 "length >= 1 - at `$.asin`"):
        assert kind in printed, kind
    line = read_raw(tmp_path, "games", ok=False)
    assert "--max-bad 0.01" in line and f"{len(bad) - 1} of" in line


def test_one_bad_line_in_a_hundred_is_the_limit(tmp_path):
    num_good = damaged(tmp_path, lambda lines: lines)
    path = tmp_path / "raw/Video_Games_5.json"
    good = path.read_bytes()
    share = 1 / (num_good + 1)
    path.write_bytes(good + b"broken\n")
    assert "1 of" in read_raw(tmp_path, "games", "--max-bad", share)[-1]
    assert "--max-bad" in read_raw(tmp_path, "games", "--max-bad", 0.99 * share, ok=False)
    assert "--max-bad" in read_raw(tmp_path, "games", "--max-bad", 0, ok=False)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    damaged(tmp_path, lambda lines: lines)
    path = tmp_path / "raw/Video_Games_5.json"
    text = path.read_text()
    for content, complaint in ((text.encode("utf-16"), "no reviews in the format"), (text.encode("utf-16"), "is UTF-16"),
                               (text.replace("\n", "\r").encode(), "CR alone"),
                               (text.replace("5", "\0", 1).encode(), "has a NUL byte in line 1")):
        path.write_bytes(content)
        assert complaint in read_raw(tmp_path, "games", ok=False)


def test_a_byte_order_mark_and_windows_lines_are_no_damage(tmp_path):
    num_good = damaged(tmp_path, lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    path = tmp_path / "raw/Video_Games_5.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    table, _, _, printed = read_raw(tmp_path, "games", "--max-bad", 0)
    assert len(table) == num_good and "are bad" not in printed


def test_of_a_truncated_file_the_whole_lines_are_used(tmp_path):
    write_amazon(tmp_path / "raw", 2018, oddities=False)
    path = tmp_path / "raw/Video_Games_5.json.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    cut = gzip.compress(b"".join(lines), compresslevel=0)  # stored: what is cut off is known to the byte
    path.write_bytes(cut[:10 + 5 + len(b"".join(lines[:60])) + 20])
    table, _, _, printed = read_raw(tmp_path, "games", "--min-interactions", 1)
    assert printed.count("warning:") == 1
    assert re.search(r"Video_Games_5.json.gz is truncated: the 60 whole lines", printed)
    assert len(table) == 60 and "are bad" not in printed


def test_of_a_damaged_file_the_lines_before_are_used(tmp_path):
    write_amazon(tmp_path / "raw", 2018, oddities=False)
    path = tmp_path / "raw/Video_Games_5.json.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    half = gzip.compress(b"".join(lines[:70]))
    path.write_bytes(half + gzip.compress(b"".join(lines[70:]))[:12] + b"\xff" * 50)
    table, _, _, printed = read_raw(tmp_path, "games", "--min-interactions", 1)
    assert len(table) == 70 and "is damaged" in printed


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 25])
def test_pieces_join_to_the_whole_however_they_are_cut(tmp_path, size):
    content = bytes(range(256)) * 40
    files = {"plain": content, "gz": gzip.compress(content), "padded": gzip.compress(content) + b"\0" * 600,
             "padded beyond a read": gzip.compress(content, 0) + b"\0" * (1 << 18) + gzip.compress(b""),
             "members": gzip.compress(content[:5000]) + b"" + gzip.compress(content[5000:]), "empty": b""}
    for name, stored in files.items():
        (tmp_path / name).write_bytes(stored)
        with open(tmp_path / name, "rb") as file:
            assert b"".join(raw_lines.unzip(file, size)) == (content if stored else b""), name


@pytest.mark.parametrize("size", [1, 10, 64, 10_000])
def test_blocks_hold_whole_lines_with_their_numbers(tmp_path, monkeypatch, size):
    lines = [b"line %d" % number * (number % 5) for number in range(1, 60)]
    unzip = raw_lines.unzip
    monkeypatch.setattr(raw_lines, "unzip", lambda file: unzip(file, size))
    for ending in (b"", b"\n"):
        (tmp_path / "lines").write_bytes(b"\n".join(lines) + ending)
        found = {}
        for first, last, block in raw_lines._blocks(tmp_path / "lines", SimpleNamespace(max_line=1, max_ratio=1)):
            found |= dict(enumerate(block.split(b"\n"), first))
            assert max(found) == last
        assert found == dict(enumerate(lines, 1))
