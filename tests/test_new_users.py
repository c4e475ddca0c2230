import argparse
import json

import pandas as pd
import torch

from conftest import run_stage, SMALL, run_pipeline, write_table
from userip.artifacts import read_artifacts


def test_new_users_get_the_bits_that_the_run_would_give_them(tmp_path):
    """Cold users of the run come again, later and alone: same profiles, same codes; others are told apart."""
    write_table(tmp_path / "raw")
    run = tmp_path / "run"
    run_pipeline(run, tmp_path / "raw", stages=1, split=["cold-user"])
    for script in list(SMALL)[:2]:
        codes = ["--codes", 2, 2, 2] if script.startswith("03") else []
        run_stage(script, "--run-dir", run, *SMALL[script], *codes, *["--ratings"] * script.startswith("02"))
    options = argparse.Namespace(run_dir=str(run))
    rows, items, users, stored, bank = read_artifacts(
        options, "interactions.parquet", "items.parquet", "users.parquet", "profiles.pt",
        "feature_bank.parquet")
    rows = rows[rows["split"] == "support"].sample(frac=1, random_state=0)
    table = pd.DataFrame({"user_id": users["user_id"].to_numpy()[rows["user"]], "rating": rows["rating"],
                          "item_id": items["item_id"].to_numpy()[rows["item"]]})
    cold = users[users["user"].isin(rows["user"])]
    for chosen in (cold["user_id"], cold["user_id"].iloc[2:3]):
        file = tmp_path / f"new{len(chosen)}.csv"
        stranger = pd.DataFrame({"user_id": ["zz"], "item_id": ["no such item"], "rating": [3]})
        pd.concat([table[table["user_id"].isin(chosen)], stranger]).to_csv(file, index=False)
        told = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file)
        assert f"{len(chosen) + 1} new users, {len(chosen)} of them with evidence" in told
        assert "1 of " in told and "does not know, the first of them 'no such item'" in told
        assert "ratings=" not in told  # nor any other option that the run may have had otherwise
        run_stage("03_quantize.py", "--run-dir", run, "--apply")
        new, codes = read_artifacts(options, "new_profiles.pt", "new_codes.parquet")
        place = users.set_index("user_id")["user"].reindex(new["user_id"][:-1]).to_numpy().astype(int)
        assert new["user_id"][-1] == "zz" and len(place) == len(chosen)
        assert torch.equal(new["profiles"][:-1], stored["profiles"][-1][place])
        assert torch.equal(new["habits"][:-1], stored["habits"][-1][place]) and not new["habits"][-1].any()
        assert (codes[stored["names"]].to_numpy()[:-1] == bank[stored["names"]].to_numpy()[place]).all()
        assert codes[stored["names"]].to_numpy()[-1].tolist() == [2, 2, 2]
    older = table.assign(rating=6 - table["rating"], timestamp=1)  # another verdict, behind in the file
    pd.concat([table.assign(timestamp=2), older]).to_csv(file, index=False)
    told = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file)
    assert f"{len(table)} rows repeat a user and an item: the last one counts" in told
    assert f"{table['user_id'].nunique()} of {table['user_id'].nunique()} users are in the run already" in told
    (new,) = read_artifacts(options, "new_profiles.pt")
    place = users.set_index("user_id")["user"].reindex(new["user_id"]).to_numpy().astype(int)
    assert torch.equal(new["profiles"], stored["profiles"][-1][place])
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", tmp_path / "none.csv",
                     ok=False)
    assert "none.csv is missing" in line
    table.drop(columns="rating").to_csv(file, index=False)
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
    assert "no column rating" in line
    table.assign(user_id=["", *table["user_id"].iloc[1:]]).to_csv(file, index=False)
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
    assert "line 2: user_id is missing" in line
    for strange in ("good", "nan"):
        table.assign(rating=[*table["rating"].iloc[1:], strange]).to_csv(file, index=False)
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert f"line {len(table) + 1}: rating {strange!r} is not a number" in line
    table.assign(rating=table["rating"] * 2).to_csv(file, index=False)  # as of ten stars
    line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
    assert "are not on the scale of the run, 1 to 5, the first of them" in line
    for empty in ("", "user_id,item_id,rating\n"):
        file.write_text(empty)
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert f"{file} has no rows" in line
    path = run / "profiles.pt.json"
    whole = path.read_text()
    for key, value, told in (("prior", "codebook.pt", "--prior"),
                             ("evidence", "review", "--evidence review"),
                             ("method", "gradient", "--method gradient")):
        sidecar = json.loads(whole)
        sidecar["options"][key] = value
        path.write_text(json.dumps(sidecar))
        line = run_stage("02_infer_profiles.py", "--run-dir", run, "--only-users", file, ok=False)
        assert told in line and "2 and 3 without it" in line
