"""report.html: one file with its pictures inside, which needs no network. All its text is escaped."""

import base64
import html
import io

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch.nn import functional as F

from common import with_interval

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
        if block.startswith("|"):
            header, _, *rows = [line.strip("|").split("|") for line in block.splitlines()]
            parts.append(table(header, rows))
        elif not block.startswith("#"):
            parts.append(paragraph(block))
    return parts


def picture(figure, description):
    """The figure as <img>, a PNG inside the page"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_maps(run, chosen):
    """Profiles in two dimensions, a colour per code; the users in `chosen` are ringed -> list of <img>"""
    pictures = []
    for k, name in enumerate(run.names):
        users, codebook = np.flatnonzero(run.has_evidence[:, k]), run.codebook[name]
        z = ((run.profiles[:, k] - codebook["mean"]) @ codebook["transform"])[users]  # [N', C]
        z = z - z.mean(0)
        plane = z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T
        plane = F.pad(plane, (0, 1))[:, :2].numpy()  # [N', 2]; on a line if C = 1
        figure = Figure(figsize=(4.2, 3.6))
        axis, codes = figure.subplots(), run.codes[users, k]
        for code in range(run.sizes[k]):
            axis.scatter(*plane[codes == code].T, s=5, alpha=0.6, color=colormaps["tab10"](code % 10), label=code)
        for index in np.flatnonzero(np.isin(users, chosen)):
            axis.scatter(*plane[index], s=60, facecolors="none", edgecolors="black")
            axis.annotate(run.user_ids[users[index]], plane[index], fontsize=6, xytext=(5, 5),
                          textcoords="offset points",
                          bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
        axis.set(title=f"{name} by code", xticks=[], yticks=[])
        axis.legend(markerscale=3, fontsize=7, loc="best")
        pictures.append(picture(figure, "Scatter plot of users' profiles in two dimensions: "
                                f"{name} by code; the users shown are ringed"))
    return pictures


def draw_attention(name, sentences, attention):
    """Figure 7 as <img>: a row per user, a column per word, colours from a user's least to most attention.

    sentences: lists of words; attention: {"before", "after": arrays [words]}
    """
    figure = Figure(figsize=(10, 0.5 * len(sentences) + 1.4))
    for axis, (when, by_user) in zip(figure.subplots(1, 2), attention.items()):
        grid = np.full((len(sentences), max(map(len, sentences))), np.nan)
        for user, (words, weights) in enumerate(zip(sentences, by_user)):
            grid[user, :len(words)] = (weights - weights.min()) / (np.ptp(weights) or 1.0)
            for column, word in enumerate(words):
                axis.text(column, user, word, ha="center", va="center", fontsize=6,
                          color="white" if grid[user, column] > 0.6 else "black")
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[], yticks=range(len(sentences)), ylabel="user")
    return picture(figure, "Heat maps of the attention from the words of a sentence to the soft token of "
                   f"{name}, before and after tuning, scaled per user")


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


def report_page(run, maps, cards, pages, attention, facts):
    """maps, attention: lists of <img>; cards: a data frame by profile; pages: HTML by user shown; facts: rows
    of words, attention and agreement, as in the sidecar
    """
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
            paragraph("Agreement of codes with what is known of users: adjusted mutual information (0: "
                      "chance, 1: the same), p of the chi-squared test."),
            table(("profile", "fact", "agreement", "p"), facts["agreement"])],
        "Do words of profiles mean anything?": [paragraph(
            "Share of users whose own words occur more often in their held-out (valid) items than another "
            "user's words do, ties counted half; 0.5 is chance."),
            table(("profile", "method", "AUC", "users"), facts["words"])],
        "A few users": [paragraph(
            "Words of a soft prompt mean little alone; where the control reads as well, trust neither. "
            "Nearest: to the profile less the mean profile. Lens: what the LLM expects more after it."),
            *pages],
        "Where the LLM looks": [paragraph(
            "Share of the attention to the soft token that content words pay, against words such as “The "
            "user likes”, before (a random soft token) and after tuning."),
            table(("profile", "before", "after", "after - before", "users"), facts["attention"]),
            *attention],
        "Does it help click models?": markdown_as_html(run.results_text)}
    body = "".join(f"<h2>{html.escape(heading)}</h2>{''.join(parts)}" for heading, parts in chapters.items())
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>User inherent profiles</title><style>{STYLE}</style></head>"
            f"<body><h1>User inherent profiles</h1>{body}</body></html>\n")
