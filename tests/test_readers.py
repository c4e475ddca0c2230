"""Readers of Amazon, Yelp and NETE, on small files in the published formats."""

import json
import os
import pickle
import re

import numpy as np
import pandas as pd
import pytest

from conftest import read_raw, write_amazon, write_nete, write_yelp


# --- Amazon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_amazon_of_every_year(tmp_path, year, suffix):
    reviews = write_amazon(tmp_path / "raw", year, suffix)
    table, items, _, printed = read_raw(tmp_path, "games")
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
    assert facts["untitled_items"] == 3 and facts["items_listed_twice"] == 1
    assert facts["junk_prices"] == 2 and facts["first_junk_price"] == "Too low to display"
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
    table, items, _, printed = read_raw(tmp_path, "games")
    assert len(items) == 9 and len(table) > 60
    assert "reading" in printed and "download(" in printed


def test_of_several_categories_the_one_asked_for_is_read(tmp_path):
    write_amazon(tmp_path / "raw", 2014)
    write_amazon(tmp_path / "raw", 2014, category="Digital_Music", oddities=False)
    assert "reviews_Video_Games_5" in read_raw(tmp_path, "games")[-1]
    assert "reviews_Digital_Music_5" in read_raw(tmp_path, "amazon", "--category", "Digital_Music")[-1]
    refused = read_raw(tmp_path, "amazon", ok=False)
    assert "--category" in refused


def test_a_folder_of_another_category_is_refused(tmp_path):
    write_amazon(tmp_path / "raw", 2014)
    refused = read_raw(tmp_path, "movies", ok=False)
    assert "of --category Movies_and_TV" in refused
    assert "reviews_Video_Games_5.json.gz (Amazon 2014 or 2018)" in refused
    assert "Video_Games" in read_raw(tmp_path, "amazon", "--category", "Toys", ok=False)
    read_raw(tmp_path, "amazon", "--category", "video_games")


def test_items_of_another_data_set_are_refused_and_few_titles_told(tmp_path):
    write_amazon(tmp_path / "raw", 2018, suffix="")
    path = tmp_path / "raw/meta_Video_Games.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n")
    assert "7 of 9 items have no title" in read_raw(tmp_path, "games")[-1]
    told = json.loads((tmp_path / "run/prepare.json").read_text())
    assert any("have no title" in warning for warning in told["warnings"])
    path.write_text(path.read_text().replace("B0", "C0"))
    assert "not one of the 9 items" in read_raw(tmp_path, "games", ok=False)


@pytest.mark.parametrize("content, cause", [(b"", "empty"), (b'[{"asin": "B"}]', "a JSON array"),
                                            (b"<html>", "HTML"),
                                            (b'{"x": 1}', "other records"), (b"\x1f\x8b\x08", "unreadable")])
def test_what_is_wrong_with_an_unknown_file_is_said(tmp_path, content, cause):
    write_amazon(tmp_path / "raw", 2018, suffix="")
    (tmp_path / "raw/Video_Games_5.json").write_bytes(content)
    assert f"Video_Games_5.json ({cause}" in read_raw(tmp_path, "games", ok=False)


def test_a_folder_of_another_format_is_named(tmp_path):
    write_yelp(tmp_path / "raw")
    line = read_raw(tmp_path, "games", ok=False)
    assert "no reviews in the format Amazon" in line and "yelp_academic_dataset_review.json" in line
    (tmp_path / "raw/yelp_academic_dataset_business.json").unlink()
    assert "holds no items" in read_raw(tmp_path, "yelp", ok=False)


# --- Yelp -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_time", [True, False])
def test_yelp_of_both_editions(tmp_path, with_time):
    write_yelp(tmp_path / "raw", with_time)
    table, items, users, _ = read_raw(tmp_path, "yelp")
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
    assert len(read_raw(tmp_path, "yelp")[2]) == 12


# --- NETE -----------------------------------------------------------------------------------------------


def test_the_published_split_of_nete_is_kept_as_it_is(tmp_path):
    """Nothing is dropped: neither rare users nor pairs that stand there twice; 441,783 rows would stay so."""
    reviews = write_nete(tmp_path / "raw")
    for fold in (1, 2):
        table, items, users, printed = read_raw(tmp_path, "nete", "--fold", fold)
        facts = json.loads((tmp_path / "run/prepare.json").read_text())
        assert facts["interactions"] == len(table) == len(reviews) and facts["split_seed"] == fold
        assert facts["users"] == len(users) == len({review["user"] for review in reviews})
        assert facts["items"] == len(items) == len({review["item"] for review in reviews})
        key = ["user_id", "item_id", "review", "feature"]
        for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
            index = map(int, (tmp_path / f"raw/{fold}/{theirs}.index").read_text().split())
            expected = sorted((reviews[i]["user"], reviews[i]["item"], reviews[i]["template"][2],
                               reviews[i]["template"][0])
                              for i in index)
            assert sorted(map(tuple, table.loc[table["split"] == ours, key].to_numpy())) == expected
    assert items["title"].iloc[0] == "Film & 0" and items["category"].iloc[0] == "Drama"
    assert "1 rows repeat a (user, item)" in printed
    for review in reviews[::3]:
        review.pop("template", None)
    (tmp_path / "raw/reviews.pickle").write_bytes(pickle.dumps(reviews))
    filtered, *_ = read_raw(tmp_path, "nete", "--split", "random")
    assert 0 < filtered["feature"].isna().sum() < len(filtered)
    assert "rare" not in set(filtered["user_id"]) and len(filtered) < len(reviews)
    assert "same time" in read_raw(tmp_path, "nete", "--split", "temporal", ok=False)


def test_rows_in_no_index_are_dropped_and_counted(tmp_path):
    reviews = write_nete(tmp_path / "raw")
    path = tmp_path / "raw/1/train.index"
    path.write_text(" ".join(path.read_text().split()[3:]))
    table, *_ = read_raw(tmp_path, "nete")
    assert len(table) == len(reviews) - 3
    assert json.loads((tmp_path / "run/prepare.json").read_text())["not_in_split"] == 3


@pytest.mark.parametrize("content, complaint", [
    ("0 1 999999", "does not fit"), ("-1 2", "does not fit"), ("", "does not fit"),
    ("a b", "no list of row numbers"), ("99999999999999999999999", "no list of row numbers")])
def test_an_index_that_does_not_fit_is_refused(tmp_path, content, complaint):
    write_nete(tmp_path / "raw")
    (tmp_path / "raw/1/test.index").write_text(content)
    assert complaint in read_raw(tmp_path, "nete", ok=False)


def test_rows_of_two_index_files_are_refused(tmp_path):
    write_nete(tmp_path / "raw")
    train = (tmp_path / "raw/1/train.index").read_text()
    (tmp_path / "raw/1/test.index").write_text(train.split()[0])
    assert "in no other index file" in read_raw(tmp_path, "nete", ok=False)
    assert "--fold" in read_raw(tmp_path, "nete", "--fold", 3, ok=False)


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
        assert re.search(f"it asks for .*{name}", read_raw(tmp_path, "nete", ok=False))
        assert not made.exists()


def test_plain_containers_of_either_python_are_read(tmp_path):
    reviews = write_nete(tmp_path / "raw")
    reviews[0]["more"] = {"nested": [(1, 2.5, None, True), "text"]}
    for protocol in range(6):
        (tmp_path / "raw/reviews.pickle").write_bytes(pickle.dumps(reviews, protocol))
        assert len(read_raw(tmp_path, "nete")[0]) == len(reviews)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 1}),
                                     pickle.dumps([{"user": "u"}]), pickle.dumps(["x" * 1000])[:500]])
def test_a_broken_dump_is_refused_in_one_line(tmp_path, content):
    write_nete(tmp_path / "raw")
    (tmp_path / "raw/reviews.pickle").write_bytes(content)
    assert "reviews.pickle" in read_raw(tmp_path, "nete", ok=False)


# --- odd types and ids ----------------------------------------------------------------------------------


def change_items(path, changes):
    """JSON lines with other values in the fields of the first records; changes: a dict each"""
    lines = path.read_text().splitlines()
    lines[:len(changes)] = [json.dumps(json.loads(line) | change) for line, change in zip(lines, changes)]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("year", [2018, 2023])
def test_odd_types_are_text_or_counted_with_the_first(tmp_path, year):
    write_amazon(tmp_path / "raw", year, suffix="", oddities=False)
    path = next((tmp_path / "raw").glob("meta_*"))
    path, brand, category = path, *(("brand", "category") if year == 2018 else ("store", "categories"))
    change_items(path, [{"title": 1984, brand: 7, category: ["Games", 2048]}, {"title": ["one"], brand: ["Åcme"]},
                        {"title": {"a": 1}, brand: [["Bolt"]]}, {brand: True, "title": "x"},
                        {category: ["Games", {"x": 1}]}, {brand: ["a", "b"]}, {category: "['Books', 'Comics']"}])
    _, items, _, printed = read_raw(tmp_path, "games")
    assert items["title"].iloc[:3].tolist() == ["1984", "one", "B002"]
    assert items["brand"].fillna("-").iloc[:6].tolist() == ["7", "Åcme", "Bolt", "-", "-", "-"]
    assert items["category"].iloc[[0, 4, 6]].tolist() == ["2048", "Games", "Comics"]
    assert printed.count("4 titles, categories or brands are neither") == 1 and "{'a': 1}, title of B002" in printed


def test_odd_types_of_yelp_are_text_or_counted(tmp_path):
    write_yelp(tmp_path / "raw")
    change_items(tmp_path / "raw/yelp_academic_dataset_business.json", [
        {"name": 7, "categories": 5}, {"categories": {"a": 1}}, {"categories": ["Food", "Tea", False]}, {"name": True}])
    _, items, _, printed = read_raw(tmp_path, "yelp")
    assert items["title"].iloc[[0, 3]].tolist() == ["7", "b3"]
    assert items["category"].fillna("-").iloc[:3].tolist() == ["5", "-", "Tea"]
    assert "3 titles, categories or brands are neither" in printed and "{'a': 1}, category of b1" in printed


@pytest.mark.parametrize("bad", ["a\x1b[31m", "  ", "a\u0000", "\x85"])
def test_ids_that_are_blank_or_not_printable_are_bad_lines(tmp_path, bad):
    reviews = write_amazon(tmp_path / "raw", 2018, suffix="", oddities=False)
    change_items(tmp_path / "raw/Video_Games_5.json", [{"reviewerID": bad}, {"asin": bad}])
    table, _, _, printed = read_raw(tmp_path, "games", "--max-bad", 0.1)
    assert len(table) == len(reviews) - 2 and "2 × reviewerID or asin is no printable text (first: line 1)" in printed
    assert "no printable text" in read_raw(tmp_path, "games", ok=False)


@pytest.mark.parametrize("change, complaint", [
    ({"user": "a\x1b[31m"}, "reviews.pickle, record 1: user_id is no printable text"),
    ({"item": " "}, "record 1: item_id is"), ({"user": None}, "None is neither text"), ({"user": ["u"]}, "['u'] is"),
    ({"user": "\ud800"}, "surrogates"), ({"rating": "nan"}, "record 1: rating is missing"), ({"rating": 1e39}, "beyond 3e+38"),
    ({"template": ("a", "b", {"c": 1}, 1)}, "{'c': 1} is neither text"), ({"item": True}, "True is neither")])
def test_values_of_a_dump_that_cannot_be_are_refused(tmp_path, change, complaint):
    reviews = write_nete(tmp_path / "raw")
    reviews[0] |= change
    (tmp_path / "raw/reviews.pickle").write_bytes(pickle.dumps(reviews))
    assert complaint in read_raw(tmp_path, "nete", ok=False)


def test_item_json_of_another_encoding_is_named(tmp_path):
    write_nete(tmp_path / "raw")
    path = tmp_path / "raw/item.json"
    path.write_bytes(path.read_text().encode("utf-16"))
    assert "item.json is UTF-16" in read_raw(tmp_path, "nete", ok=False)
