"""The report of stage 4: statistics (eq. 10, 11, paired intervals), the paper's tables, figures 5 and 6.

groups: {(model, features): frame of results}, rows of all in the same order of split and seed. As a feature
set to compare with, "means" is the model of this name, which reads none.
"""

import itertools
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from common import with_interval
from userip.artifacts import MADE_BY, read_artifacts, read_sidecar, run_of
from userip.checks import BASELINES
from userip.features import parts_of
from userip.further_runs import command_line
from userip.report import picture

DIFFERENCES = [("codes", "none"), ("codes", "random"), ("truth", "random"), ("codes", "cf"),
               ("codes", "leniency"), ("codes", "leniency16"), ("codes", "dense"), ("random", "none"),
               ("cf", "none"), ("leniency", "none"), ("leniency16", "leniency"), ("leniency16", "random"),
               ("dense", "none"), ("none", "means"), ("codes", "means"), ("codes", "habits16"),
               ("habits16", "leniency16"), ("dense-means", "none"), ("dense-means", "means"),
               ("peapod", "none"), ("codes", "peapod"), ("items", "none"),
               ("items", "random"), ("items", "tfidf"), ("codes+items", "codes+tfidf"),
               ("leniency16+items", "leniency16+tfidf"), ("taste", "none"), ("tfidf-taste", "none"),
               ("taste", "tfidf-taste"), ("dense-means+taste", "dense-means+tfidf-taste"),
               ("codes+items+taste", "codes+items")]
PAPER_DATA = {179_223: "clothing", 441_783: "movies", 19_927: "games", 1_293_247: "yelp"}  # by interactions
PAPER = Path(__file__).resolve().parent.parent / "assets/paper.csv"  # tables 2, 3 (dense) and 4, Llama-2


def rela_impr_auc(auc, reference):
    """Relative improvement in percent (eq. 10): ((A - .5) / (A_ref - .5) - 1) · 100"""
    return ((auc - 0.5) / (reference - 0.5) - 1) * 100 if reference > 0.5 else float("nan")


def rela_impr_logloss(loss, reference):
    """Relative improvement in percent (eq. 11): (LL_ref / LL - 1) · 100"""
    return (reference / loss - 1) * 100


def paired_interval(differences, splits, overlap):
    """Mean of paired differences [R], half of its 95% interval, p that it is 0 (t test); nan for one of them.

    splits: of each difference. Seeds of one split share its rows, so of several splits each one's mean is one
    repetition, and since their train rows overlap the test is the corrected resampled t test (Nadeau and
    Bengio, 2003); overlap: test rows per train row. Of one split each seed is a repetition.
    """
    differences, splits = np.asarray(differences), np.asarray(splits)
    means = np.array([differences[splits == split].mean() for split in np.unique(splits)])
    differences, overlap = (means, overlap) if len(means) > 1 else (differences, 0.0)
    num, mean = len(differences), float(differences.mean())
    if num < 2:
        return mean, float("nan"), float("nan")
    error = differences.std(ddof=1) * np.sqrt(1 / num + overlap)
    p = 2 * stats.t.sf(abs(mean) / error, num - 1) if error else float(not mean)
    return mean, float(stats.t.ppf(0.975, num - 1) * error), float(p)


def markdown(header, lines):
    """A pipe table as a list of lines: header a list of names, lines a list of lists of texts"""
    return ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *lines]]


def spread(figures):
    """Mean and standard deviation of a series as text; the mean alone of one figure"""
    return f"{figures.mean():.4f} ± {figures.std():.4f}".replace(" ± nan", "")


def set_name(feature, frame):
    """A feature set as the tables name it: in how many draws valid chose the two means, too (--with-means)"""
    if "with_means" not in frame or not frame["with_means"].any():
        return feature
    chosen = frame.groupby("split_seed")["with_means"].any()
    return f"{feature} (means in {chosen.sum()} of {len(chosen)} draws)"


def table_of_means(groups, data=None):
    """Tables 2 (`none`), 3 (`dense`), 4 (`codes`): means over draws, the paper's on `data` beside"""
    lines, paper = [], pd.read_csv(PAPER, index_col=["data", "model", "features"])
    for key, frame in groups.items():
        reference, name = groups.get((key[0], "none")), set_name(key[1], frame)
        line = [key[0], name, spread(frame["auc"]), spread(frame["logloss"])]
        line += ["", ""] if reference is None or reference is frame else [
            f"{rela_impr_auc(frame['auc'].mean(), reference['auc'].mean()):+.2f}".replace("+nan", "–"),
            f"{rela_impr_logloss(frame['logloss'].mean(), reference['logloss'].mean()):+.2f}"]
        if data:
            line += [f"{figure:.4f}".replace("nan", "") for figure in paper.reindex([(data, *key)]).iloc[0]]
        lines.append(line)
    header = ["model", "features", "AUC", "logloss", "RelaImpr AUC (%)", "RelaImpr logloss (%)"]
    return markdown(header + (["paper: AUC", "logloss"] if data else []), lines)


def read_baselines(args):
    """What baselines/ wrote into this run: {file: frame}; those of another split are left out, and a line
    says so
    """
    files = [f"baseline-{name}.parquet" for name in BASELINES]
    found = {}
    for file in [file for file in files if (Path(args.run_dir) / file).exists()]:
        if read_sidecar(args, file).get("run") == run_of(args.run_dir):
            found[file] = read_artifacts(args, file)[0]
        else:
            print(f"left out: {Path(args.run_dir) / file} is of another split; run `python {MADE_BY[file]}`")
    return found


def table_of_baselines(baselines):
    """The LLM-based systems that the paper compares with, and what they cost: list of lines, maybe empty"""
    lines = []
    for frame in baselines.values():
        for (model, features), rows in frame.groupby(["model", "features"], sort=False):
            mean = lambda name: rows[name].mean()
            lines.append([model, features, f"{len(rows)}", f"{rows['rows'].iloc[0]:,}",
                          f"{rows['test_rows'].iloc[0]:,}", spread(rows["auc"]), spread(rows["logloss"]),
                          f"{mean('milliseconds'):,.4g}", f"{mean('bytes') / 2**20:.2f}",
                          f"{mean('tokens_per_user'):,.0f}", f"{mean('seconds') / 60:.1f}"])
    return ["", "## LLM-based baselines", "",
            "By the scripts of baselines/, on the same split. Rows of train that trained, rows of test that "
            "were scored: compare only what scored all. Serving: milliseconds per 10,000 rows, MB held. "
            "Tokens that the LLM read or wrote per user; minutes of one seed, training and LLM.", "",
            *markdown(["system", "features", "seeds", "train rows", "test rows", "AUC", "logloss",
                       "ms per 10,000", "held (MB)", "tokens per user", "minutes"], lines),
            ""] if lines else []


def pairs_of(features):
    """DIFFERENCES, and of each set joined by +: those to its controls, all random or the first part only, to
    its parts, leniency and `means`
    """
    joined = [name for name in features if "+" in name and "random" not in name.split("+")]
    return list(dict.fromkeys(DIFFERENCES + [(name, other) for name in joined for other in (
        "+".join(["random"] * len(name.split("+"))), "+".join(["random", *name.split("+")[1:]]),
        *name.split("+"), "leniency", "means")]))


def table_of_differences(groups, overlap):
    """Paired differences, and by model what the codes gain over random codes: lines, {model: figures}.
    overlap: test rows per train row
    """
    lines, gains = [], {}
    p_text = lambda p: "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    models, features = (list(dict.fromkeys(names)) for names in zip(*groups))
    for model, (first, second) in itertools.product(models, pairs_of(features)):
        keys = [(model, first), ("means", "none") if second == "means" else (model, second)]
        if model in ("base rate", "means") or not set(keys) <= set(groups):
            continue
        one, two = (groups[key][["auc", "logloss"]].to_numpy() for key in keys)
        splits = groups[keys[0]]["split_seed"]
        auc, loss = (paired_interval(differences, splits, overlap) for differences in (one - two).T)
        names = [set_name(name, groups[key]) for name, key in zip((first, second), keys)]
        lines.append([model, " - ".join(names), with_interval(*auc[:2]), p_text(auc[2]),
                      with_interval(*loss[:2]), p_text(loss[2])])
        if (first, second) == ("codes", "random"):
            gains[model] = {"auc_gain": auc[0], "auc_half_interval": auc[1]}
        if (first, second) == ("truth", "random") and model in gains:
            gains[model]["share_of_oracle"] = gains[model]["auc_gain"] / (one[:, 0].mean() - two[:, 0].mean())
    return markdown(["model", "difference", "AUC", "p", "logloss", "p"], lines), gains


def summarize(options, results, runs):
    """results.md, and what the codes gain by model. options: of the stage; runs: one per split"""
    prepared, num_splits = runs[0].prepared, len(runs)
    num_train, num_test = (len(runs[0].labels[name]) for name in ("train", "test"))
    test, train = (runs[0].split[name] for name in ("test", "train"))
    num_cold, num_new = (int((~test[key].isin(train[key])).sum()) for key in ("user", "item"))
    data, asked = PAPER_DATA.get(prepared["interactions"]), options.get("features") or []
    groups = dict(list(results.groupby(["model", "features"], sort=False)))
    differences, gains = table_of_differences(groups, num_test / num_train)
    text = [f"# Click-through rate: {prepared['dataset']}, {num_test:,} test rows", "",
            f"Split: {prepared['split']}. Draws: {num_splits}, seeds of each: {options['seeds']}. "
            f"Test rows of the first draw of users without a train row: {num_cold:,}, of such items: "
            f"{num_new:,}.", "",
            f"`04_train_ctr.py --run-dir RUN {shlex.join(command_line(options))}`", "",
            "## Tables 2, 3 and 4", "",
            "Features: see `--help`; a gain counts only against `random`. Logloss in nats. ± is the standard "
            "deviation over draws and seeds. RelaImpr (eq. 10, 11): against the same model with `none`. "
            "`none` is table 2, `dense` table 3 (without VQ), `codes` (UserIP) table 4. `means`: logistic "
            "regression on the item's and the user's shrunk means, no ids. Fields beside the ids (--fields): "
            f"{', '.join(options.get('fields') or ['none'])}."
            + "".join(f" `{name}` deals parts of {'+'.join(part for part, _ in parts_of(name, asked))}."
                      for name in asked if "random" in name.split("+") and "+" in name)
            + (f" The paper's columns are its figures on {data}." if data else ""), "",
            *table_of_means(groups, data), ""]
    if num_lines := len(differences) - 2:
        text += ["## Paired differences", "",
                 "± is half of the 95% interval of a t test over splits, each the mean of its seeds, "
                 "corrected for the splits' overlap (Nadeau and Bengio, 2003); with one split over its "
                 "seeds, which say nothing of other splits. p: that the difference is 0, not corrected for "
                 f"{2 * num_lines} looks.", "", *differences, ""]
    return "\n".join(text), gains


def draw_figure(args, name, title, rows):
    """Figures 5 and 6: AUC and logloss by the `size` of rows, mean and standard deviation over the seeds"""
    results, figure = pd.DataFrame(rows), Figure(figsize=(9, 3), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 2), ("auc", "logloss")):
        mean, deviation = (results.pivot_table(metric, "size", "features", function).fillna(0)
                           for function in ("mean", "std"))
        mean.plot(ax=axis, yerr=deviation, logx=True, marker="o", xlabel=title, ylabel=metric)
    picture(Path(args.run_dir), name, figure, results, f"AUC and logloss of {args.models[0]} by {title}")
