"""Stage 5 of 5: say in one page what was inferred, how far it can be believed, and whether it helped.

For a few users: the items they had, their codes, and the nearest vocabulary words of their centred profiles
(table 5 of the paper) beside those of another user drawn at random, for nearest words mean little alone. For
each code: its size and the categories and words that its users have more often than the others (log-odds with
a Dirichlet prior; Monroe et al., 2008). Only train rows are told as evidence.

Reads   all artifacts of the run, and the LLM's embeddings
Writes  report.html: one file with its pictures inside, opens without a network

Example: python 05_case_study.py        (10 seconds)
  wrote runs/demo/report.html: 4 users, 7 codes, 6 pictures
"""

import base64
import html
import io
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer

from common import (VectorQuantizer, at_least, fail, fig4_mask, load_llm, read_artifacts, read_sidecar,
                    stage_parser, start_stage, usage_of, with_interval, write_artifact)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the choice of users and of the control")
    add("--num-users", type=at_least(1), default=4, help="users shown")
    add("--num-words", type=at_least(1), default=6, help="words shown per profile and per code")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------
# words
# ----------------------------------------------------------------------------------------------------------


def vocabulary_words(tokenizer):
    """Tokens that begin a word and hold letters only: ids, texts [W]. "Ġ" (GPT-2), "▁" (Llama): the space."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [(index, token[1:]) for index, token in enumerate(tokens)
             if token and token[0] in "Ġ▁" and len(token) > 3 and token[1:].isascii() and token[1:].isalpha()]
    return torch.tensor([index for index, _ in words], dtype=torch.long), [word for _, word in words]


def nearest_words(deviation, embeddings, words, num_words):
    """deviation θ_u - mean θ [B, D], embeddings [W, D] -> for each row the words of the largest cosine"""
    centred = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=1)
    cosine = torch.nn.functional.normalize(deviation, dim=1) @ centred.T  # [B, W]
    nearest = cosine.topk(min(num_words, len(words)), dim=1).indices.tolist()
    return [[words[index] for index in row] for row in nearest]


def overrepresented(counts, names, num_words, threshold=1.96):
    """counts [K, W]: what each code's users have -> per code the names whose share is surely above elsewhere.

    z of the log-odds ratio against all other codes, with the whole corpus as Dirichlet prior of a tenth of
    its weight.
    """
    prior = 0.1 * counts.sum(0) + 0.01
    result = []
    for own in counts:
        other = counts.sum(0) - own
        first, second = own + prior, other + prior
        odds = np.log(first / (first.sum() - first)) - np.log(second / (second.sum() - second))
        z = odds / np.sqrt(1 / first + 1 / second)
        best = np.argsort(-z, kind="stable")[:num_words]
        result.append([(names[index], float(z[index])) for index in best if z[index] > threshold])
    return result


def item_features(items):
    """What items are, as counts: list of (title, counts [M, W], names [W]), without what the data lack."""
    features = []
    for title, column in (("categories", "category"), ("brands", "brand")):
        one_hot = pd.get_dummies(items[column])
        features.append((title, one_hot.to_numpy(float), list(one_hot.columns)))
    vectorizer = CountVectorizer(token_pattern=r"[^\W\d_]{3,}", min_df=2, stop_words="english")
    try:
        counts = vectorizer.fit_transform(items["title"])
        features.append(("title words", counts, vectorizer.get_feature_names_out()))
    except ValueError:  # no title word stands in two titles
        pass
    return [feature for feature in features if len(feature[2])]


# ----------------------------------------------------------------------------------------------------------
# pictures: each returns an <img> with its text for those who cannot see it
# ----------------------------------------------------------------------------------------------------------


def picture(figure, description):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_usage(bank, names, sizes):
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name, num_codes in zip(axes[0], names, sizes):
        counts, perplexity = usage_of(bank[name].to_numpy(), num_codes)
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    return picture(figure, "Bars: users per code, for each profile")


def draw_map(plane, colour, title, labels):
    """plane [N, 2], colour [N] int -> scatter plot"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for value, label in enumerate(labels):
        mask = colour == value
        axis.scatter(*plane[mask].T, s=5, alpha=0.6, color=plt.cm.tab10(value % 10), label=str(label))
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    return picture(figure, f"Scatter plot of users' profiles in two dimensions: {title}")


def draw_mask(names):
    """Fig. 4: who attends to whom, for names and task text of three tokens and evidence of four."""
    num_profiles = len(names)
    blocks = [k for k in range(num_profiles) for _ in range(3)]
    segment = torch.tensor(blocks + 3 * [num_profiles] + 4 * [num_profiles + 1])
    is_soft = torch.zeros(len(segment), dtype=torch.bool)
    is_soft[[3 * k + 2 for k in range(num_profiles)]] = True
    mask = fig4_mask(segment, is_soft, torch.ones(1, num_profiles, dtype=torch.bool))[0, 0]
    labels = [text for name in names for text in (name, "…", f"θ {name}")]
    labels += ["task", "…", "text"] + [f"h{t}" for t in range(1, 5)]
    figure, axis = plt.subplots(figsize=(4.2, 4.2))
    axis.imshow(mask.numpy(), cmap="Blues", vmax=1.6)
    axis.set(xticks=range(len(labels)), yticks=range(len(labels)), ylabel="reads", xlabel="is read",
             title="attention mask (Fig. 4)")
    axis.set_xticklabels(labels, rotation=90, fontsize=7)
    axis.set_yticklabels(labels, fontsize=7)
    return picture(figure, "Attention mask: name and soft tokens of one profile see only each other; "
                           "evidence sees all before it")


# ----------------------------------------------------------------------------------------------------------
# the report
# ----------------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}"
    "img{max-width:100%}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}.dim{color:#777}")


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


def code_cards(bank, names, sizes, had, items, typical, num_words):
    """One row per code: had [N, M] (1 = a train row), typical: for each name and code, user ids -> HTML"""
    features, parts = item_features(items), []
    price = items["price"].to_numpy(float)
    show = lambda pairs: ", ".join(f"{word} ({z:.0f})" for word, z in pairs) or "none above chance"
    for name, num_codes in zip(names, sizes):
        member = np.stack([bank[name] == code for code in range(num_codes)]).astype(float)  # [K, N]
        counts = member @ had  # [K, M]
        columns = {"code": range(num_codes), "users": [f"{int(size):,}" for size in member.sum(1)]}
        for title, of_item, texts in features:
            more = overrepresented(np.asarray(counts @ of_item), texts, num_words)
            columns[f"{title} (z)"] = map(show, more)
        if np.isfinite(price).any():
            paid = [np.repeat(price, row.astype(int)) for row in counts]
            columns["median price"] = [f"${np.nanmedian(row):.0f}" if np.isfinite(row).any() else ""
                                       for row in paid]
        columns["typical users"] = map(", ".join, typical[name])
        parts.append(f"<h3>{html.escape(name)}</h3>" + table(columns, zip(*columns.values())))
    return "".join(parts)


def user_pages(args, chosen, other, bank, names, train, items, nearest, nearest_control):
    """Items, codes, and nearest words beside those of another user, for each chosen user."""
    parts = []
    for place, user in enumerate(chosen):
        titles = items["title"].to_numpy()[train.loc[train["user"] == user, "item"]]
        rows = [(name, "unknown" if nearest[k][place] is None else bank[name].iat[user],
                 ", ".join(nearest[k][place] or []), ", ".join(nearest_control[k][place] or []))
                for k, name in enumerate(names)]
        shown = "; ".join(titles[-12:]) + (f" … and {len(titles) - 12} earlier" if len(titles) > 12 else "")
        control = f"control: those of user {bank['user_id'].iat[other[place]]}"
        parts.append(f"<h3>User {html.escape(str(bank['user_id'].iat[user]))}</h3>"
                     f"<p>Had (train rows): {html.escape(shown)}</p>"
                     + table(("profile", "code", "nearest words", control), rows))
    return "".join(parts)


def main(args):
    start_stage(args)
    started = time.time()
    names_of_inputs = ["interactions.parquet", "items.parquet", "users.parquet", "profiles.pt", "codebook.pt",
                       "feature_bank.parquet", "results.parquet", "results.md"]
    artifacts = read_artifacts(args, *names_of_inputs)
    interactions, items, users, stored, codebook, bank, _, results_text = artifacts
    sidecars = {name: read_sidecar(args, name) for name in names_of_inputs}
    names, sizes = stored["names"], sidecars["feature_bank.parquet"]["codes"]
    if "fold" in stored:  # the last profile is the one with all evidence
        stored |= {key: stored[key][-1] for key in ("profiles", "num_evidence")}
    train = interactions[interactions["split"] == "train"]
    had = np.zeros((len(bank), len(items)), dtype=np.float32)
    had[train["user"], train["item"]] = 1

    rng = np.random.default_rng(args.seed)
    maps, typical, deviations = [], {}, []
    for k, (name, num_codes) in enumerate(zip(names, sizes)):
        part, told = codebook[name], (stored["num_evidence"][:, k] > 0)
        z = (stored["profiles"][:, k] - part["mean"]) @ part["transform"]  # [N, C]
        codewords, codes, _ = VectorQuantizer(part["codebook"])(z)
        distance = (z - codewords.detach()).norm(dim=1).masked_fill(~told, float("inf"))
        nearest_first = distance.argsort(stable=True)[:int(told.sum())]
        closest = lambda code: nearest_first[codes[nearest_first] == code][:3].tolist()
        typical[name] = [bank["user_id"].iloc[closest(code)].tolist() for code in range(num_codes)]

        centred = z[told] - z[told].mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        plane = (centred @ directions.T).numpy()  # [N', 2], or 1 for C = 1
        if plane.shape[1] == 1:  # one direction: spread over the height, so that users do not hide each other
            plane = np.column_stack([plane, rng.random(len(plane))])
        maps.append(draw_map(plane, bank[name].to_numpy()[told.numpy()], f"{name} by code", range(num_codes)))
        if f"true_{name}" in users:
            truth, labels = pd.factorize(users[f"true_{name}"][told.numpy()], sort=True)
            maps.append(draw_map(plane, truth, f"{name} by truth", labels))
        deviations.append(stored["profiles"][:, k] - stored["profiles"][told, k].mean(0))

    stamp = Path(args.run_dir) / "tiny_llm" / "made_from.txt"
    if stored["llm"] == "tiny" and (not stamp.exists() or stamp.read_text() != stored["tiny_llm"]):
        fail(f"{stamp.parent} is not the LLM that profiles.pt was inferred with: run `python "
             f"02_infer_profiles.py --run-dir {args.run_dir}` again, with the options in profiles.pt.json")
    model, tokenizer = load_llm(args, stored["llm"])
    ids, words = vocabulary_words(tokenizer)
    embeddings = model.get_input_embeddings().weight[ids].float()
    known = np.flatnonzero(stored["has_evidence"])
    chosen = np.sort(rng.choice(known, min(args.num_users, len(known)), replace=False))
    other = rng.choice(np.setdiff1d(known, chosen) if len(known) > len(chosen) else known, len(chosen))
    one_token = lambda rows: rows.unflatten(1, (-1, embeddings.shape[1])).mean(1)  # of several soft tokens
    words_of = lambda group: [nearest_words(one_token(deviation[group]), embeddings, words, args.num_words)
                              for deviation in deviations]
    nearest, control = words_of(chosen), words_of(other)

    pictures = [draw_usage(bank, names, sizes), draw_mask(names), *maps]
    size = f"{len(bank):,} users, {len(items):,} items, {len(train):,} train rows"
    caveat = ("Nearest words of a soft prompt mean little alone; where the control reads as well, "
              "believe neither.")
    body = [
        "<h1>User inherent profiles: what was inferred, and is it true?</h1>",
        headline(sidecars["feature_bank.parquet"], sidecars["profiles.pt"], sidecars["results.parquet"]),
        f"<p>{size}; LLM: {html.escape(str(stored['llm']))}.</p>",
        "<h2>The codes</h2>",
        pictures[0],
        *maps,
        "<h2>What each code stands for</h2>",
        "<p>What its users have more often than all others; z above 1.96 only.</p>",
        code_cards(bank, names, sizes, had, items, typical, args.num_words),
        f"<h2>A few users</h2><p class='dim'>{caveat}</p>",
        user_pages(args, chosen, other, bank, names, train, items, nearest, control),
        "<h2>Does it help click-through models?</h2>",
        markdown_tables(results_text),
        "<h2>How a profile is kept apart</h2>",
        pictures[1],
    ]
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>User inherent profiles</title><style>{STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n")
    path = write_artifact(args, "report.html", page, names_of_inputs, seconds=time.time() - started)
    print(f"wrote {path}: {len(chosen)} users, {sum(sizes)} codes, {len(pictures)} pictures")


if __name__ == "__main__":
    main(parse_args())
