"""Baselines side by side: each line is compared with its control, on rows of the same split and seed."""

import importlib
import json
from types import SimpleNamespace

import pandas as pd
import pytest

import compare_baselines


def write_rows(path, rows, **columns):
    """rows: {features: [AUC of seeds 0, 1, …]}"""
    frame = pd.DataFrame([{"features": name, "model": "dcn", "split_seed": 0, "seed": seed, "auc": auc,
                           "logloss": 1 - auc} for name, figures in rows.items()
                          for seed, auc in enumerate(figures)])
    path.parent.mkdir(exist_ok=True)
    frame.assign(**columns).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    """What the systems leave in the folder of a split; nothing of ReLLa"""
    pd.DataFrame({"split": ["train"] * 8 + ["test"]}).to_parquet(tmp_path / "interactions.parquet")
    write_rows(tmp_path / "results.parquet", {"none": [0.70, 0.72], "random": [0.71, 0.71],
                                              "codes": [0.74, 0.76]})
    cost = {"milliseconds": 20.0, "bytes": 2**20, "tokens_per_user": 300.0, "test_rows": 90}
    write_rows(tmp_path / "baseline-kar.parquet", {"none": [0.60], "random": [0.62], "generated": [0.65]}, **cost)
    write_rows(tmp_path / "baseline-pepler.parquet", {"mlp": [0.73]}, **cost)
    write_rows(tmp_path / "peapod/results.parquet", {"random": [0.70, 0.70], "codes": [0.73, 0.73]})
    pd.DataFrame({"model": ["item-kNN", "pool", "pool", "shared"],
                  "tokens_per_user": [None, 40, 60, 9]}).to_parquet(tmp_path / "peapod.parquet")
    modes = {name: {"median_10000": 0.0012, "megabytes": size} for name, size in (
        ("DCN", 0.07), ("DCN + bank", 0.08))}
    (tmp_path / "baseline-kar.parquet.json").write_text(json.dumps({"modes": modes}))
    (tmp_path / "profiles.pt.json").write_text(json.dumps({"tokens": {"catalogue": 90, "map": 10}, "users": 5}))
    return tmp_path


def test_a_line_has_the_difference_to_its_control_and_what_the_system_costs(folder):
    seconds = [{"codes": 90, "kar": 120, "pepler": 30, "peapod": 60}]
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
             for line in compare_baselines.table([folder], seconds)[2:]}
    assert [*lines] == ["DCN, none", "DCN, random codes", "DCN, codes", "KAR, none", "KAR, random",
                        "KAR, generated", "PEPLER", "DCN, PeaPOD's random codes", "DCN, PeaPOD's codes"]
    assert lines["DCN, none"] == ["2", "all", "0.7100", "0.2900", "–", "–", "–", "1.2", "0.07", "0", "1.5"]
    codes = lines["DCN, codes"]
    assert codes[4] == "DCN, random codes" and codes[5].startswith("+0.0400 ± 0.127")  # .03 and .05
    assert codes[6].startswith("-0.0400 ± ") and codes[7:] == ["1.2", "0.08", "20", "1.5"]
    assert lines["KAR, generated"][4:6] == ["KAR, random", "+0.0300 (one run, no interval)"]
    assert lines["KAR, generated"][7:] == ["20", "1.00", "300", "2.0"]
    peapod = lines["DCN, PeaPOD's codes"]
    assert peapod[5] == "+0.0300 ± 0.0000" and peapod[7:] == ["1.2", "0.08", "50", "1.0"]
    assert lines["PEPLER"][:2] == ["1", "90"] and lines["PEPLER"][5].startswith("+0.0300 (")  # seed 0 alone


def test_systems_run_once_in_order_and_a_real_llm_reads_less(tmp_path, monkeypatch):
    ran = []

    def run(script, folder, *options):
        ran.append((script, folder, options))
        if script == "01_prepare.py":
            folder.mkdir(parents=True)
            (folder / "users.parquet.json").write_text("{}")
            (folder / "interactions.parquet.json").write_text('{"options": {"split": "cold-user"}}')

    monkeypatch.setattr(compare_baselines, "run", run)
    args = SimpleNamespace(llm="SMOL", evidence="titles", systems=["kar"])
    folder = tmp_path / "split-1"
    assert compare_baselines.climb(args, folder, ["--split", "cold-user"], 1).keys() == {"kar"}
    assert ran[0] == ("01_prepare.py", folder, ("--split", "cold-user", "--split-seed", 1))
    kar = ran[1][2]
    assert ran[1][0] == "baselines/kar.py" and kar[kar.index("--id-dropout") + 1] == 0.3
    assert kar[kar.index("--max-users") + 1] == 500 and "--tiny-steps" not in kar
    ran.clear()
    args = SimpleNamespace(llm="tiny", evidence="titles", systems=["codes", "kar", "peapod"])
    assert compare_baselines.climb(args, folder, [], 1).keys() == {"codes", "kar", "peapod"}
    scripts = [(script, below.name) for script, below, _ in ran]  # KAR and stage 1 were there
    assert scripts == [("02_infer_profiles.py", "split-1"), ("03_quantize.py", "split-1"),
                       ("04_train_ctr.py", "split-1"), ("baselines/peapod.py", "split-1"),
                       ("03_quantize.py", "peapod"), ("04_train_ctr.py", "peapod")]
    assert "--max-users" not in ran[3][2] and "--tiny-steps" in ran[3][2]


@pytest.mark.parametrize("llm", ["tiny", "models/SmolLM2"])
@pytest.mark.parametrize("evidence", compare_baselines.SETS)
def test_every_script_takes_the_options_of_the_table(llm, evidence):
    for steps in compare_baselines.steps_of(SimpleNamespace(llm=llm, evidence=evidence), True).values():
        for script, _, options in steps:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            module.parse_args([*map(str, options), "--run-dir", "runs/x"])
