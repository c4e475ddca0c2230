"""Checks of artifacts and sidecars that somebody else may have made: columns, keys, shapes, types, ranges."""

import numpy as np
import pandas as pd
import torch

from userip.ctr_models import MODELS

BASELINES = "kar", "rella", "pepler"  # baselines/NAME.py writes baseline-NAME.parquet
BASELINE = {  # its columns, beside the model
    "features": "text", "options": "text",
    **dict.fromkeys(("split_seed", "seed", "rows", "test_rows"), "index"),
    **dict.fromkeys(("auc", "logloss", "valid_auc", "valid_logloss", "seconds", "tokens_per_user",
                     "milliseconds", "bytes"), "number")}
# column -> what it must hold: "number" (finite), "index" (int64, 0 or more), "order" (0, 1, 2, …), "text"
# (none missing), "maybe text", "maybe number", or a set of values
COLUMNS = {
    "interactions.parquet": {"user": "index", "item": "index", "rating": "number", "label": {0, 1},
                             "timestamp": "number", "split": {"train", "valid", "test", "support"}},
    "items.parquet": {"item": "order", "item_id": "text", "title": "text", "category": "maybe text",
                      "brand": "maybe text", "price": "maybe number"},
    "users.parquet": {"user": "order", "user_id": "text"},
    "feature_bank.parquet": {"user": "order", "user_id": "text"},
    "train_codes.parquet": {"user": "index", "item": "index"},
    "item_bank.parquet": {"item": "order", "item_id": "text"},
    "results.parquet": {"model": {"base rate", "means", *MODELS}, "features": "text", "split_seed": "index",
                        "seed": "index", "auc": "number", "logloss": "number",
                        **dict.fromkeys(("lr", "weight_decay", "start"), "maybe number")},
    **{f"baseline-{name}.parquet": {"model": {name}, **BASELINE} for name in BASELINES},
    "peapod.parquet": {"model": "text", "task": {"sequential", "top-n", "explanation"}, "users": "index",
                       "split_seed": "index", "seed": "maybe number",
                       **dict.fromkeys(("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10"), "maybe number")}}
# A schema is a type, (type, least, most), a set of values, "dtype letters" (a tensor, by the letters of
# common.py; a small letter has a size for each profile), [schema] or [schema, letter] (a list, not empty),
# {str: schema} (any texts as keys) or {key: schema}, where a "key?" may be missing.
COUNT, SEED, FINITE = (int, 1, 2**32), (int, 0, 2**32 - 1), (float, -1e30, 1e30)
PART = {"codebook": "float32 kc", "transform": "float32 dc", "mean": "float32 d"}  # of each profile
TENSORS = {
    "scores.pt": {"names": [str, "P"], "shared": "float32 PD", "lift": "float32 PCD",
                  "pull": "float32 P", "told": ["bool t", "P"], "tables": ["float32 tC", "P"],
                  "num_verdicts": [COUNT, "P"]},
    "profiles.pt": {"names": [str, "P"], "texts": [str, "P"], "llm": str, "tiny_llm": str,
                    "profiles": "float32 NPD", "shared": "float32 PD", "noise": "float32 PDD",
                    "gain": "float32 NP", "num_evidence": "int64 NP", "has_evidence": "bool N",
                    "fold?": "int64 R", "prior?": {str: PART}, "habits?": "float32 NH"},
    "new_profiles.pt": {"names": [str, "P"], "user_id": [str, "U"], "profiles": "float32 UPD",
                        "num_evidence": "int64 UP", "has_evidence": "bool U", "habits?": "float32 UH"},
    "codebook.pt": {str: PART | {"usage": "int64 k"}},
    "item_vectors.pt": {"vectors": "float32 MV"},
    "new_item_vectors.pt": {"item_id": [str, "U"], "vectors": "float32 UV"},
    "item_codebook.pt": {"mean": "float32 V", "scale": "float32 V", "landmarks": "float32 LV",
                         "coefficients": "float64 L", "intercept": "float64 I", "codebook": "float32 KI"}}
WORDS = {"N": "number of users", "M": "number of items", "R": "number of train rows"}
WITH_FOLDS = {"profiles": "float32 FNPD", "num_evidence": "int64 FNP", "habits?": "float32 FNH"}
SIDECAR = {"sha256": str, "inputs": {str: str}, "options": {}, "seed": SEED}
SIDECARS = {  # more, of which later stages read something
    "interactions.parquet": {"split_seed?": SEED, "split?": str, "dataset?": str, "interactions?": int,
                             "options": {"threshold?": float}},
    "users.parquet": {"bayes_ari?": {str: float}},
    "profiles.pt": {"heldout_nll": {**dict.fromkeys(("none", "shared", "shuffled", "own"), FINITE),
                                    "own_minus_shared": [FINITE, "2"], "own_minus_shuffled": [FINITE, "2"]},
                    "options": {"method?": str, "evidence?": str, "ratings?": bool, "route?": [str]}},
    "feature_bank.parquet": {"names": [str, "P"], "codes": [COUNT, "P"], "has_folds?": bool},
    "train_codes.parquet": {"names": [str]},
    "item_bank.parquet": {"codes": COUNT},
    "results.parquet": {
        "gains": {str: {"auc_gain": float, "auc_half_interval": float, "share_of_oracle?": float}},
        "options": {"models": [{"means", *MODELS}], "hidden": [COUNT], "dropout": (float, 0, 1 - 1e-15),
                    "id_dropout": (float, 0, 1 - 1e-15),
                    **dict.fromkeys(("field_dim", "layers", "batch_size", "epochs", "patience"), COUNT)}}}


def reads_ratings(options, num_profiles):
    """Which profiles have ratings as evidence, by the options of stage 2: list of bool"""
    has_ratings, routes = options.get("ratings", False), options.get("route", ["none"])
    return [has_ratings and (routes == ["none"] or "rating" in routes[k].split("+"))
            for k in range(num_profiles)]


def find_problem(artifacts, sidecars):
    """What is wrong with the first of these artifacts {name: value} that no stage can have written: its name
    and the problem as texts; None if all can be
    """
    sizes = {}  # {letter or fact: its value}, the same in all that are read together
    for name, value in artifacts.items():
        if problem := _problem_of_artifact(name, value, sidecars[name], sizes):
            return name, problem
        for fact, size in _facts(name, value, sidecars[name]).items():
            if sizes.setdefault(fact, size) != size:
                others = ", ".join(other for other in artifacts if other != name)
                return name, (f"has the {WORDS.get(fact, fact)} {size!s:.60}, but one of {others} has "
                              f"{sizes[fact]!s:.60}")
    return None


def find_sidecar_problem(name, sidecar):
    """What is wrong with the sidecar of this artifact, a text; None if a stage can have written it"""
    problem = _problem_of(sidecar, SIDECAR) or _problem_of(sidecar, SIDECARS.get(name, {}))
    if name != "feature_bank.parquet" or problem:
        return problem
    shown = [f"{profile}_perplexity" for profile in sidecar["names"]]  # the numbers that stage 5 reports
    for profile in sidecar["names"]:
        if (share := f"{profile}_share_of_bayes") in sidecar:
            shown += [share, f"{profile}_vs_true_{profile}"]
    return _problem_of(sidecar, dict.fromkeys(shown, FINITE))


def _problem_of_artifact(name, value, sidecar, sizes):
    if name in COLUMNS:
        names = sidecar["names"] if name in ("feature_bank.parquet", "train_codes.parquet") else []
        codes = {"code": sidecar["codes"] - 1} if name == "item_bank.parquet" else \
            dict(zip(names, sidecar.get("codes", [np.inf] * len(names))))  # of items, none is unknown
        problem = _problem_of_frame(value, COLUMNS[name], codes)
    elif name in TENSORS:
        has_folds = name == "profiles.pt" and isinstance(value, dict) and "fold" in value
        folds = WITH_FOLDS if has_folds else {}
        problem = _problem_of(value, TENSORS[name] | folds, "", sizes)
    else:
        return None
    return problem or next((text for text, is_right in _claims(name, value, sidecar) if not is_right), None)


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
            if kind != "number" and values.dtype != np.int64 or kind == "index" and numbers.min() < 0:
                return f"has numbers in column {column} that are not whole (int64) or below 0"
            if kind == "order" and (numbers != np.arange(len(numbers))).any():
                return f"must have {column} 0, 1, 2, … in this order"
            if column in codes and numbers.max() > codes[column]:
                return f"has a code above {codes[column]} in column {column}"
    return None if frame.index.equals(pd.RangeIndex(len(frame))) else "has an index that is no column"


def _problem_of(value, schema, path="", sizes=None, part=None):
    """What contradicts the schema at `path` of a sidecar or dict; None if nothing. sizes: {letter: size} so
    far, of a small letter {(letter, part): size}, where part is the key or index of the profile
    """
    sizes = {} if sizes is None else sizes
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"has no dict {path}".strip()
        if str in schema:
            if not all(isinstance(key, str) for key in value):
                return f"has other keys than texts {path}"
            parts = [(key, schema[str], key) for key in value]
        else:
            parts = [(key.rstrip("?"), kind, part) for key, kind in schema.items()
                     if key.rstrip("?") == key or key[:-1] in value]
        return next(filter(None, (_problem_of(value.get(key), kind, f"{path} {key}".strip(), sizes, index)
                                  for key, kind, index in parts)), None)
    if isinstance(schema, list):
        letter = schema[-1] if len(schema) > 1 else ""
        if not isinstance(value, list) or not value or letter and len(value) != sizes.setdefault(
                letter, int(letter) if letter.isdigit() else len(value)):
            return f"has no list {path} of the right length"
        return next(filter(None, (_problem_of(element, schema[0], f"{path}[{index}]", sizes, index)
                                  for index, element in enumerate(value))), None)
    if isinstance(schema, str):
        return _problem_of_tensor(value, schema, path, sizes, part)
    if isinstance(schema, set):
        return None if isinstance(value, str) and value in schema else f"has {path} {value!r:.40}"
    kind, least, most = schema if isinstance(schema, tuple) else (schema, -np.inf, np.inf)
    is_right = isinstance(value, (int, float) if kind is float else kind) and (
        kind is bool or not isinstance(value, bool))
    if not is_right or isinstance(schema, tuple) and not least <= value <= most:
        limits = f" from {least:g} to {most:g}" if isinstance(schema, tuple) else ""
        return f"has {path} {value!r:.40}, not {kind.__name__}{limits}"
    return None


def _problem_of_tensor(value, schema, path, sizes, part):
    dtype, letters = schema.split()
    if not torch.is_tensor(value) or value.dtype != getattr(torch, dtype) or value.dim() != len(letters) \
            or value.layout != torch.strided or value.requires_grad:
        return f"has no tensor {path} of {dtype} and {len(letters)} axes"
    if value.is_floating_point() and not torch.isfinite(value).all():
        return f"has numbers in {path} that are not finite"
    if dtype == "int64" and value.numel() and value.min() < 0:
        return f"has numbers in {path} that are below 0"
    for letter, size in zip(letters, value.shape):
        if sizes.setdefault((letter, part) if letter.islower() else letter, size) != size:
            return f"has a tensor {path} of shape {list(value.shape)}, which does not fit the others"
    return None


def _is_covariance(matrix):
    """Symmetric, and no eigenvalue is below 0 by more than rounding: float32 [D, D]"""
    matrix = matrix.double()
    slack = 1e-4 * float(matrix.diagonal().sum())
    if not slack or (matrix - matrix.T).abs().max() > slack:
        return not matrix.any()  # users that do not differ have no noise
    return not torch.linalg.cholesky_ex(matrix + slack * torch.eye(len(matrix), dtype=matrix.dtype)).info


def _claims(name, value, sidecar):
    """Pairs (what is wrong with an artifact, is it right?) about numbers whose columns and types are right"""
    options = sidecar["options"]
    if name == "interactions.parquet":
        user, time = value["user"].diff(), value["timestamp"].diff()
        yield "leaves out a number of a user or an item", all(
            value[key].nunique() == value[key].max() + 1 for key in ("user", "item"))
        yield "is not sorted by user and timestamp", ((user > 0) | (user == 0) & (time >= 0))[1:].all()
        yield "has labels other than rating > --threshold", "threshold" not in options or (
            (value["rating"] > options["threshold"]) == value["label"]).all()
        yield "has a user who has an item twice", options.get("split", "published") == "published" or \
            not value.duplicated(["user", "item"]).any()
    elif name in ("users.parquet", "items.parquet"):
        yield "has an id twice", value[f"{name[:4]}_id"].is_unique
        yield "has lists in a column", all(pd.api.types.infer_dtype(column, skipna=True) != "mixed"
                                           for _, column in value.items())
    elif name == "results.parquet":
        trained = value[value["model"].isin(MODELS)]
        yield "does not begin with the base rate", value["model"].iloc[0] == "base rate"
        chosen = trained[["lr", "weight_decay", "start"]]
        yield "has rows without what was chosen", chosen.notna().all(axis=None)
        yield "has a sidecar whose --fields are no names", all(
            isinstance(name, str) for name in options.get("fields", []))
    elif name == "scores.pt":
        items = [len(table) / levels for table, levels in zip(value["tables"], value["num_verdicts"])]
        yield "has tables of unlike numbers of items", len(set(items)) == 1
    elif name == "profiles.pt":
        names, route = value["names"], options.get("route", ["none"])
        yield "has names that are no words or not unlike", len({*names, "user", "user_id", "item"}) == \
            len(names) + 3 and all(map(str.isidentifier, names))
        yield "has a sidecar whose --route is not a list for each profile", route == ["none"] or \
            len(route) == len(names)
        yield "has a fold that no profiles are without", "fold" not in value or \
            value["fold"].max() < len(value["profiles"]) - 1
        yield "has a prior of other profiles", list(value.get("prior", names)) == names
        yield "has rating habits without --ratings, or none with them", \
            ("habits" in value) == options.get("ratings", False)
        yield "has noise that is no covariance", all(map(_is_covariance, value["noise"]))


def _facts(name, value, sidecar):
    """What else must be the same in artifacts that are read together: {letter or fact: its value}"""
    facts = {}
    if name in ("users.parquet", "feature_bank.parquet"):
        facts = {"N": len(value), "user_ids": value["user_id"].tolist()}
    elif name in ("items.parquet", "item_bank.parquet"):
        facts = {"M": len(value), "item_ids": value["item_id"].tolist()}
    elif name == "train_codes.parquet":
        facts = {"R": len(value)}
    elif name == "interactions.parquet":
        facts = {letter: int(value[column].max()) + 1 for letter, column in (("N", "user"), ("M", "item"))}
        facts["R"] = int((value["split"] == "train").sum())
    elif name == "codebook.pt":
        facts = {"profiles": list(value), "codes": [len(part["codebook"]) for part in value.values()]}
    elif name in ("scores.pt", "profiles.pt", "new_profiles.pt"):
        facts = {"profiles": value["names"]}
    if name == "scores.pt":
        facts["M"] = len(value["tables"][0]) // value["num_verdicts"][0]
    if name == "profiles.pt":
        facts["folds"] = "fold" in value
        habits_dim = value["habits"].shape[-1] if "habits" in value else 0
        facts["widths"] = [value["shared"].shape[1] + habits_dim * is_rated for is_rated in
                           reads_ratings(sidecar["options"], len(value["names"]))]
    if name == "codebook.pt":
        facts["widths"] = [len(part["mean"]) for part in value.values()]
    if name in ("profiles.pt", "new_profiles.pt"):
        facts["habits"] = "habits" in value
    if name in ("feature_bank.parquet", "train_codes.parquet"):
        facts["profiles"] = sidecar["names"]
    if name == "feature_bank.parquet":
        facts |= {"codes": sidecar["codes"], "folds": sidecar.get("has_folds", False)}
    return facts
