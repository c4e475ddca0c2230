"""Statistics against their textbook forms; tables pair what belongs together and show the paper's figures."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from ctr_data import small_run_of
from userip import ctr_report


def test_the_papers_relative_improvements_come_out():
    """Eq. 10 and 11 on table 2's printed figures; tolerance: what rounding to four digits can do."""
    figures = pd.read_csv(ctr_report.PAPER, index_col=["data", "model", "features"])
    pairs = lambda *key: {data: tuple(figures.loc[data, *key]) for data in ctr_report.PAPER_DATA.values()}
    ours, reference = pairs("dcn", "codes"), pairs("dcn", "none") | {"yelp": pairs("pnn", "none")["yelp"]}
    printed = {"clothing": (4.5548, 3.8199), "movies": (0.5336, 0.3482),
               "games": (3.2755, 6.2992), "yelp": (1.1937, 0.2879)}
    assert np.isnan(ctr_report.rela_impr_auc(0.6, 0.48))  # a worse reference than chance has no scale
    for name, (auc, loss) in printed.items():
        assert ctr_report.rela_impr_auc(ours[name][0], reference[name][0]) == pytest.approx(auc, abs=0.09)
        assert ctr_report.rela_impr_logloss(ours[name][1], reference[name][1]) == pytest.approx(loss, abs=0.025)


def test_a_reference_worse_than_chance_gives_a_dash_and_not_nan():
    frames = [pd.DataFrame({"auc": [auc], "logloss": [0.6]}) for auc in (0.48, 0.6)]
    lines = ctr_report.table_of_means(dict(zip([("dcn", "none"), ("dcn", "codes")], frames)))
    assert lines[-1] == "| dcn | codes | 0.6000 | 0.6000 | – | +0.00 |"


def test_the_paired_interval_is_that_of_a_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 6))
    mean, half, p = ctr_report.paired_interval(first - second, [3] * 6, 0.5)  # seeds of one split
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    assert p == pytest.approx(test.pvalue)


def test_auc_counts_ties_as_half():
    assert roc_auc_score([0, 1, 1], [0.5, 0.5, 0.9]) == pytest.approx(0.75)


def frame_of(gain, splits=(0,), seeds=(1, 0), model="dcn"):
    return pd.DataFrame([{"model": model, "features": name, "split_seed": split, "seed": seed,
                          "auc": 0.6 + 0.1 * seed + 0.02 * split + value, "logloss": 0.6}
                         for name, value in gain.items() for split in splits for seed in seeds])


def groups_of(results):
    return dict(list(results.groupby(["model", "features"], sort=False)))


def test_the_differences_pair_by_split_and_seed():
    results = frame_of({"none": 0.0, "random": 0.01, "codes": 0.03, "truth": 0.05}, splits=(3, 2))
    lines, gains = ctr_report.table_of_differences(groups_of(results), 0.125)
    assert gains["dcn"]["auc_gain"] == pytest.approx(0.02)
    assert gains["dcn"]["auc_half_interval"] == pytest.approx(0, abs=1e-9)
    assert gains["dcn"]["share_of_oracle"] == pytest.approx(0.5)
    assert len(lines) == 2 + 4 and any("codes - random | +0.0200 ± 0.0000" in line for line in lines)


def test_joined_sets_are_compared_with_their_control_their_first_part_and_the_model_means():
    results = frame_of({"leniency16": 0.0, "random+random": 0.01, "leniency16+tfidf": 0.03, "none": 0.02})
    results = pd.concat([frame_of({"none": 0.05}, model="means"), results])
    lines = ctr_report.table_of_differences(groups_of(results), 0.125)[0]
    for text in ("leniency16+tfidf - random+random | +0.0200", "leniency16+tfidf - leniency16 | +0.0300",
                 "leniency16+tfidf - means | -0.0200", "none - means | -0.0300"):
        assert sum(text in line for line in lines) == 1, text
    assert len(lines) == 2 + 4


def test_a_set_that_valid_gave_the_means_says_so_in_both_tables():
    rows = frame_of({"codes": 0.1, "random": 0.0}, splits=(0, 1))
    rows["with_means"] = (rows["features"] == "codes") & (rows["split_seed"] == 1)
    groups = groups_of(rows)
    means, (differences, _) = ctr_report.table_of_means(groups), ctr_report.table_of_differences(groups, 0.1)
    assert any("| codes (means in 1 of 2 draws) |" in line for line in means)
    assert any("| codes (means in 1 of 2 draws) - random |" in line for line in differences)


def test_the_interval_over_splits_is_that_of_their_means_and_wider_by_their_overlap():
    differences, splits = np.random.default_rng(0).normal(size=9), [0, 1, 2] * 3
    means = differences.reshape(3, 3).mean(0)
    mean, half, p = ctr_report.paired_interval(differences, splits, 0.0)
    low, high = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
    _, wide, corrected = ctr_report.paired_interval(differences, splits, 0.125)
    assert wide / half == pytest.approx(np.sqrt((1 / 3 + 0.125) / (1 / 3))) and corrected > p
    for value, p in ((0.0, 1), (1.0, 0)):
        assert ctr_report.paired_interval([value, value], [0, 0], 0.0)[2] == p
    assert np.isnan(ctr_report.paired_interval([1.0], [0], 0.125)[1])  # one run has no interval


def test_seeds_of_one_split_do_not_count_as_splits():
    """Nine differences, alike within each split: three figures are known, not nine"""
    rows = frame_of({"codes": 0.0, "random": 0.0}, splits=(0, 1, 2))
    rows.loc[rows["features"] == "codes", "auc"] += rows["split_seed"] / 100
    line = next(line for line in ctr_report.table_of_differences(groups_of(rows), 0.125)[0]
                if "codes - random" in line)
    half = stats.t.ppf(0.975, 2) * 0.01 * np.sqrt(1 / 3 + 0.125)
    assert f"+0.0100 ± {half:.4f}" in line


def test_the_papers_tables_stand_beside_ours_where_it_is_the_papers_data():
    results = pd.concat([frame_of({"none": 0.0, "codes": 0.1, "dense": 0.05, "cf": 0.0}),
                         frame_of({"none": 0.0, "codes": 0.1}, model="pnn")])
    lines = ctr_report.table_of_means(groups_of(results), "games")
    for line in ("| dcn | none | 0.6500 ± 0.0707 | 0.6000 ± 0.0000 |  |  | 0.7317 | 0.7744 |",
                 "| dcn | cf | 0.6500 ± 0.0707 | 0.6000 ± 0.0000 | +0.00 | +0.00 |  |  |",  # none of the paper's
                 "| dcn | dense | 0.7000 ± 0.0707 | 0.6000 ± 0.0000 | +33.33 | +0.00 | 0.7340 | 0.8429 |",
                 "| pnn | codes | 0.7500 ± 0.0707 | 0.6000 ± 0.0000 | +66.67 | +0.00 | 0.7208 | 0.8076 |"):
        assert line in lines  # tables 2, 3 and 4
    without = "\n".join(ctr_report.table_of_means(groups_of(results)))
    assert "0.7317" not in without and "| pnn | codes | 0.7500" in without
    run = small_run_of()
    run.prepared = {"dataset": "nete", "interactions": 441_783, "split": "random"}
    text, _ = ctr_report.summarize({"seeds": 2, "models": ["dcn", "pnn"]}, results, [run])
    assert "its figures on movies" in text and "`04_train_ctr.py --run-dir RUN --seeds 2 --models dcn pnn`" in text
    run.prepared["interactions"] = 27_024
    assert "its figures" not in ctr_report.summarize({"seeds": 2}, results, [run])[0]
