"""Baselines side by side: each line is compared with its control, on rows of the same split and seed."""

import importlib
import json
from types import SimpleNamespace

import pandas as pd
import pytest

import compare_baselines
from common import with_interval
from userip.ctr_report import paired_interval


def write_rows(path, rows, **columns):
    """rows: {features: [AUC of seeds 0, 1, …]}"""
    frame = pd.DataFrame([{"features": name, "model": "dcn", "split_seed": 0, "seed": seed, "auc": auc,
                           "logloss": 1 - auc} for name, figures in rows.items()
                          for seed, auc in enumerate(figures)])
    path.parent.mkdir(exist_ok=True)
    frame.assign(**columns).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    """What the systems leave in the folder of a split"""
    pd.DataFrame({"split": ["train"] * 8 + ["test"]}).to_parquet(tmp_path / "interactions.parquet")
    write_rows(tmp_path / "results.parquet", {"none": [0.70, 0.72], "random": [0.71, 0.71],
                                              "codes": [0.74, 0.76]})
    cost = {"milliseconds": 20.0, "bytes": 2**20, "tokens_per_user": 300.0, "test_rows": 90}
    write_rows(tmp_path / "baseline-kar.parquet", {"none": [0.60], "random": [0.62], "generated": [0.65]},
               **cost)
    write_rows(tmp_path / "baseline-pepler.parquet", {"mlp": [0.73]}, **cost)
    write_rows(tmp_path / "baseline-rella.parquet",
               {"semantic zero-shot": [0.5], "semantic lora": [0.6, 0.6]}, **cost)
    write_rows(tmp_path / "peapod/results.parquet", {"random": [0.70, 0.70], "codes": [0.73, 0.73]})
    pd.DataFrame({"model": ["item-kNN", "pool", "pool", "shared"],
                  "tokens_per_user": [None, 40, 60, 9]}).to_parquet(tmp_path / "peapod.parquet")
    modes = {name: {"median_10000": 0.0012, "megabytes": size} for name, size in (
        ("DCN", 0.07), ("DCN + bank", 0.08))}
    (tmp_path / "baseline-kar.parquet.json").write_text(json.dumps({"modes": modes}))
    profiles = {"tokens": {"catalogue": 90, "map": 10}, "users": 5}
    (tmp_path / "profiles.pt.json").write_text(json.dumps(profiles))
    return tmp_path


def lines_of(folders, seconds):
    return {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
            for line in compare_baselines.table(folders, seconds)[2:]}


def test_a_line_has_the_difference_to_its_control_and_what_the_system_costs(folder):
    lines = lines_of([folder], [{"codes": 90, "kar": 120, "pepler": 30, "peapod": 60}])
    assert [*lines] == ["DCN, none", "DCN, random codes", "DCN, codes", "KAR, none", "KAR, random",
                        "KAR, generated", "PEPLER", "ReLLa, zero-shot", "ReLLa, LoRA",
                        "DCN, PeaPOD's random codes", "DCN, PeaPOD's codes"]
    assert lines["DCN, none"] == ["2", "all", "0.7100", "0.2900", "–", "–", "–", "1.2", "0.07", "0", "–"]
    codes = lines["DCN, codes"]
    assert codes[4] == "DCN, random codes" and codes[5].startswith("+0.0400 ± 0.127")  # .03 and .05
    assert codes[6].startswith("-0.0400 ± ") and codes[7:] == ["1.2", "0.08", "20", "1.5"]
    assert lines["KAR, generated"][4:6] == ["KAR, random", "+0.0300 (one run, no interval)"]
    assert lines["KAR, generated"][7:] == ["20", "1.00", "300", "2.0"]
    peapod = lines["DCN, PeaPOD's codes"]
    assert peapod[5] == "+0.0300 ± 0.0000" and peapod[7:] == ["1.2", "0.08", "50", "1.0"]
    assert lines["PEPLER"][:2] == ["1", "90"] and lines["PEPLER"][5] == "–"  # its control did not run
    assert lines["ReLLa, LoRA"][5] == "+0.1000 ± 0.0000" and lines["ReLLa, LoRA"][10] == "–"  # of both seeds


def test_intervals_of_several_splits_are_over_their_means(folder, tmp_path):
    """Differences .03 and .05 in the first split, .10 and .12 in the second: .04 and .11, not four figures"""
    other = tmp_path / "other"
    write_rows(other / "results.parquet", {"none": [0.7], "random": [0.60, 0.60], "codes": [0.70, 0.72]})
    frame = pd.read_parquet(other / "results.parquet").assign(split_seed=1)
    frame.to_parquet(other / "results.parquet")
    lines = lines_of([folder, other], [{"codes": 60}, {"codes": 180}])
    mean, half, _ = paired_interval([0.04, 0.11], [0, 1], 1 / 8)
    assert lines["DCN, codes"][5] == with_interval(mean, half) and lines["DCN, codes"][-1] == "2.0"
    assert lines["KAR, generated"][0] == "1"  # the second split has none


def test_systems_run_once_in_order_and_a_real_llm_reads_less(tmp_path, monkeypatch):
    ran, broken = [], []

    def run(script, folder, *options):
        ran.append((script, folder, options))
        if script == "01_prepare.py":
            folder.mkdir(parents=True)
            (folder / "users.parquet.json").write_text("{}")
            (folder / "interactions.parquet.json").write_text('{"options": {"split": "cold-user"}}')
        if script in broken:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare_baselines, "run", run)
    args = SimpleNamespace(llm="SMOL", evidence="titles", systems=["kar"], splits=2)
    folder, of_stage_1 = tmp_path / "split-1", ["--split", "cold-user"]
    assert compare_baselines.climb(args, folder, of_stage_1, 1).keys() == {"kar"}
    assert ran[0] == ("01_prepare.py", folder, ("--split", "cold-user", "--split-seed", 1))
    kar = ran[1][2]
    assert ran[1][0] == "baselines/kar.py" and kar[kar.index("--id-dropout") + 1] == 0.3
    assert kar[kar.index("--max-users") + 1] == 500 and "--tiny-steps" not in kar
    ran.clear()
    args.systems, broken = ["codes", "kar", "pepler", "peapod"], ["03_quantize.py"]
    clock = iter([0, 10, 20, 25, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
    monkeypatch.setattr(compare_baselines.time, "time", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt):  # 10 and 5 seconds of codes
        compare_baselines.climb(args, folder, of_stage_1, 1)
    ran.clear()
    broken.clear()
    seconds = compare_baselines.climb(args, folder, of_stage_1, 1)
    assert {*seconds} == {"codes", "kar", "pepler", "peapod"} and seconds["codes"] == 15 + 3
    scripts = [(script, below.name) for script, below, _ in ran]  # KAR and stage 1 were there
    assert scripts == [("02_infer_profiles.py", "split-1"), ("03_quantize.py", "split-1"),
                       ("04_train_ctr.py", "split-1"), ("baselines/pepler.py", "split-1"),
                       ("baselines/pepler.py", "without-text"), ("baselines/peapod.py", "split-1"),
                       ("03_quantize.py", "peapod"), ("04_train_ctr.py", "peapod")]
    args.llm = "tiny"
    with pytest.raises(SystemExit, match="other options"):
        compare_baselines.climb(args, folder, of_stage_1, 1)
    assert "--max-users" not in str(compare_baselines.steps_of(args, False)["peapod"])


@pytest.mark.parametrize("llm", ["tiny", "models/SmolLM2"])
@pytest.mark.parametrize("evidence", compare_baselines.SETS)
def test_every_script_takes_the_options_of_the_table(llm, evidence):
    for steps in compare_baselines.steps_of(SimpleNamespace(llm=llm, evidence=evidence), True).values():
        for script, _, options in steps:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            module.parse_args([*map(str, options), "--run-dir", "runs/x"])
