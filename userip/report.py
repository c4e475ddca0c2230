"""report.html: its text, tables and chapters. One file that needs no network; all text is escaped."""

import html
import itertools

import numpy as np
import pandas as pd

from common import with_interval

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
    "h2{margin-top:2.5rem;border-bottom:1px solid #ddd}h4{margin:1rem 0 0}"
    "@media print{body{margin:0}nav{display:none}table{display:table}tr,img{break-inside:avoid}}")


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
    """results.md: its pipe tables as HTML tables, other lines as paragraphs, without headings"""
    parts = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            header, _, *rows = [line.strip("|").split("|") for line in lines]
            parts.append(table(header, rows))
        else:
            parts += [paragraph(line) for line in lines if line and not line.startswith("#")]
    return "".join(parts)


def page(title, opening, chapters=()):
    """One HTML file: opening, a list of HTML; a table of contents; chapters (heading, list of HTML)"""
    links = "".join(f'<li><a href="#part{k}">{html.escape(heading)}</a></li>'
                    for k, (heading, _) in enumerate(chapters))
    body = [*opening, f"<nav><ul>{links}</ul></nav>"]
    for k, (heading, parts) in enumerate(chapters):
        body += [f'<h2 id="part{k}">{html.escape(heading)}</h2>', *parts]
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n")


def headline(sidecars):
    """Table: what was inferred, how much of the truth was found, and did it help?"""
    nll, quantized = sidecars["profiles.pt"]["heldout_nll"], sidecars["feature_bank.parquet"]
    answer = "held-out NLL per token: "
    answer += ", ".join(f"{key} {nll[key]:.4f}" for key in ("none", "shared", "shuffled", "own"))
    for key in ("shared", "shuffled"):
        answer += f"; own - {key} {with_interval(*nll[f'own_minus_{key}'])} (95%)"
    rows = [("Do profiles predict the items of their users?", answer)]
    for name, num_codes in zip(quantized["names"], quantized["codes"]):
        answer = (f"perplexity {quantized[f'{name}_perplexity']:.2f} of {num_codes}, "
                  f"smallest share {quantized[f'{name}_smallest_share']:.3f}")
        if f"{name}_share_of_bayes" in quantized:
            answer += (f"; ARI with the truth {quantized[f'{name}_vs_true_{name}']:.3f}, "
                       f"{quantized[f'{name}_share_of_bayes']:.0%} of the Bayes-optimal")
        rows.append((f"How good are the codes of {name}?", answer))
    for model, gain in sidecars["results.parquet"]["gains"].items():
        answer = f"AUC of codes - random {with_interval(gain['auc_gain'], gain['auc_half_interval'])}"
        if "share_of_oracle" in gain:
            answer += (f", {gain['share_of_oracle']:.0%} of what the truth itself gains "
                       f"({gain['oracle_auc_gain']:+.4f})")
        rows.append((f"Do they help {model}?", answer))
    return table(("question", "answer"), rows)


def report_page(run, cards, pages, pictures, facts):
    """report.html. cards: a data frame by profile; pages: HTML by user shown; pictures: lists of <img> of
    codes and of attention; facts: rows of words, attention and agreement, as in the sidecar
    """
    return page("User inherent profiles", [
            "<h1>User inherent profiles: what was inferred, and is it true?</h1>"], [
        ("Summary", [headline(run.sidecars), paragraph(
            f"{len(run.users):,} users, {len(run.items):,} items, {len(run.split['train']):,} train rows; "
            f"LLM: {run.stored['llm']}.")]),
        ("The codes", pictures[0]),
        ("What each code stands for", [
            paragraph(
                "What the users of a code have more often than all others: odds ratio ×, 95% interval; only "
                "names that are surely more frequent (one-sided 2.5% for each list as a whole). "
                f"{facts['names_found'][0]:,} such names; {facts['names_found'][1]:,} with the codes "
                "shuffled among users. Ratings: mean over users ± half of the 95% interval. Train rows."),
            *(table(card, card.itertuples(index=False)) for card in cards),
            paragraph(
                "Agreement with what is known of users: adjusted mutual information (0: chance, 1: the "
                "same), p of the chi-squared test."),
            table(("profile", "fact", "agreement", "p"), facts["agreement"])]),
        ("Do words of profiles mean anything?", [
            paragraph(
                "Share of users whose own words occur more often in their held-out (valid) items than "
                "another user's words do, ties counted half, ± half of the 95% interval; 0.5 is chance."),
            table(("profile", "method", "AUC", "users"), facts["words"])]),
        ("A few users", [
            paragraph(
                "Words of a soft prompt mean little alone; where the control reads as well, trust neither. "
                "Nearest: to the profile less the mean profile. Lens: what the LLM expects more after it."),
            *pages]),
        ("Where the LLM looks", [
            paragraph(
                "Share of the attention to the soft token that content words pay, against words such as “The "
                "user likes”, before (a random soft token) and after tuning; ± half of the 95% interval over "
                "users."),
            table(("profile", "before", "after", "after - before", "users"), facts["attention"]),
            *pictures[1]]),
        ("Does it help click models?", [markdown_as_html(run.results_text)])])

