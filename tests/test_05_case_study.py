import argparse
import html
import re
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

from common import logloss
from conftest import case_study, run_pipeline, run_stage, write_table
from userip.artifacts import sha256_of
from userip.llm import load_llm


def best(scores, words, number):
    return [[words[index] for index in row] for row in scores.topk(number, dim=1).indices.tolist()]


def test_nearest_words_are_those_of_the_largest_cosine():
    torch.manual_seed(0)
    embeddings = torch.randn(30, 8)
    centred = embeddings - embeddings.mean(0)
    scores = case_study.nearest_scores(5 * centred[[7, 21]], embeddings)
    assert scores.argmax(1).tolist() == [7, 21]
    for row, index in zip(scores, (7, 21)):
        cosine = [torch.cosine_similarity(centred[index], word, dim=0) for word in centred]
        assert torch.allclose(row, torch.stack(cosine), atol=1e-6)


@pytest.fixture(scope="module")
def llm(llm_folder):
    """With the attention implementation that returns its weights"""
    return load_llm(argparse.Namespace(run_dir="unused"), str(llm_folder), attn_implementation="eager")


@pytest.mark.parametrize("num_soft", [1, 2])
def test_a_words_attention_to_the_soft_tokens_is_the_models_own_and_the_mean_of_its_tokens(llm, num_soft):
    """Whatever the other sentences are; the model's rows of attention sum to one."""
    model, tokenizer = llm
    embed, prefix = model.get_input_embeddings(), [5, 6, 7]
    sentences = [["The", "user", "likes", "skillet", "racer"], ["The", "user", "a"],
                 ["The", "user", "likes", "racer", "skillet"]]
    soft = torch.randn(3, num_soft * 32, generator=torch.Generator().manual_seed(0))
    together = case_study.attention_by_word(model, tokenizer, prefix, soft, sentences, batch_size=2)
    for user, (words, found) in enumerate(zip(sentences, together)):  # one text, layer, head after the other
        ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        text = torch.tensor(sum(ids, []))
        inputs = torch.cat([embed(torch.tensor(prefix)), soft[user].view(num_soft, 32), embed(text)])
        with torch.no_grad():
            attentions = model(inputs_embeds=inputs[None], output_attentions=True).attentions
        of_token = torch.zeros(len(text))
        for layer in range(2):
            for head in range(4):
                weights = attentions[layer][0, head]
                assert torch.allclose(weights.sum(1), torch.ones(len(inputs)), atol=1e-5)
                of_token += weights[3 + num_soft:, 3:3 + num_soft].sum(1) / 8
        assert len(found) == len(words)
        first = 0
        for part, weight in zip(ids, found):
            assert np.isclose(float(of_token[first:first + len(part)].mean()), weight, atol=1e-5)
            first += len(part)
    share = case_study.content_share([np.array([0.2, 0.1, 0.5])], num_noise=1)
    assert np.isclose(share[0], 0.3 / 0.5)


def test_lens_words_are_those_whose_log_probability_rises_most(llm):
    model, _ = llm
    ids = torch.arange(20, 60)
    generator = torch.Generator().manual_seed(0)
    soft, shared = torch.randn(3, 32, generator=generator), torch.randn(32, generator=generator)
    scores = case_study.lens_scores(model, ids, [5, 6, 7], soft, shared, batch_size=2)
    before = model.get_input_embeddings()(torch.tensor([5, 6, 7]))
    expects = lambda theta: model(inputs_embeds=torch.cat([before, theta[None]])[None]).logits[0, -1]
    for user in range(3):
        with torch.no_grad():
            rise = (expects(soft[user]).log_softmax(0) - expects(shared).log_softmax(0))[20:60]
        assert torch.allclose(scores[user], rise, atol=1e-4)


def test_words_are_scored_by_how_often_they_occur_in_held_out_items():
    words = [["Boots", "trail"], ["pan"], ["kite"], ["harp"], ["unread"], ["unread"]]
    texts = [{"boots", "trail"}, {"boots"}, {"kite"}, {"flute"}, set(), None]
    assert case_study.held_out_wins(words, texts).tolist() == [1, 0, 1, 0.5]


def test_the_words_of_a_planted_profile_are_its_categorys_far_above_the_control():
    """Profiles that lie at the words of what their users will have: found, and scored so."""
    generator, words = torch.Generator().manual_seed(0), [f"word{'abcdefgh'[k]}" for k in range(8)]
    embeddings, kind = torch.randn(8, 16, generator=generator), np.arange(200) % 4
    deviation = torch.stack([embeddings[2 * k] + embeddings[2 * k + 1] for k in kind])
    deviation = deviation + 0.5 * torch.randn(200, 16, generator=generator)
    own = best(case_study.nearest_scores(deviation, embeddings), words, 2)
    texts = [{words[2 * k], words[2 * k + 1]} for k in kind]
    wins = case_study.held_out_wins(own, texts)
    assert wins.mean() - 1.96 * wins.std(ddof=1) / 200**0.5 > 0.9
    shuffled = [own[index] for index in np.random.default_rng(0).permutation(200)]
    assert abs(case_study.held_out_wins(shuffled, texts).mean() - 0.5) < 0.15


def test_sentences_hold_train_words_and_the_level_of_prices():
    items = pd.DataFrame({"title": ["red racer", "iron skillet", "blue racer"], "brand": None,
                          "category": ["Games", "Kitchen", "Games"], "price": [1.0, 50.0, 9.0]})
    rows = pd.DataFrame({"user": [0, 0, 1, 2], "item": [0, 2, 1, 2]})
    noise, content = case_study.sentences_of(0, rows, items)
    assert noise == ["The", "user", "likes"] and set(content[0][:2]) == {"Games", "racer"}
    noise, content = case_study.sentences_of(1, rows, items)
    assert noise[:3] == ["The", "spending", "level"]
    assert [content[user] for user in range(3)] == [["low"], ["high"], ["medium"]]
    items["price"] = np.nan
    assert case_study.sentences_of(1, rows, items)[0] == ["The", "user", "likes"]


def test_vocabulary_words_begin_a_word_and_hold_letters_only():
    class Tokenizer:
        tokens = ["Ġgames", "ames", "Ġ12", "▁guitar", "Ġof", "Ġcafÿ", "<|endoftext|>", None]

        def __len__(self):
            return len(self.tokens)

        def convert_ids_to_tokens(self, ids):
            return [self.tokens[index] for index in ids]

    ids, words = case_study.vocabulary_words(Tokenizer())
    assert words.tolist() == ["games", "guitar"] and ids.tolist() == [0, 3]


@pytest.fixture(scope="module")
def tagged_report(small_run, tmp_path_factory):
    """The report of the small run, as if its items were named by somebody who wants to run a script."""
    run = tmp_path_factory.mktemp("tagged") / "run"
    shutil.copytree(small_run[1], run)
    path = run / "items.parquet"
    items, digest = pd.read_parquet(path), sha256_of(path)
    items["title"] = [f"<script>document.title='taken'</script><img src=x onerror=alert(1)> & racer {index}"
                      for index in range(len(items))]
    items.to_parquet(path, index=False)
    for sidecar in run.glob("*.json"):  # nothing else was made from the new titles
        sidecar.write_text(sidecar.read_text().replace(digest, sha256_of(path)))
    run_stage("05_case_study.py", "--run-dir", run, "--num-users", 2)
    return run / "report.html"


def test_titles_are_escaped_and_the_report_needs_no_network(tagged_report):
    page = tagged_report.read_text()
    assert "<script" not in page and html.escape("<script>document.title") in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)


def test_the_report_has_its_pictures_tables_and_figures(small_run):
    page = (small_run[1] / "report.html").read_text()
    # a map and an attention per profile
    assert page.count("<img alt=") == page.count("data:image/png;base64,") == 4
    folder, users = small_run[1] / "report", pd.read_parquet(small_run[1] / "users.parquet")
    drawn = {path.stem for path in folder.glob("*.png")}
    assert len(drawn) == 4 and drawn == {path.stem for path in folder.glob("*.csv")}
    for path in folder.glob("*.csv"):
        assert len(pd.read_csv(path)) > 0
        assert "attention" not in path.stem or set(pd.read_csv(path)["user"]) < set(users["user_id"])
    assert page.count("<h2>") == 7
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    for part in ("held-out NLL", "Do they help dcn?", "codes - random", "control: those of user",
                 "<th>hobby 0</th><th>hobby 1</th>", "title words"):
        assert part in page


def tables_of(page, user_id):
    """The tables of one user in a page: {title: rows as lists of texts, the header first}"""
    part = page.split(f"<h3>User {user_id}</h3>")[1].split("<h3>")[0].split("<h2")[0]
    cells = lambda row: [html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)]
    return {title: [cells(row) for row in re.findall(r"<tr>(.*?)</tr>", rows)]
            for title, rows in re.findall(r"<h4>(.*?)</h4><table>(.*?)</table>", part)}


def test_a_users_page_shows_train_rows_as_evidence_valid_ones_as_held_out_and_never_a_test_row(small_run):
    names = ("interactions", "items", "feature_bank")
    interactions, items, bank = (pd.read_parquet(small_run[1] / f"{name}.parquet") for name in names)
    page, titles, num_held_out = (small_run[1] / "report.html").read_text(), items["title"].to_numpy(), 0
    shown = re.findall(r"<h3>User (\w+)</h3>", page)
    assert len(shown) == 2
    for user_id in shown:
        rows = interactions[interactions["user"] == bank.set_index("user_id").loc[user_id, "user"]]
        of_split = {split: set(titles[frame["item"]]) for split, frame in rows.groupby("split")}
        tables = tables_of(page, user_id)
        had, held_out = ([rows[1:] for title, rows in tables.items() if title.startswith(start)]
                         for start in ("Had (train", "Held-out"))
        assert {title for title, _ in had[0]} <= of_split["train"]
        assert len(had[0]) == min(12, (rows["split"] == "train").sum())
        if "valid" in of_split:
            assert {row[0] for row in held_out[0]} == of_split["valid"]
            num_held_out += len(held_out[0])
            assert all(1 <= int(rank) <= len(items) for row in held_out[0] for rank in row[2:])
        recommended = tables["Recommended by dcn"]
        assert recommended[0] == ["without codes", "with codes"] and len(recommended) == 6
        assert not set(sum(recommended[1:], [])) & of_split["train"]
    assert num_held_out


def test_what_is_recommended_comes_from_the_model_that_stage_4_scored(small_run):
    """The same weights: the logloss of the valid rows is that of stage 4's table."""
    args = case_study.parse_args(["--run-dir", str(small_run[1])])
    run = case_study.read_run(args)
    valid = run.split["valid"]
    scores = case_study.click_scores(run, np.arange(len(run.users)))
    for feature, of_users in zip(("none", "codes"), scores.values()):
        row = run.results[(run.results["model"] == "dcn") & (run.results["features"] == feature)].iloc[0]
        found = logloss(valid["label"], of_users[valid["user"], valid["item"]])
        assert np.isclose(found, row["valid_logloss"], atol=1e-5)
    assert list(scores) == ["without codes", "with codes"] and not np.allclose(*scores.values())


def test_a_row_that_also_reads_the_two_means_is_not_scored_without_them(small_run, capsys):
    run = case_study.read_run(case_study.parse_args(["--run-dir", str(small_run[1])]))
    run.results["with_means"] = run.results["features"] == "none"
    assert list(case_study.click_scores(run, np.arange(2))) == ["with codes"]
    assert "scores without codes are left out" in capsys.readouterr().out


def test_a_fact_of_0_or_false_is_told(small_run):
    run = case_study.read_run(case_study.parse_args(["--run-dir", str(small_run[1])]))
    run.user_facts = {"owns a pet": pd.Series([False] * len(run.users), dtype=object),
                      "children": pd.Series([0] * len(run.users), dtype=object),
                      "job": pd.Series([None] * len(run.users), dtype=object)}
    found = argparse.Namespace(scored=np.array([3, 4]), words={}, clicks={}, meanings=[["a"] * 9] * len(run.names))
    known = case_study.user_tables(run, found, 0)["What is known of the user (no model reads it)"]
    assert known.to_numpy().tolist() == [["owns a pet", False], ["children", 0]]


def test_one_users_page_is_printed_and_written_and_the_report_stays(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    before = (run / "report.html").read_bytes()
    user_id = pd.read_parquet(run / "feature_bank.parquet")["user_id"].iat[7]
    printed = run_stage("05_case_study.py", "--run-dir", run, "--user", user_id)
    tables = tables_of((run / "report/user-7.html").read_text(), user_id)
    assert len(tables) >= 4
    for title, rows in tables.items():
        assert title in printed and all(cell[:50] in printed for cell in sum(rows, []))
    assert (run / "report.html").read_bytes() == before
    line = run_stage("05_case_study.py", "--run-dir", run, "--user", "nobody", ok=False)
    assert "--user nobody: there is no such user; for example u" in line


def test_pages_of_cold_users_show_their_support_rows(tmp_path):
    """With ratings and folds, too: the profile read is the one with all evidence."""
    write_table(tmp_path / "raw")
    run_pipeline(tmp_path / "run", tmp_path / "raw", split=("cold-user",), ratings=True, stages=4)
    interactions, bank = (pd.read_parquet(tmp_path / f"run/{name}.parquet")
                          for name in ("interactions", "feature_bank"))
    cold = interactions.loc[interactions["split"] == "support", "user"].iat[0]
    user_id = bank["user_id"].iat[cold]
    printed = run_stage("05_case_study.py", "--run-dir", tmp_path / "run", "--user", user_id)
    mine = interactions[interactions["user"] == cold]
    num_support = (mine["split"] == "support").sum()
    assert f"Had (support rows), the latest {num_support} of {num_support}\n" in printed
    assert 0 < num_support < len(mine) and "Held-out" not in printed


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_a_browser_shows_titles_as_text_fetches_nothing_and_draws_the_page(tagged_report, tmp_path):
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/own"]
    address = tagged_report.as_uri()
    page = subprocess.run([*chromium, "--dump-dom", address], capture_output=True, text=True,
                          timeout=120).stdout
    assert "<title>User inherent profiles</title>" in page and "<script" not in page
    assert "&lt;script&gt;document.title" in page and page.count("<img") == page.count("<img alt=") == 4
    picture = tmp_path / "page.png"
    subprocess.run([*chromium, f"--screenshot={picture}", "--window-size=400,4000", address], timeout=120,
                   capture_output=True)
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (4000, 400) and pixels.std() > 0.05


def test_options_move_what_they_should(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    pages = []
    for options in ((), ("--num-users", 3), ("--seed", 4), ("--num-words", 2), ("--num-scored", 9)):
        run_stage("05_case_study.py", "--run-dir", run, *options)
        pages.append((run / "report.html").read_text())
    assert len(set(pages)) == 5 and pages[1].count("<h3>User ") == 3


def test_a_missing_predecessor_is_named(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    (run / "results.parquet").unlink()
    assert "python 04_train_ctr.py" in run_stage("05_case_study.py", "--run-dir", run, ok=False)


def test_another_tiny_llm_than_that_of_the_profiles_is_refused(small_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run[1], run)
    (run / "tiny_llm/made_from.txt").write_text("another")
    assert "is not the LLM" in run_stage("05_case_study.py", "--run-dir", run, ok=False)


def test_titles_in_a_script_without_spaces_are_measured_by_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["電子書籍", "電子玩具"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    _, words = case_study.vocabulary_words(PreTrainedTokenizerFast(tokenizer_object=bpe), has_spaces=False)
    assert "電子" in words and not any("\ufffd" in word for word in words)
    wins = case_study.held_out_wins([["電子"], ["玩具"]], ["電子書籍", "電子書籍"])
    assert wins.tolist() == [1, 0]
    assert len(case_study.held_out_wins([["a"], ["b"]], [{"c"}, {"c"}])) == 0  # nothing was measured
