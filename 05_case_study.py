"""Stage 5 of 5: say in one page what was inferred, how far it can be believed, and whether it helped.

For a few users: the items they had, their codes, and the words of their profiles (table 5 of the paper) beside
those of another user drawn at random, for words mean little alone. Two ways to get words: the vocabulary's
nearest to θ_u - θ̄, and a lens: the words that the LLM expects more after "This user's hobby is" θ_u than
after θ̄. Over many users: do a user's words occur in his held-out items more often than another user's? And
where does the LLM look (figure 7 of the paper): the attention from the words of "The user likes …" to the soft
token, before and after tuning, and the share of it on content words, with an interval. For each code: its
size and the categories and words that its users have more often than the others (log-odds with a Dirichlet
prior; Monroe et al., 2008). Evidence told is of train rows, held-out rows are valid ones, never test rows.

Reads   all artifacts of the run, and the LLM
Writes  report.html: one file with its pictures inside, opens without a network
        report/: each picture as PNG, what it shows as csv

Example: python 05_case_study.py        (20 seconds)
  wrote runs/demo/report.html: 4 users, 7 codes, 9 pictures
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
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer

from common import (VectorQuantizer, at_least, fail, fig4_mask, load_llm, read_artifacts, read_sidecar,
                    stage_parser, start_stage, usage_of, whole_file, with_interval, write_artifact)

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the choice of users and of the control")
    add("--num-users", type=at_least(1), default=4, help="users shown")
    add("--num-words", type=at_least(1), default=6, help="words shown per profile and per code")
    add("--num-scored", type=at_least(2), default=1000, help="users whose words and attention are measured")
    add("--layers", type=at_least(0), nargs="+", help="layers whose attention is averaged (default: all)")
    add("--heads", type=at_least(0), nargs="+", help="attention heads that are averaged (default: all)")
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


@torch.no_grad()
def lens_words(model, ids, prefix, soft, shared, words, num_words, batch_size=256):
    """The words whose log-probability after the name text and θ_u rises most against θ̄: a list per user

    ids [W]: the vocabulary's words; prefix: token ids of "This user's hobby is"; soft [B, S D], shared [S D].
    """
    embed = model.get_input_embeddings()
    before = embed(torch.tensor(prefix))[None]  # [1, L, D]

    def log_probability(theta):
        theta = theta.unflatten(1, (-1, before.shape[2])).to(before.dtype)  # [b, S, D]
        logits = model(inputs_embeds=torch.cat([before.expand(len(theta), -1, -1), theta], 1), use_cache=False,
                       logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(1)[:, ids]

    usual, result = log_probability(shared[None]), []
    for part in soft.split(batch_size):
        rise = log_probability(part) - usual
        for row in rise.topk(min(num_words, len(words)), dim=1).indices.tolist():
            result.append([words[index] for index in row])
    return result


def held_out_score(own, other, texts):
    """How much more often a user's words occur in his held-out items than another's do: AUC, half of its 95%
    interval, number of users.

    own, other: a list of words per user; texts: the words of his held-out items, a set per user. AUC: the
    share of users whose own words hit more often, ties counted half; 0.5 if words tell nothing.
    """
    wins = []
    for mine, his, text in zip(own, other, texts):
        if text:
            hits = [sum(word.lower() in text for word in words) for words in (mine, his)]
            wins.append(0.5 + 0.5 * np.sign(hits[0] - hits[1]))
    if len(wins) < 2:
        return float("nan"), float("nan"), len(wins)
    return float(np.mean(wins)), float(1.96 * np.std(wins, ddof=1) / np.sqrt(len(wins))), len(wins)


def words_in(items, rows):
    """The words of the items of those rows by user: dict of sets"""
    texts = items["title"].fillna("") + " " + items["category"].fillna("") + " " + items["brand"].fillna("")
    of_item = texts.str.lower().str.findall(r"[^\W\d_]{3,}")
    return {user: set().union(*of_item.iloc[mine]) for user, mine in rows.groupby("user")["item"]}


# ----------------------------------------------------------------------------------------------------------
# attention (figure 7)
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_to_soft(model, prefix, soft, text, layers=None, heads=None):
    """Attention that each token of a text [B, T] pays to the soft tokens before it: soft [B, S D] -> [B, T]

    The LLM reads name text, θ, text; the weights are those of its own (eager) attention, averaged over layers
    and heads (default: all), summed over the S soft tokens.
    """
    embed = model.get_input_embeddings()
    before, after = embed(torch.tensor(prefix)).expand(len(soft), -1, -1), embed(text)
    theta = soft.unflatten(1, (-1, before.shape[2])).to(before.dtype)  # [B, S, D]
    attentions = model(inputs_embeds=torch.cat([before, theta, after], 1), use_cache=False,
                       output_attentions=True).attentions  # by layer: [B, heads, Q, K]
    chosen = torch.stack([attentions[layer] for layer in layers or range(len(attentions))], 1)
    chosen = chosen[:, :, heads or slice(None)].float().mean((1, 2))  # [B, Q, K]
    first = before.shape[1]
    return chosen[:, first + theta.shape[1]:, first:first + theta.shape[1]].sum(2)


def sentences_of(profile, rows, items, num_content=3):
    """The sentence of figure 7 for each user: (noise words, content words) by user

    Of the first profile: "The user likes" and the words that his train items' titles and categories hold most;
    of the others, where prices are known, "The spending level of this user is" and low, medium or high.
    """
    price = rows["item"].map(items["price"])
    if profile and price.notna().any():
        of_user = price.groupby(rows["user"]).median().dropna()
        level = np.searchsorted(of_user.quantile([1 / 3, 2 / 3]), of_user)
        return {user: (["The", "spending", "level", "of", "this", "user", "is"],
                       [("low", "medium", "high")[place]]) for user, place in zip(of_user.index, level)}
    texts = (items["category"].fillna("") + " " + items["title"]).str.findall(r"[^\W\d_]{3,}")
    result = {}
    for user, mine in rows.groupby("user")["item"]:
        counts = pd.Series([word for words in texts.iloc[mine] for word in words]).value_counts(sort=False)
        if len(counts):
            result[user] = (["The", "user", "likes"], list(counts.nlargest(num_content).index))
    return result


def attention_by_word(args, model, tokenizer, prefix, soft, sentences, batch_size=64):
    """Attention of each word of each user's sentence to his soft token: list of (words, is content, weights)"""
    ids = [[tokenizer(f" {word}", add_special_tokens=False).input_ids for word in noise + content]
           for noise, content in sentences]
    length = np.array([sum(map(len, of_user)) for of_user in ids])
    result = [None] * len(ids)
    for same in np.unique(length):  # sentences of one length need no padding
        for users in np.split(np.flatnonzero(length == same), range(batch_size, len(ids), batch_size)):
            if not len(users):
                continue
            text = torch.tensor([sum(ids[user], []) for user in users])
            weights = attention_to_soft(model, prefix, soft[users], text, args.layers, args.heads)
            for user, of_token in zip(users, weights):
                parts = of_token.tensor_split(np.cumsum([len(part) for part in ids[user]])[:-1].tolist())
                noise, content = sentences[user]
                is_content = np.arange(len(parts)) >= len(noise)
                result[user] = noise + content, is_content, np.array([float(part.mean()) for part in parts])
    return result


def content_share(attention):
    """Share of the attention that content words pay, mean over words within each kind: [users]"""
    return np.array([weights[is_content].mean() / (weights[is_content].mean() + weights[~is_content].mean())
                     for _, is_content, weights in attention])


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


def picture(args, name, figure, data, description):
    """The picture as <img>; also as report/name.png, and what it shows as report/name.csv"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(Path(args.run_dir) / "report" / f"{name}{suffix}") as file:
            file.write(content)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_usage(args, bank, names, sizes):
    rows = []
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name, num_codes in zip(axes[0], names, sizes):
        counts, perplexity = usage_of(bank[name].to_numpy(), num_codes)
        rows += [(name, code, count) for code, count in enumerate(counts)]
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    data = pd.DataFrame(rows, columns=["profile", "code", "users"])
    return picture(args, "usage", figure, data, "Bars: users per code, for each profile")


def draw_map(args, plane, colour, title, labels):
    """plane [N, 2], colour [N] int -> scatter plot"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for value, label in enumerate(labels):
        mask = colour == value
        axis.scatter(*plane[mask].T, s=5, alpha=0.6, color=plt.cm.tab10(value % 10), label=str(label))
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": [
        labels[value] if value < len(labels) else "unknown" for value in colour]})
    return picture(args, f"map-{title.replace(' ', '-')}", figure, data,
                   f"Scatter plot of users' profiles in two dimensions: {title}")


def draw_attention(args, name, before, after):
    """Figure 7: a row per user, a column per place of the sentence; each user's weights from 0 to 1"""
    width = max(len(words) for words, _, _ in after)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(after) + 1.4), squeeze=False)
    rows = []
    for axis, when, found in zip(axes[0], ("before", "after"), (before, after)):
        grid = np.full((len(found), width), np.nan)
        for place, (words, is_content, weights) in enumerate(found):
            span = np.ptp(weights) or 1.0
            grid[place, :len(words)] = (weights - weights.min()) / span
            for column, word in enumerate(words):
                axis.text(column, place, word, ha="center", va="center", fontsize=6,
                          color="white" if grid[place, column] > 0.6 else "black")
                rows.append((place, when, word, bool(is_content[column]), weights[column]))
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[], yticks=range(len(found)), ylabel="user")
    data = pd.DataFrame(rows, columns=["user", "when", "word", "is_content", "attention"])
    return picture(args, f"attention-{name}", figure, data, f"Heat maps of the attention from the words of a "
                   f"sentence to the soft token of {name}, before and after tuning, scaled per user")


def draw_curves(args, curve):
    """The losses of stage 3 by epoch"""
    data = pd.DataFrame(curve)
    figure, axes = plt.subplots(1, len(data.columns), figsize=(3 * len(data.columns), 2.4), squeeze=False)
    for axis, column in zip(axes[0], data):
        axis.plot(range(1, len(data) + 1), data[column])
        axis.set(title=column, xlabel="epoch of stage 3")
    figure.tight_layout()
    return picture(args, "curves", figure, data.assign(epoch=range(1, len(data) + 1)),
                   f"Lines: {', '.join(data)} by epoch of stage 3")


def draw_mask(args, names):
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
    data = pd.DataFrame(mask.int().numpy(), columns=labels).assign(reads=labels)
    return picture(args, "mask", figure, data, "Attention mask: name and soft tokens of one profile see only "
                   "each other; evidence sees all before it")


# ----------------------------------------------------------------------------------------------------------
# the report
# ----------------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left;vertical-align:top}"
    "img{max-width:100%}table{display:block;overflow-x:auto}@media print{body{margin:0}"
    "nav{display:none}}h2{margin-top:2.5rem;border-bottom:1px solid #ddd}.dim{color:#777}")


HEADINGS = ("The codes", "What each code stands for", "Do words of profiles mean anything?", "A few users",
            "Where the LLM looks", "Does it help click-through models?", "How a profile is kept apart")


def heading(text):
    return f'<h2 id="part{HEADINGS.index(text)}">{html.escape(text)}</h2>'


def contents():
    links = "".join(f'<li><a href="#part{place}">{html.escape(text)}</a></li>'
                    for place, text in enumerate(HEADINGS))
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


def code_cards(bank, names, sizes, had, items, typical, num_words):
    """One row per code: had sparse [N, M] (1 = a train row), typical: for each name and code, user ids -> HTML"""
    features, parts = item_features(items), []
    price = items["price"].to_numpy(float)
    show = lambda pairs: ", ".join(f"{word} ({z:.0f})" for word, z in pairs) or "none above chance"
    for name, num_codes in zip(names, sizes):
        member = np.stack([bank[name] == code for code in range(num_codes)]).astype(float)  # [K, N]
        counts = (had.T @ member.T).T  # [K, M]
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


def user_pages(chosen, other, bank, names, train, items, shown):
    """Items, codes, and words beside those of another user, for each chosen user

    shown: for each way of finding words, by profile, (words of the chosen, words of the others), None for who
    has no evidence.
    """
    parts = []
    for place, user in enumerate(chosen):
        titles = items["title"].to_numpy()[train.loc[train["user"] == user, "item"]]
        rows = []
        for k, name in enumerate(names):
            code = bank[name].iat[user]
            for way, by_profile in shown.items():
                own, control = by_profile[k]
                rows.append((name, code, way, ", ".join(own[place]), ", ".join(control[place])))
        told = "; ".join(titles[-12:]) + (f" … and {len(titles) - 12} earlier" if len(titles) > 12 else "")
        control = f"control: those of user {bank['user_id'].iat[other[place]]}"
        parts.append(f"<h3>User {html.escape(str(bank['user_id'].iat[user]))}</h3>"
                     f"<p>Had (train rows): {html.escape(told)}</p>"
                     + table(("profile", "code", "way", "words", control), rows))
    return "".join(parts)


def words_of_users(args, model, tokenizer, stored, names, users):
    """Two ways from profiles to words: {way: by profile, a list of words for each of those users}"""
    ids, words = vocabulary_words(tokenizer)
    embeddings = model.get_input_embeddings().weight[ids].float()
    found = {"nearest": [], "lens": []}
    for k in range(len(names)):
        soft, told = stored["profiles"][:, k], stored["num_evidence"][:, k] > 0
        deviation = (soft - soft[told].mean(0))[users].unflatten(1, (-1, embeddings.shape[1])).mean(1)
        found["nearest"].append(nearest_words(deviation, embeddings, words, args.num_words))
        prefix = tokenizer(stored["texts"][k]).input_ids
        found["lens"].append(lens_words(model, ids, prefix, soft[users], soft[told].mean(0), words,
                                        args.num_words))
    return found


def word_scores(args, found, names, scored, other, items, valid):
    """Do own words occur in held-out items more often than another user's? Rows of (profile, way, AUC, n)"""
    texts, rows, place = words_in(items, valid), [], {user: k for k, user in enumerate(scored)}
    of_user = [texts.get(user, set()) for user in scored]
    for k, name in enumerate(names):
        for way, by_profile in found.items():
            his = [by_profile[k][place[user]] for user in other]
            auc, half, num = held_out_score(by_profile[k], his, of_user)
            rows.append((name, way, f"{auc:.3f} ± {half:.3f}", f"{num:,}"))
    return rows


def attention_report(args, model, tokenizer, stored, names, scored, chosen, rows, items):
    """Figure 7 for each profile -> pictures, rows of (profile, share before, after, difference, users)

    Before tuning a soft token is random, as in the paper: normal, at the scale of the LLM's embeddings.
    """
    scale = float(model.get_input_embeddings().weight.float().square().mean().sqrt())
    generator = torch.Generator().manual_seed(args.seed)
    pictures, lines = [], []
    for k, name in enumerate(names):
        sentences = sentences_of(k, rows, items)
        users = [user for user in [*chosen, *np.setdiff1d(scored, chosen)] if user in sentences]
        if not users:
            continue
        soft, prefix = stored["profiles"][users, k], tokenizer(stored["texts"][k]).input_ids
        start = scale * torch.randn(soft.shape, generator=generator)
        before, after = (attention_by_word(args, model, tokenizer, prefix, theta,
                                           [sentences[user] for user in users]) for theta in (start, soft))
        num_drawn = min(len(chosen), len(users))
        pictures.append(draw_attention(args, name, before[:num_drawn], after[:num_drawn]))
        shares = content_share(before), content_share(after)
        half = lambda values: 1.96 * values.std(ddof=1) / len(values) ** 0.5
        lines.append((name, *(f"{share.mean():.3f} ± {half(share):.3f}" for share in shares),
                      with_interval(np.mean(shares[1] - shares[0]), half(shares[1] - shares[0])),
                      f"{len(users):,}"))
    return pictures, lines


def check_attention(args, model):
    """Exit when --layers or --heads name what the LLM does not have."""
    config = model.config
    for option, most in (("layers", config.num_hidden_layers), ("heads", config.num_attention_heads)):
        if max(getattr(args, option) or [0]) >= most:
            fail(f"--{option} {max(getattr(args, option))}: this LLM has {most}, counted from 0")


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
    pairs = train[["user", "item"]].drop_duplicates()
    had = sparse.csr_matrix((np.ones(len(pairs)), (pairs["user"], pairs["item"])), (len(bank), len(items)))

    rng = np.random.default_rng(args.seed)
    maps, typical = [], {}
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
        codes_told = bank[name].to_numpy()[told.numpy()]
        maps.append(draw_map(args, plane, codes_told, f"{name} by code", range(num_codes)))
        if f"true_{name}" in users:
            truth, labels = pd.factorize(users[f"true_{name}"][told.numpy()], sort=True)
            maps.append(draw_map(args, plane, truth, f"{name} by truth", labels))

    stamp = Path(args.run_dir) / "tiny_llm" / "made_from.txt"
    if stored["llm"] == "tiny" and (not stamp.exists() or stamp.read_text() != stored["tiny_llm"]):
        fail(f"{stamp.parent} is not the LLM that profiles.pt was inferred with: run `python "
             f"02_infer_profiles.py --run-dir {args.run_dir}` again, with the options in profiles.pt.json")
    # attention weights are told by the eager implementation only
    model, tokenizer = load_llm(args, stored["llm"], attn_implementation="eager")
    check_attention(args, model)
    known = np.flatnonzero(stored["has_evidence"])
    chosen = np.sort(rng.choice(known, min(args.num_users, len(known)), replace=False))
    rest = np.setdiff1d(known, chosen)
    scored = np.concatenate([chosen, rng.choice(rest, min(len(rest), max(0, args.num_scored - len(chosen))),
                                                replace=False)])
    other = np.roll(scored, 1)  # everybody is compared with somebody else
    found = words_of_users(args, model, tokenizer, stored, names, scored)
    valid = interactions[interactions["split"] == "valid"]
    scores = word_scores(args, found, names, scored, other, items, valid)
    shown = {way: [(part[:len(chosen)], [part[place - 1] for place in range(len(chosen))])
                   for part in by_profile] for way, by_profile in found.items()}
    attention, shares = attention_report(args, model, tokenizer, stored, names, scored, chosen, train, items)

    pictures = [draw_usage(args, bank, names, sizes), draw_mask(args, names), *maps, *attention]
    curve = sidecars["codebook.pt"].get("curve")
    curves = [draw_curves(args, curve)] if curve else []
    pictures += curves
    size = f"{len(bank):,} users, {len(items):,} items, {len(train):,} train rows"
    caveat = ("Words of a soft prompt mean little alone; where the control reads as well, believe neither. "
              "Nearest: to the profile less the mean profile. Lens: what the LLM expects more behind it.")
    body = [
        "<h1>User inherent profiles: what was inferred, and is it true?</h1>",
        contents(),
        headline(sidecars["feature_bank.parquet"], sidecars["profiles.pt"], sidecars["results.parquet"]),
        f"<p>{size}; LLM: {html.escape(str(stored['llm']))}.</p>",
        heading("The codes"), pictures[0], *maps, *curves,
        heading("What each code stands for"),
        "<p>What its users have more often than all others; z above 1.96 only.</p>",
        code_cards(bank, names, sizes, had, items, typical, args.num_words),
        heading("Do words of profiles mean anything?"),
        "<p>Share of users whose own words occur more often in their held-out (valid) items than another "
        "user's words do, ties counted half, ± half of the 95% interval; 0.5 if they tell nothing.</p>",
        table(("profile", "way", "AUC", "users"), scores),
        heading("A few users"), f"<p class='dim'>{caveat}</p>",
        user_pages(chosen, other, bank, names, train, items, shown),
        heading("Where the LLM looks"),
        "<p>Share of the attention to the soft token that content words pay, against words such as "
        "&ldquo;The user likes&rdquo;, before (a random soft token) and after tuning; ± half of the 95% "
        "interval over users.</p>",
        table(("profile", "before", "after", "after - before", "users"), shares), *attention,
        heading("Does it help click-through models?"),
        markdown_tables(results_text),
        heading("How a profile is kept apart"),
        pictures[1],
    ]
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>User inherent profiles</title><style>{STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n")
    path = write_artifact(args, "report.html", page, names_of_inputs, words=scores, attention=shares,
                          seconds=time.time() - started)
    for name, way, auc, _ in scores:
        print(f"{name}: {way} words in held-out items, own against another user's: AUC {auc}")
    for name, *parts, _ in shares:
        print(f"{name}: share of attention on content words {parts[0]} before, {parts[1]} after tuning")
    print(f"wrote {path}: {len(chosen)} users, {sum(sizes)} codes, {len(pictures)} pictures")


if __name__ == "__main__":
    main(parse_args())
