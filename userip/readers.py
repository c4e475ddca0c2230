"""Readers of Amazon's, Yelp's and NETE's files as published: raw files -> interactions, items, users.

Each reader takes the stage's options and returns three frames: interactions with user_id, item_id, rating,
timestamp (s), review and, with --split published, split; items with item_id, title, category, brand, price;
users with user_id. A file that cannot be read exits with code 2.
"""

import json
import pickle
import re
from datetime import date, datetime
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from userip.artifacts import fail
from userip.cleaning import deepest_category, to_seconds
from userip.json_lines import BAD_LINE, DAMAGE, first_lines, parse_line, read_lines

CATEGORIES = {"clothing": "Clothing_Shoes_and_Jewelry", "movies": "Movies_and_TV", "games": "Video_Games"}
ITEM_FIELDS = ["item_id", "title", "category", "brand", "price"]
REVIEW_FIELDS = {  # format -> our columns and the fields that hold them
    "Amazon 2014 or 2018": dict(user_id="reviewerID", item_id="asin", rating="overall",
                                timestamp="unixReviewTime", review="reviewText"),
    "Amazon 2023": dict(user_id="user_id", item_id="parent_asin", rating="rating", timestamp="timestamp",
                        review="text"),
    "Yelp": dict(user_id="user_id", item_id="business_id", rating="stars", timestamp="date", review="text"),
}
Id = Annotated[str, msgspec.Meta(min_length=1)]
Time = Annotated[float, msgspec.Meta(ge=-1e10, le=1e14)]  # seconds or milliseconds: see `to_seconds`
PUBLISHED_NAME = re.compile(r"(?:reviews_|meta_)?([A-Z]\w*?)(?:_5)?\.jsonl?(?:\.gz)?")  # [1]: category
ASIN = re.compile(rb"""["'](?:parent_)?asin["']: ?["']([^"']+)["']""")
YELP_TOP_LEVEL = set("""Active Life|Arts & Entertainment|Automotive|Beauty & Spas|Bicycles|Education|
Event Planning & Services|Financial Services|Food|Health & Medical|Home Services|Hotels & Travel|Local Flavor|
Local Services|Mass Media|Nightlife|Pets|Professional Services|Public Services & Government|
Religious Organizations|Restaurants|Shopping""".replace("\n", "").split("|"))


# ----------------------------------------------------------------------------------------------------------
# which file of a folder holds what
# ----------------------------------------------------------------------------------------------------------


def _find_files(args, formats):
    """Which files of --raw hold what, by their first records: {"reviews": path, "items": path, "users": path
    or None}, and the format of the reviews. --category decides between several files of one kind.
    """
    contents = {path: _contents(path, formats) for path in sorted(args.raw.iterdir()) if path.is_file()}
    listing = ", ".join(f"{path.name} ({content})" for path, (content, _) in list(contents.items())[:8])
    paths = {}
    for kind in ("reviews", "items", "users"):
        candidates = [path for path, (content, _) in contents.items() if content == kind]
        if args.category:  # files under another category's name are left out
            names = {path: PUBLISHED_NAME.fullmatch(path.name) for path in candidates}
            is_same = lambda path: names[path] and names[path][1].lower() == args.category.lower()
            candidates = [*filter(is_same, candidates)] or [path for path in candidates if not names[path]]
        if not candidates and kind != "users":
            of_category = f" of --category {args.category}" if args.category else ""
            fail(f"{args.raw} holds no {kind} in the format {' or '.join(formats)}{of_category}; it holds "
                 f"{listing or 'no file'}")
        if len(candidates) > 1:
            fail(f"{args.raw} holds several files of {kind} ({', '.join(path.name for path in candidates)}): "
                 f"leave one there or, if they are of several categories, name one by --category")
        paths[kind] = candidates[0] if candidates else None
    return paths, contents[paths["reviews"]][1]


def _contents(path, formats):
    """What a file holds: "reviews", "items", "users" or, for a complaint, what else; the reviews' format."""
    try:
        lines = first_lines(path)
    except (OSError, *DAMAGE) as error:
        return f"unreadable: {error}", None
    for line in lines:
        try:
            fields = set(parse_line(line))
        except BAD_LINE:
            continue
        for name in formats:
            if {field for column, field in REVIEW_FIELDS[name].items() if column != "review"} <= fields:
                return "reviews", name
        if {"user_id", "yelping_since"} <= fields:
            return "users", None
        if {"business_id", "name"} <= fields or \
                fields & {"asin", "parent_asin"} and fields & {"title", "categories", "category"}:
            return "items", None
    other = {b"": "empty", b"[": "a JSON array, not one record a line", b"<": "HTML"}
    return other.get(b"".join(lines).strip()[:1], "other records"), None


# ----------------------------------------------------------------------------------------------------------
# Amazon and Yelp: JSON lines
# ----------------------------------------------------------------------------------------------------------


def _read_reviews(args, path, fields):
    """A file of reviews as a frame: user_id, item_id categorical, rating, timestamp, review (arrow text)."""
    time_type = Time
    if fields["timestamp"] == "date":  # Yelp's are "2018-07-07 22:09:11", in older editions "2018-07-07"
        has_hours = re.search(rb'"date": ?"[\d-]+[ T]', b"\n".join(first_lines(path)))
        time_type = datetime if has_hours else date
    record_type = msgspec.defstruct("Review", [
        ("user_id", Id), ("item_id", Id), ("rating", float), ("timestamp", time_type),
        ("review", str | None, None)], rename=fields, gc=False)
    decoder = msgspec.json.Decoder(record_type)
    tables = []
    for records in _grouped(read_lines(path, args, decoder.decode, decoder.decode_lines)):
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


def _grouped(blocks, size=1 << 13):
    """Join lists until they have `size` entries: blocks fit the processor's cache, columns are longer."""
    group = []
    for block in blocks:
        group += block
        if len(group) >= size:
            yield group
            group = []
    if group:
        yield group


def _pack_texts(texts):
    """Texts and None -> an arrow array of just their size; arrow's own builder is slower and takes more."""
    encoded = [b"" if text is None else text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype="int64")
    is_text = pa.array([text is not None for text in texts]).buffers()[1]
    content = pa.py_buffer(b"".join(encoded))
    return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(ends), content, is_text)


def read_amazon(args):
    """Amazon's reviews of one category, in the format of 2014, 2018 or 2023, with their items' metadata."""
    paths, name = _find_files(args, [name for name in REVIEW_FIELDS if name.startswith("Amazon")])
    print(f"reading {paths['reviews']} ({name}) and {paths['items']}")
    interactions = _read_reviews(args, paths["reviews"], REVIEW_FIELDS[name])
    item_ids = set(interactions["item_id"].cat.categories)

    def decode_item(line):
        match = ASIN.search(line)  # literals are slow to read: most items of the shop have no review here
        if match and match[1].decode("utf-8", "replace") not in item_ids:
            return None
        record = parse_line(line)
        item_id = record.get("parent_asin") or record.get("asin")
        if not isinstance(item_id, str) or not item_id:
            raise ValueError("no asin")
        details = record.get("details")
        brand = record.get("brand") or record.get("store") or \
            (details.get("Brand") if isinstance(details, dict) else None)
        category = record.get("category") or record.get("categories") or record.get("main_category")
        return {"item_id": item_id, "title": record.get("title"), "category": deepest_category(category),
                "brand": brand, "price": record.get("price")}

    items = chain.from_iterable(read_lines(paths["items"], args, decode_item))
    items = pd.DataFrame(items, columns=ITEM_FIELDS)
    return interactions, items, pd.DataFrame({"user_id": interactions["user_id"].cat.categories})


def read_yelp(args):
    """Yelp's open data set: reviews, businesses and, if there, users: those fields that no rating made."""
    paths, name = _find_files(args, ["Yelp"])
    print(f"reading {paths['reviews']}, {paths['items']}" + (f", {paths['users']}" if paths["users"] else ""))
    interactions = _read_reviews(args, paths["reviews"], REVIEW_FIELDS[name])
    items = _yelp_records(args, paths["items"], "business_id", interactions["item_id"].cat.categories)
    items = pd.DataFrame(map(_yelp_item, items), columns=ITEM_FIELDS)
    users = pd.DataFrame({"user_id": interactions["user_id"].cat.categories})
    if paths["users"]:
        fields = ["user_id", "review_count", "yelping_since", "fans"]
        users = _yelp_records(args, paths["users"], "user_id", users["user_id"])
        users = pd.DataFrame(({name: user.get(name) for name in fields} for user in users), columns=fields)
    return interactions, items, users


def _yelp_records(args, path, key, ids):
    """The records of a file whose `key` is among `ids`: yields dicts."""
    ids = set(ids)

    def decode(line):
        record = parse_line(line)
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"no {key}")
        return record if record[key] in ids else None

    return chain.from_iterable(read_lines(path, args, decode))


def _yelp_item(record):
    """A business as an item; of its categories, which have no order, the first below Yelp's top level."""
    names = record.get("categories") or []
    names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    attributes = record.get("attributes")
    price = attributes.get("RestaurantsPriceRange2") if isinstance(attributes, dict) else None
    category = next((name for name in names if name not in YELP_TOP_LEVEL), names[0] if names else "")
    return {"item_id": record["business_id"], "title": record.get("name"), "category": category,
            "brand": None, "price": price}


# ----------------------------------------------------------------------------------------------------------
# NETE: a pickle, JSON, and published splits
# ----------------------------------------------------------------------------------------------------------


class SafeUnpickler(pickle.Unpickler):
    """Unpickles plain containers and numbers; asked for anything else it stops before that could run."""

    ADMITTED = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set",
                "slice", "str", "tuple"}

    def find_class(self, module, name):
        if module in ("builtins", "__builtin__") and name in self.ADMITTED:  # the second name is Python 2's
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run a stranger's code; "
                                     f"dump it with plain numbers, texts, lists and dicts")


def read_nete(args):
    """The dumps that the paper's Movies and Yelp are (from NETE, Li et al., 2020).

    reviews.pickle: list of {user, item, rating, template: (feature, adjective, sentence, sentiment)};
    item.json: list (or lines) of {item, title or name, categories, …}; N/train.index, …: row numbers.
    """
    path = args.raw / "reviews.pickle"
    try:
        with open(path, "rb") as file:
            reviews = SafeUnpickler(file).load()
        rows = [(str(review["user"]), str(review["item"]), float(review["rating"]),
                 (review.get("template") or (None,) * 3)[2] or review.get("text")) for review in reviews]
        path = args.raw / "item.json"
        text = path.read_bytes()
        records = json.loads(text) if text.lstrip().startswith(b"[") else map(parse_line, text.splitlines())
        items = pd.DataFrame([_nete_item(record) for record in records])
    except FileNotFoundError:
        fail(f"{path} is missing: --raw must be the folder that holds it")
    except pickle.UnpicklingError as error:
        fail(f"{path} is refused: {error}")
    except Exception as error:  # a broken pickle raises nearly anything
        fail(f"{path} is cut off or is not what NETE published ({type(error).__name__}: {error}): download "
             f"it again")
    interactions = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "review"])
    interactions["timestamp"] = 0  # the dumps have none
    if args.split == "published":
        interactions["split"] = _published_split(args.raw / str(args.fold), len(interactions))
    return interactions, items, pd.DataFrame({"user_id": interactions["user_id"].unique()})


def _nete_item(record):
    """An item of item.json, whose fields differ from dump to dump."""
    if "attributes" in record or "business_id" in record:
        return _yelp_item({**record, "business_id": str(record["item"])})
    return {"item_id": str(record["item"]), "title": record.get("title") or record.get("name"),
            "brand": record.get("brand"), "price": record.get("price"),
            "category": deepest_category(record.get("categories") or record.get("category"))}


def _published_split(folder, num_rows):
    """Row numbers in train.index, validation.index, test.index -> split per row, None where none has it."""
    split = np.full(num_rows, None, dtype=object)
    for name in ("train", "validation", "test"):
        path = folder / f"{name}.index"
        try:
            rows = np.array(path.read_text().split(), dtype="int64")
        except FileNotFoundError:
            fail(f"{path} is missing: choose another --fold, or --split random")
        except (OSError, ValueError, OverflowError) as error:
            fail(f"{path} is no list of row numbers ({error}): download it again")
        if not len(rows) or rows.min() < 0 or rows.max() >= num_rows or any(split[rows]):
            fail(f"{path} does not fit reviews.pickle with its {num_rows:,} reviews: it must hold numbers "
                 f"below {num_rows:,} that are in no other index file")
        split[rows] = "valid" if name == "validation" else name
    return split
