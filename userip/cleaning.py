"""Cleaning: titles, prices, categories and times as data sets publish them -> plain text and numbers."""

import html
import re
from itertools import takewhile

import numpy as np
import pandas as pd

TAG = re.compile(  # also one that was cut short
    r"<(?:!--|/?(?:a|b|big|br|center|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|script|small|span|strong|"
    r"style|sub|sup|table|tbody|td|th|tr|u|ul)\b)[^<>]*(?:>|$)", re.I)
SCRIPT = re.compile(r"getTime\(|function ?\(|[.#][\w-]+ ?\{|\{[^{}]*:[^{}]*\}")  # of the page, not a title
AMOUNT = re.compile(r"\$?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")
PRICE = re.compile(rf"\s*(?:from\s+)?{AMOUNT.pattern}\s*(?:[-–—]\s*{AMOUNT.pattern}\s*)?", re.I)
NO_NAME = re.compile(r"[<{%]|[.!?:;]$|.{51}")  # features and slogans in Amazon 2018's category paths
NOT_INFORMATIVE = re.compile(r"(all|general|other|more|misc\w*)( \w+)?", re.I)


def clean(text):
    """Published text -> one line without HTML entities, tags, scripts and half surrogate pairs; else ""."""
    if not isinstance(text, str):
        return ""
    text, before = text.encode("utf-8", "ignore").decode(), None
    while text != before:  # entities may be escaped twice, tags may hide in entities
        before, text = text, TAG.sub(" ", html.unescape(text))
    return "" if SCRIPT.search(text) else " ".join(text.split())


def to_price(text):
    """12.99, "$1,012.99", "$5 - $9" (its lower end), "from $5" -> dollars; anything else -> nan"""
    match = PRICE.fullmatch(str(text))
    return min(float(part.replace(",", "")) for part in match.groups() if part) if match else float("nan")


def to_seconds(times):
    """Times -> int64 seconds; numbers beyond 1e11 (the year 5138) are read as milliseconds."""
    times = np.asarray(times, dtype="float64")
    return np.where(np.abs(times) > 1e11, times // 1000, times).astype("int64")


def deepest_category(paths):
    """A category, a path of categories or a list of paths -> last informative name of the longest path."""
    paths = paths if isinstance(paths, list) else [paths]
    paths = paths if any(isinstance(path, list) for path in paths) else [paths]
    is_name = lambda part: isinstance(part, str) and part.strip() and not NO_NAME.search(part.strip())
    longest = []
    for path in paths:
        names = [*map(clean, takewhile(is_name, path if isinstance(path, list) else [path]))]
        while len(names) > 1 and NOT_INFORMATIVE.fullmatch(names[-1]):
            names.pop()
        longest = max(longest, names, key=len)
    return longest[-1] if longest else ""


def clean_items(items):
    """Items with item, item_id, title, maybe category, brand, price -> these columns as plain text and
    dollars; number of items without a title, whose id replaces it; number of prices that are no numbers.
    """
    items = items.reindex(columns=["item", "item_id", "title", "category", "brand", "price"])
    has_price = items["price"].notna() & (items["price"] != "")
    for name in ("title", "category", "brand"):
        items[name] = pd.array([clean(text) or None for text in items[name]], dtype="str")
    items["price"] = np.array([to_price(price) for price in items["price"]], dtype="float64")
    num_untitled, num_junk = items["title"].isna().sum(), (has_price & items["price"].isna()).sum()
    items["title"] = items["title"].fillna(items["item_id"])
    return items, int(num_untitled), int(num_junk)
