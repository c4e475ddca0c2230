import argparse
import importlib
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from baseline_cases import kill_at_call, poisoned, trained_states
from conftest import read_raw, run_process, run_stage, write_amazon, write_interactions, write_table
from userip.artifacts import read_artifacts
from userip.epochs import train_epochs

peapod = importlib.import_module("baselines.peapod")
SMALL = ["--llm", "tiny", "--tiny-steps", 4, "--epochs", 2, "--seeds", 1, "--batch-size", 32, "--rank", 4,
         "--max-history", 8]


def run_peapod(run_dir, *options):
    peapod.main(peapod.parse_args(list(map(str, ["--run-dir", run_dir, *SMALL, *options]))))
    args = argparse.Namespace(run_dir=str(run_dir / "peapod"))
    return read_artifacts(args, "profiles.pt")[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of stage 1 with cold users, and a profile of PeaPOD beside it: read only"""
    folder = tmp_path_factory.mktemp("peapod")
    write_table(folder / "raw")
    run_stage("01_prepare.py", "--dataset", "table", "--raw", folder / "raw", "--run-dir", folder / "run",
              "--split", "cold-user")
    rows = pd.read_parquet(folder / "run/interactions.parquet")
    item = rows["item"][rows["split"] == "test"].iloc[0]  # shall have test rows only
    rows = rows[(rows["item"] != item) | (rows["split"] == "test")].reset_index(drop=True)
    write_interactions(argparse.Namespace(run_dir=folder / "run", seed=0), rows)
    shutil.copytree(folder / "run", folder / "prepared")
    profiles = run_peapod(folder / "run", "--variant", "neighbours", "shared")
    return folder / "prepared", folder / "run", profiles


def test_pool_weights_sum_to_one_and_mix_the_pool():
    torch.manual_seed(0)
    prompt, vectors = peapod.PROMPTS["pool"](4, 6, 2, 5), 9 * torch.randn(7, 4)
    weights = prompt.attention(vectors)
    assert weights.shape == (7, 6) and torch.allclose(weights.sum(1), torch.ones(7)) and (weights >= 0).all()
    for row in range(7):  # Σ_m a_m p_m with a = softmax(W v)
        score = torch.exp(prompt.interest.weight @ vectors[row] + prompt.interest.bias)
        expected = sum(score[m] / score.sum() * prompt.prompts[m] for m in range(6))
        assert torch.allclose(prompt(vectors, None)[row], expected, atol=1e-5)
    assert prompt(vectors, None).std(0).max() > 0.1  # users differ


def test_shared_is_one_prompt_for_all():
    prompt = peapod.PROMPTS["shared"](4, 1, 2, 5)
    assert torch.equal(prompt(torch.randn(7, 4), None), prompt.prompts.expand(7, -1))


def test_training_starts_at_most_popular_and_weight_decay_pulls_back_to_it():
    share = torch.tensor([0.5, 0.3, 0.2])
    model = peapod.PeaPOD(peapod.PROMPTS["pool"](4, 6, 2, 5), torch.randn(3, 5), share, 1.0)
    for shrunk in (1.0, 0.0):  # as weight decay does with all that is trained
        with torch.no_grad():
            for weight in model.parameters():
                weight *= shrunk
        log_p = model.log_probabilities(torch.randn(2, 7, 5))  # whatever the LLM's states are
        assert torch.allclose(log_p.exp(), share.expand(2, 7, 3), atol=1e-6)
    with torch.no_grad():
        model.gain += 1
    assert not torch.allclose(model.log_probabilities(torch.randn(2, 5)).exp(), share.expand(2, 3))


def test_no_value_of_neighbours_is_the_users_own():
    """The user's vector only asks: with one neighbour nothing of it is left"""
    torch.manual_seed(0)
    prompt, neighbours = peapod.PROMPTS["neighbours"](4, 0, 3, 5), torch.randn(2, 1, 4)
    assert torch.equal(prompt(torch.randn(2, 4), neighbours), prompt(torch.randn(2, 4), neighbours))
    neighbours = torch.randn(2, 6, 4)
    weights = prompt.attention(torch.randn(2, 4), neighbours)
    assert weights.shape == (2, 3, 6) and torch.allclose(weights.sum(2), torch.ones(2, 3))
    assert not torch.allclose(prompt(torch.zeros(2, 4), neighbours), prompt(torch.ones(2, 4), neighbours))


def test_end_to_end_and_stage_3_reads_its_profiles(prepared):
    _, run_dir, profiles = prepared
    table = pd.read_parquet(run_dir / "peapod.parquet")
    assert set(table["model"]) == {"most popular", "item-kNN", "Markov chain", "neighbours", "shared"}
    assert set(table["task"]) == {"sequential", "top-n"}
    assert table.filter(regex="@").apply(lambda column: column.between(0, 1)).all(axis=None)
    trained = table["model"].isin(["neighbours", "shared"])
    assert (table.loc[trained, ["tokens_per_user", "seconds"]] > 0).all(axis=None)
    assert profiles["profiles"].shape == (6, 60, 1, 3 * 128) and profiles["has_evidence"].all()
    rows = pd.read_parquet(run_dir / "interactions.parquet")
    counts = rows[rows["split"].isin(["train", "support"])].groupby("user").size()
    assert profiles["num_evidence"][-1, :, 0].tolist() == counts.tolist()
    in_folds = (profiles["num_evidence"][-1] - profiles["num_evidence"][:-1]).sum(0)[:, 0]
    assert in_folds.tolist() == rows[rows["split"] == "train"].groupby("user").size().reindex(
        range(60), fill_value=0).tolist()  # each train row is in one fold
    printed = run_stage("03_quantize.py", "--codes", 3, "--epochs", 2, "--run-dir", run_dir / "peapod")
    assert "wrote" in printed and len(pd.read_parquet(run_dir / "peapod/train_codes.parquet")) == sum(
        rows["split"] == "train")


def test_poisoned_test_rows_change_nothing_that_is_trained(prepared, tmp_path):
    source, run_dir, profiles = prepared
    poisoned(source, tmp_path / "run")
    again = run_peapod(tmp_path / "run", "--variant", "neighbours", "shared")
    for name in ("profiles", "noise", "fold"):
        assert torch.equal(profiles[name], again[name]), name
    assert trained_states(run_dir) == trained_states(tmp_path / "run") and len(trained_states(run_dir)) == 2


def test_a_killed_run_goes_on_with_the_same_bits(prepared, tmp_path, monkeypatch, capsys):
    source, _, profiles = prepared
    run_dir = tmp_path / "run"
    shutil.copytree(source, run_dir)
    kill_at_call(monkeypatch, peapod, "train_epoch", 2)
    with pytest.raises(KeyboardInterrupt):
        run_peapod(run_dir, "--variant", "neighbours")
    again = run_peapod(run_dir, "--variant", "neighbours")
    assert "neighbours seed 0: 1 epochs were finished before" in capsys.readouterr().out
    assert len([*run_dir.glob("baselines/peapod/*.pt")]) == 1  # a training's state, not one an epoch
    for name in ("profiles", "noise", "shared"):
        assert torch.equal(profiles[name], again[name]), name


@pytest.mark.parametrize("falls, expected", [(True, [0.4, 0.3, 0.2, 0.1]), (False, [0.4] * 4)])
def test_the_learning_rate_falls_linearly_where_it_shall(falls, expected):
    rates = []
    finished = argparse.Namespace(read=lambda key: None, write=lambda key, state: None, seconds=0.0)

    def epoch(optimizer, generator):
        rates.extend(group["lr"] for group in optimizer.param_groups)
        return {}, -len(rates)

    args = argparse.Namespace(lr=0.4, weight_decay=0.0, epochs=4, patience=1)
    train_epochs(args, finished, ["x", 0], torch.nn.Linear(1, 1), epoch, rate_falls=falls)
    assert rates == pytest.approx(expected)


def test_an_epoch_has_at_most_so_many_prompts_of_each_task(monkeypatch):
    seen = {}
    tasks = {name: lambda model, run, index, fold, name=name: seen.setdefault(name, []).extend(index.tolist())
             or (model * 0).sum() for name in ("sequential_loss", "top_n_loss", "explanation_loss")}
    for name, task in tasks.items():
        task.__name__ = name
        monkeypatch.setattr(peapod, name, task)
    run = argparse.Namespace(sequences=range(9), warm=range(4), texts=[])
    weight = torch.nn.Parameter(torch.zeros(1))
    losses = peapod.train_epoch(argparse.Namespace(prompts=6, batch_size=4), run, weight,
                                torch.optim.SGD([weight], lr=0.1), torch.Generator().manual_seed(0))
    assert losses == {"sequential": 0.0, "top_n": 0.0}
    assert len(set(seen["sequential_loss"])) == 6 and sorted(seen["top_n_loss"]) == [0, 1, 2, 3]


def test_tokens_per_user_are_those_that_the_llm_reads_in_all_epochs(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "run")
    rows = pd.read_parquet(tmp_path / "run/interactions.parquet")
    rows["review"] = np.where(rows["user"] % 9 == 1, "Good it was. More.", None)
    write_interactions(argparse.Namespace(run_dir=tmp_path / "run", seed=0), rows)
    args = peapod.parse_args(["--run-dir", str(tmp_path / "run"), *map(str, SMALL)])
    run = peapod.set_up(args, data := peapod.read_data(args))
    model = peapod.PeaPOD(peapod.PROMPTS["pool"](4, 6, 3, run.item_text.shape[1]), run.item_text, run.share,
                          run.scale)
    read = []
    run.llm.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True)
    for index in range(len(run.sequences)):  # one by one, so that there are no pads
        peapod.sequential_loss(model, run, torch.tensor([index]), 0)
    for index in range(len(run.warm)):
        peapod.top_n_loss(model, run, torch.tensor([index]), 0)
    for index in range(len(run.texts)):
        peapod.explanation_loss(model, run, torch.tensor([index]), 0)
    assert len(run.texts) > 10
    assert peapod.tokens_per_user(args, run, 3) == pytest.approx(3 * sum(read) / data.num_users)
    args.prompts = 10
    parts = np.split(read, np.cumsum([len(run.sequences), len(run.warm)]))
    assert peapod.tokens_per_user(args, run, 3) == pytest.approx(
        3 * sum(10 * np.mean(part) for part in parts) / data.num_users)


def test_in_training_no_interest_has_seen_the_rating_of_its_target(prepared, tmp_path, monkeypatch):
    """Each loss asks for interests without a fold, and its targets are the train rows of this fold"""
    shutil.copytree(prepared[0], tmp_path / "run")
    rows = pd.read_parquet(tmp_path / "run/interactions.parquet")
    rows["review"] = np.where(rows["user"] % 2 == 1, "Good. More.", None)
    write_interactions(argparse.Namespace(run_dir=tmp_path / "run", seed=0), rows)
    args = peapod.parse_args(["--run-dir", str(tmp_path / "run"), *map(str, SMALL)])
    data = peapod.read_data(args)
    run, seen = peapod.set_up(args, data), {}
    prompt = peapod.PROMPTS["pool"](4, 6, 3, run.item_text.shape[1])
    model = peapod.PeaPOD(prompt, run.item_text, run.share, run.scale)
    train, soft = data.split["train"].assign(fold=run.pmf.fold.numpy()), model.soft
    monkeypatch.setattr(model, "soft", lambda run, users, fold: seen.update(fold=fold) or soft(run, users, fold))
    log_probabilities = lambda hidden: seen.update(log_p=torch.randn(
        *hidden.shape[:-1], data.num_items).log_softmax(-1).requires_grad_()) or seen["log_p"]
    monkeypatch.setattr(model, "log_probabilities", log_probabilities)
    for fold in (0, 3):
        own, index = train[train["fold"] == fold], torch.arange(len(run.sequences))
        peapod.sequential_loss(model, run, index, fold).backward()
        assert seen["fold"] == fold and len(seen["log_p"]) == len(own)
        asked = seen["log_p"].grad.nonzero()[:, 1].tolist()
        assert sorted(asked) == sorted(own["item"])
        peapod.top_n_loss(model, run, torch.arange(len(run.warm)), fold).backward()
        users, items = seen["log_p"].grad.nonzero().T.tolist()
        pairs = {(int(run.warm[user]), item) for user, item in zip(users, items)}
        assert seen["fold"] == fold and pairs == {*zip(own["user"], own["item"])}
    told, index = train[train["user"] % 2 == 1], torch.tensor([0, 5, 20, 3])
    peapod.explanation_loss(model, run, index, 0)
    assert seen["fold"].tolist() == told["fold"].iloc[index].tolist()  # of each row its own
    assert len(run.texts) == len(told) and len(set(seen["fold"].tolist())) > 1


def test_without_a_train_review_nothing_is_explained(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "run")
    rows = pd.read_parquet(tmp_path / "run/interactions.parquet")
    rows["review"] = np.where(rows["split"] == "test", "Good. More.", None)
    write_interactions(argparse.Namespace(run_dir=tmp_path / "run", seed=0), rows)
    run_peapod(tmp_path / "run", "--variant", "pool")
    assert "explanation" not in set(pd.read_parquet(tmp_path / "run/peapod.parquet")["task"])


def test_reviews_are_explained_by_a_process_of_its_own(tmp_path):
    write_amazon(tmp_path / "raw", 2023)
    read_raw(tmp_path, "amazon")
    printed = run_process("baselines/peapod.py", "--run-dir", tmp_path / "run", *SMALL, "--variant", "pool",
                          "--max-texts", 5)
    table = pd.read_parquet(tmp_path / "run/peapod.parquet").set_index(["task", "model"])
    assert "sequential NDCG@10" in printed
    figures = table.loc["explanation"]
    assert figures.index.tolist() == ["item's last review", "pool"]
    assert figures[["bleu4", "rouge1", "rougeL", "distinct1", "usr"]].apply(
        lambda column: column.between(0, 1)).all(axis=None)
    assert 1 <= figures["users"].iloc[0] <= 5
