from types import SimpleNamespace

import numpy as np
import pandas as pd

from userip.report import agreement, code_cards, draw_map, item_features, overrepresented, user_facts


def test_overrepresented_finds_what_a_code_has_more_and_nothing_in_equal_codes():
    names = ["a", "b", "c", "d"]
    counts = np.array([[50.0, 10, 10, 30], [10, 50, 10, 30], [10, 10, 50, 30]])
    found = overrepresented(counts, names, 2)
    assert [[name for name, *_ in row] for row in found] == [["a"], ["b"], ["c"]]
    assert overrepresented(np.full((3, 4), 40.0), names, 2) == [[], [], []]
    own, other, prior = counts[0], counts[1:].sum(0), 0.1 * counts.sum(0) + 0.01  # the first one by hand
    first, second = own[0] + prior[0], other[0] + prior[0]
    odds = np.log(first / ((own + prior).sum() - first)) - np.log(second / ((other + prior).sum() - second))
    error = np.sqrt(1 / first + 1 / second)
    assert np.allclose(found[0][0][1:], np.exp([odds, odds - 1.96 * error, odds + 1.96 * error]))


def test_of_a_thousand_names_by_chance_hardly_any_is_listed():
    """A test of each name at 2.5% would list 25 in every code."""
    rng = np.random.default_rng(0)
    found = overrepresented(rng.poisson(20, (4, 1000)).astype(float), list(range(1000)), 1000)
    assert sum(map(len, found)) <= 2


def test_facts_are_groups_and_agree_with_codes_that_follow_them():
    users = pd.DataFrame({"user": range(80), "user_id": "u", "age": [20 + k // 2 for k in range(80)],
                          "gender": ["F", None, "M", "M"] * 20, "zip_code": [str(k) for k in range(80)]})
    facts = user_facts(users)
    as_text = user_facts(users.astype({name: str for name in users.columns if name != "user"}))  # of a csv file
    assert {name: list(values) for name, values in as_text.items()} == {
        name: list(values) for name, values in facts.items()}
    assert list(facts) == ["age", "gender"]
    assert facts["age"].iloc[[0, 79]].tolist() == ["20 to 29", "50 to 59"] and facts["age"].nunique() == 4
    codes = np.stack([np.arange(80) // 20, np.random.default_rng(0).integers(4, size=80)], 1)
    run = SimpleNamespace(user_facts=facts, codes=codes, names=["follows", "random"], sizes=[4, 4])
    agreed = {row[:2]: row[2:] for row in agreement(run)}
    assert float(agreed["follows", "age"][0]) > 0.99 and agreed["follows", "age"][1] == "below 1e-16"
    assert abs(float(agreed["random", "age"][0])) < 0.1 and float(agreed["random", "age"][1]) > 0.01
    codes[:, 1] = 4  # unknown
    assert all(row[0] == "follows" for row in agreement(run))


def test_items_fall_into_thirds_by_price():
    items = pd.DataFrame({"title": "a", "category": "b", "brand": None,
                          "price": [1.0, 2, 3, 4, 5, 6, np.nan]})
    counts, names = item_features(items)["price levels"]
    assert sorted(names) == ["$2.67 to $4.33", "above $4.33", "up to $2.67"]
    assert counts.sum(0).tolist() == [2, 2, 2] and counts[6].sum() == 0


def test_cards_tell_habits_over_train_rows_and_what_a_codes_users_have_more_often():
    """Code 0 has the racers and rates a half above the items' means, code 1 the pans; the last is unknown."""
    items = pd.DataFrame({"title": ["red racer", "blue racer", "red pan", "blue pan"], "brand": None,
                          "category": ["Games", "Games", "Kitchen", "Kitchen"], "price": np.nan})
    rows = [(user, item, 5.0 - user // 20, 1 - user // 20) for user in range(40)
            for item in ([0, 1, 2] if user < 20 else [2, 3, 0])]
    train = pd.DataFrame(rows, columns=["user", "item", "rating", "label"])
    run = SimpleNamespace(names=["hobby"], sizes=[2], codes=np.array([*[0] * 20, *[1] * 20, 2])[:, None],
                          items=items, user_facts={}, split={"train": train})
    cards, meanings, num_names = code_cards(run, 0, 6, seed=0)
    card = cards.set_index("")
    assert list(card.columns) == ["hobby 0", "hobby 1"] and card.loc["users"].tolist() == ["20", "20"]
    assert card.loc["share rated positive"].tolist() == ["1.00 ± 0.00", "0.00 ± 0.00"]
    assert card.loc["rating less the item's mean"].tolist() == ["0.33 ± 0.00", "-0.33 ± 0.00"]
    assert card.loc["categories", "hobby 0"].startswith("Games ×")
    assert card.loc["categories", "hobby 1"].startswith("Kitchen ×")
    assert meanings == ["Games, racer", "Kitchen, pan", "no evidence"] and num_names[0] == 4


def test_texts_of_users_are_neither_formulas_nor_mathematics_and_missing_letters_are_said_once(tmp_path, capsys):
    groups = np.array(["=1+1", "$x_", "電子", ""])
    html = draw_map(tmp_path, "hobby by truth", np.eye(4)[:, :2], groups, {"$u$": 0})
    assert html.startswith("<img") and (tmp_path / "map-hobby-by-truth.png").stat().st_size > 1000
    data = pd.read_csv(tmp_path / "map-hobby-by-truth.csv", keep_default_na=False)
    assert data["group"].tolist() == ["'=1+1", "$x_", "電子", ""]
    assert capsys.readouterr().out.count("lacks letters") == 1
