import numpy as np
import pytest

from userip.cleaning import clean, deepest_category, is_no_age, read_category, to_price


@pytest.mark.parametrize("published, price", [
    ("$12.99", 12.99), (12.99, 12.99), ("12", 12), ("$1,299.00", 1299), ("$5.99 - $12.49", 5.99),
    ("$.99", 0.99), ("$20–$10", 10), ("from 12.99", 12.99), ("From $3 - $4", 3), (" $7 ", 7), ("", None),
    (None, None), ("—", None), ("12,99", None), ("-5", None), ("$5 off", None), (float("nan"), None),
    ("1e400", None), ({"a": 1}, None), (True, None), ("£4", None), ("Too low to display", None)])
def test_prices_become_numbers_and_junk_is_missing(published, price):
    number = to_price(published)
    assert np.isnan(number) if price is None else number == pytest.approx(price)


@pytest.mark.parametrize("published, title", [
    ("Rock &amp; Roll", "Rock & Roll"), ("AT&amp;amp;T", "AT&T"), ("a<br>b", "a b"),
    ("<b>Bold</b> move", "Bold move"), ("&lt;i&gt;x&lt;/i&gt;", "x"), ("5 < 6 > 4", "5 < 6 > 4"),
    ("x<y and 3>2", "x<y and 3>2"),
    (" a\n\t b ", "a b"), ("caf\u00e9\u00a0noir", "café noir"), ("half \ud83d pair", "half pair"),
    ("<span class=", ""), ("x function(){ y }", ""), (None, ""), (1984, "1984"),
    ("Form & function (2nd edition)", "Form & function (2nd edition)"), ("Fate {stay: night}",) * 2,
    ("Sing <a cappella>",) * 2, ('<a href="x">Link</a>', "Link"), (".a-box{color:#fff}", ""),
    ("var t = (new Date()).getTime();", ""), ("red \x1b[31m alarm", "red [31m alarm")])
def test_titles_are_plain_text(published, title):
    assert clean(published) == title == clean(title)


@pytest.mark.parametrize("published, category", [
    (["Games", "PC", "Strategy"], "Strategy"), ([["A", "B"], ["A", "C", "D"], ["E", "F", "G"]], "D"),
    ([], ""), (None, ""), ("Books", "Books"), (["Movies & TV", "Studio", "All Titles"], "Studio"),
    (["All Beauty"], "All Beauty"), (["Gift Cards", "Gift Cards", "No expiration, no fees."], "Gift Cards"),
    (["Women", "</span></span>"], "Women"), (["Clothing", "Tops", "100% Cotton", "Imported"], "Tops"),
    (["Travel, City &amp; Regional"], "Travel, City & Regional"), ([None, "x"], "x"), ([1, 2], "2"), ([["A"], "B"], "A")])
def test_the_deepest_informative_category(published, category):
    assert deepest_category(published) == category


@pytest.mark.parametrize("published, category, odd", [
    ('["Books", "Fiction"]', "Fiction", None), ("['Books']", "Books", None), ("['Books' 'Sci\\n']", "Sci", None),
    ("['Books' 'Fiction']", "Fiction", None), ("('a', 'b')", "b", None), ('[["A"], ["B", "C"]]', "C", None),
    ('["A", null]', "A", None), ("[]", "", None), ("[7]", "7", None), ("[Books, Fiction]", "", "[Books, Fiction]"),
    ("{Books,Fiction}", "", "{Books,Fiction}"), ('["Books", "Fic', "", '["Books", "Fic'),
    ("array(['a', 'b'], dtype=object)", "", "array(['a', 'b'], dtype=object)"), ("Toys (new)", "Toys (new)", None),
    ('["A", {"x": 1}]', "A", {"x": 1}), (True, "", True), (False, "", False), ([["A", [2.5]]], "2.5", None),
    ({"a": 1}, "", {"a": 1}), (7, "7", None), (2.5, "2.5", None), ([1, 2.5], "2.5", None), (float("nan"), "", None)])
def test_categories_that_are_lists_texts_of_lists_or_of_odd_types(published, category, odd):
    assert read_category(published) == (category, odd)


@pytest.mark.parametrize("value, odd", [
    (0, False), (25, False), ("25-34", False), ("18+", False), ("Under 18", False), (120, False), (26.0, False),
    (float("nan"), False), (None, False), ("0-17", False), (121, True), (1987, True), ("1987-05-12", True),
    ("12.05.87", True), ("5/12/87", True), ("May 1987", True), (-3, True), (5.4e8, True)])
def test_dates_years_and_numbers_beyond_120_are_no_ages(value, odd):
    assert is_no_age(value) == odd
