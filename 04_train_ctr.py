"""Stage 4 of 5: train click-through models with and without the codes, and say whether the codes help.

Every model reads user id and item id (features `none`), and more sparse fields where asked: the `codes` of
the feature bank (eq. 8), `random` codes (the same codes dealt to users at random: more parameters, no
information), and on planted data the `truth` (the upper bound). More controls: `cf` (k-means of the users'
factors of a SVD of the train rows), `leniency` (quartile of how generously the user rates, out of fold),
`dense` (the profiles themselves, without VQ: table 3). With --id-dropout cold users meet a trained unknown
id. Adam on binary cross-entropy (eq. 9), early stopping on valid logloss, the best epoch's weights restored,
test scored once. A gain counts only against `random`. `--paper` = the paper's learning rate.

Reads   interactions.parquet, feature_bank.parquet, users.parquet (truth, planted data only)
Writes  results.parquet: one row per (model, features, split seed, seed): auc, logloss, valid figures, best
        epoch, options
        results.md: the tables below; the seconds of each run stand in the sidecar, so that the same seed
        gives the same bits

Example: python 04_train_ctr.py        (2 minutes on two cores)
  wrote runs/demo/results.parquet: 81 rows | dcn: codes - random AUC +0.0682 ± 0.0122, 71% of what the truth
  gains
"""

import itertools
import json
import time

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import normalize
from torch.nn import functional as F

from common import (at_least, fail, logloss, options_text, parse_with_presets, read_artifacts, read_sidecar,
                    stage_parser, start_stage, with_interval, write_artifact)
from ctr_models import MODELS

PAPER = {"lr": 0.001, "weight_decay": 0.001}  # the paper's learning rate; the decay that suits it is ours
FEATURES = ("none", "codes", "random", "truth", "cf", "leniency", "dense")
DIFFERENCES = [("codes", "none"), ("codes", "random"), ("truth", "random"), ("codes", "cf"),
               ("codes", "leniency"), ("codes", "dense"), ("cf", "none"), ("leniency", "none"),
               ("dense", "none")]


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="first of the seeds")
    add("--seeds", type=at_least(1), default=5, help="how many seeds of start, batches and random codes")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--models", nargs="+", choices=MODELS, default=["dcn", "pnn", "onn", "dcnv2"], help="what to train")
    add("--features", nargs="+", choices=FEATURES, default=None,
        help="read beside the ids (default: none codes random and, on planted data, truth)")
    add("--id-dropout", type=at_least(0, float), default=0.0,
        help="share of train rows that meet the unknown user id instead of their own, anew in each step")
    add("--field-dim", type=at_least(1), default=8, help="width of a field's embedding, E")
    add("--layers", type=at_least(1), default=3, help="cross layers (DCN, DCNv2), attention layers (AutoInt)")
    add("--hidden", type=at_least(1), nargs="+", default=[16, 16], help="widths of the MLP")
    add("--dropout", type=at_least(0, float), default=0.2, help="dropout in the MLP")
    add("--lr", type=at_least(0, float), default=0.01, help="learning rate of Adam")
    add("--weight-decay", type=at_least(0, float), default=3e-4, help="L2 penalty of Adam")
    add("--batch-size", type=at_least(1), default=512, help="rows per step")
    add("--epochs", type=at_least(1), default=50, help="passes over the train rows at most")
    add("--patience", type=at_least(1), default=6, help="stop after so many epochs without progress on valid")
    args = parse_with_presets(parser, argv, paper=PAPER)
    for name in ("dropout", "id_dropout"):
        if getattr(args, name) >= 1:
            parser.error(f"--{name.replace('_', '-')} must be below 1, not {getattr(args, name)}")
    return args


# ----------------------------------------------------------------------------------------------------------
# data: ids of all fields
# ----------------------------------------------------------------------------------------------------------


def fields_of(feature, split, bank, users, names, sizes, vectors, seed):
    """The fields of a feature set beside the ids: dict of int64 [rows, P'] by split, and their sizes.

    split: frames train, valid, test, support. All but leniency are functions of the user. `vectors`: the
    profiles without VQ, float32 [N, C] per name.
    """
    if feature == "leniency":
        return leniency_of(split, seed)
    if feature == "none":
        codes, sizes = np.empty((len(bank), 0), dtype=np.int64), []
    elif feature == "dense":
        codes, sizes = np.arange(len(bank))[:, None].repeat(len(names), 1), list(vectors)
    elif feature == "truth":
        columns = [pd.factorize(users[f"true_{name}"], sort=True)[0] for name in names]
        codes = np.stack(columns, 1).astype(np.int64)
        sizes = [int(column.max()) + 1 for column in codes.T]
    elif feature == "cf":
        codes, sizes = cf_of(split, len(bank), sizes, seed), [size + 1 for size in sizes]
    else:
        codes, sizes = bank[names].to_numpy(dtype=np.int64), [size + 1 for size in sizes]
    if feature == "random":  # the same codes, dealt anew: sizes and usage stay, meaning goes
        deal = lambda k: np.random.default_rng([seed, k]).permutation(codes[:, k])
        codes = np.stack([deal(k) for k in range(len(names))], 1)
    return {name: codes[frame["user"]] for name, frame in split.items()}, sizes


def vectors_of(profiles, codebook, names):
    """The profiles in the codebook's coordinates, not quantized (table 3, w/o VQ): [N, C] per name"""
    parts = [codebook[name] for name in names]
    return [(profiles["profiles"][:, k] - part["mean"]) @ part["transform"] for k, part in enumerate(parts)]


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


# ----------------------------------------------------------------------------------------------------------
# train and evaluate
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, ids, batch_size=65536):
    """ids [B, F] -> click probabilities, float64 numpy [B]"""
    model.eval()
    return torch.cat([model(part).sigmoid() for part in ids.split(batch_size)]).double().cpu().numpy()


def train_one(args, name, sizes, ids, labels, seed):
    """Train one model; ids and labels: dicts by split. Figures on valid (best epoch) and, once, on test."""
    torch.manual_seed(seed)
    device = ids["train"].device
    model = MODELS[name](sizes, args.field_dim, args.layers, args.hidden, args.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    # a generator of its own: every feature set sees the same rows in the same order
    batches = torch.Generator().manual_seed(seed)
    train_label = torch.from_numpy(labels["train"]).float().to(device)
    best = {"valid_logloss": float("inf")}
    for epoch in range(1, args.epochs + 1):
        model.train()
        for rows in torch.randperm(len(train_label), generator=batches).to(device).split(args.batch_size):
            batch = ids["train"][rows]
            if args.id_dropout:
                dropped = torch.rand(len(rows), generator=batches) < args.id_dropout
                batch[dropped.to(device), 0] = sizes[0] - 1  # the unknown user, last of his field
            loss = F.binary_cross_entropy_with_logits(model(batch), train_label[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        probability = predict(model, ids["valid"])
        valid = logloss(labels["valid"], probability)
        if not np.isfinite(valid):
            fail(f"{name} diverged in epoch {epoch} with --lr {args.lr:g}: lower it")
        if valid < best["valid_logloss"]:
            best = {"valid_logloss": valid, "valid_auc": roc_auc_score(labels["valid"], probability),
                    "best_epoch": epoch}
            weights = {key: value.clone() for key, value in model.state_dict().items()}
        if epoch - best["best_epoch"] >= args.patience:
            break
    model.load_state_dict(weights)
    probability = predict(model, ids["test"])
    auc = roc_auc_score(labels["test"], probability)
    return {"auc": auc, "logloss": logloss(labels["test"], probability),
            "calibration_error": calibration_error(labels["test"], probability), **best}


# ----------------------------------------------------------------------------------------------------------
# tables
# ----------------------------------------------------------------------------------------------------------


def rela_impr_auc(auc, reference):
    """Relative improvement in percent (eq. 10): ((A - .5) / (A_ref - .5) - 1) · 100"""
    return ((auc - 0.5) / (reference - 0.5) - 1) * 100


def rela_impr_logloss(loss, reference):
    """Relative improvement in percent (eq. 11): (LL_ref / LL - 1) · 100"""
    return (reference / loss - 1) * 100


def calibration_error(labels, probabilities, num_bins=10):
    """Expected calibration error: mean of |mean probability - share of clicks| over bins of equal size."""
    order = np.argsort(probabilities, kind="stable")
    bins = [part for part in np.array_split(order, num_bins) if len(part)]
    gaps = [abs(probabilities[part].mean() - labels[part].mean()) * len(part) for part in bins]
    return float(sum(gaps) / len(labels))


def paired_interval(differences):
    """Mean of paired differences [S], half of its 95% interval, p that it is 0 (t test); nan for one seed."""
    differences = np.asarray(differences)
    if len(differences) < 2:
        return float(differences.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / np.sqrt(len(differences))
    p = stats.ttest_1samp(differences, 0).pvalue if differences.std() else float(not differences.mean())
    return float(differences.mean()), float(half), float(p)


def summarize(results):
    """Markdown tables of means, and paired differences over the seeds: text, the codes' gains by model"""
    deviation = lambda values: f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    spread = lambda values: f"{values.mean():.4f}{deviation(values)}"
    by = {key: frame.sort_values("seed") for key, frame in results.groupby(["model", "features"], sort=False)}
    lines = ["| model | features | AUC | logloss | calibration error | RelaImpr AUC (%) | "
             "RelaImpr logloss (%) |",
             "|---|---|---|---|---|---|---|"]
    for (model, features), frame in by.items():
        improvements = "| | |"
        if (reference := by.get((model, "none"))) is not None and features != "none":
            auc = rela_impr_auc(frame["auc"].mean(), reference["auc"].mean())
            loss = rela_impr_logloss(frame["logloss"].mean(), reference["logloss"].mean())
            improvements = f"| {auc:+.2f} | {loss:+.2f} |"
        lines.append(f"| {model} | {features} | {spread(frame['auc'])} | {spread(frame['logloss'])} "
                     f"| {spread(frame['calibration_error'])} {improvements}")

    caption = "Paired differences over the seeds, mean ± half of the 95% interval"
    lines += ["", "± is the standard deviation over the seeds."]
    lines += ["", f"{caption} (the split is one and the same):", "",
              "| model | difference | AUC | p | logloss | p | share of the truth's AUC gain |",
              "|---|---|---|---|---|---|---|"]
    gains = {}
    for model in results["model"].unique():
        for first, second in DIFFERENCES:
            if (model, first) not in by or (model, second) not in by:
                continue
            difference = lambda key: by[model, first][key].to_numpy() - by[model, second][key].to_numpy()
            auc, loss = paired_interval(difference("auc")), paired_interval(difference("logloss"))
            share = ""
            if (first, second) == ("codes", "random"):
                gains[model] = {"auc_gain": auc[0], "auc_half_interval": auc[1]}
                if (model, "truth") in by:
                    oracle = by[model, "truth"]["auc"].mean() - by[model, "random"]["auc"].mean()
                    gains[model] |= {"oracle_auc_gain": oracle, "share_of_oracle": auc[0] / oracle}
                    share = f"{auc[0] / oracle:.0%}"
            lines.append(f"| {model} | {first} - {second} | {with_interval(*auc[:2])} | {auc[2]:.3f} | "
                         f"{with_interval(*loss[:2])} | {loss[2]:.3f} | {share} |")
    return "\n".join(lines), gains


def main(args):
    start_stage(args)
    started = time.time()
    inputs = ["interactions.parquet", "feature_bank.parquet", "users.parquet"]
    if "dense" in (args.features or []):
        inputs += ["profiles.pt", "codebook.pt"]
    interactions, bank, users, *stored = read_artifacts(args, *inputs)
    made = read_sidecar(args, "feature_bank.parquet")
    names, code_sizes = made["names"], made["codes"]
    has_truth = all(f"true_{name}" in users for name in names)
    features = args.features or ["none", "codes", "random", *["truth"] * has_truth]
    if "truth" in features and not has_truth:
        fail(f"--features truth: users.parquet holds no true_{names[0]}; only planted data know the truth")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vectors = vectors_of(*stored, names) if stored else []
    split = {name: interactions[interactions["split"] == name]
             for name in ("train", "valid", "test", "support")}
    labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid", "test")}
    for name, values in labels.items():
        if len(np.unique(values)) < 2:
            fail(f"the {name} rows of interactions.parquet have one label only, so AUC is undefined: "
                 f"choose another --threshold in stage 1")
    is_warm = np.isin(np.arange(len(users)), split["train"]["user"])
    made_from = read_sidecar(args, "interactions.parquet")
    split_seed = made_from.get("split_seed", made_from["seed"])
    told = {key: value for key, value in vars(args).items() if key != "run_dir"}
    options = json.dumps(told, sort_keys=True)

    rate = float(labels["train"].mean())
    rows = [{"model": "base rate", "features": "none", "split_seed": split_seed, "seed": 0, "auc": 0.5,
             "logloss": logloss(labels["test"], rate),
             "calibration_error": abs(rate - float(labels["test"].mean())), "rows": len(labels["train"])}]
    seconds = [0.0]
    seeds = range(args.seed, args.seed + args.seeds)
    for model, feature, seed in itertools.product(args.models, features, seeds):
        fields, sizes = fields_of(feature, split, bank, users, names, code_sizes, vectors, seed)
        # a user without train rows is unknown to the model: one id for all of them, behind the others
        has_unknown = bool(args.id_dropout) or not is_warm.all()
        sizes = [len(users) + has_unknown, int(interactions["item"].max()) + 1, *sizes]
        user_id = np.where(is_warm, np.arange(len(users)), len(users))
        columns = {name: (user_id[split[name]["user"]], split[name]["item"], fields[name]) for name in labels}
        ids = {name: torch.from_numpy(np.column_stack(part)).to(device) for name, part in columns.items()}
        run_started = time.time()
        figures = train_one(args, model, sizes, ids, labels, seed)
        seconds.append(time.time() - run_started)
        rows.append({"model": model, "features": feature, "split_seed": split_seed, "seed": seed,
                     "rows": len(labels["train"]), **figures, "options": options})
        speed = figures["best_epoch"] * len(labels["train"]) / seconds[-1]
        print(f"{model:5} {feature:6} seed {seed} | epoch {figures['best_epoch']:02d}/{args.epochs} | "
              f"valid auc {figures['valid_auc']:.4f} logloss {figures['valid_logloss']:.4f} | "
              f"test auc {figures['auc']:.4f} logloss {figures['logloss']:.4f} | "
              f"{seconds[-1]:.1f}s, {speed:,.0f} rows/s")

    results = pd.DataFrame(rows)
    text, gains = summarize(results)
    unknown = int((~is_warm[split["test"]["user"]]).sum())
    text = (f"Split: {made_from.get('split', 'random')}; {unknown:,} of {len(labels['test']):,} test rows "
            f"are of users without a train row, whom the models know as unknown.\n\n{text}")
    print(text)
    facts = {"gains": gains, "seconds": time.time() - started, "seconds_per_row": seconds}
    markdown = f"# Click-through rate, {len(labels['test']):,} test rows\n\n{text}\n"
    write_artifact(args, "results.md", markdown, inputs, **facts)
    path = write_artifact(args, "results.parquet", results, inputs, **facts)
    final = f"wrote {path}: {len(results)} rows"
    for model, gain in list(gains.items())[:1]:
        told = with_interval(gain["auc_gain"], gain["auc_half_interval"])
        final += f" | {model}: codes - random AUC {told}"
        if "share_of_oracle" in gain:
            final += f", {gain['share_of_oracle']:.0%} of what the truth gains"
    print(final)


if __name__ == "__main__":
    main(parse_args())
