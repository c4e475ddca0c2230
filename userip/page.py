"""HTML that needs no network: tables, cards and pictures, put together to one page. All text is escaped."""

import base64
import html
from typing import NamedTuple

import numpy as np
import pandas as pd

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
    "h2{margin-top:2.5rem;border-bottom:1px solid #ddd}h4{margin:1rem 0 0}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}"
    ".card{border:1px solid #ccc;border-radius:.4rem;padding:.3rem .8rem;font-size:.9rem;break-inside:avoid;"
    "overflow-wrap:anywhere}.card dt{font-weight:600}.card dd{margin:0 0 .3rem 1rem}"
    "@media print{body{margin:0}nav{display:none}table{display:table}tr,img{break-inside:avoid}}")


class Section(NamedTuple):
    """A table with a title; rows: a list of tuples, one value per column of the header"""

    title: str
    header: tuple
    rows: list


def mean_with_interval(values, form=".2f"):
    """Mean ± half of its 95% interval as text, in a number format; "–" for fewer than two values"""
    if len(values) < 2:
        return "–"
    return f"{np.mean(values):{form}} ± {1.96 * np.std(values, ddof=1) / len(values) ** 0.5:{form.strip('+')}}"


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def table(header, rows):
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"


def markdown_tables(text):
    """The pipe tables of results.md as HTML tables, other lines as paragraphs."""
    parts, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            parts.append(table(rows[0], rows[2:]))
            rows = []
        if line and not line.startswith("#"):
            parts.append(paragraph(line))
    return "".join(parts)


def image(png, description):
    """The bytes of a PNG as <img>, with a text for those who cannot see it"""
    encoded = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def code_cards_as_html(name, cards):
    """The cards of profile `name`, one per code, each a list of (term, text)"""
    parts = []
    for code, card in enumerate(cards):
        terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in card)
        parts.append(f"<div class='card'><h4>{html.escape(name)} {code}</h4><dl>{terms}</dl></div>")
    return f"<h3>{html.escape(name)}</h3><div class='cards'>{''.join(parts)}</div>"


def sections_as_html(title, sections):
    parts = [f"<h4>{html.escape(part.title)}</h4>{table(part.header, part.rows)}" for part in sections]
    return f"<h3>{html.escape(title)}</h3>{''.join(parts)}"


def sections_as_text(sections):
    """For a terminal"""
    frames = [(part.title, pd.DataFrame(part.rows, columns=part.header)) for part in sections if part.rows]
    return "\n\n".join(f"{title}\n{frame.to_string(index=False, max_colwidth=60)}" for title, frame in frames)


def page(title, opening, chapters=()):
    """One HTML file: opening, a list of HTML; chapters, pairs of (heading, list of HTML), behind their list"""
    links = "".join(f'<li><a href="#part{k}">{html.escape(heading)}</a></li>'
                    for k, (heading, _) in enumerate(chapters))
    body = [*opening, f"<nav><ul>{links}</ul></nav>" if chapters else ""]
    for k, (heading, parts) in enumerate(chapters):
        body += [f'<h2 id="part{k}">{html.escape(heading)}</h2>', *parts]
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n")
