"""The item bank: states as the LLM has them, the regression of the library, and no rating in its own item's code."""

import argparse
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from torch.nn import functional as F

from conftest import ctr, dies, run_stage, save_llm, SMALL, write_table
from llm_cases import ITEMS, prompt_of
from test_checks import overwrite
from userip import item_bank
from userip.artifacts import read_artifacts
from userip.evidence import item_pieces, item_texts, join
from userip.item_bank import (codewords, fit_ridge, foretell, hidden_states, nearest, similarity,
                              weighted_correlation)

SMALL_ITEMS = {"02_infer_profiles.py": [*SMALL["02_infer_profiles.py"][4:], "--items"],  # without a tiny LLM
               "03_quantize.py": [*SMALL["03_quantize.py"], "--stability", 0, "--item-codes", 3]}


def test_an_items_vector_is_the_mean_of_the_states_that_the_llm_has_behind_the_whole_prompt(llm, monkeypatch):
    """Against one text at a time, the long way; texts of several lengths in one batch, in any order."""
    monkeypatch.setattr(item_bank, "DEPTHS", (0, 0.5, 1))
    model, tokenizer = llm
    prompt = prompt_of(llm)
    soft = prompt.random_soft(1, torch.Generator().manual_seed(0))[0]
    index = torch.tensor([3, 0, 1, 4])
    vectors = hidden_states(prompt, item_texts(prompt, tokenizer, ITEMS), soft, index, 4096)
    layers = [int(depth * model.config.num_hidden_layers) for depth in (0, 0.5, 1)]
    shift = 1 if tokenizer.tokenize("a")[0].startswith("▁") else 0
    for vector, item in zip(vectors, ITEMS.iloc[index.tolist()].itertuples()):
        text = join(item_pieces(item, ("category", "title", "brand")))
        assert item.title in text and "$" not in text
        ids = torch.tensor([tokenizer(text[shift:], add_special_tokens=False).input_ids])
        embeddings, mask, position = prompt.inputs(soft[None], ids, torch.ones(1, 2, dtype=torch.bool))
        with torch.no_grad():
            states = model.base_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                                      output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer][0, -ids.shape[1]:].mean(0) for layer in layers])
        assert torch.allclose(vector, expected, atol=1e-4)


def planted(num_items=60, num_users=80, num_rows=3000, seed=0):
    """Vectors whose first number decides how an item is rated; no row of the last five items"""
    rng = np.random.default_rng(seed)
    vectors = torch.from_numpy(rng.normal(size=(num_items, 6))).float()
    vectors[-5:, 0] = torch.linspace(-2, 2, 5)
    rows = pd.DataFrame({"user": rng.integers(num_users, size=num_rows),
                         "item": rng.integers(num_items - 5, size=num_rows)}).drop_duplicates()
    quality = vectors[:, 0].numpy()[rows["item"]]
    return vectors, rows.assign(rating=(3 + quality + rng.normal(size=len(rows))).clip(1, 5))


def test_the_code_of_an_item_says_how_it_is_rated_also_where_nobody_has_rated_it():
    vectors, train = planted()
    found = foretell(vectors, train, 0, 4)
    assert np.corrcoef(found.values, vectors[:, 0])[0, 1] > 0.75 and set(found.codes.tolist()) == {0, 1, 2, 3}
    assert found.is_warm.tolist() == [True] * 55 + [False] * 5
    assert np.corrcoef(found.codes[-5:], vectors[-5:, 0])[0, 1] > 0.7


def test_values_are_those_of_the_librarys_kernel_ridge_in_a_loop_over_the_folds(monkeypatch):
    vectors, train = planted()
    values = foretell(vectors, train, 0, 4).values
    fold = np.random.default_rng([0, 4]).permutation(60) % 10
    numbers = vectors.numpy()[:55]  # of items with train rows
    z = (vectors.numpy() - numbers.mean(0)) / numbers.std(0)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    kernel = np.exp(item_bank.STEEPNESS * (z @ z.T - 1))
    for left_out in range(10):
        rows = train[fold[train["item"]] != left_out]
        target, weight = item_bank.residual_means(rows, 60)
        known = np.flatnonzero(weight > 0)
        assert not (fold[known] == left_out).any()
        weight = weight[known] / weight[known].mean()
        mean = np.average(target[known], weights=weight)
        ridge = KernelRidge(alpha=item_bank.RIDGE, kernel="precomputed")
        ridge.fit(kernel[np.ix_(known, known)], target[known] - mean, sample_weight=weight)
        expected = mean + ridge.predict(kernel[np.ix_(fold == left_out, known)])
        assert np.allclose(values[torch.from_numpy(fold == left_out)], expected, atol=1e-4)
    monkeypatch.setattr(item_bank, "MOST_LANDMARKS", 20)  # more items than the regression may have
    few = foretell(vectors, train, 0, 4)
    assert len(few.fitted["landmarks"]) == 20 and np.corrcoef(few.values, values)[0, 1] > 0.7
    count = np.bincount(train["item"], minlength=60)
    kept = [row in few.fitted["landmarks"].tolist() for row in vectors.tolist()]
    assert count[kept].min() >= np.sort(count)[-20]


def test_no_rating_of_an_items_own_fold_is_in_its_code_and_no_text_of_unrated_items_in_that_of_others():
    vectors, train = planted()
    before = foretell(vectors, train, 0, 40)  # so many that codewords of other folds' values would show
    fold = np.random.default_rng([0, 4]).permutation(60) % 10
    for left_out in (0, 7):
        is_own = fold[train["item"]] == left_out
        other = train.assign(rating=np.where(is_own, 6 - train["rating"], train["rating"]))
        after, own = foretell(vectors, other, 0, 40), torch.from_numpy(fold == left_out)
        assert torch.equal(after.values[own], before.values[own]) and torch.equal(after.codes[own], before.codes[own])
        assert not torch.equal(after.values[~own], before.values[~own])
    poisoned = vectors.clone()
    poisoned[-5:] = 100 * poisoned[-5:].flip(1)
    after = foretell(poisoned, train, 0, 40)
    assert torch.equal(after.codes[:55], before.codes[:55]) and torch.equal(after.values[:55], before.values[:55])
    assert all(torch.equal(after.fitted[name], part) for name, part in before.fitted.items())
    assert not torch.equal(after.values[55:], before.values[55:])


def test_codewords_are_middle_quantiles_and_the_nearest_is_the_code():
    values = torch.arange(80, dtype=torch.float64)
    codebook = codewords(values, 4)
    assert torch.allclose(codebook[:, 0], torch.tensor([9.875, 29.625, 49.375, 69.125]))
    assert torch.equal(nearest(values, codebook), torch.arange(4).repeat_interleave(20))
    assert codewords(values[:0], 4).tolist() == [[0.0]] * 4  # a fold without an item that has rows


def test_similarity_is_one_of_equals_and_small_differences_in_scale_do_not_count():
    vectors = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    mean, scale = vectors.mean(0), vectors.std(0)
    kernel = similarity(vectors, vectors, mean, scale)
    assert torch.allclose(kernel.diagonal(), torch.ones(5)) and torch.allclose(kernel, kernel.T, atol=1e-6)
    cosine = F.cosine_similarity((vectors[0] - mean) / scale, (vectors[1] - mean) / scale, dim=0)
    assert kernel[0, 1].item() == pytest.approx(np.exp(2 * (cosine.item() - 1)), abs=1e-5)
    again = similarity(10 * vectors, 10 * vectors, 10 * mean, 10 * scale)
    assert torch.allclose(again, kernel, atol=1e-5)
    coefficients, intercept = fit_ridge(torch.eye(3), torch.tensor([1.0, 2, 6]).double(), torch.ones(3).double())
    assert intercept == 3 and torch.allclose(coefficients, torch.tensor([-2.0, -1, 3]).double() / 3)


def test_weighted_correlation_is_numpys_of_repeated_rows():
    rng = np.random.default_rng(0)
    one, two, weight = rng.normal(size=9), rng.normal(size=9), rng.integers(1, 4, size=9)
    expected = np.corrcoef(one.repeat(weight), two.repeat(weight))[0, 1]
    assert weighted_correlation(one, two, weight) == pytest.approx(expected)


@pytest.fixture(scope="module")
def item_runs(tmp_path_factory):
    """Two runs of stages 1 to 3 on cold items: as they are, and with other ratings of valid and test rows and
    other titles of the items that only test rows have
    """
    folder = tmp_path_factory.mktemp("item_bank")
    llm = save_llm(folder / "llm", "gpt2")
    interactions, items = write_table(folder / "plain", suffix=".csv")
    runs = [folder / "run_plain", folder / "run_poisoned"]

    def run(number, raw, *scripts):
        run_stage("01_prepare.py", "--dataset", "table", "--raw", raw, "--run-dir", runs[number],
                  "--split", "cold-item")
        for script in scripts:
            run_stage(script, "--run-dir", runs[number], *["--llm", llm] * script.startswith("02"),
                      *SMALL_ITEMS[script])

    run(0, folder / "plain", *SMALL_ITEMS)
    table, stored, users = read_artifacts(argparse.Namespace(run_dir=runs[0]), "interactions.parquet",
                                          "items.parquet", "users.parquet")
    table = table.assign(user_id=users["user_id"].to_numpy()[table["user"]],
                         item_id=stored["item_id"].to_numpy()[table["item"]])
    split = interactions.merge(table[["user_id", "item_id", "split"]], how="left")["split"]
    only_test = set(table["item_id"]) - set(table.loc[table["split"] != "test", "item_id"])
    (folder / "poisoned").mkdir()
    interactions["rating"] = interactions["rating"].where(split == "train", 6 - interactions["rating"])
    interactions.to_csv(folder / "poisoned/interactions.csv", index=False)
    items.assign(title=items["title"] + np.where(items["item_id"].isin(only_test), " a sport", "")).to_csv(
        folder / "poisoned/items.csv", index=False)
    run(1, folder / "poisoned", *SMALL_ITEMS)
    return runs, items, only_test


def test_valid_and_test_rows_and_titles_of_unrated_items_leave_no_trace_in_other_items_codes(item_runs):
    runs, _, only_test = item_runs
    names = "item_bank.parquet", "item_codebook.pt", "item_vectors.pt"
    before, after = (read_artifacts(argparse.Namespace(run_dir=run), *names) for run in runs)
    is_cold = before[0]["item_id"].isin(only_test).to_numpy()
    assert 0 < is_cold.sum() < 10 and before[0]["code"].isin(range(3)).all()
    pd.testing.assert_frame_equal(before[0][~is_cold], after[0][~is_cold])
    assert all(torch.equal(after[1][name], part) for name, part in before[1].items())
    vectors = [stored[2]["vectors"] for stored in (before, after)]
    assert torch.equal(*(part[torch.tensor(~is_cold)] for part in vectors))
    assert not torch.allclose(*(part[torch.tensor(is_cold)] for part in vectors), atol=1e-3)


def test_stage_4_reads_the_code_of_each_rows_item_and_its_control_deals_codes_to_items(item_runs):
    run_dir = item_runs[0][0]
    bank, table = read_artifacts(argparse.Namespace(run_dir=run_dir), "item_bank.parquet", "interactions.parquet")
    features = ["codes+items", "random+random"]
    run, args = ctr.read_run(run_dir, features), argparse.Namespace(features=features, with_means=False)
    fields, sizes, _ = ctr.further_fields(args, "codes+items", run, 0)
    dealt, dealt_sizes, _ = ctr.further_fields(args, "random+random", run, 0)
    assert sizes == dealt_sizes == [3, 3, 3]  # two profiles with "unknown", and the item
    for name in ("train", "test"):
        rows = table[table["split"] == name]
        assert fields[name][:, 2].tolist() == bank["code"].to_numpy()[rows["item"]].tolist()
        pairs = set(zip(rows["item"], dealt[name][:, 2]))
        assert len(pairs) == rows["item"].nunique() and dealt[name][:, 2].tolist() != fields[name][:, 2].tolist()


def test_new_items_get_the_codes_of_items_with_their_texts(item_runs, tmp_path):
    """The run's own items come again as new ones: their vectors to rounding, the codes of all evidence"""
    (run, _), items, _ = item_runs
    options = argparse.Namespace(run_dir=run)
    items.iloc[::-1].to_csv(tmp_path / "new.csv", index=False)
    run_stage("02_infer_profiles.py", "--run-dir", run, "--only-items", tmp_path / "new.csv")
    assert "40 new items" in run_stage("03_quantize.py", "--apply", "items", "--run-dir", run)
    stored, new, fitted, codes = read_artifacts(options, "item_vectors.pt", "new_item_vectors.pt", "item_codebook.pt",
                                                "new_item_codes.parquet")
    known = read_artifacts(options, "items.parquet")[0].set_index("item_id")["item"].reindex(codes["item_id"])
    assert torch.allclose(new["vectors"], stored["vectors"][torch.tensor(known.to_numpy())], atol=1e-4)
    kernel = similarity(new["vectors"], fitted["landmarks"], fitted["mean"], fitted["scale"]).double()
    values = kernel @ fitted["coefficients"] + fitted["intercept"]
    expected = (values[:, None] - fitted["codebook"].T).abs().argmin(1)
    assert codes["code"].tolist() == expected.tolist() and codes["code"].nunique() > 1
    for content, problem in (("item_id,title\na,one\na,two\n", "has the item_id 'a' twice"),
                             ("item_id\na\n", "no column title"), ("item_id,title\n", "has no rows"),
                             (f"item_id,title\na,{'red racer ' * 600}\n", "needs 1,2")):
        (tmp_path / "odd.csv").write_text(content)
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-items", tmp_path / "odd.csv", ok=False)
        assert problem in line, line
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-items", tmp_path / "new.csv", "--ratings",
                     ok=False)
    assert "--only-items takes all options from the run: leave out --ratings" in line


@pytest.mark.parametrize("name, change, problem", [
    ("item_bank.parquet", lambda f: f.assign(code=3), "a code above 2 in column code"),
    ("item_bank.parquet", lambda f: f.drop(columns="code"), "has no column code"),
    ("item_bank.parquet", lambda f: f.iloc[:9], "number of items"),
    ("item_bank.parquet", lambda f: f.assign(item_id=f["item_id"].to_numpy()[::-1]), "has the item_ids"),
    ("item_vectors.pt", lambda s: {"vectors": s["vectors"][:9]}, "does not fit"),
    ("item_vectors.pt", lambda s: {"vectors": s["vectors"] * np.nan}, "not finite"),
    ("item_codebook.pt", lambda s: s | {"landmarks": s["landmarks"][:, :9]}, "does not fit"),
    ("item_codebook.pt", lambda s: s | {"coefficients": s["coefficients"].float()}, "no tensor coefficients")])
def test_item_banks_that_no_stage_writes_are_refused_by_name(item_runs, tmp_path, capsys, name, change, problem):
    run = shutil.copytree(item_runs[0][0], tmp_path / "run")
    path = run / name
    overwrite(run, name, change(pd.read_parquet(path) if path.suffix == ".parquet" else torch.load(path)))
    names = "items.parquet", "item_vectors.pt", "item_codebook.pt", "item_bank.parquet"
    line = dies(capsys, read_artifacts, argparse.Namespace(run_dir=str(run)), *names)
    assert name in line and problem in line, line


def test_a_run_without_items_refuses_what_reads_them(small_run, tmp_path):
    run = small_run[1]
    (tmp_path / "new.csv").write_text("item_id,title\na,one\n")
    for script, options in (("02_infer_profiles.py", ["--only-items", tmp_path / "new.csv"]),
                            ("03_quantize.py", ["--item-codes", 4]), ("04_train_ctr.py", ["--features", "items"])):
        line = run_stage(script, "--run-dir", run, *options, ok=False)
        assert "--items" in line and "item_bank" not in line, line
    assert not (run / "item_bank.parquet").exists()
