import numpy as np
import pandas as pd
import pytest
import torch

from conftest import dies
from llm_cases import events_of, prompt_of, routes_for, run_of, soft_for
from userip.heldout import heldout_events, heldout_nll, interval


def test_users_who_choose_and_users_who_report_are_not_the_same(llm):
    rows = pd.DataFrame({"user": [0, 1, 2, 3, 3, 4], "item": [0, 1, 2, 3, 4, 0]})
    rows["split"] = 5 * ["valid"] + ["test"]
    events = events_of(rows["user"].tolist(), rows["item"].tolist())
    tune, report = heldout_events(rows, events, routes_for(llm), (100, 100), seed=0)
    assert sorted(tune.user.tolist()) == [0, 2] and sorted(report.user.tolist()) == [1, 3, 3]
    assert report.item.tolist() == [1, 3, 4] and report.row.tolist() == [1, 3, 4]
    tune, report = heldout_events(rows, events, routes_for(llm), (1, 2), seed=0)
    assert len(tune.user) == 1 and len(report.user) == 2


def test_both_halves_have_users_whatever_their_numbers(llm, capsys):
    rows = pd.DataFrame({"user": [0, 2, 4, 6], "item": [0, 1, 2, 3], "split": "valid"})
    events = events_of(rows["user"].tolist(), rows["item"].tolist())
    tune, report = heldout_events(rows, events, routes_for(llm), (9, 9), seed=0)
    assert tune.user.tolist() == [0, 4] and report.user.tolist() == [2, 6]
    alone = events.select(torch.tensor([0]))
    assert "of one user only" in dies(capsys, heldout_events, rows[:1], alone, routes_for(llm), (9, 9), 0)


def test_one_profile_for_all_rows_reads_each_text_once(llm):
    run = run_of(llm, prompt_of(llm), routes_for(llm), events_of([0, 1, 2, 3], [0, 0, 1, 0]))
    soft = soft_for(run.prompt, 1)
    each = heldout_nll(run, soft.expand(4, -1, -1), run.report)
    num_tokens = run.prompt.num_tokens.total()
    once = heldout_nll(run, soft, run.report)
    assert torch.allclose(each[0], once[0], atol=1e-4) and torch.equal(each[1], once[1])
    assert run.prompt.num_tokens.total() - num_tokens == sum(
        int(route.texts.length[[0, 1]].sum()) for route in run.routes)


def test_a_user_interval_is_that_of_the_ratio():
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(5, 15, size=4000)).float()
    difference = -0.1 * tokens + torch.tensor(rng.standard_normal(4000)).float()
    mean, half = interval(difference, tokens)
    assert abs(mean + 0.1) < half < 0.01
    assert half == pytest.approx(1.96 / np.sqrt(4000) / float(tokens.mean()), rel=0.05)
