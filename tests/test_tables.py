import gzip
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import dies, read_raw, write_ml_1m, write_ml_100k, write_table
from userip.tables import read_ml_100k


# --- MovieLens ------------------------------------------------------------------------------------------


def test_movielens_100k_as_published(tmp_path):
    write_ml_100k(tmp_path / "raw")
    table, items, users, _ = read_raw(tmp_path, "ml-100k")
    assert len(table) == 360 and items["title"].iloc[0].startswith("Café Nº")
    assert items["category"]["1"] == "Comedy" and items["category"]["2"] == "Action"
    assert {"age", "gender", "occupation"} <= set(users)
    assert users.loc["7", "age"] == 26


def test_movielens_1m_as_published(tmp_path):
    write_ml_1m(tmp_path / "raw/ml-1m")  # as the archive unpacks
    table, items, users, _ = read_raw(tmp_path, "ml-1m")
    assert len(table) == 160 and items.loc["3", "title"] == "Amélie: Part 2 (2001)"
    assert items.loc["3", "category"] == "Comedy, Film-Noir"
    assert users.loc["2", ["gender", "age"]].tolist() == ["F", 18]
    path = tmp_path / "raw/ml-1m/ratings.dat"
    path.write_text(path.read_text() + "1::2\n")
    assert "without 4 columns" in read_raw(tmp_path, "ml-1m", ok=False)


# --- tables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_a_table_reads_alike_in_every_format(tmp_path, suffix):
    write_table(tmp_path / "raw", suffix=suffix)
    table, items, *_ = read_raw(tmp_path, "table")
    assert len(table) == 60 * 14 and table["rating"].sum() > 0
    assert items["brand"].isna().sum() == 13 and items["price"].iloc[1] == pytest.approx(8.1)
    assert items.columns.tolist() == ["item", "title", "category", "brand", "price"]


def test_tables_with_tabs_and_other_names(tmp_path):
    interactions, items = write_table(tmp_path / "raw", suffix=".csv")
    theirs = {"user_id": "reviewer", "rating": "stars", "timestamp": "when"}
    (tmp_path / "raw/interactions.csv").unlink()
    interactions["timestamp"] *= 1000  # milliseconds are told by their size
    interactions.rename(columns=theirs).to_csv(tmp_path / "raw/interactions.tsv.gz", index=False, sep="\t")
    (tmp_path / "raw/items.csv").unlink()
    items.rename(columns={"title": "name"}).to_parquet(tmp_path / "raw/items.parquet")
    columns = [f"{ours}={name}" for ours, name in {**theirs, "title": "name"}.items()]
    table, stored, *_ = read_raw(tmp_path, "table", "--columns", *columns)
    assert len(table) == 60 * 14 and stored.loc["i000", "title"] == "red racer 0"
    assert table["timestamp"].between(1_500_000_000, 1_500_001_000).all()
    refuse = lambda *columns: read_raw(tmp_path, "table", "--columns", *columns, ok=False)
    assert "no file has a column nowhere" in refuse(*columns, "brand=nowhere")
    assert "two columns item_id" in refuse("item_id=reviewer")
    (tmp_path / "raw/items.csv").write_text("item_id,title\n")
    assert "leave one of them" in refuse(*columns)
    assert "ours is one of" in refuse("stars=rating")


def test_a_table_with_a_split_of_its_own(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions["split"] = np.resize(["train"] * 8 + ["validation", "test"], len(interactions))
    interactions.to_csv(tmp_path / "raw/interactions.csv", index=False)
    table, *_ = read_raw(tmp_path, "table", "--split", "published")
    assert table["split"].value_counts().to_dict() == {"train": 672, "valid": 84, "test": 84}
    interactions.assign(split="half").to_csv(tmp_path / "raw/interactions.csv", index=False)
    assert "half is no split" in read_raw(tmp_path, "table", "--split", "published", ok=False)


def test_a_missing_file_and_an_empty_one(tmp_path):
    write_table(tmp_path / "raw", suffix=".csv")
    (tmp_path / "raw/items.csv").unlink()
    assert "items.csv" in read_raw(tmp_path, "table", ok=False)
    (tmp_path / "raw/items.csv").write_text("")
    assert "items.csv cannot be read (No columns" in read_raw(tmp_path, "table", ok=False)
    (tmp_path / "raw/items.csv").write_text("item_id,title\n")
    assert "no rows" in read_raw(tmp_path, "table", ok=False)


def test_a_missing_column_is_named_with_those_found(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions.rename(columns={"rating": "stars"}).to_csv(tmp_path / "raw/interactions.csv", index=False)
    line = read_raw(tmp_path, "table", ok=False)
    assert "no column rating" in line and "stars" in line


def test_a_rating_that_is_not_a_number_is_named_with_its_line(tmp_path, capsys):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions["rating"] = interactions["rating"].astype(object)
    interactions.loc[7, "rating"] = "five"
    interactions.to_csv(tmp_path / "raw/interactions.csv", index=False)
    assert (tmp_path / "raw/interactions.csv").read_text().splitlines()[8].split(",")[2] == "five"
    line = read_raw(tmp_path, "table", ok=False)
    assert "line 9" in line and "'five'" in line
    write_ml_100k(tmp_path / "ml")
    lines = (tmp_path / "ml/u.data").read_text().splitlines()
    lines[4] = lines[4].rsplit("\t", 2)[0] + "\tx\t1"
    (tmp_path / "ml/u.data").write_text("\n".join(lines))
    args = SimpleNamespace(dataset="ml-100k", raw=tmp_path / "ml")
    assert "u.data, line 5" in dies(capsys, read_ml_100k, args)


def test_a_broken_gzip(tmp_path):
    write_table(tmp_path / "raw")
    path = tmp_path / "raw/interactions.csv.gz"
    path.write_bytes(path.read_bytes()[:400])
    assert "interactions.csv.gz" in read_raw(tmp_path, "table", ok=False)
    path.write_bytes(gzip.compress(b"\xff\xfe\x00garbage\n\xff"))
    assert "interactions.csv.gz" in read_raw(tmp_path, "table", ok=False)
