"""Checks of artifacts that somebody else may have made: columns, keys, shapes, types and ranges."""

import numpy as np
import pandas as pd
import torch

# column -> what it must hold: "number" (finite), "index" (integers, 0 or more), "order" (0, 1, 2, …), "text"
# (none missing), "maybe text", "maybe number", or a set of values
COLUMNS = {
    "interactions.parquet": {"user": "index", "item": "index", "rating": "number", "label": {0, 1},
                             "timestamp": "number", "split": {"train", "valid", "test", "support"}},
    "items.parquet": {"item": "order", "item_id": "text", "title": "text", "category": "maybe text",
                      "brand": "maybe text", "price": "maybe number"},
    "users.parquet": {"user": "order", "user_id": "text"},
    "feature_bank.parquet": {"user": "order", "user_id": "text"},
    "train_codes.parquet": {"user": "index", "item": "index"},
    "results.parquet": {"model": "text", "features": "text", "auc": "number", "logloss": "number"}}
# key -> its shape, by the letters of common.py
SHAPES = {
    "profiles.pt": {"profiles": "NPD", "shared": "PD", "noise": "PDD", "gain": "NP", "num_evidence": "NP",
                    "has_evidence": "N"},
    "new_profiles.pt": {"profiles": "NPD", "num_evidence": "NP"}}
FACTS = {"feature_bank.parquet": {"names": list, "codes": list}, "profiles.pt": {"heldout_nll": dict},
         "results.parquet": {"gains": dict}}  # key of the sidecar -> its type
CODEBOOK = {"codebook": "KC", "transform": "DC", "mean": "D"}  # of each profile


def find_problem(artifacts, sidecars):
    """What is wrong with the first of these artifacts {name: value} that no stage can have written: its name
    and the problem as texts; None if all can be
    """
    for name, value in artifacts.items():
        if problem := _problem_of_artifact(name, value, sidecars[name]):
            return name, problem
    return _problem_of_sizes(artifacts)


def _problem_of_artifact(name, value, sidecar):
    for key, kind in FACTS.get(name, {}).items():
        if not isinstance(sidecar.get(key), kind):
            return f"has a sidecar without {key} ({kind.__name__})"
    if name in COLUMNS:
        names = sidecar.get("names", []) if name != "results.parquet" else []
        sizes = sidecar.get("codes") or [np.inf] * len(names)
        return _problem_of_frame(value, COLUMNS[name], dict(zip(names, sizes)))
    if name in SHAPES:
        problem = _problem_of_tensors(value, SHAPES[name])
        names = value.get("names") if isinstance(value, dict) else None
        if not problem and (not isinstance(names, list) or len(names) != value["profiles"].shape[-2]):
            problem = "has no list of names, one for each profile"
        return problem
    if name == "codebook.pt":
        return next(filter(None, (_problem_of_tensors(part, CODEBOOK) for part in value.values())), None)
    return None


def _problem_of_frame(frame, columns, codes):
    """codes: {column: number of codes}; the code of that number is "unknown" """
    if frame.empty:
        return "holds no rows"
    for column, kind in {**columns, **dict.fromkeys(codes, "index")}.items():
        if column not in frame:
            return f"has no column {column}"
        values = frame[column]
        if isinstance(kind, set) and not values.isin(kind).all():
            return f"has {str(values[~values.isin(kind)].iloc[0])!r} in column {column}"
        if kind == "text" and values.isna().any():
            return f"has rows without {column}"
        if kind in ("text", "maybe text") and pd.api.types.infer_dtype(values) not in ("string", "empty"):
            return f"has something else than text in column {column}"
        if kind == "maybe number":
            values, kind = values.fillna(0.0), "number"
        if kind in ("number", "index", "order"):
            is_number = pd.api.types.is_numeric_dtype(values)
            numbers = values.to_numpy(float, na_value=np.nan) if is_number else np.array([np.nan])
            if not np.isfinite(numbers).all():
                return f"has something else than finite numbers in column {column}"
            if kind != "number" and not pd.api.types.is_integer_dtype(values) or \
                    kind == "index" and numbers.min() < 0:
                return f"has numbers in column {column} that are not whole or below 0"
            if kind == "order" and (numbers != np.arange(len(numbers))).any():
                return f"must have {column} 0, 1, 2, … in this order"
            if column in codes and numbers.max() > codes[column]:
                return f"has a code above {codes[column]} in column {column}"
    return None


def _problem_of_tensors(value, shapes):
    """A dict whose tensors have the shapes: a letter has one size; more axes in front (folds) are allowed"""
    sizes = {}
    for key, letters in shapes.items():
        tensor = value.get(key) if isinstance(value, dict) else None
        if not torch.is_tensor(tensor) or tensor.dim() < len(letters):
            return f"has no tensor {key} of {len(letters)} axes"
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"has numbers in {key} that are not finite"
        for letter, size in zip(letters, tensor.shape[tensor.dim() - len(letters):]):
            if sizes.setdefault(letter, size) != size:
                return f"has a tensor {key} of shape {list(tensor.shape)}, which does not fit the others"
    return None


def _problem_of_sizes(artifacts):
    """Numbers of users and items of artifacts that are read together"""
    lengths = {name: len(value) for name, value in artifacts.items()
               if name in ("users.parquet", "feature_bank.parquet")}
    if "profiles.pt" in artifacts:
        lengths["profiles.pt"] = len(artifacts["profiles.pt"]["has_evidence"])
    for name, length in lengths.items():
        if length != next(iter(lengths.values())):
            return name, f"is of {length} users, but {next(iter(lengths))} of {next(iter(lengths.values()))}"
    ids = [value["user_id"] for name, value in artifacts.items()
           if name in ("users.parquet", "feature_bank.parquet")]
    if len(ids) == 2 and (ids[0].to_numpy() != ids[1].to_numpy()).any():
        return "feature_bank.parquet", "has other user_ids than users.parquet"
    if "interactions.parquet" in artifacts:
        lengths = dict.fromkeys(["user"], min(lengths.values(), default=np.inf))
        lengths["item"] = len(artifacts.get("items.parquet", ())) or np.inf
        for column, length in lengths.items():
            if (largest := artifacts["interactions.parquet"][column].max()) >= length:
                return "interactions.parquet", f"has {column} {largest}, but there are only {length} of them"
    return None
