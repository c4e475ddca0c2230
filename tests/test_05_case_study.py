import html
import re

import numpy as np
import pandas as pd
import torch

from conftest import case_study, prepare, run_pipeline, run_stage, write_table


def test_nearest_words_are_those_of_the_largest_cosine():
    torch.manual_seed(0)
    embeddings, words = torch.randn(30, 8), [f"w{index}" for index in range(30)]
    centred = embeddings - embeddings.mean(0)
    found = case_study.nearest_words(5 * centred[[7, 21]], embeddings, words, 3)
    assert [row[0] for row in found] == ["w7", "w21"]
    for row, index in zip(found, (7, 21)):
        cosine = [float(torch.cosine_similarity(centred[index], other, dim=0)) for other in centred]
        assert row == [words[place] for place in np.argsort(cosine)[::-1][:3]]


def test_overrepresented_finds_what_a_code_has_more_and_nothing_in_equal_codes():
    names = ["a", "b", "c", "d"]
    counts = np.array([[50.0, 10, 10, 30], [10, 50, 10, 30], [10, 10, 50, 30]])
    found = case_study.overrepresented(counts, names, 2)
    assert [[name for name, _ in row] for row in found] == [["a"], ["b"], ["c"]]
    assert case_study.overrepresented(np.full((3, 4), 40.0), names, 2) == [[], [], []]
    own, other, prior = counts[0], counts[1:].sum(0), 0.1 * counts.sum(0) + 0.01  # the first z by hand
    first, second = own[0] + prior[0], other[0] + prior[0]
    odds = np.log(first / ((own + prior).sum() - first)) - np.log(second / ((other + prior).sum() - second))
    assert np.isclose(found[0][0][1], odds / np.sqrt(1 / first + 1 / second))


def test_vocabulary_words_begin_a_word_and_hold_letters_only():
    class Tokenizer:
        tokens = ["Ġgames", "ames", "Ġ12", "▁guitar", "Ġof", "Ġcafÿ", "<|endoftext|>", None]

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[index] for index in ids]

    ids, words = case_study.vocabulary_words(Tokenizer())
    assert words == ["games", "guitar"] and ids.tolist() == [0, 3]


def test_titles_are_escaped_and_the_report_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "clean", lambda text: text)  # somebody else's items may hold tags
    _, items = write_table(tmp_path / "raw")
    items["title"] = [f"<script>alert({index})</script> & racer" for index in range(len(items))]
    items.to_csv(tmp_path / "raw/items.csv.gz", index=False)
    run_pipeline(tmp_path / "run", tmp_path / "raw")
    page = (tmp_path / "run/report.html").read_text()
    assert "<script" not in page and html.escape("<script>alert(") in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)


def test_the_report_has_its_pictures_tables_and_figures(small_run):
    page = (small_run[1] / "report.html").read_text()
    # usage, mask, one map per profile
    assert page.count("<img alt=") == page.count("data:image/png;base64,") == 4
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    for part in ("held-out NLL", "Do they help dcn?", "codes - random", "control: those of user"):
        assert part in page


def test_the_report_tells_train_rows_only(small_run):
    raw, run = small_run
    names = ("interactions", "items", "feature_bank")
    interactions, items, bank = (pd.read_parquet(run / f"{name}.parquet") for name in names)
    page = (run / "report.html").read_text()
    for user_id, told in re.findall(r"<h3>User (\w+)</h3><p>Had \(train rows\): (.*?)</p>", page):
        rows = interactions[interactions["user"] == bank.set_index("user_id").loc[user_id, "user"]]
        titles = items["title"].to_numpy()
        shown = {title.strip() for title in told.split(" … ")[0].split(";")}
        assert shown <= set(titles[rows.loc[rows["split"] == "train", "item"]])
        assert len(shown) == min(12, (rows["split"] == "train").sum())


def test_options_move_what_they_should(small_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    pages = []
    for options in ((), ("--num-users", 3), ("--seed", 4), ("--num-words", 2)):
        run_stage("05_case_study.py", "--run-dir", run, *options)
        pages.append((run / "report.html").read_text())
    assert len(set(pages)) == 4 and pages[1].count("<h3>User ") == 3


def test_a_missing_predecessor_is_named(small_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    (run / "results.parquet").unlink()
    assert "python 04_train_ctr.py" in run_stage("05_case_study.py", "--run-dir", run, ok=False)


def test_another_tiny_llm_than_that_of_the_profiles_is_refused(small_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    (run / "tiny_llm/made_from.txt").write_text("another")
    assert "is not the LLM" in run_stage("05_case_study.py", "--run-dir", run, ok=False)
