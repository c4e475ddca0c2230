"""Readers of Amazon's, Yelp's and NETE's files as published: options of stage 1 -> three frames.

interactions: user_id, item_id, rating, timestamp (s), review, of NETE feature, with --split published also
split; items: ITEM_FIELDS; users: user_id and what is known, or None. A bad file exits with code 2.
"""

import json
import pickle
import re
import reprlib
from datetime import date, datetime
from io import BytesIO
from itertools import islice
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from userip.artifacts import fail, warn
from userip.cleaning import CONTROL, odd_part, read_category, to_seconds, to_text
from userip.raw_lines import BAD_LINE, DAMAGE, first_lines, parse_line, problem_of, read_lines
from userip.tables import check_columns

CATEGORIES = {"clothing": "Clothing_Shoes_and_Jewelry", "movies": "Movies_and_TV", "games": "Video_Games"}
ITEM_FIELDS = ["item_id", "title", "category", "brand", "price"]
REVIEW_FIELDS = {  # format -> fields that hold user_id, item_id, rating, timestamp, review
    "Amazon 2014 or 2018": ("reviewerID", "asin", "overall", "unixReviewTime", "reviewText"),
    "Amazon 2023": ("user_id", "parent_asin", "rating", "timestamp", "text"),
    "Yelp": ("user_id", "business_id", "stars", "date", "text"),
}
Id = Annotated[str, msgspec.Meta(min_length=1)]
Rating = Annotated[float, msgspec.Meta(ge=-3e38, le=3e38)]  # float32
Time = Annotated[float, msgspec.Meta(ge=-1e10, le=1e14)]  # seconds or milliseconds: see `to_seconds`
PUBLISHED_NAME = re.compile(r"(?:reviews_|meta_)?([A-Z]\w*?)(?:_5)?\.jsonl?(?:\.gz)?")  # [1]: category
YELP_TOP_LEVEL = set("""Active Life|Arts & Entertainment|Automotive|Beauty & Spas|Bicycles|Education|
Event Planning & Services|Financial Services|Food|Health & Medical|Home Services|Hotels & Travel|Local Flavor|
Local Services|Mass Media|Nightlife|Pets|Professional Services|Public Services & Government|
Religious Organizations|Restaurants|Shopping""".replace("\n", "").split("|"))


def _find_files(args, formats):
    """The files of --raw by their first records, {"reviews", "items", "users": path or None}, and the format
    of the reviews. --category decides between several files of one kind.
    """
    contents = {path: _content(path, formats) for path in sorted(args.raw.iterdir()) if path.is_file()}
    listing = ", ".join(f"{path.name} ({content})" for path, content in list(contents.items())[:8])
    paths = {}
    for kind, accepted in (("reviews", formats), ("items", ["items"]), ("users", ["users"])):
        candidates = [path for path, content in contents.items() if content in accepted]
        if args.category:  # files under another category's name are left out
            names = {path: PUBLISHED_NAME.fullmatch(path.name) for path in candidates}
            candidates = [path for path, name in names.items()
                          if not name or name[1].lower() == args.category.lower()]
        if not candidates and kind != "users":
            of_category = f" of --category {args.category}" if args.category else ""
            fail(f"{args.raw} holds no {kind} in the format {' or '.join(formats)}{of_category}; it holds "
                 f"{listing or 'no file'}")
        if len(candidates) > 1:
            fail(f"{args.raw} holds several files of {kind} ({', '.join(path.name for path in candidates)}): "
                 f"leave one there or, if they are of several categories, name one by --category")
        paths[kind] = candidates[0] if candidates else None
    print(f"reading {', '.join(str(path) for path in paths.values() if path)} ({contents[paths['reviews']]})")
    return paths, contents[paths["reviews"]]


def _content(path, formats):
    """What a file holds: the name of a format of reviews, "items", "users" or, for a complaint, what else."""
    try:
        lines = first_lines(path)
    except (OSError, *DAMAGE) as error:
        return f"unreadable: {error}"
    for line in lines:
        try:
            fields = set(parse_line(line))
        except BAD_LINE:
            continue
        for name in formats:
            if fields.issuperset(REVIEW_FIELDS[name][:4]):  # some reviews have no text
                return name
        if {"user_id", "yelping_since"} <= fields:
            return "users"
        if {"business_id", "name"} <= fields or \
                fields & {"asin", "parent_asin"} and fields & {"title", "categories", "category"}:
            return "items"
    if problem := problem_of(b"".join(lines)):
        return problem
    other = {b"": "empty", b"[": "a JSON array, not one record a line", b"<": "HTML"}
    return other.get(b"".join(lines).strip()[:1], "other records")


def _read_reviews(args, path, fields):
    """A file of reviews as a frame: user_id, item_id categorical, rating, timestamp, review (arrow text)."""
    time_type = Time
    if "date" in fields:  # Yelp's are "2018-07-07 22:09:11", in older editions "2018-07-07"
        has_hours = re.search(rb'"date": ?"[\d-]+[ T]', b"\n".join(first_lines(path)))
        time_type = datetime if has_hours else date
    columns = [("user_id", Id), ("item_id", Id), ("rating", Rating), ("timestamp", time_type),
               ("review", str | None, None)]
    names = {column: field for (column, *_), field in zip(columns, fields)}
    decoder = msgspec.json.Decoder(msgspec.defstruct("Review", columns, rename=names, gc=False))

    def decode(lines):
        records = decoder.decode_lines(lines)
        ids = [text for record in records for text in (record.user_id, record.item_id)]
        if CONTROL.search("".join(ids)) or not all(map(str.strip, ids)):
            raise ValueError(f"{fields[0]} or {fields[1]} is no printable text")
        return records

    reviews = read_lines(path, args, decode)
    tables = []
    for records in iter(lambda: [*islice(reviews, 1 << 13)], []):  # as many as fit the processor's cache
        times = [record.timestamp for record in records]
        tables.append(pa.table({
            "user_id": pa.array([record.user_id for record in records]),
            "item_id": pa.array([record.item_id for record in records]),
            "rating": np.array([record.rating for record in records], dtype="float32"),
            "timestamp": to_seconds(times) if time_type is Time
            else np.array(times, dtype="datetime64[s]").astype("int64"),
            "review": _pack_texts([record.review for record in records]),
        }))
    if not tables:
        fail(f"{path} holds no review: download it again")
    table = pa.concat_tables(tables)
    del tables
    frame = pd.DataFrame({"rating": table["rating"].to_numpy(), "timestamp": table["timestamp"].to_numpy(),
                          "review": pd.arrays.ArrowExtensionArray(table["review"])})
    for name in ("user_id", "item_id"):
        frame[name] = table[name].dictionary_encode().combine_chunks().to_pandas()
        table = table.drop_columns(name)  # as texts they take more memory than all the rest but the reviews
    return frame


def _pack_texts(texts):
    """Texts and None -> an arrow array of just their size; arrow's own builder is slower and takes more."""
    encoded = [b"" if text is None else text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype="int64")
    is_text = pa.array([text is not None for text in texts]).buffers()[1]
    content = pa.py_buffer(b"".join(encoded))
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), content, is_text)


def _read_records(args, path, keys, ids):
    """The records, as dicts, of a file whose id is among `ids`; it is the value of the first of `keys` that a
    record has, and becomes its "id".
    """
    ids = set(ids)
    pattern = re.compile(rf"""["'](?:{'|'.join(keys)})["']: ?["']([^"'\\]+)["']""".encode())

    def decode(lines):
        records = []
        for line in filter(bytes.strip, lines.split(b"\n")):
            match = pattern.search(line)  # literals are slow to read, and most items of a shop have no review
            if not match or match[1].decode("utf-8", "replace") in ids:
                record = parse_line(line)
                record["id"] = next(filter(None, map(record.get, keys)), None)
                if not isinstance(record["id"], str):
                    raise ValueError(f"no {keys[-1]}")
                records.append(record)
        return records

    return read_lines(path, args, decode)


def _first(*values):
    """The first of these values that is not missing"""
    return next((value for value in values if value not in (None, "", [], {})), None)


def _to_items(path, rows):
    """Rows of ITEM_FIELDS as published -> a frame; says how many values hold no text, with the first."""
    items, names, odd = pd.DataFrame(rows, columns=ITEM_FIELDS, dtype=object), [], []
    for item, title, category, brand, _ in items.itertuples(index=False):
        name, part = read_category(category)
        names.append(name)
        parts = {"title": odd_part(title), "category": part, "brand": odd_part(brand)}
        odd += [f"{reprlib.repr(part)}, {key} of {item}" for key, part in parts.items() if part is not None]
    if odd:
        warn(f"{path}: {len(odd):,} titles, categories or brands are neither text nor a number and are "
             f"left out, the first of them {odd[0]}")
    return items.assign(category=names)


def read_amazon(args):
    """Amazon's reviews of one category, in the format of 2014, 2018 or 2023, with their items' metadata."""
    paths, name = _find_files(args, [name for name in REVIEW_FIELDS if name.startswith("Amazon")])
    interactions = _read_reviews(args, paths["reviews"], REVIEW_FIELDS[name])
    items = []
    for record in _read_records(args, paths["items"], ["parent_asin", "asin"],
                                interactions["item_id"].cat.categories):
        details = record.get("details")
        details = details if isinstance(details, dict) else {}
        brand = _first(record.get("brand"), record.get("store"), details.get("Brand"))
        category = _first(*map(record.get, ("category", "categories", "main_category")))
        items.append((record["id"], record.get("title"), category, brand, record.get("price")))
    return interactions, _to_items(paths["items"], items), None


def read_yelp(args):
    """Yelp's open data set: reviews, businesses and, if there, users: those fields that no rating made."""
    paths, name = _find_files(args, ["Yelp"])
    interactions = _read_reviews(args, paths["reviews"], REVIEW_FIELDS[name])
    items = _read_records(args, paths["items"], ["business_id"], interactions["item_id"].cat.categories)
    items = _to_items(paths["items"], map(_yelp_item, items))
    if not paths["users"]:
        return interactions, items, None
    fields = ["user_id", "review_count", "yelping_since", "fans"]
    users = _read_records(args, paths["users"], ["user_id"], interactions["user_id"].cat.categories)
    return interactions, items, pd.DataFrame([[user.get(name) for name in fields] for user in users],
                                             columns=fields)


def _yelp_item(record):
    """A business as a row of ITEM_FIELDS. Categories have no order: the first below the top level counts."""
    parts = record.get("categories")
    parts = parts.split(",") if isinstance(parts, str) else parts if isinstance(parts, list) else [parts]
    names = [name.strip() for part in parts if (name := to_text(part))]
    category = next((name for name in names if name not in YELP_TOP_LEVEL), names[0] if names else "")
    category = [category, *(part for part in parts if odd_part(part) is not None)]
    attributes = record.get("attributes") or {}
    if isinstance(attributes, list):  # of 2017: ["RestaurantsPriceRange2: 2", …]
        attributes = dict(part.split(": ", 1) for part in map(str, attributes) if ": " in part)
    attributes = attributes if isinstance(attributes, dict) else {}
    price = attributes.get("RestaurantsPriceRange2") or attributes.get("Price Range")  # until 2016
    price = price.strip("u'\"") if isinstance(price, str) else price  # in some editions "u'2'"
    return record["id"], record.get("name"), category, None, price


class SafeUnpickler(pickle.Unpickler):
    """Unpickles plain containers and numbers; asked for anything else it stops before that could run."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run a stranger's code")


def read_nete(args):
    """The dumps that the paper's Movies and Yelp are (from NETE, Li et al., 2020).

    reviews.pickle: list of {user, item, rating, template: (feature, adjective, sentence, sentiment)};
    item.json: list (or lines) of {item, title or name, categories, …}; N/train.index, …: row numbers.
    The sentence is the review, the feature (such as "plot") what it is about.
    """
    dump, text = (args.raw / "reviews.pickle").read_bytes(), (args.raw / "item.json").read_bytes()
    try:
        rows = []
        for review in SafeUnpickler(BytesIO(dump)).load():
            feature, _, sentence = (review.get("template") or (None,) * 3)[:3]
            texts = [text if text is None else _nete_text(text)
                     for text in (sentence or review.get("text"), feature)]
            rows.append((_nete_text(review["user"]), _nete_text(review["item"]), float(review["rating"]),
                         *texts))
        if problem := problem_of(text):
            raise ValueError(f"item.json {problem}")
        records = json.loads(text) if text.lstrip().startswith(b"[") else map(parse_line, text.splitlines())
        items = _to_items(args.raw / "item.json", map(_nete_item, records))
    except Exception as error:  # a broken pickle raises nearly anything
        fail(f"reviews.pickle or item.json in {args.raw} is not what NETE published ({type(error).__name__}: "
             f"{error}): download it again")
    interactions = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "review", "feature"])
    interactions["timestamp"] = 0  # the dumps have none
    for frame, name in ((interactions, "reviews.pickle"), (items[["item_id"]], "item.json")):
        frame.index = pd.RangeIndex(1, len(frame) + 1, name="record")
        check_columns(frame, args.raw / name)
    if args.split == "published":
        interactions["split"] = _published_split(args.raw / str(args.fold), len(interactions))
    return interactions, items, None


def _nete_text(value):
    """An id or a review of a dump as text; raises a ValueError where it is neither text nor a whole number"""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{reprlib.repr(value)} is neither text nor a whole number")
    return str(value).encode().decode()  # half a surrogate pair raises a ValueError, too


def _nete_item(record):
    """An item of item.json, whose fields differ from dump to dump, as a row of ITEM_FIELDS"""
    item_id = _nete_text(record["item"])
    if "attributes" in record or "business_id" in record:
        return _yelp_item(record | {"id": item_id})
    category = _first(record.get("categories"), record.get("category"))
    title = _first(record.get("title"), record.get("name"))
    return item_id, title, category, record.get("brand"), record.get("price")


def _published_split(folder, num_rows):
    """Row numbers in train.index, validation.index, test.index -> split per row, None where none has it."""
    split = np.full(num_rows, None, dtype=object)
    for name in ("train", "validation", "test"):
        path = folder / f"{name}.index"
        try:
            rows = np.array(path.read_text().split(), dtype="int64")
        except (OSError, ValueError, OverflowError) as error:
            fail(f"{path} is no list of row numbers ({error}): choose another --fold, or download it again")
        if not len(rows) or rows.min() < 0 or rows.max() >= num_rows or any(split[rows]):
            fail(f"{path} does not fit reviews.pickle with its {num_rows:,} reviews: it must hold numbers "
                 f"below {num_rows:,} that are in no other index file")
        split[rows] = "valid" if name == "validation" else name
    return split
