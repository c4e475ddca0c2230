"""Readers of MovieLens and of tables as csv, tsv or parquet: options of stage 1 -> three frames.

They are as in `userip.readers`, but of the columns only those that are REQUIRED must be there. The index of a
frame numbers the lines of its file (parquet: the rows), for messages.
"""

import contextlib
import csv
import itertools
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userip.artifacts import fail
from userip.cleaning import LIST_TEXT, read_category, to_seconds
from userip.raw_lines import problem_of, text_lines

REQUIRED = {"interactions": ["user_id", "item_id", "rating", "timestamp"], "items": ["item_id", "title"],
            "users": ["user_id"]}
TEXTS = {"user_id", "item_id", "title", "category", "brand", "review", "split"}
ALLOWED = {*TEXTS, "rating", "timestamp", "price"}
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
LARGEST = {"rating": 3e38, "timestamp": 1e20}  # of float32; nanoseconds in the year 5138
# a terminal would obey them, or nobody sees them; blank
UNPRINTABLE = r"[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]|^\s*$"
LAST_SECOND = 4102444800  # the year 2100 begins
EXACT = {"float": 2**24, "double": 2**53}  # below which whole numbers differ
ESCAPE = r"""\\(?:[\\"'/,;tnr\t\r\n]|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|$)"""  # of databases; not AC\DC


def _fail_at(frame, path, row, problem):
    fail(f"{path}, {frame.index.name} {frame.index[row]}: {problem}; mend or drop the {frame.index.name}")


def _refuse(frame, path, columns, pattern, problem, is_missing_bad=False):
    """Exit code 2 with the first line where one of these columns matches a pattern"""
    for column in frame.columns.intersection(columns):
        is_bad = frame[column].str.contains(pattern, na=is_missing_bad)
        if is_bad.any():
            text = str(frame[column].iloc[row := int(is_bad.argmax())])
            if pd.isna(frame[column].iloc[row]):
                _fail_at(frame, path, row, f"{column} is missing")
            start = max(0, match.start() - 20) if (match := re.search(pattern, text)) else 0
            _fail_at(frame, path, row, f"{column} {problem}: {text[start:start + 60]!r}")


def check_columns(frame, path):
    """Make numbers of ratings and times (s), and names of categories that are the text of a list, in place;
    exit code 2 with the first line where that cannot be, or whose id is missing or not printable.
    """
    for column in frame.columns.intersection(["user_id", "item_id"]):
        frame[column] = frame[column].str.strip()
        if num_nan := int(frame[column].isin(["nan", "NaN", "None", "<NA>"]).sum()):
            print(f"{path}: {num_nan:,} rows have a {column} such as nan or None; it is taken as an id")
    _refuse(frame, path, ["user_id", "item_id"], UNPRINTABLE, "is no printable text", is_missing_bad=True)
    names = {}  # of categories that are lists
    for text in filter(LIST_TEXT.fullmatch, frame.get("category", pd.Series(dtype="str")).dropna().unique()):
        name, odd_part = read_category(text)
        if odd_part is not None:
            row = int((frame["category"] == text).to_numpy(dtype=bool, na_value=False).argmax())
            _fail_at(frame, path, row, f"category {text[:60]!r} is no list of names")
        names[text] = name or None
    if names:
        frame["category"] = frame["category"].map(lambda text: names.get(text, text), na_action="ignore")
    for column in frame.columns.intersection(LARGEST):
        numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(dtype="float64", na_value=np.nan)
        is_good = np.abs(numbers) <= LARGEST[column]  # false for nan, too
        if not is_good.all():
            row = int(is_good.argmin())
            problem = "is not a number" if np.isnan(numbers[row]) else f"is beyond {LARGEST[column]:g}"
            value = frame[column].iloc[row]
            _fail_at(frame, path, row, f"{column} is missing" if pd.isna(value) else
                     f"{column} {str(value)!r} {problem}")
        frame[column] = numbers
    if "timestamp" in frame:
        if frame["timestamp"].between(19000101, 21001231).all():
            first = f"timestamp {frame['timestamp'].iloc[0]:.0f}"
            _fail_at(frame, path, 0, f"{first} looks like YYYYMMDD, as all others do; seconds are needed")
        seconds = to_seconds(frame["timestamp"])
        if (is_late := seconds >= LAST_SECOND).any():
            row = int(is_late.argmax())
            _fail_at(frame, path, row, f"timestamp {frame['timestamp'].iloc[row]:.0f} lies beyond the year "
                     f"2100: seconds are needed, no date as a number")
        is_second = frame["timestamp"].to_numpy() < 1e11
        if is_second.any() and not is_second.all():
            row, other = int(is_second.argmin()), frame.index[int(is_second.argmax())]
            _fail_at(frame, path, row, f"timestamp {frame['timestamp'].iloc[row]:.0f} has another unit than "
                     f"that of {frame.index.name} {other}")
        frame["timestamp"] = seconds


# ----------------------------------------------------------------------------------------------------------
# MovieLens
# ----------------------------------------------------------------------------------------------------------


def movielens_file(args, name):
    """The path of a file of MovieLens, in --raw or in the folder in it that the published archive makes."""
    inner = args.raw / args.dataset / name
    return inner if inner.exists() else args.raw / name


def _read_movielens(args, name, columns, separator):
    """A file of MovieLens without header -> a frame. It is Latin-1 as published, UTF-8 if saved again."""
    path = movielens_file(args, name)
    if not path.is_file():
        fail(f"{path} is missing")
    content = path.read_bytes()
    if problem := problem_of(content):
        fail(f"{path} {problem}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    lines = {number: line.rstrip("\r").split(separator) for number, line in enumerate(text.split("\n"), 1)
             if line.strip()}
    for number, fields in lines.items():
        if len(fields) != len(columns):
            fail(f"{path}, line {number} has {len(fields)} columns, not {len(columns)}, between "
                 f"{separator!r}: is it a file of {args.dataset}?")
    if not lines:
        fail(f"{path} is empty: download it again")
    frame = pd.DataFrame(list(lines.values()), columns=columns, index=pd.Index(lines, name="line"), dtype=str)
    frame = frame.replace("", None)
    check_columns(frame, path)
    if "age" in frame:
        frame["age"] = pd.to_numeric(frame["age"], errors="coerce")
    return frame


def read_ml_100k(args):
    """MovieLens-100k as published: u.data (tab), u.item (pipe, 19 genre flags), u.user, u.genre."""
    interactions = _read_movielens(args, "u.data", REQUIRED["interactions"], "\t")
    genres = _read_movielens(args, "u.genre", ["genre", "number"], "|")
    if genres["number"].tolist() != [str(number) for number in range(len(genres))] or \
            genres["genre"].duplicated().any() or genres["genre"].isna().any():
        fail(f"{movielens_file(args, 'u.genre')} must have different genres, numbered 0, 1, 2, … in order")
    genres = np.array(genres["genre"])
    columns = ["item_id", "title", "released", "video_released", "url", *genres]
    items = _read_movielens(args, "u.item", columns, "|")
    items["category"] = [", ".join(genres[flags]) or None for flags in items[genres].to_numpy() == "1"]
    columns = ["user_id", "age", "gender", "occupation", "zip_code"]
    return interactions, items, _read_movielens(args, "u.user", columns, "|")


def read_ml_1m(args):
    """MovieLens-1M as published: ratings.dat, movies.dat, users.dat, "::" between columns."""
    interactions = _read_movielens(args, "ratings.dat", REQUIRED["interactions"], "::")
    items = _read_movielens(args, "movies.dat", ["item_id", "title", "category"], "::")
    items["category"] = items["category"].str.replace("|", ", ")
    columns = ["user_id", "gender", "age", "occupation", "zip_code"]
    return interactions, items, _read_movielens(args, "users.dat", columns, "::")


# ----------------------------------------------------------------------------------------------------------
# csv, tsv, parquet
# ----------------------------------------------------------------------------------------------------------


def read_table(args):
    """A folder with interactions.*, items.* (and users.*, if any) as csv, tsv (both also .gz) or parquet."""
    required = REQUIRED | {"interactions": REQUIRED["interactions"] + ["split"] * (args.split == "published")}
    names = {}
    for pair in args.columns:
        ours, _, theirs = pair.partition("=")
        if not theirs or theirs in names or ours not in ALLOWED:
            fail(f"--columns {pair}: each must be OURS=THEIRS, such as rating=stars, none twice; ours is "
                 f"one of {', '.join(sorted(ALLOWED))}")
        names[theirs] = ours
    frames, unused = {}, set(names)
    for kind, columns in required.items():
        paths = [path for ending in ENDINGS if (path := args.raw / f"{kind}{ending}").exists()]
        if len(paths) > 1:
            fail(f"{args.raw} holds {' and '.join(path.name for path in paths)}: leave one of them")
        if not paths and kind == "users":
            continue
        if not paths:
            fail(f"{args.raw} holds no {' or '.join(kind + ending for ending in ENDINGS)}")
        frame = frames[kind] = read_frame(paths[0], columns, args, names)
        unused -= set(frame.attrs["published"])
        _check_line_breaks(frame, paths[0], frames["interactions"])
    if unused:
        fail(f"--columns: no file has a column {', '.join(unused)}")
    interactions = frames["interactions"]
    if args.split == "published":
        interactions["split"] = interactions["split"].replace("validation", "valid")
        if unknown := set(interactions["split"].dropna()) - {"train", "valid", "test", "support"}:
            fail(f"{', '.join(map(str, unknown))} is no split; it must be train, valid, test or support")
    elif "split" in interactions:
        print(f"the column split is not used: --split is {args.split}, not published")
    return interactions, frames["items"], frames.get("users")


def read_frame(path, required, args, names=None):
    """A table as a frame that has the columns `required`; names: {theirs: ours}; args: limits of its size"""
    print(f"reading {path}")
    if not path.is_file():
        fail(f"{path} is {'no regular file' if path.exists() else 'missing'}")
    table, numbers = _read_parquet(path) if path.suffix == ".parquet" else _read_text(path, args)
    if not len(table):
        fail(f"{path} has no rows: download or export it again")
    ours = [(names or {}).get(name, name) for name in table.column_names]
    if len(set(ours)) < len(ours):
        fail(f"{path} has two columns of one name among {', '.join(ours)}: see --columns")
    if missing := [column for column in required if column not in ours]:
        fail(f"{path} has no column {', '.join(missing)}; it has {', '.join(ours)}")
    frame = _to_frame(table.rename_columns(ours), numbers, path)
    check_columns(frame, path)
    if path.suffix != ".parquet":
        _refuse(frame, path, sorted(TEXTS), ESCAPE, r"has a backslash escape, and only \N is one here: write "
                r"the letter itself (quotes twice), or `sed 's,\\,/,g'`")
    frame.attrs["published"] = table.column_names
    return frame


def _read_text(path, args):
    """A csv or tsv file (also .gz) -> an arrow table of texts, and the line on which each record begins.

    Each record must have the fields of the header. Tab-separated files are not quoted. In csv files a quote
    opens or closes a field and is doubled within it: an unclosed one would swallow lines.
    """
    lines = text_lines(path, args)
    num_blank, first = next(((count, line) for count, line in enumerate(lines) if line.strip()), (0, ""))
    delimiter = "\t" if ".tsv" in path.suffixes else next((d for d in DELIMITERS if d in first), ",")
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    csv.field_size_limit(args.max_line << 20)
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, quoting=quoting, strict=True,
                        skipinitialspace=f"{delimiter} " in first)
    tables, records, numbers, end = [], [], [], 0  # end: line on which the last record ended
    try:
        header, end = [field.strip() for field in next(reader)], reader.line_num
        if delimiter == "\t" and any(header) and all(re.fullmatch('".*"|', field) for field in header):
            fail(f"{path} has its columns in quotes, but in a tab-separated file quotes are letters: save it "
                 f"without quotes, or as csv with commas")
        for record in reader:
            number, end = num_blank + end + 1, reader.line_num
            if len(record) == len(header) + 1 and not record[-1]:  # a delimiter at the end of the line
                record.pop()
            if len(record) == len(header):
                records.append(record)
                numbers.append(number)
            elif record:
                fail(f"{path}, line {number} has {len(record)} fields between {DELIMITERS[delimiter]}, but "
                     f"the header has {len(header)}: mend the line; a field that holds one must be in quotes "
                     f"(csv only)")
            if len(records) == 1 << 16:
                tables.append(_texts(header, records))
                records = []
    except csv.Error as error:
        fail(f"{path}, lines {num_blank + end + 1} to {num_blank + reader.line_num}: {error}; a quote within "
             f"a field must be doubled, and the field be in quotes: export the file again")
    table = pa.concat_tables([*tables, _texts(header, records)])
    if header[-1:] == [""] and table.columns[-1].null_count == len(table):  # a delimiter ends the header
        table = table.remove_column(len(header) - 1)
    return table, pd.Index(numbers, name="line")


def _texts(header, records):
    """Records as an arrow table; None for what is empty or, as databases write it, \\N"""
    columns = zip(*records) if records else [()] * len(header)
    return pa.Table.from_arrays([pa.array([field if field not in ("", "\\N") else None for field in column],
                                          pa.string()) for column in columns], names=header)


def _read_parquet(path):
    """A parquet file -> an arrow table of what it holds, and the number of each row"""
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, pa.ArrowException) as error:
        fail(f"{path} cannot be read ({str(error).splitlines()[0]}): export it again")
    return table, pd.RangeIndex(1, len(table) + 1, name="row")


def _to_frame(table, numbers, path):
    """An arrow table -> a frame: TEXTS as texts, times in seconds, of a list of categories the deepest

    Exit code 2 for a column of another type than it should have.
    """
    columns = {}
    for name, column in zip(table.column_names, table.columns):
        try:
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            column.validate(full=True)  # that text is UTF-8
            columns[name] = _plain(name, column).to_pandas()
        except (pa.ArrowException, TypeError):
            with contextlib.suppress(pa.ArrowException):  # neither texts nor bytes
                for number, text in zip(numbers, column.cast("large_binary").to_pylist()):
                    if text and text.decode(errors="ignore").encode() != text:
                        fail(f"{path}, column {name}, {numbers.name} {number}: {text[:40]!r} is not UTF-8: "
                             f"save it as such")
            kind = "text" if name in TEXTS else "number"
            fail(f"{path}, column {name}: {column.type} is no {kind}, in row 1 and all others")
    return pd.DataFrame(columns).set_index(numbers)


def _plain(name, column):
    """A column of a table as text or as numbers: raises an ArrowException or TypeError where it is neither"""
    if hasattr(column.type, "value_type") and name == "category":  # a list of any kind
        names, odd_parts = zip(*map(read_category, column.to_pylist()))
        if any(part is not None for part in odd_parts):
            raise TypeError
        return pa.array([name or None for name in names], "string")
    if pa.types.is_nested(column.type) and name in ALLOWED:
        raise TypeError
    if pa.types.is_nested(column.type):  # what is known of users, for checking only
        return pa.array([value if value is None else str(value) for value in column.to_pylist()])
    if pa.types.is_temporal(column.type) and name == "timestamp":
        return column.cast(pa.timestamp("s"), safe=False).cast("int64")
    if name in ("rating", "price", "timestamp") and not pa.types.is_temporal(column.type):
        return column.cast("float64") if pa.types.is_decimal(column.type) else column
    if name not in ALLOWED and not (pa.types.is_temporal(column.type) or pa.types.is_binary(column.type)):
        return column
    if name in ("rating", "price"):
        raise TypeError  # a time
    if pa.types.is_floating(column.type):  # 7.0 is the id 7, in a column with gaps
        if str(column.type) not in EXACT:
            raise TypeError  # a number of two bytes
        column, limit = pc.if_else(pc.is_nan(column), None, column), EXACT[str(column.type)]
        if name in ("user_id", "item_id") and (pc.max(pc.abs(column)).as_py() or 0) >= limit:
            raise TypeError  # neighbours are one number
        with contextlib.suppress(pa.ArrowInvalid):
            column = column.cast("int64")
    return column.cast("string")


def _check_line_breaks(frame, path, interactions):
    """Exit code 2 where a field of a csv file holds a line with ids as in a record: a quote swallowed it."""
    if path.suffix == ".parquet":
        return
    ids = {name: set(interactions[name]) for name in frame.columns.intersection(["user_id", "item_id"])}
    for column in frame.columns[frame.dtypes == "str"]:
        for number, text in frame.loc[frame[column].str.contains("\n", na=False), column].items():
            for line in text.split("\n")[1:]:
                fields = dict(zip(frame.columns, re.split("[,;]", line)))
                if all(fields.get(name) in known for name, known in ids.items()):
                    fail(f"{path}, line {number}: {column} goes on with {line[:60]!r}, which looks like a "
                         f"record: close the quote before it")
