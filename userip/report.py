"""Code cards, pictures, and report.html, one file that holds them; needs no network; all text is escaped."""

import base64
import html
import io
import warnings

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import sparse, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_mutual_info_score
from torch.nn import functional as F

from common import with_interval
from userip.artifacts import whole_file
from userip.profiles import theta_of

WORD = r"[^\W\d_]{3,}"  # at least three letters
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
    "h2{margin-top:2.5rem;border-bottom:1px solid #ddd}h4{margin:1rem 0 0}")


def mean_with_interval(values, form=".2f"):
    """Mean ± half of its 95% interval as text, in a number format; "–" for fewer than two values"""
    if len(values) < 2:
        return "–"
    half = 1.96 * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):{form}} ± {half:{form.strip('+')}}"


def overrepresented(counts, names, num_words):
    """counts [K, W] of what each code's users have -> per code the names whose share is surely higher than
    in the other codes: (name, odds ratio, ends of its 95% interval), the surest first. Log-odds with a
    Dirichlet prior, a tenth of all counts (Monroe et al., 2008). Sure: one-sided at 2.5% for all W names
    together (Bonferroni), else some of a thousand words would stand out by chance.
    """
    prior, threshold = 0.1 * counts.sum(0) + 0.01, stats.norm.isf(0.025 / len(names))
    result = []
    for own in counts:
        first, second = own + prior, counts.sum(0) - own + prior
        odds = np.log(first / (first.sum() - first)) - np.log(second / (second.sum() - second))
        error = np.sqrt(1 / first + 1 / second)
        best = np.argsort(-odds / error, kind="stable")[:num_words]
        result.append([(names[k], *np.exp(odds[k] + np.array([0, -1.96, 1.96]) * error[k]).tolist())
                       for k in best if odds[k] > threshold * error[k]])
    return result


def one_hot(values):
    """A column of texts, maybe missing -> sparse [rows, W] of 0 and 1, and the W texts in order"""
    number, names = pd.factorize(values, sort=True)
    row = np.flatnonzero(number >= 0)
    return sparse.csr_array((np.ones(len(row)), (row, number[row])), (len(number), len(names))), list(names)


def item_features(items):
    """Categories, brands, price levels, title words: {term: (counts [M, W], names [W])}"""
    price = items["price"].astype(float)
    low, high = price.quantile([1 / 3, 2 / 3])
    level = np.select([price <= low, price <= high], [f"up to ${low:.2f}", f"${low:.2f} to ${high:.2f}"],
                      f"above ${high:.2f}")
    columns = {"categories": items["category"], "brands": items["brand"],
               "price levels": pd.Series(level).where(price.notna())}
    features = {term: one_hot(column) for term, column in columns.items()}
    vectorizer = CountVectorizer(token_pattern=WORD, min_df=2, stop_words="english")
    try:
        features["title words"] = vectorizer.fit_transform(items["title"]), vectorizer.get_feature_names_out()
    except ValueError:  # no word is in two titles
        pass
    return {term: part for term, part in features.items() if len(part[1]) > 1}


def user_facts(users):
    """What is known of users: {fact: values [N], None where unknown}. Numbers of many values fall into
    quarters; facts with too many groups (zip codes) are left out.
    """
    facts = {}
    for column in users.columns.drop(["user", "user_id"]):
        values = users[column]
        numbers = pd.to_numeric(values.astype(object), errors="coerce")
        is_number = pd.api.types.is_numeric_dtype(values)
        if not is_number:  # of a csv file all is text: numbers that users share are no zip codes
            is_number = (numbers.isna() == values.isna()).all() and 2 * numbers.nunique() <= numbers.count()
        if is_number and numbers.nunique() > 8:
            quarter = pd.qcut(numbers, 4, labels=False, duplicates="drop")
            values = numbers.groupby(quarter).transform(lambda part: f"{part.min():g} to {part.max():g}")
        if 1 < values.nunique() <= min(50, max(8, len(users) / 20)):
            facts[column.replace("_", " ")] = values.astype(object).where(values.notna(), None)
    return facts


def agreement(run):
    """Codes against each fact of user_facts: rows of (profile, fact, adjusted mutual information, p)"""
    rows = []
    for name, codes, num_codes in zip(run.names, run.codes.T, run.sizes):
        for fact, values in run.user_facts.items():
            is_known = (codes < num_codes) & values.notna().to_numpy()
            table = pd.crosstab(codes[is_known], values[is_known].to_numpy())
            if min(table.shape) > 1:
                information = adjusted_mutual_info_score(codes[is_known], values[is_known].astype(str))
                p = stats.chi2_contingency(table).pvalue
                rows.append((name, fact, f"{information:.3f}", f"{p:.2g}" if p > 1e-16 else "below 1e-16"))
    return rows


def code_cards(run, k, num_words, seed):
    """Profile k -> cards, a data frame with a column per code; meanings of the codes, the unknown one's last;
    how many names of items are overrepresented [with these codes, with the codes shuffled among users]
    """
    train, codes, num_codes = run.split["train"], run.codes[:, k], run.sizes[k]
    shuffled = np.random.default_rng(seed).permutation(codes)
    is_member, is_shuffled = ((np.arange(num_codes)[:, None] == column).astype(float)
                              for column in (codes, shuffled))  # [K, N]
    pairs = train[["user", "item"]].drop_duplicates()
    had = sparse.csr_matrix((np.ones(len(pairs)), (pairs["user"], pairs["item"])),
                            (len(codes), len(run.items)))
    odds_text = lambda names: ", ".join(f"{name} ×{odds:.1f} ({low:.1f}–{high:.1f})"
                                        for name, odds, low, high in names) or "none above chance"
    cards = {"users": [f"{int(size):,}" for size in is_member.sum(1)]}  # {term: texts [K]}
    meanings, num_names = [[] for _ in range(num_codes)], np.zeros(2, dtype=int)
    for term, (item_counts, names) in item_features(run.items).items():
        own, control = (overrepresented(np.asarray((had.T @ member.T).T @ item_counts), names, num_words)
                        for member in (is_member, is_shuffled))
        num_names += [sum(map(len, own)), sum(map(len, control))]
        cards[term] = list(map(odds_text, own))
        for meaning, names_of_code in zip(meanings, own):
            meaning += [str(name) for name, *_ in names_of_code[:2]]
    departure = train["rating"] - train.groupby("item")["rating"].transform("mean")
    habits = pd.DataFrame({"share rated positive": train["label"], "rating less the item's mean": departure})
    for term, habit in habits.groupby(train["user"]).mean().items():  # by user with train rows
        cards[term] = [mean_with_interval(habit[member[habit.index] > 0]) for member in is_member]
    for fact, values in run.user_facts.items():
        is_of, groups = one_hot(values)
        names = overrepresented(is_member @ is_of, groups, num_words)
        cards[fact] = list(map(odds_text, names))
    cards = pd.DataFrame(cards, index=[f"{run.names[k]} {code}" for code in range(num_codes)])
    meanings = [", ".join(meaning) or "nothing above chance" for meaning in meanings]
    return cards.T.reset_index(names=""), [*meanings, "no evidence"], num_names


def picture(folder, name, figure, data, description):
    """The figure as <img>, and as folder/name.png, with its data frame as folder/name.csv"""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    if any("missing from font" in str(warning.message) for warning in caught):
        print(f"{name}.png lacks letters that its font DejaVu Sans does not have; {name}.csv has them")
    # a spreadsheet would run a text such as =1+1
    runs = lambda cell: isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    data = data.map(lambda cell: f"'{cell}" if runs(cell) else cell)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(folder / f"{name}{suffix}") as file:
            file.write(content)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_map(folder, title, plane, groups, marked):
    """Scatter plot of users: plane [N, 2], a colour per group [N]; marked: {user id: index}, ringed"""
    figure = Figure(figsize=(4.2, 3.6))
    axis, colours = figure.subplots(), colormaps["tab10"]
    for number, group in enumerate(np.unique(groups)):
        axis.scatter(*plane[groups == group].T, s=5, alpha=0.6, color=colours(number % 10),
                     label=str(group).replace("$", r"\$"))  # no mathematics
    for user_id, index in marked.items():
        axis.scatter(*plane[index], s=60, facecolors="none", edgecolors="black")
        axis.annotate(user_id, plane[index], parse_math=False, fontsize=6, xytext=(5, 5),
                      textcoords="offset points",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": groups})
    return picture(folder, f"map-{title.replace(' ', '-')}", figure, data,
                   f"Scatter plot of users' profiles in two dimensions: {title}; the users shown are ringed")


def draw_maps(folder, run, chosen):
    """Profiles in two dimensions, by code and by truth; the users in `chosen` are ringed -> list of <img>"""
    pictures = []
    for k, name in enumerate(run.names):
        users, codebook = np.flatnonzero(run.has_evidence[:, k]), run.codebook[name]
        theta = theta_of(run.stored, k, len(codebook["mean"]))
        z = ((theta - codebook["mean"]) @ codebook["transform"])[users]  # [N', C]
        z = z - z.mean(0)
        plane = z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T
        plane = F.pad(plane, (0, 1))[:, :2].numpy()  # [N', 2]; on a line if C = 1
        marked = {run.user_ids[user]: index for index, user in enumerate(users) if user in chosen}
        pictures.append(draw_map(folder, f"{name} by code", plane, run.codes[users, k], marked))
        if f"true_{name}" in run.users:
            truth = run.users[f"true_{name}"].fillna("unknown").to_numpy()[users]
            pictures.append(draw_map(folder, f"{name} by truth", plane, truth, marked))
    return pictures


def draw_attention(folder, name, num_noise, sentences, attention):
    """Figure 7 as <img>: a row per user, a column per word, colours from a user's least to most attention.

    sentences: {user id: words, the content behind num_noise}; attention: {"before", "after": arrays [words]}
    """
    figure, rows = Figure(figsize=(10, 0.5 * len(sentences) + 1.4)), []
    for axis, (when, by_user) in zip(figure.subplots(1, 2), attention.items()):
        grid = np.full((len(sentences), max(map(len, sentences.values()))), np.nan)
        for user, ((user_id, words), weights) in enumerate(zip(sentences.items(), by_user)):
            grid[user, :len(words)] = (weights - weights.min()) / (np.ptp(weights) or 1.0)
            for column, word in enumerate(words):
                axis.text(column, user, word, ha="center", va="center", fontsize=6, parse_math=False,
                          color="white" if grid[user, column] > 0.6 else "black")
                rows.append((user_id, when, word, column >= num_noise, weights[column]))
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[])
        labels = [user_id[:12] for user_id in sentences]
        axis.set_yticks(range(len(sentences)), labels, fontsize=6, parse_math=False)
    data = pd.DataFrame(rows, columns=["user", "when", "word", "is_content", "attention"])
    return picture(folder, f"attention-{name}", figure, data, "Heat maps of the attention from the words of "
                   f"a sentence to the soft token of {name}, before and after tuning, scaled per user")


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def table(header, rows):
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"


def tables_as_html(title, tables):
    """tables: {title: data frame}"""
    parts = [f"<h4>{html.escape(name)}</h4>{table(frame, frame.itertuples(index=False))}"
             for name, frame in tables.items()]
    return f"<h3>{html.escape(title)}</h3>{''.join(parts)}"


def markdown_as_html(text):
    """The pipe tables and paragraphs of results.md, without headings: list of HTML"""
    parts = []
    for block in text.strip().split("\n\n"):
        if block.startswith("|") and "\n" in block:
            header, _, *rows = [line.strip("|").split("|") for line in block.splitlines()]
            parts.append(table(header, rows))
        elif not block.startswith("#"):
            parts.append(paragraph(block))
    return parts


def headline(sidecars):
    """Table: what was inferred, how much of the truth was found, and did it help?"""
    nll, quantized = sidecars["profiles.pt"]["heldout_nll"], sidecars["feature_bank.parquet"]
    parts = [f"{key} {nll[key]:.4f}" for key in ("none", "shared", "shuffled", "own")]
    parts += [f"own - {key} {with_interval(*nll[f'own_minus_{key}'])}" for key in ("shared", "shuffled")]
    rows = [("Do profiles predict the items of their users?", f"held-out NLL per token: {', '.join(parts)}")]
    for name, num_codes in zip(quantized["names"], quantized["codes"]):
        answer = f"perplexity {quantized[f'{name}_perplexity']:.2f} of {num_codes}"
        if f"{name}_share_of_bayes" in quantized:
            answer += (f", ARI {quantized[f'{name}_vs_true_{name}']:.3f} with the truth, "
                       f"{quantized[f'{name}_share_of_bayes']:.0%} of the Bayes-optimal")
        rows.append((f"How good are the codes of {name}?", answer))
    for model, gain in sidecars["results.parquet"]["gains"].items():
        answer = f"AUC of codes - random {with_interval(gain['auc_gain'], gain['auc_half_interval'])}"
        if "share_of_oracle" in gain:
            answer += f", {gain['share_of_oracle']:.0%} of what the truth itself gains"
        rows.append((f"Do they help {model}?", answer))
    return table(("question", "answer"), rows)


def page(title, body):
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n")


def report_page(run, maps, cards, pages, attention, facts):
    """maps, attention: lists of <img>; cards: data frames; pages: HTML by user; facts: as in the sidecar"""
    names_found, names_by_chance = facts["names_found"]
    chapters = {
        "Summary": [headline(run.sidecars), paragraph(
            f"{len(run.users):,} users, {len(run.items):,} items, {len(run.split['train']):,} train rows; "
            f"LLM: {run.stored['llm']}; ± is half of a 95% interval.")],
        "The codes": maps,
        "What each code stands for": [paragraph(
            "What the users of a code have more often than all others, in train rows: odds ratio ×, 95% "
            "interval; only names that are surely more frequent (one-sided 2.5% for each list as a whole). "
            f"{names_found:,} such names; {names_by_chance:,} with the codes shuffled among users."),
            *(table(card, card.itertuples(index=False)) for card in cards),
            *[paragraph("Agreement of codes with what is known of users: adjusted mutual information (0: "
                        "chance, 1: the same), p of the chi-squared test."),
              table(("profile", "fact", "agreement", "p"), facts["agreement"])] * bool(facts["agreement"])],
        "Do words of profiles mean anything?": [paragraph(
            "Share of users whose own words occur more often in their held-out (valid) items than another "
            "user's words do, ties counted half; 0.5 is chance."),
            table(("profile", "method", "AUC", "users"), facts["words"])],
        "A few users": [paragraph(
            "Words of a soft prompt mean little alone; where the control reads as well, trust neither. "
            "They are single tokens of the LLM: a longer word shows as its first token. "
            "Nearest: to the profile less the mean profile. Lens: what the LLM expects more after it."),
            *pages],
        "Where the LLM looks": [paragraph(
            "Share of the attention to the soft token that content words pay, against words such as “The "
            "user likes”, before (a random soft token) and after tuning. Pictures: a row per user."),
            table(("profile", "before", "after", "after - before", "users"), facts["attention"]),
            *attention],
        "Does it help click models?": markdown_as_html(run.results_text)}
    body = "".join(f"<h2>{html.escape(heading)}</h2>{''.join(parts)}" for heading, parts in chapters.items())
    return page("User inherent profiles", body)
