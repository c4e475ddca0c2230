"""The report of stage 4: statistics (eq. 10, 11, paired intervals), the paper's tables, figures 5 and 6.

groups: {(model, features): frame of results}, rows in the order of split and seed, the base rate first.
"""

import io
import itertools
from pathlib import Path

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


def paper_figures():
    """Tables 2, 3 (dense) and 4 of the paper, Llama-2: a frame of auc and logloss by data, model, features"""
    path = Path(__file__).resolve().parent.parent / "assets/paper.csv"
    return pd.read_csv(path, index_col=["data", "model", "features"])


def rela_impr_auc(auc, reference):
    """Relative improvement in percent (eq. 10): ((A - .5) / (A_ref - .5) - 1) · 100"""
    return ((auc - 0.5) / (reference - 0.5) - 1) * 100 if reference != 0.5 else float("nan")


def rela_impr_logloss(loss, reference):
    """Relative improvement in percent (eq. 11): (LL_ref / LL - 1) · 100"""
    return (reference / loss - 1) * 100


def paired_interval(differences, overlap=0.0):
    """Mean of paired differences [S], half of its 95% interval, p that it is 0 (t test); nan for one of them.

    overlap: test rows per train row where splits of the same rows differ, and so train sets overlap (the
    corrected resampled t test, Nadeau and Bengio, 2003); 0 for seeds of one split.
    """
    differences = np.asarray(differences)
    num, mean = len(differences), float(differences.mean())
    if num < 2:
        return mean, float("nan"), float("nan")
    error = differences.std(ddof=1) * np.sqrt(1 / num + overlap)
    p = 2 * stats.t.sf(abs(mean) / error, num - 1) if error else float(not mean)
    return mean, float(stats.t.ppf(0.975, num - 1) * error), float(p)


def group_results(results):
    """results, a frame with a row per (model, features, split seed, seed) -> groups"""
    ordered = results.sort_values(["split_seed", "seed"], kind="stable")
    return dict(list(ordered.groupby(["model", "features"], sort=False)))


def spread(figures):
    """Mean ± standard deviation as text."""
    deviation = f" ± {figures.std(ddof=1):.4f}" if len(figures) > 1 else ""
    return f"{figures.mean():.4f}{deviation}"


def markdown(header, lines):
    """A pipe table as a list of lines: header a list of names, lines a list of lists of texts"""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]]


def table_of_means(groups, data=None):
    """Tables 2 (`none`), 3 (`dense`), 4 (`codes`): means over draws, the paper's on `data` beside"""
    columns = ["auc", "logloss", "calibration_error"]
    header = ["model", "features", "AUC", "logloss", "calibration error", "RelaImpr AUC (%)",
              "RelaImpr logloss (%)", *(["paper: AUC", "logloss"] if data else [])]
    lines, papers = [], paper_figures()
    for (model, features), frame in groups.items():
        improvements, paper = ["", ""], ["", ""] if data else []
        if (model, "none") in groups and features != "none":
            mean, reference = frame[columns].mean(), groups[model, "none"][columns].mean()
            improvements = [f"{rela_impr_auc(mean['auc'], reference['auc']):+.2f}",
                            f"{rela_impr_logloss(mean['logloss'], reference['logloss']):+.2f}"]
        if (data, model, features) in papers.index:
            paper = [f"{figure:.4f}" for figure in papers.loc[data, model, features]]
        lines.append([model, features, *(spread(frame[column]) for column in columns), *improvements, *paper])
    return markdown(header, lines)


def table_of_differences(groups, overlap):
    """Paired differences, and by model what the codes gain over random codes: lines, {model: figures}"""
    lines, gains = [], {}
    p_text = lambda p: "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    for model, (first, second) in itertools.product(dict.fromkeys(model for model, _ in groups), DIFFERENCES):
        if (model, first) not in groups or (model, second) not in groups:
            continue
        one, two = groups[model, first], groups[model, second]
        auc, loss = (paired_interval(one[column].to_numpy() - two[column].to_numpy(), overlap)
                     for column in ("auc", "logloss"))
        share = ""
        if (first, second) == ("codes", "random"):
            gains[model] = {"auc_gain": auc[0], "auc_half_interval": auc[1]}
            if (model, "truth") in groups:
                oracle = groups[model, "truth"]["auc"].mean() - two["auc"].mean()
                gains[model] |= {"oracle_auc_gain": oracle, "share_of_oracle": auc[0] / oracle}
                share = f"{auc[0] / oracle:.0%}"
        lines.append([model, f"{first} - {second}", with_interval(*auc[:2]), p_text(auc[2]),
                      with_interval(*loss[:2]), p_text(loss[2]), share])
    return markdown(["model", "difference", "AUC", "p", "logloss", "p", "share of the truth's AUC gain"],
                    lines), gains


def table_of_choices(args, results):
    """Learning rate, penalty and start of each model; with --tune of each feature set and split"""
    keys = ["model", "features", "split_seed"] if args.tune else ["model"]
    chosen = results[results["model"] != "base rate"].groupby(keys, sort=False)[list(CHOICES)].first()
    lines = [[*map(str, row[:len(keys)]), *(f"{number:g}" for number in row[len(keys):])]
             for row in chosen.reset_index().itertuples(index=False)]
    return markdown([*keys, "lr", "weight decay of the embeddings", "start"], lines)


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
    dataset, interactions = first.prepared["dataset"], first.prepared["interactions"]
    # NETE's dumps are told by their sizes
    data = next((name for name, size in PAPER_DATA.items() if dataset == name or interactions == size), None)
    paper = (f" The paper's columns are its figures on {data}, {PAPER_DATA[data]:,} interactions; here are "
             f"{interactions:,}." if data else "")
    text = [f"# Click-through rate: {dataset}, {num_test:,} test rows", "",
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
    """Figures 5 and 6: AUC and logloss by codebook size, mean and band of one deviation -> the picture's path

    rows: dicts as in results, each with its codebook `size`.
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
