"""The report as HTML, and one user's page as text for a terminal."""

import html

import pandas as pd

from common import with_interval


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}img{max-width:100%}"
    "h2{margin-top:2.5rem;border-bottom:1px solid #ddd}h4{margin:1rem 0 0}.dim{color:#666}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}"
    ".card{border:1px solid #ccc;border-radius:.4rem;padding:.3rem .8rem;font-size:.9rem;break-inside:avoid;"
    "overflow-wrap:anywhere}.card dt{font-weight:600}.card dd{margin:0 0 .3rem 1rem}"
    "@media print{body{margin:0}nav{display:none}table{display:table}tr,img{break-inside:avoid}}")


HEADINGS = ("The codes", "What each code stands for", "Do words of profiles mean anything?", "A few users",
            "Where the LLM looks", "Does it help click-through models?", "How a profile is kept apart")


def heading(text):
    return f'<h2 id="part{HEADINGS.index(text)}">{html.escape(text)}</h2>'


def contents():
    links = "".join(f'<li><a href="#part{number}">{html.escape(text)}</a></li>'
                    for number, text in enumerate(HEADINGS))
    return f"<nav><ul>{links}</ul></nav>"


def table(header, rows):
    """HTML table; every cell is escaped."""
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
            parts.append(f"<p>{html.escape(line)}</p>")
    return "".join(parts)


def headline(quantized, inferred, results):
    """What was inferred, how much of the truth was found, whether it helped: rows of (question, answer)."""
    nll = inferred["heldout_nll"]
    answer = "held-out NLL per token: "
    answer += ", ".join(f"{key} {nll[key]:.4f}" for key in ("none", "shared", "shuffled", "own"))
    shared, shuffled = nll["own_minus_shared"], nll["own_minus_shuffled"]
    answer += f"; own - shared {shared[0]:+.4f} ± {shared[1]:.4f}"
    answer += f", own - shuffled {shuffled[0]:+.4f} ± {shuffled[1]:.4f} (95%)"
    rows = [("Do profiles know their users?", answer)]
    for name, num_codes in zip(quantized["names"], quantized["codes"]):
        answer = (f"perplexity {quantized[f'{name}_perplexity']:.2f} of {num_codes}, "
                  f"smallest share {quantized[f'{name}_smallest_share']:.3f}")
        if f"{name}_share_of_bayes" in quantized:
            answer += (f"; ARI with the truth {quantized[f'{name}_vs_true_{name}']:.3f}, "
                       f"{quantized[f'{name}_share_of_bayes']:.0%} of the Bayes-optimal")
        rows.append((f"What are the codes of {name} worth?", answer))
    for model, gain in results["gains"].items():
        answer = f"AUC of codes - random {with_interval(gain['auc_gain'], gain['auc_half_interval'])}"
        if "share_of_oracle" in gain:
            answer += (f", {gain['share_of_oracle']:.0%} of what the truth itself gains "
                       f"({gain['oracle_auc_gain']:+.4f})")
        rows.append((f"Do they help {model}?", answer))
    return table(("question", "answer"), rows)


def cards_as_html(cards):
    """{profile: cards by code, each a list of (term, text)} -> HTML"""
    parts = []
    for name, by_code in cards.items():
        parts.append(f"<h3>{html.escape(name)}</h3><div class='cards'>")
        for code, card in enumerate(by_code):
            terms = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>"
                            for term, text in card)
            parts.append(f"<div class='card'><h4>{html.escape(name)} {code}</h4><dl>{terms}</dl></div>")
        parts.append("</div>")
    return "".join(parts)


def sections_as_html(run, user, sections):
    """One user's page"""
    parts = [f"<h3>User {html.escape(str(run.bank['user_id'].iat[user]))}</h3>"]
    for title, header, rows in sections:
        parts.append(f"<h4>{html.escape(title)}</h4>{table(header, rows)}")
    return "".join(parts)


def page_of(title, body):
    """The parts as one HTML file"""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n")


def as_text(sections):
    """Sections for a terminal"""
    frames = [(title, pd.DataFrame(rows, columns=header)) for title, header, rows in sections]
    return "\n\n".join(f"{title}\n{frame.to_string(index=False, max_colwidth=60)}"
                       for title, frame in frames if len(frame))
