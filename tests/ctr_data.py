"""Small data for the tests of stage 4 and its rooms."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

SPLITS = "train", "valid", "test"


def small_split(num_users=300, num_items=20, seed=0):
    """Frames by split; users 0 to 279 have train, valid and test rows, the others support and test rows."""
    rng = np.random.default_rng(seed)
    generous = rng.normal(size=num_users)
    rows = pd.DataFrame([(user, item) for user in range(num_users)
                         for item in rng.choice(num_items, 8, replace=False)], columns=["user", "item"])
    rows["rating"] = 3 + generous[rows["user"]] + 0.3 * rng.normal(size=len(rows))
    rows["label"] = (rows["rating"] > 3).astype(int)
    position = rows.groupby("user").cumcount()
    warm = np.where(position < 6, "train", np.where(position < 7, "valid", "test"))
    name = np.where(rows["user"] < 280, warm, np.where(position < 4, "support", "test"))
    return {key: rows[name == key] for key in ("train", "valid", "test", "support")}, generous


def small_run_of(split=None, seed=0):
    """What read_run gives: users' codes decide, with the item's, whether they like it."""
    rng = np.random.default_rng(seed)
    split = split or small_split()[0]
    num_users = 1 + max(int(frame["user"].max()) for frame in split.values())
    codes = np.stack([rng.integers(4, size=num_users), rng.integers(3, size=num_users)], 1)
    for name, frame in split.items():
        likes = (codes[frame["user"], 0] + frame["item"]) % 4 < 2
        label = np.where(rng.random(len(frame)) < 0.1, ~likes, likes).astype(np.int8)
        split[name] = frame.assign(label=label)
    items = pd.DataFrame({"item": range(20), "title": [f"item {item % 4}" for item in range(20)],
                          "category": None, "brand": "Acme"})
    vectors = torch.stack([torch.eye(4)[codes[:, 0]], torch.eye(4)[codes[:, 1]]], 1)  # [N, P, D]
    return SimpleNamespace(
        split=split, labels={name: split[name]["label"].to_numpy(copy=True) for name in SPLITS},
        users=pd.DataFrame({"true_hobby": codes[:, 0], "true_background": codes[:, 1]}), codes=codes,
        code_sizes=[4, 3], names=["hobby", "background"], stored={"profiles": vectors}, num_items=20,
        codebook=dict.fromkeys(("hobby", "background"), {"mean": 0.0, "transform": torch.eye(4)}),
        split_seed=0, digests={}, items=items, described=[],
        prepared={"split": "random"}, train_codes=codes[split["train"]["user"]])
