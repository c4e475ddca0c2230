import decimal
import gzip
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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
    assert "line 161 has 2 columns, not 4" in read_raw(tmp_path, "ml-1m", ok=False)


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
    interactions["feature"] = 0.5  # NETE's reviews have another column of this name
    interactions.rename(columns=theirs).to_csv(tmp_path / "raw/interactions.tsv.gz", index=False, sep="\t")
    (tmp_path / "raw/items.csv").unlink()
    items.rename(columns={"title": "name"}).to_parquet(tmp_path / "raw/items.parquet")
    columns = [f"{ours}={name}" for ours, name in {**theirs, "title": "name"}.items()]
    table, stored, *_ = read_raw(tmp_path, "table", "--columns", *columns)
    assert len(table) == 60 * 14 and stored.loc["i000", "title"] == "red racer 0"
    assert "feature" not in table
    assert table["timestamp"].between(1_500_000_000, 1_500_001_000).all()
    refuse = lambda *columns: read_raw(tmp_path, "table", "--columns", *columns, ok=False)
    assert "no file has a column nowhere" in refuse(*columns, "brand=nowhere")
    assert "two columns of one name" in refuse("item_id=reviewer")
    (tmp_path / "raw/items.csv").write_text("item_id,title\n")
    assert "leave one of them" in refuse(*columns)
    for wrong in (["stars=rating"], ["rating"], ["rating="], ["=stars"], ["rating=stars", "timestamp=stars"],
                  ["rating=stars", "rating=stars"]):
        assert f"--columns {wrong[-1]}: each must be OURS=THEIRS" in refuse(*wrong)
    interactions.assign(score=1).rename(columns=theirs).to_csv(
        tmp_path / "raw/interactions.tsv.gz", index=False, sep="\t")
    (tmp_path / "raw/items.csv").unlink()
    assert "two columns of one name" in refuse(*columns, "rating=score")


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
    assert "items.csv has no rows" in read_raw(tmp_path, "table", ok=False)
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


# --- nothing is lost in silence -------------------------------------------------------------------------


def with_items(folder, items, suffix=".csv", sep=","):
    """A table with these lines of items behind the header; the complaint of stage 1, or its items"""
    write_table(folder / "raw", suffix=suffix)
    path = folder / f"raw/items{suffix}"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *items, *lines[1 + len(items):]]) + "\n")
    return path


def test_quotes_in_tab_separated_files_are_letters(tmp_path):
    interactions, items = write_table(tmp_path / "raw", suffix=".csv")
    items.loc[[5, 9], "title"] = ['"Blue racer 5', '"Blue racer 9']
    for name, frame in (("interactions", interactions), ("items", items)):
        (tmp_path / f"raw/{name}.csv").unlink()
        frame.to_csv(tmp_path / f"raw/{name}.tsv", sep="\t", index=False, quoting=3)
    table, stored, *_ = read_raw(tmp_path, "table")
    assert len(table) == 60 * 14 and stored["title"].tolist() == items["title"].tolist()


@pytest.mark.parametrize("lines, complaint", [
    (['i000,"Blue racer,Games,Acme,3', 'i001,"Blue racer,Games,Acme,3'], "lines 2 to 3: ',' expected"),
    (['i000,"Blue racer,Games,Acme,3', 'i001,red,Games,Acme,3', 'i002,Blue racer",Games,Acme,3'],
     "line 2: title goes on with 'i001,red,Games,Acme,3'"),
    (['i000,"Blue \\"racer\\"",Games,Acme,3'], "lines 2 to 2: ',' expected"),
    (['i000,"Blue racer,Games,Acme,3'], "unexpected end of data"),
    (["i000,Blue racer, the game,Games,Acme,3"], "line 2 has 6 fields between commas, but the header has 5"),
    (["", "", "i000,red,Games"], "line 4 has 3 fields"), (["i000,red,Games,Acme,3\xff"], "")])
def test_csv_files_that_do_not_add_up_are_refused_with_the_line(tmp_path, lines, complaint):
    path = with_items(tmp_path, lines)
    if not complaint:
        path.write_bytes(path.read_bytes().replace("\xff".encode(), b"\xff"))
        complaint = "line 2: b'\\xff' is not UTF-8"
    assert f"items.csv, {complaint}" in read_raw(tmp_path, "table", ok=False).replace("lines 2 to 41: ", "")


def test_well_formed_quotes_line_breaks_spaces_and_delimiters_at_the_end_are_read(tmp_path):
    path = with_items(tmp_path, ['i000,"Blue, ""the"" racer\nof 1999",Games,\\N,3', "", "i001,red,Games,Acme,3"])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", ",\r\n").replace(
        "1999\",", "1999\",").replace("racer,\r\n", "racer\r\n").replace("\r\n,\r\n", "\r\n\r\n").encode())
    _, items, *_ = read_raw(tmp_path, "table")
    assert items.loc["i000", "title"] == 'Blue, "the" racer of 1999' and items["brand"].isna()["i000"]
    assert len(items) == 40 and items.loc["i001", "title"] == "red"
    path.write_text(path.read_text("utf-8-sig").replace(",\n", "\n").replace(",", ", "))
    assert read_raw(tmp_path, "table")[1].loc["i001", "category"] == "Games"


@pytest.mark.parametrize("convert, seconds", [
    (lambda s: pd.to_datetime(s, unit="s").astype("datetime64[ns]"), 1),
    (lambda s: pd.to_datetime(s, unit="s").dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"), 1), (lambda s: s * 10**6, 1),
    (lambda s: s * 10**9, 1), (lambda s: s * 1000.0, 1),
    (lambda s: pd.to_datetime(s, unit="s").dt.date, 86_400)])
def test_times_are_seconds_whatever_their_type_and_unit(tmp_path, convert, seconds):
    interactions, _ = write_table(tmp_path / "raw", suffix=".parquet")
    times = interactions["timestamp"].to_numpy() // seconds * seconds
    interactions.assign(timestamp=convert(interactions["timestamp"])).to_parquet(
        tmp_path / "raw/interactions.parquet")
    assert sorted(read_raw(tmp_path, "table")[0]["timestamp"]) == sorted(times)


@pytest.mark.parametrize("column, value, complaint", [
    ("timestamp", pd.NaT, "timestamp is missing"), ("rating", 1e39, "is beyond 3e+38"),
    ("timestamp", 1e300, "is beyond 1e+20"), ("rating", None, "rating is missing"),
    ("user_id", None, "user_id is"), ("user_id", "a\x1b[31m", "user_id is")])
def test_a_value_that_cannot_be_is_refused_with_its_row(tmp_path, column, value, complaint):
    interactions, _ = write_table(tmp_path / "raw", suffix=".parquet")
    values = interactions[column].astype(object)
    if value is pd.NaT:
        values = pd.to_datetime(interactions[column], unit="s")
    values[7] = value
    interactions.assign(**{column: values}).to_parquet(tmp_path / "raw/interactions.parquet")
    line = read_raw(tmp_path, "table", ok=False)
    assert "interactions.parquet, row 8: " in line and complaint in line


def test_numbers_and_lists_in_parquet_are_text_or_refused(tmp_path):
    interactions, items = write_table(tmp_path / "raw", suffix=".parquet")
    path = tmp_path / "raw/items.parquet"
    number = np.arange(40)
    items = items.assign(title=1950 + number, category=[["Games", "PC", "Chess"]] * 40,
                         brand=np.where(number % 2, 7.0, np.nan), price=[decimal.Decimal("3.50")] * 40)
    items["title"] = items["title"].astype("category")
    items.to_parquet(path)
    stored = read_raw(tmp_path, "table")[1]
    assert stored["title"].iloc[3] == "1953" and set(stored["category"]) == {"Chess"}
    assert stored["brand"].iloc[:2].tolist()[1] == "7" and stored["brand"].isna().sum() == 20
    assert stored["price"].iloc[0] == 3.5
    table = pq.read_table(path).set_column(1, "title", pa.array(np.where(number == 7, np.nan, number)))
    pq.write_table(table, path)  # pandas would have made it null
    assert "nan" not in set(read_raw(tmp_path, "table")[1]["title"])
    table = table.set_column(0, "item_id", pa.array(np.where(number == 7, np.nan, number)))
    pq.write_table(table, path)
    assert "row 8: item_id is missing" in read_raw(tmp_path, "table", ok=False)
    items.assign(category=[[{"name": "Games"}]] * 40).to_parquet(path)
    assert "column category: list<" in read_raw(tmp_path, "table", ok=False)
    for column in ("item_id", "title", "price"):
        items.assign(**{column: [[1]] * 40}).to_parquet(path)
        assert f"column {column}: list<" in read_raw(tmp_path, "table", ok=False)


def test_an_id_that_is_the_text_nan_is_an_id_and_a_line_says_so(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    user = interactions["user_id"]
    interactions["user_id"] = user.where(user != user[0], "nan")
    interactions.to_csv(tmp_path / "raw/interactions.csv", index=False)
    *_, printed = read_raw(tmp_path, "table")
    assert f"{(interactions['user_id'] == 'nan').sum()} rows have a user_id such as nan" in printed


def test_ids_that_never_match_are_shown_one_of_each_side(tmp_path):
    interactions, items = write_table(tmp_path / "raw", suffix=".csv")
    items.assign(item_id=items["item_id"] + ".0").to_csv(tmp_path / "raw/items.csv", index=False)
    line = read_raw(tmp_path, "table", ok=False)
    assert "'i000'" in line and "'i000.0'" in line


def test_movielens_files_saved_again_as_utf_8(tmp_path):
    write_ml_1m(tmp_path / "raw")
    path = tmp_path / "raw/movies.dat"
    path.write_text(path.read_text("latin-1"), "utf-8")
    assert read_raw(tmp_path, "ml-1m")[1].loc["3", "title"] == "Amélie: Part 2 (2001)"


def test_a_column_of_users_may_have_any_name(tmp_path):
    write_table(tmp_path / "raw", suffix=".csv")
    (tmp_path / "raw/users.csv").write_text("user_id,user,mood\nu000,5,glad\n")
    _, _, users, printed = read_raw(tmp_path, "table")
    assert users.loc["u000", "mood"] == "glad" and "the column user of users is left out" in printed


def test_sizes_have_limits(tmp_path):
    write_table(tmp_path / "raw")
    path = tmp_path / "raw/items.csv.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content + b"i1," + b"x" * (3 << 20) + b",,,\n"))
    assert "is longer than 2 MiB" in read_raw(tmp_path, "table", "--max-line", 2, ok=False)
    assert "expands to more than 3 times" in read_raw(tmp_path, "table", "--max-ratio", 3, ok=False)
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in read_raw(tmp_path, "table", ok=False)


def test_ids_are_printable_distinct_and_never_swallow_lines(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".parquet")
    path = tmp_path / "raw/interactions.parquet"
    for bad in ("", "  ", "a\nb", "a\u200bb", "a\u202eb"):
        interactions.assign(user_id=[bad, *interactions["user_id"][1:]]).to_parquet(path)
        assert "row 1: user_id is no printable text" in read_raw(tmp_path, "table", ok=False)
    for exact, kind in ((2.0**53, "float64"), (2.0**24, "float32")):  # beyond it neighbours are one number
        interactions.assign(user_id=(exact + np.arange(len(interactions))).astype(kind)).to_parquet(path)
        assert "column user_id: " in read_raw(tmp_path, "table", ok=False)
    blanks = [" " * (row % 2) for row in range(len(interactions))]
    interactions.assign(user_id=interactions["user_id"] + blanks).to_parquet(path)
    assert set(read_raw(tmp_path, "table")[0]["user_id"]) <= set(interactions["user_id"])
    interactions.assign(rating=pd.to_datetime(interactions["timestamp"], unit="s")).to_parquet(path)
    assert "column rating: timestamp" in read_raw(tmp_path, "table", ok=False)


def test_genres_must_stand_in_the_order_of_the_flags(tmp_path):
    write_ml_100k(tmp_path / "raw")
    path = tmp_path / "raw/u.genre"
    for text in ("Action|1\nunknown|0\nComedy|2\nFilm-Noir|3\n", "a|0\na|1\nb|2\nc|3\n"):
        path.write_text(text)
        assert "u.genre must have different genres" in read_raw(tmp_path, "ml-100k", ok=False)


def test_dates_written_as_numbers_are_refused(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions.assign(timestamp=20160101).to_csv(tmp_path / "raw/interactions.csv", index=False)
    assert "timestamp 20160101 looks like YYYYMMDD" in read_raw(tmp_path, "table", ok=False)


@pytest.mark.parametrize("times, problem", [
    (lambda rows: 20151102011500 + rows, "lies beyond the year 2100"),  # YYYYMMDDhhmmss
    (lambda rows: rows * 10**9, "lies beyond the year 2100"),  # milliseconds of a clock that began at 0
    (lambda rows: 1_500_000_000 * 1000 ** (rows % 2), "line 3: timestamp 1500000000000 has another unit")])
def test_times_of_two_units_and_of_no_unit_are_refused(tmp_path, times, problem):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    interactions.assign(timestamp=times(np.arange(len(interactions)))).to_csv(
        tmp_path / "raw/interactions.csv", index=False)
    assert problem in read_raw(tmp_path, "table", ok=False)


# --- other dialects -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, is_whole", [
    ("AC\\DC", True), ("and\\or \\o", True), ("a \\ b", True), ("24\\7", True), ("Blue \\\"racer\\\"", False),
    ("AC\\\\DC", False), ("tab\\tbed", False), ("caf\\u00e9", False), ("Rock \\'n", False), ("end\\", False),
    ('"in\\, quotes"', False)])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_backslash_is_a_letter_and_an_escape_is_refused(tmp_path, text, is_whole, suffix):
    separator = "\t" if suffix == ".tsv" else ","
    with_items(tmp_path, [separator.join(["i000", text, "Games", "Acme", "3"])], suffix)
    if is_whole:
        assert read_raw(tmp_path, "table")[1].loc["i000", "title"] == text
    else:
        assert "line 2: title has a backslash escape" in read_raw(tmp_path, "table", ok=False)


@pytest.mark.parametrize("convert, complaint", [
    (lambda text: text.encode("utf-16"), "is UTF-16: `iconv"), (lambda text: text.encode("utf-16-be"), "is UTF-16"),
    (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), "is UTF-16"), (lambda text: text.encode("utf-16-le"), "UTF-16"),
    (lambda text: text.replace("\n", "\r").encode(), "CR alone, as old Macs did: `tr"),
    (lambda text: text.replace("3", "\0", 1).encode(), "has a NUL byte in line ")])
def test_other_encodings_and_line_ends_are_named_with_the_cure(tmp_path, convert, complaint):
    write_table(tmp_path / "raw", suffix=".csv")
    write_ml_1m(tmp_path / "ml/raw")
    for folder, name, dataset in ((tmp_path, "items.csv", "table"), (tmp_path / "ml", "users.dat", "ml-1m")):
        path = folder / "raw" / name
        path.write_bytes(convert(path.read_text()))
        assert f"{path} {complaint}" in (line := read_raw(folder, dataset, ok=False)) or complaint in line


def test_a_quoted_tab_separated_file_is_refused(tmp_path):
    path = with_items(tmp_path, [], ".tsv")
    path.write_text(path.read_text().replace("\t", '"\t"').replace("\n", '"\n"')[:-1].join(['"', ""]))
    assert "items.tsv has its columns in quotes" in read_raw(tmp_path, "table", ok=False)


def test_a_category_in_csv_that_is_the_text_of_a_list(tmp_path):
    path = with_items(tmp_path, ['i000,red,"[""Books"", ""Fiction""]",Acme,3', "i001,red,['Books'],Acme,3"])
    assert read_raw(tmp_path, "table")[1]["category"].iloc[:3].tolist() == ["Fiction", "Books", "Games"]
    path.write_text(path.read_text().replace("['Books']", "[Books]"))
    assert "line 3: category '[Books]' is no list of names" in read_raw(tmp_path, "table", ok=False)


def test_ages_that_are_dates_are_left_out_with_a_line(tmp_path):
    write_table(tmp_path / "raw", suffix=".csv")
    (tmp_path / "raw/users.csv").write_text("user_id,age\nu000,25-34\nu001,1987-05-12\nu002,1987\nu003,41\n")
    _, _, users, printed = read_raw(tmp_path, "table")
    assert users.loc[["u000", "u003"], "age"].tolist() == ["25-34", "41"] and users["age"].notna().sum() == 2
    assert "2 ages of users are dates, years" in printed and "'1987-05-12'" in printed


def test_rows_that_are_there_twice_are_counted(tmp_path):
    interactions, _ = write_table(tmp_path / "raw", suffix=".csv")
    path = tmp_path / "raw/interactions.csv"
    later = interactions[:5].assign(timestamp=1_600_000_000)
    pd.concat([interactions, interactions[:3], later]).to_csv(path, index=False)
    table, _, _, printed = read_raw(tmp_path, "table")
    assert printed.count("3 rows repeat another's user, item and time") == 1 and len(table) == len(interactions)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.string(), pa.dictionary(pa.int32(), pa.binary())])
@pytest.mark.parametrize("column", ["item_id", "title"])
def test_bytes_in_parquet_are_utf_8_or_refused_with_the_row(tmp_path, column, kind):
    _, items = write_table(tmp_path / "raw", suffix=".parquet")
    for text, is_good in (("é".encode(), True), (b"\xe9", False)):
        values = pa.array([*(name.encode() for name in items[column][:-1]), text], pa.binary())
        values = pa.Array.from_buffers(kind, len(values), values.buffers()) if kind == pa.string() else \
            values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
        table = pa.Table.from_pandas(items, preserve_index=False)
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, values),
                       tmp_path / "raw/items.parquet")
        if is_good:
            assert len(read_raw(tmp_path, "table")[1]) == 40
        else:
            assert f"column {column}, row 40: b'\\xe9' is not UTF-8" in read_raw(tmp_path, "table", ok=False)
