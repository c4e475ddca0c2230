"""Cleaning: titles, prices, categories and times as data sets publish them -> plain text and numbers."""

import ast
import contextlib
import html
import json
import re
from itertools import takewhile

import numpy as np
import pandas as pd

TAG = re.compile(  # a comment, a tag, with attributes, also one that was cut short; no "<a cappella>"
    r"<(?:!--[^<>]*|/?(?:a|b|big|br|center|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|script|small|span|"
    r"strong|style|sub|sup|table|tbody|td|th|tr|u|ul)(?:\s[^<>]*=[^<>]*)?\s*/?)(?:>|$)", re.I)
SCRIPT = re.compile(  # of the page, not a title: no "Form & function (2nd edition)", no "{a: b}"
    r"\.getTime\(|\bfunction ?\([\w, ]*\) ?\{|[.#][a-z][\w-]* ?\{[a-z-]+:\S", re.I)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
AMOUNT = re.compile(r"\$?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
PRICE = re.compile(rf"\s*(?:from\s+)?{AMOUNT.pattern}\s*(?:[-–—]\s*{AMOUNT.pattern}\s*)?", re.I)
NO_NAME = re.compile(r"[<{%]|[.!?:;]$|.{51}")  # features and slogans in Amazon 2018's category paths
LIST_TEXT = re.compile(  # a list as csv files hold it, in JSON, Python, numpy or a database; or half of one
    r"""\s*(?:[\[{].*[\]}]|\(\s*['"].*\))\s*|.*\[\s*['"].*""", re.S)
NOT_INFORMATIVE = re.compile(r"(all|general|other|more|misc\w*)( \w+)?", re.I)


def to_text(value):
    """A published title, brand or category as text, also where it is a number or a list of one; else None"""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15:
        return f"{value:.15g}"  # a title such as 1984; not nan
    return value if isinstance(value, str) else None


def odd_part(value):
    """A value that is neither missing nor text nor a number, such as true or {"a": 1}; any other -> None"""
    is_odd = value not in (None, "", [], {}) and value == value and to_text(value) is None
    return value if is_odd else None


def clean(text):
    """Published text -> one line without HTML entities, tags, scripts and half surrogate pairs; else ""."""
    text, before = (to_text(text) or "").encode("utf-8", "ignore").decode(), None
    while text != before:  # entities may be escaped twice, tags may hide in entities
        before, text = text, TAG.sub(" ", html.unescape(text))
    return "" if SCRIPT.search(text) else " ".join(CONTROL.sub(" ", text).split())


def to_price(text):
    """12.99, "$1,012.99", "$5 - $9" (its lower end), "from $5" -> dollars; anything else -> nan"""
    match = PRICE.fullmatch(str(text))
    return min(float(part.replace(",", "")) for part in match.groups() if part) if match else float("nan")


def to_seconds(times):
    """Times -> int64 seconds: beyond 1e11 (the year 5138) they are milli-, beyond 1e14 micro-, beyond 1e17
    nanoseconds.
    """
    times = np.asarray(times, dtype="float64")
    units = np.array([1, 1e3, 1e6, 1e9])[np.searchsorted([1e11, 1e14, 1e17], np.abs(times))]
    return (times // units).astype("int64")


def deepest_category(paths):
    """A category, a path of categories or a list of paths -> last informative name of the longest path."""
    paths = paths if isinstance(paths, list) else [paths]
    paths = paths if any(isinstance(path, list) for path in paths) else [paths]
    paths = [[to_text(part) for part in path if part is not None] if isinstance(path, list) else path
             for path in paths]
    is_name = lambda part: isinstance(part, str) and part.strip() and not NO_NAME.search(part.strip())
    longest = []
    for path in paths:
        names = [*map(clean, takewhile(is_name, path if isinstance(path, list) else [path]))]
        while len(names) > 1 and NOT_INFORMATIVE.fullmatch(names[-1]):
            names.pop()
        longest = max(longest, names, key=len)
    return longest[-1] if longest else ""


def read_category(published):
    """A category, also as the text of a list such as '["a", "b"]' -> its deepest informative name, and the
    first part of it that is neither text nor a number (of a list that cannot be read all of it), or None.
    """
    if isinstance(published, str) and LIST_TEXT.fullmatch(published):
        with_commas = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", published)  # numpy prints none
        names = None
        for parse, text in ((ast.literal_eval, with_commas), (json.loads, published)):  # the last one counts
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                names = parse(text)
        if not isinstance(names, (list, tuple)):
            return "", published
        published = [*names]
    parts = [published]
    while any(isinstance(part, list) for part in parts):
        parts = [leaf for part in parts for leaf in (part if isinstance(part, list) else [part])]
    return deepest_category(published), next((part for part in parts if odd_part(part) is not None), None)


def is_no_age(value):
    """Is a value of a column of ages a date, a year or another number above 120, or below 0?"""
    is_date = re.search(r"\d([./-])\d+\1\d|^\s*-\d", str(value))
    return bool(is_date) or any(float(number) > 120 for number in re.findall(r"\d+(?:\.\d+)?", str(value)))


def clean_items(items):
    """Items with item, item_id, title, maybe category, brand, price -> these columns as plain text and
    dollars; how many titles were missing (the id replaces them), how many were cut, with the first before and
    after, and how many prices were no numbers, with the first: dict.
    """
    items = items.reindex(columns=["item", "item_id", "title", "category", "brand", "price"])
    has_price = items["price"].notna() & (items["price"] != "")
    plain = [" ".join(html.unescape(html.unescape(text)).split()) if isinstance(text, str) else ""
             for text in items["title"]]
    for name in ("title", "category", "brand"):
        items[name] = pd.array([clean(text) or None for text in items[name]], dtype="str")
    published = items["price"]
    items["price"] = np.array([to_price(price) for price in published], dtype="float64")
    is_junk = has_price & items["price"].isna()
    counts = {"untitled_items": int(items["title"].isna().sum()), "junk_prices": int(is_junk.sum()),
              "first_junk_price": str(published[is_junk].iloc[0])[:60] if is_junk.any() else None}
    cut = [(before, after) for before, after in zip(plain, items["title"].fillna(""))
           if len(after) < len(before)]
    counts |= {"cut_titles": len(cut), "first_cut_title": cut[0] if cut else None}
    items["title"] = items["title"].fillna(items["item_id"])
    return items, counts
