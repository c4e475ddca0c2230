"""Stage 4 of 5: train click-through models with and without the codes, and say whether the codes help.

Every model reads user id and item id (features `none`), and more sparse fields where asked: the `codes` of
the feature bank (eq. 8; of codes inferred in folds, a train row reads those that have not seen it), `random`
codes (the same codes dealt to users at random: more parameters, no information), and on planted data the
`truth` (the upper bound). More controls: `cf` (k-means of the users' factors of a SVD of the train rows),
`leniency` (quartile of how generously the user rates, out of fold), `dense` (the profiles themselves, without
VQ: table 3). With --id-dropout cold users meet a trained unknown id. Adam on binary cross-entropy (eq. 9),
early stopping on valid logloss, the best epoch's weights restored, test scored once. Seeds and controls of a
model train side by side (ctr_models.py). With --splits the stages 1 to 3 run again for each further split,
into RUN_DIR/split-SEED: no profile may have read the rows it is judged by. With --tune, rate, penalty and
start are chosen on valid from a grid, for each model and feature set alike. A gain counts only against
`random`. A killed run goes on where it stood.

Reads   interactions.parquet, feature_bank.parquet, users.parquet; with folds train_codes.parquet; with
        `dense` profiles.pt, codebook.pt; with --bench profiles.pt; for further splits and codebook sizes all
        that stages 1 to 3 made, whose options they repeat
Writes  results.parquet: the base rate's row, and one per (model, features, split seed, seed): rows (of
        train), auc, logloss, calibration error, auc by how much history the user has, valid figures, what was
        chosen, options
        results.md: tables 2, 3, 4 beside the paper's, paired differences, with --bench table 6; seconds of
        training stand in the sidecars
        finished.jsonl: every row that was ever finished here with this code; none is trained twice
        with --codebook-sizes figure5.png, figure6.png (AUC and logloss by K)

Example: python 04_train_ctr.py        (1 to 2 minutes on two cores)
  wrote runs/demo/results.parquet: 81 rows | dcn: codes - random AUC +0.0782 ± 0.0118, 77% of what the truth
  gains
"""

import argparse
import ctypes
import functools
import hashlib
import io
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize

from common import (at_least, fail, logloss, options_text, parse_with_presets, read_artifacts, read_sidecar,
                    sha256_of, stage_parser, start_stage, with_interval, write_artifact)
from ctr_models import MODELS, Member, Rows, WithVectors, table_rows, train_stack

PAPER = {"lr": 0.001}  # it tells neither batch size nor penalty
# penalty of the embeddings: no network scales those of the shallow ones, nor first-order weights, up again
WEIGHT_DECAY = dict.fromkeys(MODELS, 3e-3) | dict.fromkeys(("ffm", "afm", "fibinet"), 1e-4)
CHOICES = ("lr", "weight_decay", "net_decay", "start")  # what a row was trained with
# the decay as a multiple of the model's own
GRID = {"lr": (0.001, 0.005), "weight_decay": (1.0, 0.1), "start": (0.5, 0.05)}
MEANING = {
    "none": "user id and item id only", "codes": "and the codes of the feature bank (UserIP)",
    "random": "and the same codes dealt to users at random: more parameters, no information",
    "truth": "and the planted truth: the upper bound",
    "cf": "and k-means codes of the users' SVD factors, without a LLM",
    "leniency": "and the quartile of how generously the user rates, without a LLM",
    "dense": "and the profiles themselves, not quantized (UserIP w.o. VQ)"}
FEATURES = tuple(MEANING)
FIGURES = {"figure5.png": (4, 16, 64, 256), "figure6.png": (3, 9, 27, 81)}  # K of hobby, of background
DRAWN = ("random", "cf", "leniency")  # these differ from seed to seed
DIFFERENCES = [("codes", "none"), ("codes", "random"), ("truth", "random"), ("codes", "cf"),
               ("codes", "leniency"), ("codes", "dense"), ("random", "none"), ("cf", "none"),
               ("leniency", "none"), ("dense", "none")]

PAPER_DATA = {"clothing": 179_223, "movies": 441_783, "games": 19_927, "yelp": 1_293_247}  # interactions
PAPER_FIGURES = {  # tables 2, 3 (dense) and 4, Llama-2: AUC, logloss for each of these data sets
    ("ffm", "none"): (0.5588, 0.6212, 0.7998, 0.5090, 0.6946, 0.8347, 0.6931, 0.6903),
    ("afm", "none"): (0.5524, 0.6181, 0.7876, 0.5656, 0.6627, 1.0342, 0.6955, 0.6836),
    ("fibinet", "none"): (0.5952, 0.6198, 0.8111, 0.4659, 0.6862, 0.8823, 0.7243, 0.5621),
    ("difm", "none"): (0.5935, 0.5758, 0.8054, 0.4694, 0.6897, 0.9285, 0.7174, 0.5666),
    ("afn", "none"): (0.5945, 0.5835, 0.8050, 0.4796, 0.7022, 0.8052, 0.7169, 0.6008),
    ("deepfm", "none"): (0.6015, 0.5965, 0.8061, 0.4729, 0.7221, 0.8659, 0.7017, 0.6028),
    ("autoint", "none"): (0.6023, 0.6023, 0.8072, 0.4842, 0.7257, 0.8205, 0.7194, 0.6122),
    ("onn", "none"): (0.6094, 0.5903, 0.8121, 0.4598, 0.7223, 0.8658, 0.7253, 0.5598),
    ("pnn", "none"): (0.6088, 0.5874, 0.8154, 0.4570, 0.7178, 0.7874, 0.7287, 0.5574),
    ("dcnv2", "none"): (0.6148, 0.5848, 0.8134, 0.4643, 0.7263, 0.7991, 0.7237, 0.5704),
    ("dcn", "none"): (0.6214, 0.5322, 0.8167, 0.4582, 0.7317, 0.7744, 0.7259, 0.5590),
    ("dcn", "codes"): (0.6269, 0.5126, 0.8184, 0.4566, 0.7393, 0.7285, 0.7314, 0.5558),
    ("dcn", "dense"): (0.6201, 0.5577, 0.7966, 0.4636, 0.7340, 0.8429, 0.7277, 0.5511),
    ("pnn", "codes"): (0.6137, 0.5383, 0.8159, 0.4566, 0.7208, 0.8076, 0.7284, 0.5578),
    ("onn", "codes"): (0.6140, 0.5021, 0.8098, 0.4626, 0.7289, 0.8395, 0.7246, 0.5613),
    ("dcnv2", "codes"): (0.6263, 0.5125, 0.8180, 0.4544, 0.7324, 0.8625, 0.7308, 0.5569),
}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="first of the seeds")
    add("--seeds", type=at_least(1), default=5, help="how many seeds of start, batches, noise, drawn codes")
    add("--splits", type=at_least(1), default=1, help="how many splits of the data: stages 1 to 3 for each")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--models", nargs="+", choices=MODELS, default=["dcn", "pnn", "onn", "dcnv2"], help="what to train")
    add("--features", nargs="+", choices=FEATURES, default=None,
        help="read beside the ids (default: none codes random and, on planted data, truth)")
    add("--id-dropout", type=at_least(0, float), default=0.0,
        help="share of train rows that meet the unknown user id instead of their own, anew in each step")
    add("--field-dim", type=at_least(1), default=8, help="width of a field's embedding, E")
    add("--layers", type=at_least(1), default=3, help="cross layers (DCN, DCNv2), attention layers (AutoInt)")
    add("--hidden", type=at_least(1), nargs="+", default=[16, 16], help="widths of an MLP, if any")
    add("--dropout", type=at_least(0, float), default=0.2, help="dropout in the MLP, or in AFM's attention")
    add("--lr", type=at_least(0, float), default=0.005, help="learning rate of Adam")
    add("--weight-decay", type=at_least(0, float),
        help="L2 penalty of the embeddings (default: 3e-3; FFM, AFM and FiBiNET 1e-4)")
    add("--start", type=at_least(0, float), default=0.5,
        help="standard deviation of the first embeddings of ids that many rows have")
    add("--net-decay", type=at_least(0, float), default=0.0, help="L2 penalty of all other parameters")
    grid = "; ".join(f"--{key.replace('_', '-')} {' or '.join(map(str, GRID[key]))}" for key in GRID)
    add("--tune", action="store_true",
        help=f"choose on valid, for each model and feature set, among {grid} (decay: of the model's own)")
    add("--batch-size", type=at_least(1), default=512, help="rows per step")
    add("--epochs", type=at_least(1), default=50, help="passes over the train rows at most")
    add("--patience", type=at_least(1), default=6, help="stop after so many epochs without progress on valid")
    add("--compile", action="store_true",
        help="compile each model's step (10 s and a C++ compiler each; pays on larger data)")
    add("--codebook-sizes", action="store_true", help="figures 5 and 6: stage 3 and the first model, many K")
    add("--bench", action="store_true", help="table 6: seconds per 10,000 rows: DCN, with bank, with vectors")
    args = parse_with_presets(parser, argv, paper=PAPER)
    for name in ("dropout", "id_dropout"):
        if getattr(args, name) >= 1:
            parser.error(f"--{name.replace('_', '-')} must be below 1, not {getattr(args, name)}")
    if args.tune and args.paper:
        parser.error("--tune chooses what --paper sets: leave one of them out")
    for name in ("lr", "start"):
        if args.tune and getattr(args, name) != parser.get_default(name):
            parser.error(f"--tune chooses --{name}: leave one of them out")
    if args.seed + args.seeds > 2**32:
        parser.error(f"--seed {args.seed} --seeds {args.seeds}: seeds must be below 2**32 = {2**32}")
    return args


# ----------------------------------------------------------------------------------------------------------
# data: the runs to be scored, the ids of all fields
# ----------------------------------------------------------------------------------------------------------


STAGES = {"01_prepare.py": ("interactions.parquet", "items.parquet", "users.parquet", "prepare.json"),
          "02_infer_profiles.py": ("profiles.pt", "scores.pt"),
          "03_quantize.py": ("feature_bank.parquet", "codebook.pt")}


SWITCHES = ("whiten", "revive")  # on unless switched off by --no-…


def further_run(args, name, stage, change):
    """RUN_DIR/name, a run with the options of this one but for `change` in one stage: made, or found.

    What earlier stages made is linked; later ones run again.
    """
    own, folder = Path(args.run_dir), Path(args.run_dir) / name
    folder.mkdir(exist_ok=True)
    is_new = False  # once a stage has run, all later ones must
    for current, artifacts in STAGES.items():
        mine, path = read_sidecar(args, artifacts[0]), folder / f"{artifacts[0]}.json"
        there = json.loads(path.read_text()) if path.exists() else {}
        if current < stage:
            for file in (f"{artifact}{end}" for artifact in artifacts for end in ("", ".json")):
                if not (own / file).exists():  # scores.pt: not all methods make it
                    continue
                if there.get("sha256") != mine["sha256"]:
                    is_new = True
                    (folder / file).unlink(missing_ok=True)
                    try:
                        os.link(own / file, folder / file)
                    except OSError:  # a file system without hard links
                        shutil.copy2(own / file, folder / file)
            continue
        options = mine["options"] | {"run_dir": str(folder)} | (change if current == stage else {})
        # a run that was killed between two stages has options as asked for, but inputs of another time
        if is_new or there.get("options") != options or any(
                digest_of(folder, name) != told for name, told in there.get("inputs", {}).items()):
            is_new = True
            command = [sys.executable, str(Path(__file__).with_name(current)), *command_line(options)]
            print(f"{folder}: {current}", flush=True)
            if subprocess.run(command).returncode:
                fail(f"{current} failed for {folder}: {shlex.join(command)}")
    return folder


def digest_of(run_dir, name):
    """The digest in an artifact's sidecar; None where there is none"""
    path = Path(run_dir) / f"{name}.json"
    return json.loads(path.read_text())["sha256"] if path.exists() else None


def command_line(options):
    """The options of a sidecar as a command line: {"paper": True, "codes": [4, 3]} -> --paper --codes 4 3"""
    words = []
    for key, value in options.items():
        if key in SWITCHES and value is False:
            words.append(f"--no-{key}")
        is_said = value is not None and value is not False and value != []  # 0 is a value, too
        if is_said and key != "download":  # what was fetched is there
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{key.replace('_', '-')}", *map(str, values)]
    return words


def read_run(args, run_dir, features):
    """The artifacts of one run, checked: what `rows_of` needs."""
    inputs = ["interactions.parquet", "feature_bank.parquet", "users.parquet"]
    inputs += ["profiles.pt", "codebook.pt"] if "dense" in features else []
    at = argparse.Namespace(run_dir=run_dir)
    interactions, bank, users, *stored = read_artifacts(at, *inputs)
    made, prepared = (read_sidecar(at, name) for name in ("feature_bank.parquet", "interactions.parquet"))
    of_train = None  # with folds, a train row's codes are those that have not seen it
    if made.get("has_folds"):
        inputs.append("train_codes.parquet")
        of_train = read_artifacts(at, "train_codes.parquet")[0][made["names"]].to_numpy(dtype=np.int64)
    split = {name: interactions[interactions["split"] == name]
             for name in ("train", "valid", "test", "support")}
    labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid", "test")}
    for name, values in labels.items():
        if len(np.unique(values)) < 2:
            fail(f"the {name} rows of {run_dir}/interactions.parquet have one label only, so AUC is "
                 f"undefined: choose another --threshold in stage 1")
    history = split["train"]["user"].value_counts().reindex(range(len(users)), fill_value=0).to_numpy()
    prepared = {"split": "random", "dataset": "table", "interactions": len(interactions)} | prepared
    return SimpleNamespace(
        inputs=inputs, prepared=prepared, split_seed=prepared.get("split_seed", prepared["seed"]),
        split=split, labels=labels, users=users, codes=bank[made["names"]].to_numpy(dtype=np.int64),
        train_codes=of_train, code_sizes=made["codes"], names=made["names"], history=history,
        vectors=vectors_of(*stored, made["names"]) if stored else [],
        fold=stored[0].get("fold") if stored else None,
        num_items=int(interactions["item"].max()) + 1,
        digests={name: sha256_of(Path(run_dir) / name) for name in inputs})


def fields_of(feature, run, seed):
    """The fields of a feature set beside the ids: dict of int64 [rows, P'] by split, and their sizes.

    All but leniency are functions of the user. The profiles themselves (`dense`) are vectors, not ids.
    """
    if feature == "leniency":
        return leniency_of(run.split, seed)
    codes, sizes = np.empty((len(run.users), 0), dtype=np.int64), []
    if feature == "truth":
        columns = [pd.factorize(run.users[f"true_{name}"], sort=True)[0] for name in run.names]
        codes = np.stack(columns, 1).astype(np.int64)
        sizes = [int(column.max()) + 1 for column in codes.T]
    elif feature == "cf":
        codes, sizes = cf_of(run.split, len(run.users), run.code_sizes, seed), [k + 1 for k in run.code_sizes]
    elif feature in ("codes", "random"):
        codes, sizes = run.codes, [size + 1 for size in run.code_sizes]
    if feature == "random":  # the same codes, dealt anew: sizes and usage stay, meaning goes
        deal = lambda k: np.random.default_rng([seed, k]).permutation(codes[:, k])
        codes = np.stack([deal(k) for k in range(len(sizes))], 1)
    fields = {name: codes[frame["user"]] for name, frame in run.split.items()}
    if feature == "codes" and run.train_codes is not None:
        fields["train"] = run.train_codes
    return fields, sizes


def vectors_of(profiles, codebook, names):
    """The profiles in the codebook's coordinates, not quantized (table 3, w/o VQ): [(F + 1) N, C] per name"""
    parts = [codebook[name] for name in names]
    return [((profiles["profiles"][..., k, :] - part["mean"]) @ part["transform"]).flatten(0, -2)
            for k, part in enumerate(parts)]


def cf_of(split, num_users, sizes, seed, rank=8):
    """Collaborative filtering without a LLM: k-means of users' factors, one field per size: int64 [N, P]

    Factors: truncated SVD of who had what (train rows); a cold user's support rows are folded in. A user
    without either has the code K.
    """
    num_items = 1 + max(int(frame["item"].max()) for frame in split.values() if len(frame))
    train, support = (sparse.csr_matrix((np.ones(len(rows)), (rows["user"], rows["item"])),
                                        shape=(num_users, num_items))
                      for rows in (split["train"], split["support"]))
    svd = TruncatedSVD(min(rank, num_items - 1), random_state=seed).fit(train)
    factors = normalize(svd.transform(train + support))  # the direction of taste, not the number of items
    warm, known = train.getnnz(1) > 0, (train + support).getnnz(1) > 0
    codes = [KMeans(size, n_init=4, random_state=seed).fit(factors[warm]).predict(factors) for size in sizes]
    return np.stack([np.where(known, code, size) for code, size in zip(codes, sizes)], 1).astype(np.int64)


def leniency_of(split, seed, num_codes=4, num_folds=5):
    """How generously a user rates: quartile of his mean residual to the items' means; 4 codes and unknown.

    From train and support rows; a train row's code is made without its own fold, or it would tell its label.
    """
    own = pd.concat([split["train"], split["support"]])
    fold = np.random.default_rng([seed, 3]).integers(num_folds, size=len(own))
    fold[len(split["train"]):] = num_folds  # support rows are in no fold: no train row is theirs

    def means(left_out):
        rows = own[fold != left_out]
        of_item = rows.groupby("item")["rating"].mean()
        return (rows["rating"] - rows["item"].map(of_item)).groupby(rows["user"]).mean()

    everything = means(num_folds + 1)
    warm = everything[everything.index.isin(split["train"]["user"])]
    edges = warm.quantile(np.arange(1, num_codes) / num_codes)

    def code(mean, user):
        of_user = mean.reindex(user)
        return np.where(of_user.isna(), num_codes, np.searchsorted(edges, of_user))

    fields = {name: code(everything, frame["user"]) for name, frame in split.items()}
    for left_out in range(num_folds):
        mine = fold[:len(split["train"])] == left_out
        fields["train"][mine] = code(means(left_out), split["train"]["user"][mine])
    return {name: column[:, None].astype(np.int64) for name, column in fields.items()}, [num_codes + 1]


def rows_of(args, run, features, seeds):
    """Feature sets of one shape, F fields -> Rows for their models, and the place of each (feature, seed)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places, ids, num_rows = {}, {name: [] for name in run.labels}, []
    for feature, seed in itertools.product(features, seeds):
        if feature not in DRAWN and seed != seeds[0]:
            places[feature, seed] = places[feature, seeds[0]]
            continue
        places[feature, seed] = len(num_rows)
        found, size, unknown = table_rows({name: run.split[name] for name in ids},
                                          *fields_of(feature, run, seed), run.history > 0, run.num_items,
                                          bool(args.id_dropout))
        num_rows.append(size)
        for name in ids:
            ids[name].append(found[name])
    rows = Rows({name: torch.stack(parts).to(device) for name, parts in ids.items()}, run.labels, num_rows,
                unknown=unknown)
    if features == ["dense"]:
        users = {name: torch.tensor(run.split[name]["user"].to_numpy()) for name in ids}
        if run.fold is not None:  # the vectors of fold after fold, the last those with all evidence
            num_folds = len(run.vectors[0]) // len(run.users) - 1
            users = {name: user + len(run.users) * (run.fold if name == "train" else num_folds)
                     for name, user in users.items()}
        users = {name: user.to(device) for name, user in users.items()}
        rows = rows._replace(vectors=torch.cat(run.vectors, 1).to(device), users=users,
                             dims=tuple(part.shape[1] for part in run.vectors))
    return rows, places


# ----------------------------------------------------------------------------------------------------------
# train and score
# ----------------------------------------------------------------------------------------------------------


def decay_of(args, model):
    """The penalty of a model's embeddings: as asked for, or its own"""
    return WEIGHT_DECAY[model] if args.weight_decay is None else args.weight_decay


def candidates_of(args, model):
    """What a model is trained with, in the order of CHOICES: the options, or with --tune all of the grid"""
    decay = decay_of(args, model)
    if not args.tune:
        return [(args.lr, decay, args.net_decay, args.start)]
    return [(lr, share * decay, args.net_decay, start) for lr, share, start in
            itertools.product(*GRID.values())]


def same_shape(features, num_profiles):
    """Feature sets by shape, each a list that trains in one stack: F = 2, 2 + P or 3 fields, or P vectors"""
    shapes = {"none": 0, "leniency": 1, "dense": "vectors"}
    key = lambda feature: str(shapes.get(feature, num_profiles))
    return [list(group) for _, group in itertools.groupby(sorted(features, key=key), key)]


def train_group(args, name, run, features, seeds, wanted=None):
    """One model with feature sets of one shape, all candidates -> figures by (feature, seed)

    wanted: which pairs of feature set and seed (default: all). The choice of rate and penalty is the best
    mean valid logloss over the seeds; test labels are looked at for the chosen only.
    """
    wanted = list(itertools.product(features, seeds)) if wanted is None else wanted
    rows, places = rows_of(args, run, features, seeds)
    # candidates of one rate stop at about the same epoch, so that few wait for the last
    todo = [(feature, seed, *candidate) for candidate in candidates_of(args, name)
            for feature, seed in wanted]
    members = [Member(places[feature, seed], seed, *candidate) for feature, seed, *candidate in todo]
    width = MODELS[name](rows.ids["train"].shape[2] + len(rows.dims), args.field_dim, args.layers,
                         args.hidden).width
    most = max(1, min(MOST_FLOATS // (max(rows.num_rows) * width), 4 * len(wanted)))
    found, probabilities = [], []
    for first in range(0, len(members), most):
        figures, stack = train_stack(args, name, members[first:first + most], rows, args.compile)
        found += figures
        probabilities += list(stack.predict(rows, "test"))
    table = pd.DataFrame(todo, columns=["features", "seed", *CHOICES]).join(pd.DataFrame(found))
    chosen = {}
    for feature in features:
        mean = table[table["features"] == feature].groupby(list(CHOICES))["valid_logloss"].mean()
        if not np.isfinite(mean.min()):
            tried = "; ".join(" ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in
                                       zip(CHOICES, values)) for values in mean.index)
            fail(f"{name} with {feature} diverged (no finite logloss on valid) with {tried}: lower them")
        is_mine = (table["features"] == feature) & (table[list(CHOICES)]
                                                    == np.array(mean.idxmin())).all(axis=1)
        for place, row in table[is_mine].iterrows():
            figures = row.drop(["features", "seed"]).to_dict()
            chosen[feature, row["seed"]] = figures | score(run, probabilities[place])
    return chosen


MOST_FLOATS = 2**27  # numbers in the embedding tables of one stack: 3 GB with Adam's averages


def score(run, probabilities):
    """Figures on test: AUC, logloss, calibration error; AUC by history, nan where a group has one label."""
    labels = run.labels["test"]
    of_group = {}
    for group, mine in history_groups(run).items():
        is_defined = len(np.unique(labels[mine])) > 1
        of_group[f"auc_{group}"] = roc_auc_score(labels[mine], probabilities[mine]) if is_defined else np.nan
    return {"auc": roc_auc_score(labels, probabilities), "logloss": logloss(labels, probabilities),
            "calibration_error": calibration_error(labels, probabilities), **of_group}


def history_groups(run):
    """Test rows by how many train rows the user has: none, or a third each: dict of bool [rows]"""
    history = run.history[run.split["test"]["user"]]
    warm = history[history > 0]
    low, high = np.quantile(warm, [1 / 3, 2 / 3]) if len(warm) else (0, 0)
    return {"cold": history == 0, "short": (history > 0) & (history <= low),
            "middle": (history > low) & (history <= high), "long": history > high}


def key_of(args, run, model, feature, seed):
    """What decides a row's figures, as a digest: options, inputs, which row, the code that trains it."""
    skip = {"run_dir", "models", "features", "splits", "codebook_sizes", "bench", "paper"}
    skip |= set() if args.tune else {"seed", "seeds"}  # a choice is made over all seeds
    told = {key: value for key, value in vars(args).items() if key not in skip}
    told["weight_decay"] = decay_of(args, model)
    # what reads no profile is the same for any codebook
    inputs = {name: digest for name, digest in run.digests.items()
              if feature not in ("none", "leniency") or name == "interactions.parquet"}
    text = json.dumps([told, inputs, model, feature, seed, code_digests()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def code_digests():
    """What of the program decides a row's figures: this file, the models, what they import; torch, device"""
    here = Path(__file__).parent
    digests = [sha256_of(here / name) for name in (Path(__file__).name, "ctr_models.py", "common.py")]
    return [*digests, torch.__version__, "cuda" if torch.cuda.is_available() else "cpu"]


def read_finished(path):
    """finished.jsonl -> dict of rows by key; a line that a kill cut short is no row."""
    rows = {}
    try:
        lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; move it away")
    for line in lines:
        if not line:
            continue
        try:
            row = json.loads(line)
            rows[row.pop("key")] = row
        except (ValueError, KeyError, AttributeError, TypeError):  # TypeError: a list
            print(f"{path}: an unfinished line is left out")
    return rows


def append(path, text):
    try:
        with open(path, "a") as file:
            file.write(text)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}; rows that stand in it are kept")


def train_run(args, run, models, features, seeds):
    """All rows of one run, trained or found finished; the base rate first: list of dicts"""
    path = Path(args.run_dir) / "finished.jsonl"
    finished, told = read_finished(path), {"split_seed": run.split_seed, "rows": len(run.labels["train"])}
    append(path, "")  # that this cannot be written must not turn out after the first model
    is_cut = path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    rate = float(run.labels["train"].mean())
    rows = [{"model": "base rate", "features": "none", **told, "seed": 0, "auc": 0.5,
             "logloss": logloss(run.labels["test"], rate),
             "calibration_error": abs(rate - float(run.labels["test"].mean()))}]
    for model, group in itertools.product(models, same_shape(features, len(run.names))):
        keys = {place: key_of(args, run, model, *place) for place in itertools.product(group, seeds)}
        missing = [place for place, key in keys.items() if key not in finished]
        if args.tune:  # a choice is made over all seeds
            missing = [place for place in keys if place[0] in {feature for feature, _ in missing}]
        started = time.time()
        print(f"{model} with {', '.join(dict.fromkeys(feature for feature, _ in missing))}: "
              f"{len(missing)} rows of split {run.split_seed} side by side …" if missing else
              f"{model} with {', '.join(group)}: finished before", flush=True)
        chosen = train_group(args, model, run, *(sorted(set(part), key=part.index) for part in zip(*missing)),
                             missing) if missing else {}
        seconds, lines = (time.time() - started) / max(1, len(chosen)), []
        for (feature, seed), figures in chosen.items():
            row = {"model": model, "features": feature, **told, "seed": seed} | figures | {"seconds": seconds}
            finished[keys[feature, seed]] = row
            lines.append(json.dumps({"key": keys[feature, seed], **row}) + "\n")
        append(path, "\n" * is_cut + "".join(lines))  # a line that a kill cut short must not swallow the next
        is_cut = False
        for (feature, seed), key in keys.items():
            row = finished[key]
            rows.append(row)
            was = f"{row['seconds']:.1f}s" if (feature, seed) in missing else "finished before"
            chosen_options = " ".join(f"{row[key]:g}" for key in CHOICES)
            print(f"{model:7} {feature:8} split {run.split_seed} seed {seed} | "
                  f"lr, decays, start {chosen_options} | epoch {row['best_epoch']:02d}/{args.epochs} | "
                  f"valid auc {row['valid_auc']:.4f} logloss {row['valid_logloss']:.4f} | "
                  f"test auc {row['auc']:.4f} logloss {row['logloss']:.4f} | {was}", flush=True)
    return rows


# ----------------------------------------------------------------------------------------------------------
# statistics
# ----------------------------------------------------------------------------------------------------------


def rela_impr_auc(auc, reference):
    """Relative improvement in percent (eq. 10): ((A - .5) / (A_ref - .5) - 1) · 100"""
    return ((auc - 0.5) / (reference - 0.5) - 1) * 100 if reference != 0.5 else float("nan")


def rela_impr_logloss(loss, reference):
    """Relative improvement in percent (eq. 11): (LL_ref / LL - 1) · 100"""
    return (reference / loss - 1) * 100


def calibration_error(labels, probabilities, num_bins=10):
    """Expected calibration error: mean of |mean probability - share of clicks| over bins of equal size."""
    order = np.argsort(probabilities, kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in bins]
    return float(sum(gaps) / len(labels))


def paired_interval(differences, overlap=0.0):
    """Mean of paired differences [S], half of its 95% interval, p that it is 0 (t test); nan for one of them.

    overlap: test rows per train row where the differences come from several splits of the same rows, whose
    train sets overlap (the corrected resampled t test, Nadeau and Bengio, 2003); 0 for seeds of one split.
    """
    differences = np.asarray(differences)
    num, mean = len(differences), float(differences.mean())
    if num < 2:
        return mean, float("nan"), float("nan")
    error = differences.std(ddof=1) * np.sqrt(1 / num + overlap)
    p = 2 * stats.t.sf(abs(mean) / error, num - 1) if error else float(not mean)
    return mean, float(stats.t.ppf(0.975, num - 1) * error), float(p)


# ----------------------------------------------------------------------------------------------------------
# tables and figures
# ----------------------------------------------------------------------------------------------------------


def spread(values, digits=4):
    """Mean ± standard deviation as text."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def markdown(header, lines):
    """A pipe table: header a list of names, lines a list of lists of texts"""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]]


def by_run(results):
    """results -> dict of frames by (model, features), their rows in the order of split and seed"""
    ordered = results.sort_values(["split_seed", "seed"])
    return {key: ordered[(ordered["model"] == key[0]) & (ordered["features"] == key[1])]
            for key in dict.fromkeys(zip(results["model"], results["features"]))}


def table_of_means(by):
    """Every (model, features): means over splits and seeds; eq. 10 and 11 against the same model without"""
    header = ["model", "features", "AUC", "logloss", "calibration error", "RelaImpr AUC (%)",
              "RelaImpr logloss (%)"]
    lines = []
    for (model, features), frame in by.items():
        improvements = ["", ""]
        if (model, "none") in by and features != "none":
            reference = by[model, "none"]
            improvements = [f"{rela_impr_auc(frame['auc'].mean(), reference['auc'].mean()):+.2f}",
                            f"{rela_impr_logloss(frame['logloss'].mean(), reference['logloss'].mean()):+.2f}"]
        lines.append([model, features, *map(spread, (frame["auc"], frame["logloss"],
                                                     frame["calibration_error"])), *improvements])
    return markdown(header, lines)


def table_of_differences(by, overlap):
    """Paired differences, and what the codes gain by model"""
    header = ["model", "difference", "AUC", "p", "logloss", "p", "share of the truth's AUC gain"]
    lines, gains = [], {}
    for model, (first, second) in itertools.product(dict.fromkeys(model for model, _ in by), DIFFERENCES):
        if (model, first) not in by or (model, second) not in by:
            continue
        difference = lambda key: by[model, first][key].to_numpy() - by[model, second][key].to_numpy()
        auc, loss = (paired_interval(difference(key), overlap) for key in ("auc", "logloss"))
        share = ""
        if (first, second) == ("codes", "random"):
            gains[model] = {"auc_gain": auc[0], "auc_half_interval": auc[1]}
            if (model, "truth") in by:
                oracle = by[model, "truth"]["auc"].mean() - by[model, "random"]["auc"].mean()
                gains[model] |= {"oracle_auc_gain": oracle, "share_of_oracle": auc[0] / oracle}
                share = f"{auc[0] / oracle:.0%}"
        told = lambda p: "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
        lines.append([model, f"{first} - {second}", with_interval(*auc[:2]), told(auc[2]),
                      with_interval(*loss[:2]), told(loss[2]), share])
    return markdown(header, lines), gains


def paper_name(prepared):
    """Which of the paper's data sets this is, by its name, or NETE's dump by its count; None if none"""
    same = [name for name, count in PAPER_DATA.items() if count == prepared["interactions"]]
    return prepared["dataset"] if prepared["dataset"] in PAPER_DATA else same[0] if same else None


def paper_tables(by, prepared):
    """Tables 2, 3 and 4 in the paper's layout: ours, and the paper's where it is the paper's data set"""
    data = paper_name(prepared)
    place = 2 * list(PAPER_DATA).index(data) if data else 0
    told = lambda key, which: [f"{PAPER_FIGURES[key][place + which]:.4f}" if key in PAPER_FIGURES else ""]
    header = ["model", "AUC", *["paper"] * bool(data), "logloss", *["paper"] * bool(data)]
    line = lambda name, key: [name, spread(by[key]["auc"]), *(told(key, 0) if data else []),
                              spread(by[key]["logloss"]), *(told(key, 1) if data else [])]
    named = {"none": "", "codes": "UserIP-", "dense": "UserIP w.o. VQ, "}
    tables = {
        "Table 2: overall performance": [*[(model, "none") for model in MODELS], ("dcn", "codes")],
        "Table 3: without vector quantization": [("dcn", "dense"), ("dcn", "codes")],
        "Table 4: transfer to other recommenders": list(itertools.product(("dcn", "pnn", "onn", "dcnv2"),
                                                                          ("none", "codes")))}
    text = []
    if data:
        text = [f"The paper's columns are its figures on {data}, {PAPER_DATA[data]:,} interactions; here are "
                f"{prepared['interactions']:,}.", ""]
    for title, keys in tables.items():
        lines = [line(f"{named[key[1]]}{key[0]}", key) for key in keys if key in by]
        if len(lines) > 1:
            text += [f"## {title}", "", *markdown(header, lines), ""]
    return text


def table_of_groups(by, run):
    """AUC by how much history the user has; cold users apart"""
    groups = history_groups(run)
    columns = [f"auc_{group}" for group, mine in groups.items() if mine.any()]
    of_test = run.history[run.split["test"]["user"]]
    titles = []
    for group, mine in groups.items():
        if mine.any():
            span = f", {of_test[mine].min()} to {of_test[mine].max()}" if group != "cold" else ""
            titles.append(f"{group} ({mine.sum():,} rows{span})")
    lines = [[model, features, *[spread(frame[column]) for column in columns]]
             for (model, features), frame in by.items() if model != "base rate"]
    return markdown(["model", "features", *titles], lines)


def what_was_trained(args, results):
    """The options behind the rows, in words; with --tune what was chosen, as a table: list of lines"""
    trained = results[results["model"] != "base rate"]
    fixed = (f"E {args.field_dim}, {args.layers} layers, MLP ({', '.join(map(str, args.hidden))}), dropout "
             f"{args.dropout:g}, id dropout {args.id_dropout:g}, batch {args.batch_size}, "
             f"at most {args.epochs} epochs, patience {args.patience}")
    chosen = trained.groupby(["model", "features", "split_seed"], sort=False)[list(CHOICES)].first()
    if args.tune:
        header = ["model", "features", "split", "lr", "embeddings' decay", "other decay", "start"]
        lines = [[*map(str, place), *(f"{value:g}" for value in row)]
                 for place, row in zip(chosen.index, chosen.to_numpy())]
        return [f"Options: {fixed}; the others were chosen on valid:", "", *markdown(header, lines)]
    decays = " · ".join(f"{decay:g} ({', '.join(dict.fromkeys(group.index.get_level_values('model')))})"
                        for decay, group in chosen.groupby("weight_decay"))
    return [f"Options: {fixed}, lr {args.lr:g}, decay of the embeddings {decays}, of all else "
            f"{args.net_decay:g}, start {args.start:g}."]


def summarize(args, results, runs):
    """results.md, and what the codes gain by model"""
    first, by = runs[0], by_run(results)
    num_splits, num_seeds = len(runs), results.loc[results["model"] != "base rate", "seed"].nunique()
    overlap = len(first.labels["test"]) / len(first.labels["train"]) if num_splits > 1 else 0.0
    cold = int((first.history[first.split["test"]["user"]] == 0).sum())
    differences, gains = table_of_differences(by, overlap)
    interval = ("t test over splits and seeds, its variance corrected for the splits' overlap (Nadeau and "
                "Bengio, 2003)" if num_splits > 1 else
                "t test over the seeds of one split, so that it says nothing of other splits (--splits)")
    num_test, many = len(first.labels["test"]), lambda num, what: f"{num} {what}{'s' * (num != 1)}"
    read = [feature for feature in FEATURES if feature in set(results["features"])]
    text = [f"# Click-through rate: {first.prepared['dataset']}, {num_test:,} test rows", "",
            f"Split: {first.prepared['split']}, {many(num_splits, 'draw')} with {many(num_seeds, 'seed')} "
            f"each; {cold:,} of the first one's test rows are of users without a train row, whom the models "
            "know as unknown. Where figures stand, ± is the standard deviation over splits and seeds.", "",
            "What models read: " + "; ".join(f"`{feature}`: {MEANING[feature]}" for feature in read)
            + ". A gain counts only against `random`.", "", *what_was_trained(args, results), "",
            *paper_tables(by, first.prepared),
            "## All figures", "",
            "Logloss in nats; calibration error: mean gap of probability and share of clicks over ten bins "
            "of equal size; RelaImpr (eq. 10, 11): against the same model with `none`, more is better.", "",
            *table_of_means(by), ""]
    if num_lines := len(differences) - 2:
        text += ["## Paired differences", "",
                 f"Here ± is half of the 95% interval: {interval}. AUC: more is better, logloss: less. p: "
                 f"that the difference is 0, not corrected for {many(2 * num_lines, 'look')}. Share of the "
                 "truth's gain: (codes - random) / (truth - random).", "", *differences, ""]
    text += ["## AUC by history", "",
             "Test rows by the number of train rows that their user has (first split).", "",
             *table_of_groups(by, first)]
    return "\n".join(text) + "\n", gains


def draw_figure(title, results, column, path_name, args):
    """Figures 5 and 6: AUC and logloss by codebook size, mean and band of one standard deviation"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, metric in zip(axes, ("auc", "logloss")):
        for features, frame in results.groupby("features", sort=False):
            values = frame.groupby(column)[metric].agg(["mean", "std"]).fillna(0)
            axis.plot(values.index, values["mean"], marker="o", label=features)
            axis.fill_between(values.index, values["mean"] - values["std"], values["mean"] + values["std"],
                              alpha=0.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(values.index, [str(size) for size in values.index])
        axis.set(xlabel=title, ylabel={"auc": "AUC", "logloss": "logloss (nats)"}[metric])
        axis.legend()
    figure.suptitle(f"{args.models[0]}, {args.seeds} seeds; band: one standard deviation", fontsize=9)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return write_artifact(args, path_name, picture.getvalue(), inputs=["interactions.parquet", "profiles.pt"],
                          figures=results.to_dict("records"))


def codebook_figures(args, run, seeds):
    """Figures 5 and 6: the first model with the codes of smaller and larger codebooks, random ones beside"""
    for place, (figure, sizes) in enumerate(FIGURES.items()):
        if place >= len(run.names):
            print(f"{figure}: there is no second profile to vary")
            continue
        rows = []
        for size in sizes:
            codes = [size if k == place else other for k, other in enumerate(run.code_sizes)]
            name = "codes-" + "-".join(map(str, codes))
            folder = further_run(args, name, "03_quantize.py", {"codes": codes})
            further = read_run(args, folder, ["codes"])
            rows += [row | {"size": size} for row in train_run(args, further, args.models[:1],
                                                               ["none", "codes", "random"], seeds)[1:]]
        path = draw_figure(f"codebook size, {run.names[place]}", pd.DataFrame(rows), "size", figure, args)
        print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------
# serving: table 6
# ----------------------------------------------------------------------------------------------------------


class FoldedDCN:
    """A DCN ready to serve: users and items keep the few numbers that it needs of them, the bank folded in.

    By induction x_l = α_l x_0 + β_l with β_l = b_0 + … + b_{l-1}, α_{l+1} = α_l (1 + w_lᵀ x_0) + w_lᵀ β_l, so
    that the model reads of x_0 only w_lᵀ x_0 [L], the head's part [1] and the MLP's first layer [H]. These
    add up over the fields; those of a user, his codes included, are added once, when the bank is loaded.
    """

    def __init__(self, net, tables, codes):
        """net: common.DCN; tables: embeddings [n_f, E] of user, item, code, …; codes int64 [N, P]"""
        first, *self.layers = net.mlp.layers
        of_x = net.weights.shape[1]
        maps = torch.cat([net.weights, net.head.weight[:, :of_x], first.weight])  # [L + 1 + H, X]
        of_user, of_item, *of_codes = (table @ part.T for table, part in zip(tables, maps.split(
            [table.shape[1] for table in tables], 1)))
        self.users = of_user + sum(part[codes[:, k]] for k, part in enumerate(of_codes))  # [N, L + 1 + H]
        self.items = of_item
        self.items[:, -len(first.bias):] += first.bias
        before = torch.cat([torch.zeros(1, of_x), net.biases.cumsum(0)])  # β_0 … β_L
        self.steps = (net.weights * before[:-1]).sum(1).tolist()  # w_lᵀ β_l
        self.head = net.head.weight[0, of_x:]
        self.constant = net.head.bias + before[-1] @ net.head.weight[0, :of_x]

    def __call__(self, user, item):
        """user and item int64 [B] -> logits [B]"""
        read = self.users.index_select(0, user) + self.items.index_select(0, item)
        num_layers = len(self.steps)
        scale = 1.0
        for k, step in enumerate(self.steps):
            scale = scale * (1 + read[:, k]) + step
        hidden = read[:, num_layers + 1:].relu()
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return torch.addmv(self.constant + scale * read[:, num_layers], hidden, self.head)


@torch.no_grad()
def serving_table(args, num_users, num_items, codes, code_sizes, vectors, rounds={1: 1000, 10_000: 60}):
    """Table 6: dict of figures by way of serving. Random weights: a DCN's time does not depend on them.

    codes int64 [N, P]; vectors [N, C], the profiles themselves. Each way answers the same requests in turn.
    """
    torch.manual_seed(0)
    sizes = [num_users, num_items, *code_sizes]
    tables = [torch.randn(size, args.field_dim) for size in sizes]
    make = lambda num: MODELS["dcn"](num, args.field_dim, args.layers, args.hidden).eval()
    plain, with_bank = make(2), make(len(sizes))
    with_vectors = WithVectors(make(3), [vectors.shape[1]]).eval()
    bank = codes.to(torch.uint8 if max(code_sizes) < 256 else torch.int32)
    first = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
    table = torch.cat(tables)
    look_up = lambda ids: table.index_select(0, (ids + first[:ids.shape[1]]).flatten()).view(*ids.shape, -1)
    pair = lambda user, item: torch.stack([user, item], 1)
    ways = {
        "DCN": lambda user, item: plain(look_up(pair(user, item))),
        "DCN + bank": lambda user, item: with_bank(look_up(torch.cat([pair(user, item), bank[user]], 1))),
        "DCN + vectors": lambda user, item: with_vectors(look_up(pair(user, item)), None, vectors[user]),
        "DCN, folded": FoldedDCN(plain.net, tables[:2], codes),
        "DCN + bank, folded": FoldedDCN(with_bank.net, tables, codes)}
    megabytes = lambda *parts: sum(part.numel() * part.element_size() for part in parts) / 2**20
    ids = megabytes(*tables[:2])
    model = lambda module: megabytes(*module.parameters())
    folded = [megabytes(ways[name].users, ways[name].items) for name in ("DCN, folded", "DCN + bank, folded")]
    held = [ids + model(plain), ids + model(with_bank) + megabytes(*tables[2:]) + megabytes(bank),
            ids + model(with_vectors) + megabytes(vectors), *folded]
    figures = {name: {"megabytes": size} for name, size in zip(ways, held)}
    draw = torch.Generator().manual_seed(0)
    for size, num in rounds.items():
        taken = {name: [] for name in ways}
        for _ in range(num):
            user, item = (torch.randint(most, (size,), generator=draw) for most in (num_users, num_items))
            for name, way in ways.items():
                started = time.perf_counter()
                way(user, item).sigmoid()
                taken[name].append((time.perf_counter() - started) * 10_000 / size)
        for name, seconds in taken.items():
            seconds = seconds[num // 10:]  # the first ones warm the caches
            figures[name] |= {f"median_{size}": float(np.median(seconds)), f"p99_{size}":
                              float(np.quantile(seconds, 0.99)), f"peak_megabytes_{size}": None}
    for name, way in ways.items():
        figures[name][f"peak_megabytes_{size}"] = peak_megabytes(lambda: way(user, item).sigmoid())
    return figures


def peak_megabytes(function):
    """How far a call lifts the process's memory (Linux: the high-water mark can be reset); None elsewhere."""
    status = lambda key: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status")
                              if line.startswith(key))
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed goes back first
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        function()
        return max(0.0, status("VmHWM") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def print_serving(figures):
    """Table 6 as text: list of lines"""
    bare = figures["DCN"]["median_10000"]
    lines = [[name, *(f"{row[key]:.4f}" for key in ("median_1", "p99_1", "median_10000", "p99_10000")),
              f"{row['median_10000'] / bare:.2f}", f"{row['megabytes']:.2f}",
              "–" if row["peak_megabytes_10000"] is None else f"{row['peak_megabytes_10000']:.1f}"]
             for name, row in figures.items()]
    header = ["way of serving", "batch 1: median", "p99", "batch 10,000: median", "p99", "ratio to DCN",
              "held (MB)", "peak of a batch (MB)"]
    return ["Table 6: seconds per 10,000 rows, random weights, "
            f"{torch.get_num_threads()} threads; the paper: DCN 0.93, UserIP + DCN 1.21, KAR + DCN 4.78.", "",
            *markdown(header, lines)]


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def check_further_runs(args, split):
    """Exit where the runs that --splits and --codebook-sizes need cannot be made."""
    what = "--splits" if args.splits > 1 else "--codebook-sizes"
    if args.splits > 1 and split not in ("random", "cold-user"):
        fail(f"--splits {args.splits}: a split {split} is not drawn, so there is one only")
    if (args.splits > 1 or args.codebook_sizes) and read_sidecar(args, "profiles.pt")["options"].get("prior"):
        fail(f"{what}: the profiles of {args.run_dir} come from a round of EM, which further runs do not "
             f"repeat: run stages 2 and 3 without --prior, or leave {what} out")


def check_features(args):
    """The feature sets asked for; `truth` is there on planted data only, and for its own profiles only."""
    users = read_artifacts(args, "users.parquet")[0]
    names = read_sidecar(args, "feature_bank.parquet")["names"]
    missing = [f"true_{name}" for name in names if f"true_{name}" not in users]
    has_truth = not missing
    if "truth" in (args.features or []) and missing:
        fail(f"--features truth: users.parquet holds no {missing[0]}; only planted data know the truth, of "
             f"hobby and background")
    return list(dict.fromkeys(args.features or ["none", "codes", "random", *["truth"] * has_truth]))


def main(args):
    start_stage(args)
    started = time.time()
    if args.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        fail("--compile: there is no C++ compiler (g++ or clang++) on this machine; leave it out")
    features = check_features(args)
    runs = [read_run(args, args.run_dir, features)]
    check_further_runs(args, runs[0].prepared["split"])
    for split_seed in range(runs[0].split_seed + 1, runs[0].split_seed + args.splits):
        folder = further_run(args, f"split-{split_seed}", "01_prepare.py", {"split_seed": split_seed})
        runs.append(read_run(args, folder, features))
    models, seeds = list(dict.fromkeys(args.models)), range(args.seed, args.seed + args.seeds)
    rows = [row for run in runs for row in train_run(args, run, models, features, seeds)]

    told = {key: value for key, value in vars(args).items() if key != "run_dir"}
    options = json.dumps(told, sort_keys=True)
    seconds = [row.get("seconds", 0.0) for row in rows]
    results = pd.DataFrame(rows).drop(columns="seconds").assign(options=options)
    text, gains = summarize(args, results, runs)
    print(text)
    facts = {"gains": gains, "seconds": time.time() - started, "seconds_per_row": seconds}
    if args.codebook_sizes:
        codebook_figures(args, runs[0], seeds)
        text += "\nFigures 5 and 6, AUC and logloss by codebook size: figure5.png, figure6.png\n"
    if args.bench:
        stored = read_artifacts(args, "profiles.pt")[0]
        profiles = stored["profiles"][-1 if "fold" in stored else ...].flatten(1).float()
        facts["serving"] = serving_table(args, len(profiles), runs[0].num_items, torch.tensor(runs[0].codes),
                                         [size + 1 for size in runs[0].code_sizes], profiles)
        table = "\n".join(print_serving(facts["serving"]))
        print(table)
        text += f"\n## Serving\n\n{table}\n"
    write_artifact(args, "results.md", text, runs[0].inputs, **facts)
    path = write_artifact(args, "results.parquet", results, runs[0].inputs, **facts)
    final = f"wrote {path}: {len(results)} rows"
    for model, gain in list(gains.items())[:1]:
        told = with_interval(gain["auc_gain"], gain["auc_half_interval"])
        final += f" | {model}: codes - random AUC {told}"
        if "share_of_oracle" in gain:
            final += f", {gain['share_of_oracle']:.0%} of what the truth gains"
    print(final)


if __name__ == "__main__":
    main(parse_args())
