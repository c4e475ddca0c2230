"""Lines of raw files, plain or gzip, as a stream of a few blocks; damage is counted or refused."""

import ast
import re
import zlib

import msgspec
from tqdm import tqdm

from userip.artifacts import fail, warn

BAD_LINE = (msgspec.MsgspecError, ValueError, SyntaxError, RecursionError, MemoryError)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
DAMAGE = (EOFError, zlib.error)  # of a gzip file


def read_lines(path, args, decode):
    """Yields the records of a file of lines. Bad lines are left out and counted by kind.

    decode(lines) gives a list of records. Exit code 2 when more than args.max_bad of the lines are bad.
    """
    bad, num_lines = {}, 0  # kind -> line numbers
    try:
        for first, num_lines, block in _blocks(path, args):
            try:
                records = decode(block)
            except BAD_LINE:  # one by one, to find the bad lines
                records = []
                for number, line in enumerate(block.split(b"\n"), first):
                    try:
                        records += decode(line)
                    except BAD_LINE as error:
                        kind = str(error).split(" (byte ")[0].replace("$[0]", "$")
                        kind = "not UTF-8" if isinstance(error, UnicodeError) else kind
                        bad.setdefault(kind, []).append(number)
            yield from records
    except DAMAGE as error:
        damage = "is truncated" if isinstance(error, EOFError) else f"is damaged ({error})"
        warn(f"{path} {damage}: the {num_lines:,} whole lines before are used")
    if bad:
        num_bad = sum(map(len, bad.values()))
        kinds = "; ".join(f"{len(numbers):,} × {kind} (first: line {numbers[0]:,})"
                          for kind, numbers in bad.items())
        message = f"{path}: {num_bad:,} of {num_lines:,} lines are bad: {kinds}"
        if num_bad > args.max_bad * num_lines:
            fail(f"{message}; that is more than --max-bad {args.max_bad:g}: download the file again or "
                 f"allow more")
        warn(f"{message}; they are left out")


def text_lines(path, args):
    """Yields the lines of a text file in UTF-8, with their ends. Damage and other encodings: exit code 2."""
    try:
        for first, _, block in _blocks(path, args):
            try:
                lines = block.decode().split("\n")
            except UnicodeDecodeError as error:
                number = first + block.count(b"\n", 0, error.start)
                fail(f"{path}, line {number}: {block[error.start:error.end]!r} is not UTF-8: save it as such")
            yield from (line + "\n" for line in lines)
    except DAMAGE as error:
        fail(f"{path} is no whole gzip file ({error}): download or export it again")


def problem_of(content, first=1):
    """Why bytes, those of a file from line `first` on, are no lines of UTF-8, with the cure, or None"""
    if first == 1 and re.match(rb"\xff\xfe|\xfe\xff|(?:[^\0]\0){4}|(?:\0[^\0]){4}", content):
        return "is UTF-16: `iconv -f UTF-16 -t UTF-8` makes it UTF-8"
    if first == 1 and re.match(rb"[^\n]*\r[^\r\n]", content):
        return "ends its lines with CR alone, as old Macs did: `tr '\\r' '\\n'` mends it"
    if (position := content.find(b"\0")) >= 0:
        number = first + content.count(b"\n", 0, position)
        return f"has a NUL byte in line {number}: it is damaged or no text; `tr -d '\\0'` drops such bytes"
    return None


def first_lines(path):
    """The first 100 lines of a file, as far as they lie in its first MiB: list of bytes."""
    with open(path, "rb") as file:
        return next(unzip(file, 1 << 20), b"").splitlines()[:100]


def parse_line(line):
    """A line as a dict: JSON or, as in Amazon's metadata of 2014, a Python literal. Raises a BAD_LINE."""
    try:
        record = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        text = line.decode().strip()
        try:
            record = ast.literal_eval(SURROGATE.sub("", text))  # half of a pair is no letter
        except (SyntaxError, ValueError):
            raise ValueError("neither JSON nor a Python literal") from None
    if not isinstance(record, dict):
        raise ValueError("not a record of named fields")
    return record


def unzip(file, size=1 << 19):
    """The content of an open binary file, gzip (also of several members) or not: yields up to `size` bytes.

    Raises EOFError where a gzip file was cut off and zlib.error where it is damaged, after all that is whole.
    """
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not is_gzip:
        yield from iter(lambda: file.read(size), b"")
        return
    decompressor, rest = zlib.decompressobj(31), b""
    while data := rest or file.read(1 << 17):
        if decompressor.eof:  # another member; zeros before it fill a block of a tape
            if not (data := data.lstrip(b"\0")):
                rest = b""
                continue
            decompressor = zlib.decompressobj(31)
        if piece := decompressor.decompress(data, size):
            yield piece
        rest = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
    if not decompressor.eof:
        raise EOFError("cut off")


def _blocks(path, args):
    """Whole lines of a file, in blocks: yields (number of the first line, of the last line, bytes).

    Raises DAMAGE behind the whole lines of a broken gzip file. Exit code 2 for what is no regular file, a
    line beyond --max-line MiB, and a gzip file that holds more than --max-ratio times its size.
    """
    if not path.is_file():
        fail(f"{path} is {'no regular file' if path.exists() else 'missing'}")
    last, rest, num_bytes, size = 0, b"", 0, path.stat().st_size
    with open(path, "rb") as file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True,
                                        mininterval=1, disable=True if size < 1 << 24 else None) as bar:
        for piece in unzip(file):
            bar.update(file.tell() - bar.n)
            num_bytes += len(piece)
            if num_bytes > args.max_ratio * max(size, 1 << 20):
                fail(f"{path} expands to more than {args.max_ratio:g} times its size: raise --max-ratio if "
                     f"that is right")
            if not last and not rest:
                piece = piece.removeprefix(b"\xef\xbb\xbf")
            if problem := problem_of(piece, last + 1):
                fail(f"{path} {problem}")
            lines, newline, tail = piece.rpartition(b"\n")
            if newline:
                first, last = last + 1, last + 1 + lines.count(b"\n")
                yield first, last, rest + lines
                rest = b""
            rest += tail
            if len(rest) > args.max_line << 20:
                fail(f"{path}, line {last + 1} is longer than {args.max_line} MiB: raise --max-line if that "
                     f"is right")
    if rest:
        yield last + 1, last + 1, rest
