"""Stage 1's readers, on small files in the published formats, and what becomes of damage, strangers,
downloads.
"""

import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest

from conftest import (prepare, run_stage, write_amazon, write_ml_1m, write_ml_100k, write_nete,
                      write_table, write_yelp)


def read(folder, dataset, *options, ok=True):
    """Run stage 1 on folder/raw; interactions (with user_id, item_id), items by item_id, users, what it
    printed.
    """
    run = folder / ("run" if ok else "refused")
    printed = run_stage("01_prepare.py", "--dataset", dataset, "--raw", folder / "raw", "--run-dir", run,
                        *options, ok=ok)
    if not ok:
        assert not list(run.glob("*")) if run.exists() else True
        return printed
    table, items, users = (pd.read_parquet(run / f"{name}.parquet")
                           for name in ("interactions", "items", "users"))
    table = table.assign(user_id=users["user_id"].to_numpy()[table["user"]],
                         item_id=items["item_id"].to_numpy()[table["item"]])
    return table, items.set_index("item_id"), users.set_index("user_id"), printed


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_of_every_year(tmp_path, year, suffix):
    reviews = write_amazon(tmp_path / "raw", year, suffix)
    table, items, _, printed = read(tmp_path, "games")
    assert ("Amazon 2023" if year == 2023 else "Amazon 2014 or 2018") in printed
    assert items["title"].tolist() == ["Tom & Jerry's Game", 'Pokémon "Gold"', "B002", "B003", "I <3 Tetris",
                                       "B005", "Quest 6", "Quest 7", "Quest 8"]
    assert items["price"].tolist() == pytest.approx([12.99, 5.99, np.nan, np.nan, 1012.5, np.nan, 9.5, 9.5,
                                                     9.5], nan_ok=True)
    # what is left of an item without a path of its own
    first = {2014: "Home", 2018: None, 2023: "Games"}[year]
    category = items["category"].astype(object).where(items["category"].notna(), None).tolist()
    assert category == ["Strategy", first, "Games", "PC & Mac", "Toys", *["Games"] * 4]
    assert items["brand"].isna().tolist() == [item % 2 == 0 for item in range(9)]
    assert set(items["brand"].dropna()) == {"Åcme"}
    facts = json.loads((tmp_path / "run/prepare.json").read_text())
    assert facts["untitled_items"] == 3 and facts["items_listed_twice"] == 1 and facts["junk_prices"] == 2
    if year == 2023:
        first, row = reviews[0], table.set_index(["user_id", "item_id"])
        row = row.loc[(first["user_id"], first["parent_asin"])]
        assert row["timestamp"] == first["timestamp"] // 1000 and facts["duplicates"] == 0
    else:
        row = table.set_index(["user_id", "item_id"]).loc[(reviews[0]["reviewerID"], reviews[0]["asin"])]
        assert row["rating"] == 1 and row["timestamp"] == 1_500_000_000  # the later of the two
        assert facts["duplicates"] == 1 and table["review"].isna().sum() == 1
    assert row["review"] == 'She said "it\'s naïve" 0'
    assert len(table) == facts["interactions"] == len(reviews) - facts["duplicates"]


def test_files_are_told_apart_by_their_content(tmp_path):
    write_amazon(tmp_path / "raw", 2018)
    for number, path in enumerate(sorted((tmp_path / "raw").iterdir())):
        path.rename(tmp_path / "raw" / f"download({number})")
    (tmp_path / "raw/README").write_text("not data")
    table, items, _, printed = read(tmp_path, "games")
    assert len(items) == 9 and len(table) > 60
    assert "reading" in printed and "download(" in printed


def test_of_several_categories_the_one_asked_for_is_read(tmp_path):
    write_amazon(tmp_path / "raw", 2014)
    write_amazon(tmp_path / "raw", 2014, category="Digital_Music", oddities=False)
    assert "reviews_Video_Games_5" in read(tmp_path, "games")[-1]
    assert "reviews_Digital_Music_5" in read(tmp_path, "amazon", "--category", "Digital_Music")[-1]
    refused = read(tmp_path, "amazon", ok=False)
    assert "--category" in refused


def test_a_folder_of_another_category_is_refused(tmp_path):
    write_amazon(tmp_path / "raw", 2014)
    assert "named as category Video_Games" in read(tmp_path, "movies", ok=False)
    assert "Video_Games" in read(tmp_path, "amazon", "--category", "Toys", ok=False)
    read(tmp_path, "amazon", "--category", "video_games")


def test_items_of_another_data_set_are_refused_and_few_titles_told(tmp_path):
    write_amazon(tmp_path / "raw", 2018, suffix="")
    path = tmp_path / "raw/meta_Video_Games.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")
    assert "7 of 9 items have no title" in read(tmp_path, "games")[-1]
    told = json.loads((tmp_path / "run/prepare.json").read_text())
    assert any("have no title" in warning for warning in told["warnings"])
    path.write_text(path.read_text().replace("B0", "C0"))
    assert "not one of the 9 items" in read(tmp_path, "games", ok=False)


@pytest.mark.parametrize("content, cause", [(b"", "empty"), (b'[{"asin": "B"}]', "a JSON array"),
                                            (b"<html>", "HTML"),
                                            (b'{"x": 1}', "other records"), (b"\x1f\x8b\x08", "unreadable")])
def test_what_is_wrong_with_an_unknown_file_is_said(tmp_path, content, cause):
    write_amazon(tmp_path / "raw", 2018, suffix="")
    (tmp_path / "raw/Video_Games_5.json").write_bytes(content)
    assert f"Video_Games_5.json ({cause}" in read(tmp_path, "games", ok=False)


def test_a_movielens_file_that_is_half_is_told(tmp_path):
    write_ml_100k(tmp_path / "raw")
    (tmp_path / "raw/u.info").write_text("30 users\n25 items\n720 ratings\n")
    assert "is it whole?" in read(tmp_path, "ml-100k")[-1]


def test_cold_users_without_support_are_told(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions.groupby("user_id").head(1).to_csv(tmp_path / "raw/interactions.csv", index=False)
    printed = read(tmp_path, "table", "--split", "cold-user", "--min-interactions", 1)[-1]
    assert "6 of 6 cold users have one interaction" in printed


def test_a_folder_of_another_format_is_named(tmp_path):
    write_yelp(tmp_path / "raw")
    line = read(tmp_path, "games", ok=False)
    assert "no reviews in the format Amazon" in line and "yelp_academic_dataset_review.json" in line
    assert "holds no items" in refuse_without(tmp_path, "yelp_academic_dataset_business.json", "yelp")


def refuse_without(folder, name, dataset):
    (folder / "raw" / name).unlink()
    return read(folder, dataset, ok=False)


@pytest.mark.parametrize("with_time", [True, False])
def test_yelp_of_both_editions(tmp_path, with_time):
    write_yelp(tmp_path / "raw", with_time)
    table, items, users, _ = read(tmp_path, "yelp")
    assert items.loc["b0", "title"] == "Café & Co 0"
    assert items["category"].fillna("-").tolist()[:5] == ["Bubble Tea", "-", "Restaurants", "Shopping",
                                                          "Pubs"]
    assert items["price"].tolist()[:5] == pytest.approx([np.nan, 2, 3, np.nan, 1], nan_ok=True)
    assert users["fans"].tolist() == [int(user[1:]) for user in users.index]
    assert "average_stars" not in users  # it is made of the ratings that the models shall foretell
    at = pd.Timestamp("2018-07-02" + (" 22:09:11" if with_time else "")).timestamp()
    assert set(table.loc[table["user_id"] == "u1", "timestamp"]) == {at}
    assert table["review"].iloc[0] == "Délicieux!\nagain"


def test_a_yelp_folder_without_users_is_read(tmp_path):
    write_yelp(tmp_path / "raw", users=False)
    assert len(read(tmp_path, "yelp")[2]) == 12


def test_the_published_split_of_nete_is_kept_as_it_is(tmp_path):
    """Nothing is dropped: neither rare users nor pairs that stand there twice; 441,783 rows would stay so."""
    reviews = write_nete(tmp_path / "raw")
    for fold in (1, 2):
        table, items, users, printed = read(tmp_path, "nete", "--fold", fold)
        facts = json.loads((tmp_path / "run/prepare.json").read_text())
        assert facts["interactions"] == len(table) == len(reviews) and facts["split_seed"] == fold
        assert facts["users"] == len(users) == len({review["user"] for review in reviews})
        assert facts["items"] == len(items) == len({review["item"] for review in reviews})
        key = ["user_id", "item_id", "review"]
        for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
            index = map(int, (tmp_path / f"raw/{fold}/{theirs}.index").read_text().split())
            expected = sorted((reviews[i]["user"], reviews[i]["item"], reviews[i]["template"][2])
                              for i in index)
            assert sorted(map(tuple, table.loc[table["split"] == ours, key].to_numpy())) == expected
    assert items["title"].iloc[0] == "Film & 0" and items["category"].iloc[0] == "Drama"
    assert "1 rows repeat a (user, item)" in printed
    filtered, *_ = read(tmp_path, "nete", "--split", "random")
    assert "rare" not in set(filtered["user_id"]) and len(filtered) < len(reviews)
    assert "same time" in read(tmp_path, "nete", "--split", "temporal", ok=False)


def test_rows_in_no_index_are_dropped_and_counted(tmp_path):
    reviews = write_nete(tmp_path / "raw")
    path = tmp_path / "raw/1/train.index"
    path.write_text(" ".join(path.read_text().split()[3:]))
    table, *_ = read(tmp_path, "nete")
    assert len(table) == len(reviews) - 3
    assert json.loads((tmp_path / "run/prepare.json").read_text())["not_in_split"] == 3


@pytest.mark.parametrize("content, complaint", [
    ("0 1 999999", "does not fit"), ("-1 2", "does not fit"), ("", "is empty"),
    ("a b", "no list of row numbers"), ("99999999999999999999999", "no list of row numbers")])
def test_an_index_that_does_not_fit_is_refused(tmp_path, content, complaint):
    write_nete(tmp_path / "raw")
    (tmp_path / "raw/1/test.index").write_text(content)
    assert complaint in read(tmp_path, "nete", ok=False)


def test_rows_of_two_index_files_are_refused(tmp_path):
    write_nete(tmp_path / "raw")
    train = (tmp_path / "raw/1/train.index").read_text()
    (tmp_path / "raw/1/test.index").write_text(train.split()[0])
    assert "in no other index file" in read(tmp_path, "nete", ok=False)
    assert "--fold" in read(tmp_path, "nete", "--fold", 3, ok=False)


class Harmful:
    """What a stranger's pickle may hold: a call that runs while it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function, name", [(os.mkdir, r"posix\.mkdir"), (np.float64, "numpy"),
                                            (eval, r"builtin(s|__)\.eval"),
                                            (getattr, r"builtin(s|__)\.getattr")])
def test_a_pickle_that_asks_for_more_than_containers_is_refused_by_name(tmp_path, function, name):
    reviews = write_nete(tmp_path / "raw")
    made = tmp_path / "made"
    arguments = {os.mkdir: [str(made)], eval: [f"__import__('os').mkdir({str(made)!r})"],
                 getattr: [made, "mkdir"], np.float64: [4.0]}[function]
    for protocol in (0, 2, 5):
        content = pickle.dumps([*reviews, Harmful(function, *arguments)], protocol)
        (tmp_path / "raw/reviews.pickle").write_bytes(content)
        assert re.search(f"it asks for .*{name}", read(tmp_path, "nete", ok=False))
        assert not made.exists()


def test_plain_containers_of_either_python_are_read(tmp_path):
    reviews = write_nete(tmp_path / "raw")
    reviews[0]["more"] = {"a set": {1, 2}, "bytes": bytearray(b"x"), "complex": 1j, "frozen": frozenset("ab")}
    for protocol in (3, 5):
        (tmp_path / "raw/reviews.pickle").write_bytes(pickle.dumps(reviews, protocol))
        assert len(read(tmp_path, "nete")[0]) == len(reviews)
    reviews[0]["more"] = {"a set": {1, 2}}
    (tmp_path / "raw/reviews.pickle").write_bytes(pickle.dumps(reviews, 2))
    assert len(read(tmp_path, "nete")[0]) == len(reviews)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1}),
                                     pickle.dumps([{"user": "u"}]), pickle.dumps(["x" * 1000])[:500]])
def test_a_broken_dump_is_refused_in_one_line(tmp_path, content):
    write_nete(tmp_path / "raw")
    (tmp_path / "raw/reviews.pickle").write_bytes(content)
    assert "reviews.pickle" in read(tmp_path, "nete", ok=False)


def test_movielens_1m_as_published(tmp_path):
    write_ml_1m(tmp_path / "raw/ml-1m")  # as the archive unpacks
    table, items, users, _ = read(tmp_path, "ml-1m")
    assert len(table) == 160 and items.loc["3", "title"] == "Amélie: Part 2 (2001)"
    assert items.loc["3", "category"] == "Comedy, Film-Noir"
    assert users.loc["2", ["gender", "age"]].tolist() == ["F", 18]
    path = tmp_path / "raw/ml-1m/ratings.dat"
    path.write_text(path.read_text() + "1::2\n")
    assert "without 4 columns" in read(tmp_path, "ml-1m", ok=False)


def test_tables_with_tabs_and_other_names(tmp_path):
    interactions, items = write_table(tmp_path / "raw", suffix=".csv")
    theirs = {"user_id": "reviewer", "rating": "stars", "timestamp": "when"}
    (tmp_path / "raw/interactions.csv").unlink()
    interactions["timestamp"] *= 1000  # milliseconds are told by their size
    interactions.rename(columns=theirs).to_csv(tmp_path / "raw/interactions.tsv.gz", index=False, sep="\t")
    (tmp_path / "raw/items.csv").unlink()
    items.rename(columns={"title": "name"}).to_parquet(tmp_path / "raw/items.parquet")
    columns = [f"{ours}={name}" for ours, name in {**theirs, "title": "name"}.items()]
    table, stored, *_ = read(tmp_path, "table", "--columns", *columns)
    assert len(table) == 60 * 14 and stored.loc["i000", "title"] == "red racer 0"
    assert table["timestamp"].between(1_500_000_000, 1_500_001_000).all()
    assert "no file has a column nowhere" in read(tmp_path, "table", "--columns", *columns, "brand=nowhere",
                                                  ok=False)
    assert "has a column item_id, too" in read(tmp_path, "table", "--columns", "item_id=reviewer", ok=False)
    (tmp_path / "raw/items.csv").write_text("item_id,title\n")
    assert "leave one of them" in read(tmp_path, "table", "--columns", *columns, ok=False)
    assert "none of our columns" in read(tmp_path, "table", "--columns", "stars=rating", ok=False)


def test_a_table_with_a_split_of_its_own(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions["split"] = np.resize(["train"] * 8 + ["validation", "test"], len(interactions))
    interactions.to_csv(tmp_path / "raw/interactions.csv", index=False)
    table, *_ = read(tmp_path, "table", "--split", "published")
    assert table["split"].value_counts().to_dict() == {"train": 672, "valid": 84, "test": 84}
    interactions.assign(split="half").to_csv(tmp_path / "raw/interactions.csv", index=False)
    assert "half is no split" in read(tmp_path, "table", "--split", "published", ok=False)


# --- cleaning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published, price", [
    ("$12.99", 12.99), (12.99, 12.99), ("12", 12), ("$1,299.00", 1299), ("$5.99 - $12.49", 5.99),
    ("$.99", 0.99), ("$20–$10", 10), ("from 12.99", 12.99), ("From $3 - $4", 3), (" $7 ", 7), ("", None),
    (None, None), ("—", None), ("12,99", None), ("-5", None), ("$5 off", None), (float("nan"), None),
    ("1e400", None), ({"a": 1}, None), (True, None), ("£4", None), ("Too low to display", None)])
def test_prices_become_numbers_and_junk_is_missing(published, price):
    found = prepare.price_of(published)
    assert np.isnan(found) if price is None else found == pytest.approx(price)


@pytest.mark.parametrize("published, title", [
    ("Rock &amp; Roll", "Rock & Roll"), ("AT&amp;amp;T", "AT&T"), ("a<br>b", "a b"),
    ("<b>Bold</b> move", "Bold move"), ("&lt;i&gt;x&lt;/i&gt;", "x"), ("5 < 6 > 4", "5 < 6 > 4"),
    ("x<y and 3>2", "x<y and 3>2"),
    (" a\n\t b ", "a b"), ("caf\u00e9\u00a0noir", "café noir"), ("half \ud83d pair", "half pair"),
    ("<span class=", ""), ("x function(){ y }", ""), (None, ""), (3, "")])
def test_titles_are_plain_text(published, title):
    assert prepare.clean(published) == title == prepare.clean(title)


@pytest.mark.parametrize("published, category", [
    (["Games", "PC", "Strategy"], "Strategy"), ([["A", "B"], ["A", "C", "D"], ["E", "F", "G"]], "D"),
    ([], ""), (None, ""), ("Books", "Books"), (["Movies & TV", "Studio", "All Titles"], "Studio"),
    (["All Beauty"], "All Beauty"), (["Gift Cards", "Gift Cards", "No expiration, no fees."], "Gift Cards"),
    (["Women", "</span></span>"], "Women"), (["Clothing", "Tops", "100% Cotton", "Imported"], "Tops"),
    (["Travel, City &amp; Regional"], "Travel, City & Regional"), ([None, "x"], ""), ([["A"], "B"], "A")])
def test_the_deepest_informative_category(published, category):
    assert prepare.deepest(published) == category


# --- damage ---------------------------------------------------------------------------------------------


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
    table, _, _, printed = read(tmp_path, "games", "--max-bad", "20%")
    assert len(table) == num_good
    assert f"{len(bad) - 1} of {num_good + len(bad) - 1} lines are bad" in printed  # the empty line is none
    for kind in ("2 × Object missing required field `overall` (first: line 5)",
                 "field `reviewerID` (first: line 6)", "field `asin` (first: line 7)",
                 "field `unixReviewTime` (first: line 8)", "1 × not UTF-8 (first: line 9)",
                 "got `str` - at `$.overall` (first: line 10)", "JSON is malformed",
                 "length >= 1 - at `$.asin`"):
        assert kind in printed, kind
    line = read(tmp_path, "games", ok=False)
    assert "--max-bad 1.000%" in line and f"{len(bad) - 1} of" in line


def test_one_bad_line_in_a_hundred_is_the_limit(tmp_path):
    num_good = damaged(tmp_path, lambda lines: lines)
    path = tmp_path / "raw/Video_Games_5.json"
    good = path.read_bytes()
    share = 1 / (num_good + 1)
    path.write_bytes(good + b"broken\n")
    assert "1 of" in read(tmp_path, "games", "--max-bad", share)[-1]
    assert "--max-bad" in read(tmp_path, "games", "--max-bad", 0.99 * share, ok=False)
    assert "--max-bad" in read(tmp_path, "games", "--max-bad", 0, ok=False)


def test_half_a_surrogate_pair_costs_no_review_and_no_item(tmp_path):
    """As Amazon's files hold them: escapes that stand for no character, which arrow and UTF-8 refuse."""
    write_amazon(tmp_path / "raw", 2018, suffix="", oddities=False)
    changed = {"Video_Games_5.json": (b"She said", b"She \\ud83d said \\ud83d\\ude00"),
               "meta_Video_Games.json": (b"Quest 6", b"Quest \\udc00 6")}
    for name, (old, new) in changed.items():
        path = tmp_path / "raw" / name
        path.write_bytes(path.read_bytes().replace(old, new))
    table, items, _, printed = read(tmp_path, "games", "--max-bad", 0)
    assert "are bad" not in printed and items.loc["B006", "title"] == "Quest ? 6"
    assert table["review"].str.startswith("She ? said 😀").all()


def test_a_file_of_another_encoding_is_refused(tmp_path):
    damaged(tmp_path, lambda lines: lines)
    path = tmp_path / "raw/Video_Games_5.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert "no reviews in the format" in read(tmp_path, "games", ok=False)


def test_a_byte_order_mark_and_windows_lines_are_no_damage(tmp_path):
    num_good = damaged(tmp_path, lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]])
    path = tmp_path / "raw/Video_Games_5.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    table, _, _, printed = read(tmp_path, "games", "--max-bad", 0)
    assert len(table) == num_good and "are bad" not in printed


def test_of_a_truncated_file_the_whole_lines_are_used(tmp_path):
    write_amazon(tmp_path / "raw", 2018, oddities=False)
    path = tmp_path / "raw/Video_Games_5.json.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    cut = gzip.compress(b"".join(lines), compresslevel=0)  # stored: what is cut off is known to the byte
    path.write_bytes(cut[:10 + 5 + len(b"".join(lines[:60])) + 20])
    table, _, _, printed = read(tmp_path, "games", "--min-interactions", 1)
    assert printed.count("warning:") == 1
    assert re.search(r"Video_Games_5.json.gz is truncated: the 60 whole lines", printed)
    assert len(table) == 60 and "are bad" not in printed
    assert "truncated after 60 whole lines" in read(tmp_path, "games", "--strict", ok=False)


def test_of_a_damaged_file_the_lines_before_are_used(tmp_path):
    write_amazon(tmp_path / "raw", 2018, oddities=False)
    path = tmp_path / "raw/Video_Games_5.json.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    half = gzip.compress(b"".join(lines[:70]))
    path.write_bytes(half + gzip.compress(b"".join(lines[70:]))[:12] + b"\xff" * 50)
    table, _, _, printed = read(tmp_path, "games", "--min-interactions", 1)
    assert len(table) == 70 and "is damaged" in printed


@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 25])
def test_pieces_join_to_the_whole_however_they_are_cut(tmp_path, size):
    content = bytes(range(256)) * 40
    files = {"plain": content, "gz": gzip.compress(content), "padded": gzip.compress(content) + b"\0" * 600,
             "members": gzip.compress(content[:5000]) + b"" + gzip.compress(content[5000:]), "empty": b""}
    for name, stored in files.items():
        (tmp_path / name).write_bytes(stored)
        with open(tmp_path / name, "rb") as file:
            assert b"".join(prepare.pieces_of(file, size)) == (content if stored else b""), name


@pytest.mark.parametrize("size", [1, 10, 64, 10_000])
def test_blocks_hold_whole_lines_with_their_numbers(tmp_path, monkeypatch, size):
    lines = [b"line %d" % number * (number % 5) for number in range(1, 60)]
    pieces_of = prepare.pieces_of
    monkeypatch.setattr(prepare, "pieces_of", lambda file: pieces_of(file, size))
    args = prepare.parse_args([])
    for ending in (b"", b"\n"):
        (tmp_path / "lines").write_bytes(b"\n".join(lines) + ending)
        found = {}
        for number, block in prepare.blocks_of(tmp_path / "lines", args):
            found |= dict(enumerate(block.split(b"\n"), number))
        assert found == dict(enumerate(lines, 1))


# --- download -------------------------------------------------------------------------------------------


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Serves `files`; drops the connection after `drop` bytes of an answer, as often as `drops` says."""

    files, drop, drops, requests, ranges, changed = {}, 200, 0, [], True, False

    def do_GET(self):
        content = self.files.get(self.path)
        if content is None:
            return self.send_error(404)
        if self.changed and "If-Unmodified-Since" in self.headers:
            return self.send_error(412)
        asked = self.headers.get("Range")
        type(self).requests.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.ranges else 0
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.drops:
            type(self).drops -= 1
            self.wfile.write(content[start:start + self.drop])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare, "PATIENCE", 0.0)
    handler = type("Handler", (Unreliable,), {"requests": [], "files": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


def offer_amazon(server, folder):
    write_amazon(folder / "there", 2014)
    server.files = {f"/{path.name}": path.read_bytes() for path in (folder / "there").iterdir()}


def test_a_download_goes_on_where_the_connection_was_dropped(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.drops = 2
    read(tmp_path, "games", "--download", server.url)
    assert server.requests[:3] == [None, "bytes=200-", "bytes=400-"]
    for name, content in server.files.items():
        assert (tmp_path / f"raw{name}").read_bytes() == content
    assert not list((tmp_path / "raw").glob("*.part"))
    before = len(server.requests)
    assert "is there already" in read(tmp_path, "games", "--download", server.url)[-1]
    assert len(server.requests) == before


def test_a_later_run_goes_on_with_what_an_earlier_one_got(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.drops, server.drop = 5, 100
    line = read(tmp_path, "games", "--download", server.url, ok=False)
    part = tmp_path / "raw/reviews_Video_Games_5.json.gz.part"
    assert "500 of" in line and str(part) in line and part.stat().st_size == 500
    read(tmp_path, "games", "--download", server.url)
    assert server.requests[5] == "bytes=500-"
    assert ((tmp_path / "raw/reviews_Video_Games_5.json.gz").read_bytes()
            == server.files["/reviews_Video_Games_5.json.gz"])


def test_a_server_that_cannot_resume_sends_all_again(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.drops, server.ranges = 1, False
    read(tmp_path, "games", "--download", server.url)
    assert ((tmp_path / "raw/reviews_Video_Games_5.json.gz").read_bytes()
            == server.files["/reviews_Video_Games_5.json.gz"])


def test_a_part_of_a_file_that_has_changed_since_is_thrown_away(tmp_path, server):
    offer_amazon(server, tmp_path)
    server.changed = True
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/reviews_Video_Games_5.json.gz.part").write_bytes(b"of an older version")
    read(tmp_path, "games", "--download", server.url)
    name = "reviews_Video_Games_5.json.gz"
    assert (tmp_path / "raw" / name).read_bytes() == server.files[f"/{name}"]


def test_a_part_that_is_larger_than_the_file_is_thrown_away(tmp_path, server):
    offer_amazon(server, tmp_path)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/reviews_Video_Games_5.json.gz.part").write_bytes(b"x" * 100_000)
    read(tmp_path, "games", "--download", server.url)


def test_what_the_server_lacks_and_where_there_is_no_server(tmp_path, server):
    assert "404" in read(tmp_path, "amazon", "--category", "Nothing", "--download", server.url, ok=False)
    for url in ("http://127.0.0.1:9", "not-a-url"):
        assert "cannot be fetched" in read(tmp_path, "games", "--download", url, ok=False)
    server.files = {"/reviews_Video_Games_5.json.gz": b"<html>come back later</html>"}
    assert "is no gzip file" in read(tmp_path, "games", "--download", server.url, ok=False)
    (tmp_path / "file").write_text("")
    options = "--raw", tmp_path / "file", "--run-dir", tmp_path / "refused", "--download", server.url
    assert "cannot be made" in run_stage("01_prepare.py", "--dataset", "games", *options, ok=False)


def test_an_archive_is_checked_by_its_digest_and_unpacked(tmp_path, server, monkeypatch):
    write_ml_100k(tmp_path / "there/ml-100k")
    with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
        for path in (tmp_path / "there/ml-100k").iterdir():
            archive.write(path, f"ml-100k/{path.name}")
    content = (tmp_path / "ml-100k.zip").read_bytes()
    server.files, server.drops = {"/ml-100k.zip": content}, 1
    line = read(tmp_path, "ml-100k", "--download", server.url, ok=False)
    assert "digest" in line and not list((tmp_path / "raw").iterdir())
    monkeypatch.setitem(prepare.ARCHIVES, "ml-100k", hashlib.md5(content).hexdigest())
    table, *_ = read(tmp_path, "ml-100k", "--download", server.url)
    assert len(table) == 360 and (tmp_path / "raw/ml-100k/u.item").exists()
    (tmp_path / "raw/ml-100k.zip").unlink()
    before = len(server.requests)
    read(tmp_path, "ml-100k", "--download", server.url)  # what is unpacked there is not fetched again
    assert len(server.requests) == before


# --- options that would change nothing ------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    ["--dataset", "table", "--strict"], ["--dataset", "games", "--category", "Books"],
    ["--dataset", "nete", "--columns", "a=b"], ["--dataset", "yelp", "--download"],
    ["--dataset", "amazon", "--download"], ["--dataset", "ml-1m", "--split", "published"],
    ["--dataset", "nete", "--min-interactions", "5"], ["--dataset", "nete", "--ensure-train"],
    ["--dataset", "games", "--split", "cold-user", "--ensure-train"], ["--dataset", "games", "--fold", "2"],
    ["--dataset", "nete", "--split", "random", "--fold", "2"], ["--dataset", "games", "--max-bad", "5"],
    ["--dataset", "games", "--max-bad", "101%"], ["--dataset", "games", "--max-bad", "nan"]])
def test_options_that_mean_nothing_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse_args([*options, "--raw", "x"])
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
