"""The report of stage 4: statistics (eq. 10, 11, paired intervals), the paper's tables, figures 5 and 6.

results: a frame with a row per (model, features, split seed, seed), the base rate's row first. groups: the
same as {(model, features): frame}, rows in the order of split and seed.
"""

import io
import itertools

import numpy as np
import pandas as pd
from scipy import stats

from common import with_interval
from userip.artifacts import write_artifact
from userip.ctr_training import CHOICES

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

# ----------------------------------------------------------------------------------------------------------
# statistics
# ----------------------------------------------------------------------------------------------------------


def rela_impr_auc(auc, reference):
    """Relative improvement in percent (eq. 10): ((A - .5) / (A_ref - .5) - 1) · 100"""
    return ((auc - 0.5) / (reference - 0.5) - 1) * 100 if reference != 0.5 else float("nan")


def rela_impr_logloss(loss, reference):
    """Relative improvement in percent (eq. 11): (LL_ref / LL - 1) · 100"""
    return (reference / loss - 1) * 100


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


def group_results(results):
    """results -> {(model, features): frame}, rows in the order of split and seed"""
    ordered = results.sort_values(["split_seed", "seed"], kind="stable")
    return dict(list(ordered.groupby(["model", "features"], sort=False)))


# ----------------------------------------------------------------------------------------------------------
# tables: lists of lines in markdown
# ----------------------------------------------------------------------------------------------------------


def spread(figures):
    """Mean ± standard deviation as text."""
    deviation = f" ± {figures.std(ddof=1):.4f}" if len(figures) > 1 else ""
    return f"{figures.mean():.4f}{deviation}"


def markdown(header, lines):
    """A pipe table: header a list of names, lines a list of lists of texts"""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]]


def table_of_means(groups, data=None):
    """Tables 2 (`none`, dcn with `codes`), 3 (`dense`) and 4 (`codes`): means over splits and seeds.

    RelaImpr (eq. 10, 11) is against the same model with `none`; data: which of PAPER_DATA stands beside ours.
    """
    columns = ["auc", "logloss", "calibration_error"]
    header = ["model", "features", "AUC", "logloss", "calibration error", "RelaImpr AUC (%)",
              "RelaImpr logloss (%)", *(["paper: AUC", "logloss"] if data else [])]
    lines = []
    for (model, features), frame in groups.items():
        improvements, paper = ["", ""], ["", ""] if data else []
        if (model, "none") in groups and features != "none":
            mean, reference = frame[columns].mean(), groups[model, "none"][columns].mean()
            improvements = [f"{rela_impr_auc(mean['auc'], reference['auc']):+.2f}",
                            f"{rela_impr_logloss(mean['logloss'], reference['logloss']):+.2f}"]
        if data and (model, features) in PAPER_FIGURES:
            first = 2 * list(PAPER_DATA).index(data)
            paper = [f"{figure:.4f}" for figure in PAPER_FIGURES[model, features][first:first + 2]]
        lines.append([model, features, *(spread(frame[column]) for column in columns), *improvements, *paper])
    return markdown(header, lines)


def table_of_differences(groups, overlap):
    """Paired differences, and by model what the codes gain over random codes: lines, {model: figures}"""
    lines, gains = [], {}
    p_text = lambda p: "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    for model, (first, second) in itertools.product(dict.fromkeys(model for model, _ in groups), DIFFERENCES):
        if (model, first) not in groups or (model, second) not in groups:
            continue
        pair = groups[model, first], groups[model, second]
        auc, loss = (paired_interval(pair[0][column].to_numpy() - pair[1][column].to_numpy(), overlap)
                     for column in ("auc", "logloss"))
        share = ""
        if (first, second) == ("codes", "random"):
            gains[model] = {"auc_gain": auc[0], "auc_half_interval": auc[1]}
            if (model, "truth") in groups:
                oracle = groups[model, "truth"]["auc"].mean() - groups[model, "random"]["auc"].mean()
                gains[model] |= {"oracle_auc_gain": oracle, "share_of_oracle": auc[0] / oracle}
                share = f"{auc[0] / oracle:.0%}"
        lines.append([model, f"{first} - {second}", with_interval(*auc[:2]), p_text(auc[2]),
                      with_interval(*loss[:2]), p_text(loss[2]), share])
    return markdown(["model", "difference", "AUC", "p", "logloss", "p", "share of the truth's AUC gain"],
                    lines), gains


def paper_name(prepared):
    """Which of the paper's data sets this is, by its name, or NETE's dump by its count; None if none"""
    if prepared["dataset"] in PAPER_DATA:
        return prepared["dataset"]
    return next((name for name, count in PAPER_DATA.items() if count == prepared["interactions"]), None)


def table_of_choices(args, results):
    """Learning rate, penalty and start of each model; with --tune of each feature set and split"""
    keys = ["model", "features", "split_seed"] if args.tune else ["model"]
    chosen = results[results["model"] != "base rate"].groupby(keys, sort=False)[list(CHOICES)].first()
    lines = [[*map(str, row[:len(keys)]), *(f"{number:g}" for number in row[len(keys):])]
             for row in chosen.reset_index().itertuples(index=False)]
    return markdown([*keys, "lr", "weight decay of the embeddings", "start"], lines)


# ----------------------------------------------------------------------------------------------------------
# results.md, figures 5 and 6
# ----------------------------------------------------------------------------------------------------------


def summarize(args, results, runs, meaning):
    """results.md, and what the codes gain by model. runs: one per split; meaning: {feature set: its text}"""
    first, groups = runs[0], group_results(results)
    num_splits, num_seeds = len(runs), results.loc[results["model"] != "base rate", "seed"].nunique()
    num_test, num_train = len(first.labels["test"]), len(first.labels["train"])
    num_cold = int((first.history[first.split["test"]["user"]] == 0).sum())
    differences, gains = table_of_differences(groups, num_test / num_train if num_splits > 1 else 0.0)
    interval = ("over splits and seeds, corrected for the splits' overlap (Nadeau and Bengio, 2003)"
                if num_splits > 1 else "over the seeds of one split, which says nothing of other splits")
    features = "; ".join(f"`{name}`: {text}" for name, text in meaning.items()
                         if name in set(results["features"]))
    data = paper_name(first.prepared)
    paper = (f" The paper's columns are its figures on {data}, {PAPER_DATA[data]:,} interactions; here are "
             f"{first.prepared['interactions']:,}." if data else "")
    text = [f"# Click-through rate: {first.prepared['dataset']}, {num_test:,} test rows", "",
            f"Split: {first.prepared['split']}. Draws: {num_splits}, seeds of each: {num_seeds}. "
            f"{num_cold:,} test rows of the first draw are of users without a train row, who share the "
            "unknown user's id. ± is the standard deviation over draws and seeds.", "",
            f"What models read: {features}. A gain counts only against `random`.", "",
            f"E {args.field_dim}, {args.layers} layers, MLP ({', '.join(map(str, args.hidden))}), dropout "
            f"{args.dropout:g}, id dropout {args.id_dropout:g}, batch {args.batch_size}, at most "
            f"{args.epochs} epochs, patience {args.patience}"
            + (", the rest chosen on valid:" if args.tune else ":"), "",
            *table_of_choices(args, results), "",
            "## Tables 2, 3 and 4", "",
            "Logloss in nats; calibration error: mean gap of probability and share of clicks over ten bins "
            "of equal size; RelaImpr (eq. 10, 11): against the same model with `none`, more is better. "
            f"`none` is table 2, `dense` table 3 (without VQ), `codes` (UserIP) table 4.{paper}", "",
            *table_of_means(groups, data), ""]
    if num_lines := len(differences) - 2:
        text += ["## Paired differences", "",
                 f"Here ± is half of the 95% interval of a t test {interval}. AUC: more is better, logloss: "
                 f"less. p: that the difference is 0, not corrected for {2 * num_lines} looks. Share of the "
                 "truth's gain: (codes - random) / (truth - random).", "", *differences, ""]
    return "\n".join(text), gains


def draw_figure(args, name, title, rows):
    """Figures 5 and 6: AUC and logloss by codebook size, mean and band of one standard deviation.

    rows: dicts as in results, each with its codebook `size`. Returns the picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for axis, metric, label in zip(axes, ("auc", "logloss"), ("AUC", "logloss (nats)")):
        for features, frame in pd.DataFrame(rows).groupby("features", sort=False):
            by_size = frame.groupby("size")[metric].agg(["mean", "std"]).fillna(0)
            axis.plot(by_size.index, by_size["mean"], marker="o", label=features)
            axis.fill_between(by_size.index, by_size["mean"] - by_size["std"],
                              by_size["mean"] + by_size["std"], alpha=0.2)
        axis.set_xscale("log", base=2)
        axis.set_xticks(by_size.index, [str(size) for size in by_size.index])
        axis.set(xlabel=title, ylabel=label)
        axis.legend()
    figure.suptitle(f"{args.models[0]}, {args.seeds} seeds; band: one standard deviation", fontsize=9)
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    inputs = ["interactions.parquet", "profiles.pt"]
    return write_artifact(args, name, picture.getvalue(), inputs, figures=rows)
