"""Stage 4 of 5: train click models with and without the codes, and report whether the codes help.

Every model reads user id, item id (features `none`), --fields, and more fields where asked. Of the
user: the `codes` of the feature bank (eq. 8); on planted data `truth`, the upper bound; `random`, the codes
dealt to users at random, the control against which a gain counts; `cf`, k-means of SVD factors; `leniency`,
quartile of the mean residual rating; `leniency16`, 16 quantiles of the shrunk one; `habits16`, 16 levels of
the rating habits that codes of ratings read, without an LLM; `dense`, profiles not quantized (table 3);
`peapod`, the codes of the profiles that baselines/peapod.py infers (RUN_DIR/peapod, after stage 3). Of the
item: `item-mean`, octile of the shrunk mean rating; `tfidf`, of the mean that other items' texts foretell;
`items`, the item bank, where an LLM reads these texts. Of both, numbers: `dense-means`, the shrunk means of
item and user; `taste`, how the user's ratings foretell the item's by the texts that an LLM read;
`tfidf-taste`, by their words. A train row reads what was made without its fold. Sets join by +. Within a +,
each `random` deals the part of its position in the first set listed with as many parts and no `random` (if
none: codes, then tfidf). The model `means`, a logistic regression on the two shrunk means, reads no ids.
Adam minimises binary cross-entropy (eq. 9); training stops early on valid logloss, the best epoch's weights
are restored, test is scored once. Seeds and sets of a model train side by side. With --splits, stages 1 to 3
run again for each further split, into RUN_DIR/split-SEED. A killed run continues.

Reads   interactions.parquet, items.parquet, users.parquet, feature_bank.parquet; with folds
        train_codes.parquet; for `dense` profiles.pt, codebook.pt; for `items` item_bank.parquet; for `taste`
        item_vectors.pt; for --bench profiles.pt; if they are there baseline-kar.parquet and others
Writes  results.parquet: the base rate's row, then per (model, features, split seed, seed), `means` first:
        rows (of train), auc, logloss, valid figures, what was chosen (not of means), options
        results.md: tables 2, 3, 4 beside the paper's, paired differences, with --bench table 6
        finished/: rows that are not trained again; with --codebook-sizes figure5, figure6 as png and csv

Example: python 04_train_ctr.py        (1 to 2 minutes on two cores)
  wrote runs/demo/results.parquet: 86 rows | dcn: codes - random AUC +0.0752 ± 0.0118, 74% of what …
"""

import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import hashlib
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from common import logloss, with_interval
from userip.artifacts import (fail, read_artifacts, read_sidecar, run_of, sha256_of, whole_file,
                              write_artifact)
from userip.ctr_models import MODELS, build
from userip.ctr_report import draw_figure, read_baselines, summarize, table_of_baselines
from userip.ctr_training import CHOICES, Member, Rows, table_rows, train_stack
from userip.features import (FEATURES, PROFILE_FREE, described_columns, feature_set, parts_of,
                             profile_vectors, set_columns)
from userip.further_runs import check_further_runs, further_run, read_json
from userip.options import (at_least, option_name, options_text, parse_with_presets, refuse_without_effect,
                            run_program, stage_parser, start_stage)
from userip.rating_means import means_model
from userip.serving import serving_figures, serving_table

PAPER = {"lr": 0.001}  # the paper gives no penalty, and no batch size of the CTR models
# penalty of the embeddings: smaller where no network can scale embeddings or first-order weights up again
WEIGHT_DECAY = dict.fromkeys(MODELS, 3e-3) | dict.fromkeys(("ffm", "afm", "fibinet"), 1e-4)
GRID = {"lr": (0.001, 0.005), "weight_decay": (1.0, 0.1), "start": (0.5, 0.05)}  # decay: times the default
CODE = "04_train_ctr.py", "common.py", *(f"userip/{room}.py" for room in (  # other code trains again
    "ctr_models", "ctr_training", "features", "item_bank", "rating_means", "taste"))
STAGE_1 = ("interactions.parquet", "items.parquet", "users.parquet")
FIGURES = {"figure5": (4, 16, 64, 256), "figure6": (3, 9, 27, 81)}  # K of hobby, of background
MAX_NUMBERS = 2**27  # in the embedding tables of one stack: 3 GB with Adam's averages


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--splits", type=at_least(1), default=1, help="number of splits; stages 1 to 3 run for each")
    add.data("--codebook-sizes", action="store_true", help="figures 5 and 6: the first model with many K")
    add.data("--features", nargs="+", type=feature_set, metavar="SET",
             help=f"of {' '.join(FEATURES)}, or joined by + (default: none codes random, planted: truth)")
    add.data("--fields", nargs="+", default=[], metavar="COLUMN",
             help="x of eq. 1: columns of items.parquet and users.parquet that all sets read (default: none)")
    add.method("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add.method("--models", nargs="+", choices=("means", *MODELS), default=["dcn", "pnn", "onn", "dcnv2"],
               metavar="MODEL", help=f"of {' '.join(MODELS)} (default: dcn pnn onn dcnv2), beside `means`, "
                                     f"which is always trained; means alone: nothing else")
    add.method("--field-dim", type=at_least(1, at_most=4096), default=8, help="width of an embedding, E")
    add.method("--layers", type=at_least(1, at_most=100), default=3, help="cross or attention layers, if any")
    add.method("--hidden", type=at_least(1, at_most=100_000), nargs="+", default=[16, 16],
               help="widths of an MLP, if any")
    add.method("--dropout", type=at_least(0, float), default=0.2, help="in the MLP, of AFM's pooled pairs")
    add.method("--with-means", action="store_true",
               help="let valid choose, for each model and set, if it reads the two shrunk means, too")
    add.method("--id-dropout", type=at_least(0, float), default=0.0,
               help="share of train rows whose user id (split cold-item: item id) is unknown")
    add.training("--seed", type=at_least(0), default=0, help="first of the seeds")
    add.training("--seeds", type=at_least(1, at_most=10_000), default=5,
                 help="seeds of start, batches, dropout, drawn codes")
    add.training("--lr", type=at_least(1e-12, float), default=0.005, help="learning rate of Adam")
    add.training("--weight-decay", type=at_least(0, float),
                 help="L2 penalty of the embeddings (default: 3e-3; FFM, AFM and FiBiNET 1e-4)")
    add.training("--start", type=at_least(0, float), default=0.5, help="deviation of first embeddings")
    add.training("--batch-size", type=at_least(1), default=512, help="rows per step")
    add.training("--epochs", type=at_least(1), default=50, help="passes over the train rows at most")
    add.training("--patience", type=at_least(1), default=6, help="stop after so many epochs without progress")
    add.training("--tune", action="store_true", help="choose lr, decay, start on valid for each feature set")
    add.machine("--compile", action="store_true", help="compile each model's step (10 s; for large data)")
    add.machine("--bench", action="store_true", help="table 6: a DCN's seconds per 10,000 rows, with bank")
    args = parse_with_presets(parser, argv, paper=PAPER)
    args.models = [name for name in args.models if name != "means"] or ["means"]
    is_trained = args.models != ["means"]
    has_mlp = args.bench or {*args.models} - {"means", "ffm", "afm", "autoint"}
    has_layers = args.bench or {*args.models} & {"dcn", "dcnv2", "autoint"}
    refuse_without_effect(parser, args, {
        **dict.fromkeys(("features", "fields", "codebook_sizes", "tune", "with_means", "paper", "lr", "start",
                         "weight_decay", "batch_size", "epochs", "patience", "id_dropout", "compile"),
                        (is_trained, "a model beside means in --models")),
        "field_dim": (is_trained or args.bench, "a model beside means in --models"),
        "hidden": (has_mlp, "a model with an MLP in --models"),
        "dropout": (has_mlp or "afm" in args.models, "a model with an MLP or afm in --models"),
        "layers": (has_layers, "dcn, dcnv2 or autoint in --models")})
    if "afn" in args.models and args.field_dim == 1:
        parser.error("--field-dim 1: afn normalizes over the rows of a batch and needs two numbers at least")
    if args.with_means and args.features and all(name == joined_with_means(name) for name in args.features):
        parser.error(f"--with-means means nothing for {' '.join(args.features)}: leave it out")
    for name in ("dropout", "id_dropout"):
        if getattr(args, name) >= 1:
            parser.error(f"{option_name(name)} must be below 1, not {getattr(args, name)}")
    for name in ("paper", "lr", "start"):
        if args.tune and getattr(args, name) != parser.get_default(name):
            parser.error(f"--tune chooses what {option_name(name)} sets: leave one of them out")
    if args.seed + args.seeds > 2**32:
        parser.error(f"--seed {args.seed} --seeds {args.seeds}: seeds must be below 2**32 = {2**32}")
    return args


# ----------------------------------------------------------------------------------------------------------
# data: which fields a model reads
# ----------------------------------------------------------------------------------------------------------


def read_run(run_dir, features, fields=()):
    """What models read in one run, as a namespace: interactions and labels int8 [n] by split, codes int64
    [N, P], train_codes [n, P], described (the fields of --fields), for `dense` profiles.pt and codebook.pt,
    for `items` item_codes int64 [M], for `taste` item_vectors [M, V], for `peapod` what is read in peapod/
    """
    folder = SimpleNamespace(run_dir=run_dir)
    prepared, bank = (read_sidecar(folder, name) for name in ("interactions.parquet", "feature_bank.parquet"))
    defaults = {"split_seed": prepared["seed"], "split": "random", "dataset": "table", "interactions": 0}
    prepared = defaults | prepared  # an interactions.parquet of another tool says less
    inputs = ["interactions.parquet", "feature_bank.parquet", "users.parquet", "items.parquet"]
    inputs += ["profiles.pt", "codebook.pt"] * ("dense" in features)
    inputs += ["train_codes.parquet"] * bool(bank.get("has_folds"))
    of_items = {"items": "item_bank.parquet", "taste": "item_vectors.pt"}
    parts = "+".join(features).split("+")
    asked = [name for name in of_items if name in parts]
    if asked and not read_sidecar(folder, "profiles.pt")["options"].get("items"):
        fail(f"--features {asked[0]}: {run_dir} has no item bank: run stages 2 (with --items) and 3 again")
    inputs += [of_items[name] for name in asked]
    tables = dict(zip(inputs, read_artifacts(folder, *inputs)))
    interactions, users = tables["interactions.parquet"], tables["users.parquet"]
    split = {name: interactions[interactions["split"] == name]
             for name in ("train", "valid", "test", "support")}
    labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid", "test")}
    for name, label in labels.items():
        if len(np.unique(label)) < 2:
            fail(f"the {name} rows of {run_dir}/interactions.parquet have one label only, so AUC is "
                 f"undefined: choose another --threshold in stage 1")
    codes = tables["feature_bank.parquet"][bank["names"]]
    train_codes = tables.get("train_codes.parquet", codes.iloc[split["train"]["user"]])[bank["names"]]
    items, has_items = tables["items.parquet"], "items" in asked
    digests = {name: sha256_of(Path(run_dir) / name) for name in inputs}
    peapod = read_peapod(run_dir) if "peapod" in parts else None
    digests |= {f"peapod/{name}": digest for name, digest in peapod.digests.items()} if peapod else {}
    return SimpleNamespace(
        inputs=[*digests], prepared=prepared, split_seed=prepared["split_seed"], split=split, labels=labels,
        users=users, names=bank["names"], code_sizes=bank["codes"], codes=codes.to_numpy(dtype=np.int64),
        train_codes=train_codes.to_numpy(dtype=np.int64), num_items=len(items), items=items,
        item_codes=tables["item_bank.parquet"]["code"].to_numpy() if has_items else None,
        num_item_codes=read_sidecar(folder, "item_bank.parquet")["codes"] if has_items else 0,
        described=described_columns(fields, items, users, split["train"]),
        stored=tables.get("profiles.pt"), codebook=tables.get("codebook.pt"),
        item_vectors=tables["item_vectors.pt"]["vectors"] if "taste" in asked else None,
        peapod=peapod, digests=digests)


def read_peapod(run_dir):
    """`read_run` of RUN_DIR/peapod, which must be of the same split"""
    folder = Path(run_dir) / "peapod"
    made = read_json(folder / "profiles.pt.json") or {}
    if (made.get("stage"), made.get("run")) != ("baselines/peapod.py", run_of(run_dir)):
        fail(f"--features peapod: {folder} has no profiles of this split: run `python baselines/peapod.py "
             f"--run-dir {run_dir}`, then `python 03_quantize.py --run-dir {folder}`")
    return read_run(folder, [])


def check_features(args, run):
    """The feature sets asked for; `truth` exists on planted data only, and for its own profiles only."""
    missing = [f"true_{name}" for name in run.names
               if f"true_{name}" not in run.users or run.users[f"true_{name}"].isna().any()]
    if any("truth" in feature.split("+") for feature in args.features or []) and missing:
        fail(f"--features truth: users.parquet has no column {missing[0]}, or it has gaps; only planted data "
             f"know the truth, of hobby and background")
    return list(dict.fromkeys(args.features or ["none", "codes", "random", *["truth"] * (not missing)]))


def further_fields(args, feature, run, seed):
    """A feature set beside user and item: ids {split: int64 [n, P']}, how many each field has, and numbers
    {split: float32 [n, C]}
    """
    columns = [*set_columns(parts_in(args, feature), run, seed), *run.described]
    is_number = [column.size == 0 for column in columns]
    codes = [column.read(run.split) for column in columns]
    table = lambda name, wanted: np.reshape(
        [code[name] for code, number in zip(codes, is_number) if number == wanted],
        (is_number.count(wanted), len(run.split[name]))).T
    ids, numbers = ({name: table(name, wanted).astype(dtype) for name in run.split}
                    for wanted, dtype in ((False, np.int64), (True, np.float32)))
    return ids, [column.size for column in columns if column.size], numbers


def read_rows(args, run, pairs):
    """Pairs (feature set, seed) of one shape, F fields -> Rows, with a set of fields for each"""
    split = {name: run.split[name] for name in run.labels}
    dropped = 1 if run.prepared["split"] == "cold-item" else 0 if args.id_dropout else None
    fields, sizes, numbers = zip(*[further_fields(args, feature, run, seed) for feature, seed in pairs])
    ids, num_rows, unknown = zip(*[table_rows(split, *sets, len(run.users), run.num_items, dropped)
                                   for sets in zip(fields, sizes)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = {name: torch.stack([of_pair[name] for of_pair in ids]).to(device) for name in split}
    dense = profile_vectors(run, device) if pairs[0][0] == "dense" else {}
    if num_numbers := numbers[0]["train"].shape[1]:
        dense = {"dims": (1,) * num_numbers, "numbers": {
            name: torch.from_numpy(np.stack([of_pair[name] for of_pair in numbers])).to(device)
            for name in split}}
    return Rows(ids, run.labels, num_rows, unknown[0], dropped, **dense)


# ----------------------------------------------------------------------------------------------------------
# train and evaluate
# ----------------------------------------------------------------------------------------------------------


def candidates(args, model):
    """What a model is trained with, in the order of CHOICES: the options, or with --tune all of the grid"""
    decay = WEIGHT_DECAY[model] if args.weight_decay is None else args.weight_decay
    if not args.tune:
        return [(args.lr, decay, args.start)]
    return [(lr, share * decay, start) for lr, share, start in itertools.product(*GRID.values())]


def train_group(args, name, run, features, seeds):
    """Train a model with feature sets of one shape -> {(feature set, seed): figures} of the candidate of the
    best mean valid logloss over the seeds; test labels are read for it only.
    """
    pairs, choices = list(itertools.product(features, seeds)), candidates(args, name)
    rows, labels = read_rows(args, run, pairs), run.labels["test"]
    # candidates of one learning rate stop at about the same epoch, so few members wait for the last
    members = [Member(index, seed, *choice) for choice in choices for index, (_, seed) in enumerate(pairs)]
    num_fields = rows.ids["train"].shape[2] + len(rows.dims)
    width = build(name, num_fields, args.field_dim, args.layers, args.hidden).width
    stack_size = max(1, min(MAX_NUMBERS // (max(rows.num_rows) * width), 4 * len(pairs)))
    figures, probabilities, chosen = [], [], {}
    for first in range(0, len(members), stack_size):
        best, stack = train_stack(args, name, members[first:first + stack_size], rows, args.compile)
        figures += best
        probabilities += list(stack.predict(rows, "test"))
    losses = np.reshape([one["valid_logloss"] for one in figures], (len(choices), len(features), -1)).mean(2)
    if not np.isfinite(losses.min(0)).all():
        fail(f"{name} with {features[losses.min(0).argmax()]} diverged: no finite logloss on valid with "
             f"{options_text(dict(zip(CHOICES, max(choices))))}; lower them")
    for index, pair in enumerate(pairs):
        choice = losses[:, features.index(pair[0])].argmin()
        member = choice * len(pairs) + index
        chosen[pair] = dict(zip(CHOICES, choices[choice])) | figures[member] | {
            "auc": roc_auc_score(labels, probabilities[member]),
            "logloss": logloss(labels, probabilities[member])}
    return chosen


def group_key(args, run, model, features, seeds):
    """A digest of what decides the figures of a group: options, inputs, its rows, the code that trains it."""
    ignored = {"run_dir", "models", "features", "seed", "seeds", "splits", "codebook_sizes", "bench", "paper",
               "with_means"}
    options = {key: option for key, option in vars(args).items() if key not in ignored | set(CHOICES)}
    parts = [parts_in(args, feature) for feature in features]
    # what reads no profile is the same for any codebook
    is_free = {*"+".join(features).split("+")} <= PROFILE_FREE
    inputs = {name: digest for name, digest in run.digests.items() if not is_free or name in STAGE_1}
    code = [sha256_of(Path(__file__).parent / file) for file in CODE]
    decisive = [options, candidates(args, model), inputs, model, features, parts, list(seeds), code,
                torch.__version__, torch.cuda.is_available()]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def train_run(args, run, models, features, seeds):
    """All rows of one run, the base rate and `means` first: list of dicts. Finished ones are read, the others
    trained. --with-means trains each set with `dense-means`, too, and keeps what has the lower valid logloss.
    """
    facts = {"split_seed": run.split_seed, "rows": len(run.labels["train"])}
    rows = [{"model": "base rate", "features": "none", **facts, "seed": 0, "auc": 0.5,
             "logloss": logloss(run.labels["test"], float(run.labels["train"].mean()))}]
    rows += [{"model": "means", "features": "none", **facts, "seed": seed}
             | dict.fromkeys(CHOICES, float("nan"))  # nothing is chosen for it
             | means_model(run.split, run.labels, seed, len(run.users), run.num_items) for seed in seeds]
    asked = features
    if args.with_means:
        features = list(dict.fromkeys([*asked, *map(joined_with_means, asked)]))
    # by fields beside the ids, sparse, numbers or vectors; feature sets of one shape train in one stack
    shape = lambda feature: "z" if feature == "dense" else str([
        column.size > 0 for column in set_columns(parts_in(args, feature), run, seeds[0])])
    groups = [list(group) for _, group in itertools.groupby(sorted(features, key=shape), shape)]
    for model, group in itertools.product([name for name in models if name in MODELS], groups):
        path = Path(args.run_dir) / "finished" / f"{group_key(args, run, model, group, seeds)}.json"
        finished = read_json(path)
        if not isinstance(finished, list) or [row.get("seed") for row in finished if isinstance(row, dict)
                                              and "auc" in row] != [*seeds] * len(group):
            finished = None  # not what this stage writes
        print(f"{model} with {', '.join(group)}: {len(group) * len(seeds)} rows of split {run.split_seed} "
              f"{'finished before' if finished else 'side by side …'}", flush=True)
        if not finished:
            trained = train_group(args, model, run, group, seeds)
            finished = [{"model": model, "features": feature, **facts, "seed": seed} | figures
                        for (feature, seed), figures in trained.items()]
            with whole_file(path) as file:
                file.write(json.dumps(finished).encode())
        print(pd.DataFrame(finished).to_string(index=False, float_format="{:.4f}".format), flush=True)
        rows += finished
    return choose_means(rows, asked) if args.with_means else rows


def parts_in(args, feature):
    """The parts of a set; what --with-means has joined to `dense-means` deals what it deals without"""
    base = feature.removesuffix("+dense-means")
    if args.with_means and base != feature and base in (args.features or ()):
        return [*parts_of(base, args.features), ("dense-means", False)]
    return parts_of(feature, args.features)


def joined_with_means(feature):
    """The set and `dense-means`; the set itself if it holds these, or vectors, which nothing joins"""
    if feature == "dense" or "dense-means" in feature.split("+"):
        return feature
    return "dense-means" if feature == "none" else f"{feature}+dense-means"


def choose_means(rows, features):
    """Of each model and feature set, the rows (dicts) with or without the two means: those whose valid
    logloss is lower in the mean over seeds. They bear the set's name; with_means says which they are.
    """
    frame = pd.DataFrame(rows)
    losses = frame.groupby(["model", "features"], sort=False)["valid_logloss"].mean()
    chosen = [row | {"with_means": False} for row in rows if row["model"] not in MODELS]
    models = [name for name in frame["model"].unique() if name in MODELS]
    for model, feature in itertools.product(models, features):
        both = feature, joined_with_means(feature)
        best = min(both, key=lambda name: losses[model, name])
        print(f"{model} with {feature}: valid logloss {losses[model, both[0]]:.4f}, with the means "
              f"{losses[model, both[1]]:.4f}")
        chosen += [row | {"features": feature, "with_means": best != feature} for row in rows
                   if (row["model"], row["features"]) == (model, best)]
    return chosen


def codebook_figures(args, run, seeds):
    """Figures 5 and 6: the first model with the codes of smaller and larger codebooks, random ones beside"""
    for k, (figure, name) in enumerate(zip(FIGURES, run.names)):
        rows = []
        for size in FIGURES[figure]:
            codes = [*run.code_sizes[:k], size, *run.code_sizes[k + 1:]]
            folder = "codes-" + "-".join(map(str, codes))
            further = read_run(further_run(args, folder, "03_quantize.py", {"codes": codes}), [], args.fields)
            trained = train_run(args, further, args.models[:1], ["none", "codes", "random"], seeds)
            rows += [row | {"size": size} for row in trained if row["model"] in MODELS]
        draw_figure(args, figure, f"codebook size, {name}", rows)


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def main(args):
    start_stage(args)
    started = time.time()
    if args.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        fail("--compile: there is no C++ compiler (g++ or clang++) on this machine; leave it out")
    runs = [read_run(args.run_dir, args.features or [], args.fields)]
    features = check_features(args, runs[0])
    check_further_runs(args, runs[0].prepared["split"])
    baselines = read_baselines(args)
    for split_seed in range(runs[0].split_seed + 1, runs[0].split_seed + args.splits):
        folder = further_run(args, f"split-{split_seed}", "01_prepare.py", {"split_seed": split_seed})
        runs.append(read_run(folder, features, args.fields))
    models, seeds = list(dict.fromkeys(args.models)), range(args.seed, args.seed + args.seeds)
    rows = [row for run in runs for row in train_run(args, run, models, features, seeds)]

    options = {key: option for key, option in vars(args).items() if key != "run_dir"}
    results = pd.DataFrame(rows).assign(options=json.dumps(options, sort_keys=True))
    text, gains = summarize(options, results, runs)
    text += "\n".join(table_of_baselines(baselines))
    print(text)
    facts = {"gains": gains}
    if args.codebook_sizes:
        codebook_figures(args, runs[0], seeds)
        text += "\nFigures 5 and 6, AUC and logloss by codebook size: figure5.png, figure6.png\n"
    if args.bench:
        profiles = read_artifacts(args, "profiles.pt")[0]["profiles"].flatten(-2).float()
        item_codes = np.empty((runs[0].num_items, 0), int) if runs[0].item_codes is None else \
            runs[0].item_codes[:, None]
        sizes = [size + 1 for size in runs[0].code_sizes] + [runs[0].num_item_codes] * item_codes.shape[1]
        facts["serving"] = serving_figures(args, torch.tensor(runs[0].codes), torch.tensor(item_codes), sizes,
                                           profiles.view(-1, *profiles.shape[-2:])[-1])
        table = "\n".join(serving_table(facts["serving"]))
        print(table)
        text += f"\n## Serving\n\n{table}\n"
    facts["seconds"] = time.time() - started
    write_artifact(args, "results.md", text, [*runs[0].inputs, *baselines], **facts)
    path = write_artifact(args, "results.parquet", results, runs[0].inputs, **facts)
    line = f"wrote {path}: {len(results)} rows"
    for model, gain in list(gains.items())[:1]:
        line += f" | {model}: codes - random AUC {with_interval(gain['auc_gain'], gain['auc_half_interval'])}"
        if "share_of_oracle" in gain:
            line += f", {gain['share_of_oracle']:.0%} of what the truth gains"
    print(line)


if __name__ == "__main__":
    run_program(main, parse_args)
