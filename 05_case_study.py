"""Stage 5 of 5: say in one page what was inferred, how far it can be believed, and whether it helped.

For each code a card: the categories, brands, words and prices that its users have more often than all others
(log-odds with a Dirichlet prior; Monroe et al., 2008), how they rate, what is known of them. For a few users:
the items they had, their codes, the words of their profiles (table 5 of the paper) beside those of another
user drawn at random, for words mean little alone, and what a click-through model recommends without and with
the codes. Two ways to get words: the vocabulary's nearest to θ_u - θ̄, and a lens: the words that the LLM
expects more after "This user's hobby is" θ_u than after θ̄. Over many users: do a user's words occur in his
held-out items more often than another user's? And where does the LLM look (figure 7 of the paper): the
attention from the words of "The user likes …" to the soft token, before and after tuning, and the share of it
on content words, with an interval. Evidence told is of train rows, held-out rows are valid ones, never test.

Reads   all artifacts of the run, and the LLM
Writes  report.html: one file with its pictures inside, opens without a network
        report/: each picture as PNG, what it shows as csv
        with --user ID: report/user-N.html and report/user-N/ instead, and the page as text on the screen

Example: python 05_case_study.py        (15 seconds)
  wrote runs/demo/report.html: 4 users, 7 codes, 9 pictures
"""

import argparse
import base64
import html
import io
import json
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_mutual_info_score

from common import (VectorQuantizer, at_least, fail, fig4_mask, load_llm, read_artifacts, read_sidecar,
                    stage_parser, start_stage, usage_of, whole_file, with_interval, write_artifact)
from ctr_models import Member, Rows, table_rows, train_stack

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of the choice of users and of the control")
    add("--user", metavar="ID", help="one user's page instead of the report: his id as in the data")
    add("--num-users", type=at_least(1), default=4, help="users shown")
    add("--num-words", type=at_least(1), default=6, help="words shown per profile and per code")
    add("--num-scored", type=at_least(2), default=1000, help="users whose words and attention are measured")
    add("--layers", type=at_least(0), nargs="+", help="layers whose attention is averaged (default: all)")
    add("--heads", type=at_least(0), nargs="+", help="attention heads that are averaged (default: all)")
    add("--num-items", type=at_least(1), default=5, help="items recommended to each user shown")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------
# data: the artifacts of the run
# ----------------------------------------------------------------------------------------------------------


def read_run(args):
    """The artifacts of the run, checked, and what several parts read of them"""
    inputs = ["interactions.parquet", "items.parquet", "users.parquet", "profiles.pt", "codebook.pt",
              "feature_bank.parquet", "results.parquet", "results.md"]
    interactions, items, users, stored, codebook, bank, results, text = read_artifacts(args, *inputs)
    sidecars = {name: read_sidecar(args, name) for name in inputs}
    names, split = stored["names"], {name: frame for name, frame in interactions.groupby("split")}
    codes = bank[names].to_numpy(dtype=np.int64)
    train_codes = codes[split["train"]["user"]]
    if "fold" in stored:  # the last profile is the one with all evidence; a train row's code has not seen it
        stored |= {key: stored[key][-1] for key in ("profiles", "num_evidence")}
        inputs.append("train_codes.parquet")
        train_codes = read_artifacts(args, "train_codes.parquet")[0][names].to_numpy(dtype=np.int64)
    pairs = split["train"][["user", "item"]].drop_duplicates()
    had = sparse.csr_matrix((np.ones(len(pairs)), (pairs["user"], pairs["item"])), (len(bank), len(items)))
    return SimpleNamespace(
        inputs=inputs, sidecars=sidecars, interactions=interactions, items=items, users=users, stored=stored,
        codebook=codebook, bank=bank, results=results, results_text=text, names=names, split=split,
        sizes=sidecars["feature_bank.parquet"]["codes"], codes=codes, train_codes=train_codes, had=had)


def choose_users(args, run):
    """Users shown, users measured (these first), and for each of the latter the one he is compared with"""
    known = np.flatnonzero(run.stored["has_evidence"])
    rng, num_scored = np.random.default_rng(args.seed), args.num_scored
    if args.user is None:
        chosen = np.sort(rng.choice(known, min(args.num_users, len(known)), replace=False))
    else:
        chosen = np.flatnonzero(run.bank["user_id"].astype(str) == args.user)
        if not len(chosen):
            fail(f"--user {args.user}: there is no such user; for example {run.bank['user_id'].iat[0]}")
        num_scored = 2  # and somebody to compare him with
    rest = np.setdiff1d(known, chosen)
    more = min(len(rest), max(0, num_scored - len(chosen)))
    scored = np.concatenate([chosen, rng.choice(rest, more, replace=False)])
    return chosen, scored, np.roll(scored, 1)


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
        inputs = torch.cat([before.expand(len(theta), -1, -1), theta], 1)
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
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


def words_of_users(args, run, model, tokenizer, users):
    """Two ways from profiles to words: {way: by profile, a list of words for each of those users}"""
    ids, words = vocabulary_words(tokenizer)
    embeddings = model.get_input_embeddings().weight[ids].float()
    found, stored = {"nearest": [], "lens": []}, run.stored
    for k in range(len(run.names)):
        soft, told = stored["profiles"][:, k], stored["num_evidence"][:, k] > 0
        deviation = (soft - soft[told].mean(0))[users].unflatten(1, (-1, embeddings.shape[1])).mean(1)
        found["nearest"].append(nearest_words(deviation, embeddings, words, args.num_words))
        prefix = tokenizer(stored["texts"][k]).input_ids
        found["lens"].append(lens_words(model, ids, prefix, soft[users], soft[told].mean(0), words,
                                        args.num_words))
    return found


def word_scores(run, found, scored, other):
    """Do own words occur in held-out items more often than another user's? Rows of (profile, way, AUC, n)"""
    texts, rows = words_in(run.items, run.split["valid"]), []
    place = {user: k for k, user in enumerate(scored)}
    of_user = [texts.get(user, set()) for user in scored]
    for k, name in enumerate(run.names):
        for way, by_profile in found.items():
            his = [by_profile[k][place[user]] for user in other]
            auc, half, num = held_out_score(by_profile[k], his, of_user)
            rows.append((name, way, f"{auc:.3f} ± {half:.3f}", f"{num:,}"))
    return rows


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

    Of the first profile: "The user likes" and the words that his train items' titles and categories hold
    most; of the others, where prices are known, "The spending level of this user is" and low, medium or high.
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
    """Attention of each word of each user's sentence to his soft token: (words, is content, weights)"""
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


def attention_report(args, folder, run, model, tokenizer, scored, chosen):
    """Figure 7 for each profile -> pictures, rows of (profile, share before, after, difference, users)

    Before tuning a soft token is random, as in the paper: normal, at the scale of the LLM's embeddings.
    """
    scale = float(model.get_input_embeddings().weight.float().square().mean().sqrt())
    generator = torch.Generator().manual_seed(args.seed)
    pictures, lines, stored = [], [], run.stored
    for k, name in enumerate(run.names):
        sentences = sentences_of(k, run.split["train"], run.items)
        users = [user for user in [*chosen, *np.setdiff1d(scored, chosen)] if user in sentences]
        if not users:
            continue
        soft, prefix = stored["profiles"][users, k], tokenizer(stored["texts"][k]).input_ids
        start = scale * torch.randn(soft.shape, generator=generator)
        before, after = (attention_by_word(args, model, tokenizer, prefix, theta,
                                           [sentences[user] for user in users]) for theta in (start, soft))
        num_drawn = min(len(chosen), len(users))
        pictures.append(draw_attention(folder, name, before[:num_drawn], after[:num_drawn]))
        shares = content_share(before), content_share(after)
        half = lambda values: 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        lines.append((name, *(f"{share.mean():.3f} ± {half(share):.3f}" for share in shares),
                      with_interval(np.mean(shares[1] - shares[0]), half(shares[1] - shares[0])),
                      f"{len(users):,}"))
    return pictures, lines


# ----------------------------------------------------------------------------------------------------------
# codes: what their users have, how they rate, who they are
# ----------------------------------------------------------------------------------------------------------


def overrepresented(counts, names, num_words):
    """counts [K, W]: what each code's users have -> per code the names whose share is surely above elsewhere:
    (name, odds ratio to all other codes, its 95% interval's ends), the surest first.

    Log-odds with the whole corpus as Dirichlet prior, of a tenth of its weight. Sure: one-sided at 2.5% for
    all W names together (Bonferroni), or of a thousand words of titles some would always stand out.
    """
    prior, threshold = 0.1 * counts.sum(0) + 0.01, stats.norm.isf(0.025 / max(1, len(names)))
    result = []
    for own in counts:
        other = counts.sum(0) - own
        first, second = own + prior, other + prior
        odds = np.log(first / (first.sum() - first)) - np.log(second / (second.sum() - second))
        error = np.sqrt(1 / first + 1 / second)
        best = np.argsort(-odds / error, kind="stable")[:num_words]
        result.append([(names[k], *np.exp(odds[k] + np.array([0, -1.96, 1.96]) * error[k]).tolist())
                       for k in best if odds[k] > threshold * error[k]])
    return result


def item_features(items):
    """What items are, as counts: list of (title, counts [M, W], names [W]), without what the data lack."""
    features = []
    price = items["price"].astype(float)
    low, high = price.quantile([1 / 3, 2 / 3]) if price.notna().any() else (0, 0)
    level = pd.Series(np.where(price.isna(), None, np.select(
        [price <= low, price <= high], [f"up to ${low:.2f}", f"${low:.2f} to ${high:.2f}"],
        f"above ${high:.2f}")))
    for title, column in (("categories", items["category"]), ("brands", items["brand"]),
                          ("price levels", level)):
        one_hot = pd.get_dummies(column)
        features.append((title, one_hot.to_numpy(float), list(one_hot.columns)))
    vectorizer = CountVectorizer(token_pattern=r"[^\W\d_]{3,}", min_df=2, stop_words="english")
    try:
        counts = vectorizer.fit_transform(items["title"])
        features.append(("title words", counts, list(vectorizer.get_feature_names_out())))
    except ValueError:  # no title word stands in two titles
        pass
    return [feature for feature in features if len(feature[2])]


def facts_of(users):
    """What is known of users, as groups: {fact: texts [N], None where unknown}

    Numbers of many values fall into quarters; what has a value of its own for every few users (zip codes)
    makes no groups.
    """
    facts = {}
    for column in users.columns.drop(["user", "user_id"]):
        values = users[column]
        if pd.api.types.is_numeric_dtype(values) and values.nunique() > 8:
            quarter = pd.qcut(values, 4, labels=False, duplicates="drop")
            ends = values.groupby(quarter).agg(["min", "max"])
            values = quarter.map(ends["min"].map("{:g}".format) + " to " + ends["max"].map("{:g}".format))
        if 1 < values.nunique() <= max(8, len(users) / 20):
            facts[column.replace("_", " ")] = values.astype(object).where(values.notna(), None)
    return facts


def agreement(run):
    """Of each profile's codes with each fact: rows of (profile, fact, adjusted mutual information, p)"""
    rows = []
    for k, name in enumerate(run.names):
        for fact, values in facts_of(run.users).items():
            mine = (run.codes[:, k] < run.sizes[k]) & values.notna().to_numpy()
            table = pd.crosstab(run.codes[mine, k], values[mine].to_numpy())
            if min(table.shape) > 1:
                agreed = adjusted_mutual_info_score(run.codes[mine, k], values[mine].astype(str))
                p = stats.chi2_contingency(table).pvalue
                rows.append((name, fact, f"{agreed:.3f}", f"{p:.2g}" if p > 1e-16 else "below 1e-16"))
    return rows


def mean_with_interval(values):
    """Mean ± half of its 95% interval, as text; of fewer than two values there is none"""
    if len(values) < 2:
        return "–"
    return f"{np.mean(values):.2f} ± {1.96 * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def habits_of(run):
    """How users rate, by user: share of positive labels, rating less the item's mean (train rows)"""
    train = run.split["train"]
    departure = train["rating"] - train.groupby("item")["rating"].transform("mean")
    table = pd.DataFrame({"user": train["user"], "positive": train["label"], "departure": departure})
    return table.groupby("user").mean()


def code_cards(args, run, typical):
    """For each code a card: its facts as (term, text); names found, and found with codes dealt at random

    -> {profile: cards by code}, {profile: a code's meaning in a few words}, (found, found at random)
    """
    features, habits, facts = item_features(run.items), habits_of(run), facts_of(run.users)
    told = lambda found: ", ".join(f"{name} ×{odds:.1f} ({low:.1f}–{high:.1f})"
                                   for name, odds, low, high in found) or "none above chance"
    cards, meaning, num_found = {}, {}, np.zeros(2, dtype=int)
    for k, (name, num_codes) in enumerate(zip(run.names, run.sizes)):
        dealt = np.random.default_rng([args.seed, k]).permutation(run.codes[:, k])
        is_member, at_random = (np.stack([codes == code for code in range(num_codes)]).astype(float)
                                for codes in (run.codes[:, k], dealt))  # [K, N]
        cards[name] = [[("users", f"{int(size):,}")] for size in is_member.sum(1)]
        meaning[name] = [[] for _ in range(num_codes)]
        for title, of_item, texts in features:
            found, by_chance = (overrepresented(np.asarray((run.had.T @ member.T).T @ of_item), texts,
                                                args.num_words) for member in (is_member, at_random))
            num_found += [sum(map(len, found)), sum(map(len, by_chance))]
            for code, of_code in enumerate(found):
                cards[name][code].append((title, told(of_code)))
                meaning[name][code] += [text for text, *_ in of_code[:2]]
        for title, column in (("share rated positive", "positive"),
                              ("rating less the item's mean", "departure")):
            for code in range(num_codes):
                mine = habits.index.isin(np.flatnonzero(is_member[code]))
                cards[name][code].append((title, mean_with_interval(habits.loc[mine, column])))
        for fact, values in facts.items():
            one_hot = pd.get_dummies(values)
            found = overrepresented(is_member @ one_hot.to_numpy(float), list(one_hot.columns),
                                    args.num_words)
            for code in range(num_codes):
                cards[name][code].append((fact, told(found[code])))
        for code in range(num_codes):
            cards[name][code].append(("typical users", ", ".join(map(str, typical[name][code]))))
            meaning[name][code] = ", ".join(map(str, meaning[name][code])) or "nothing above chance"
    return cards, meaning, num_found


# ----------------------------------------------------------------------------------------------------------
# one user
# ----------------------------------------------------------------------------------------------------------


def click_scores(run, users):
    """Click probability of every item for those users, without codes and with them: {features: [B, M]}

    By the first model of stage 4's table, trained once more with the options of its first row: stage 4 keeps
    figures, not weights.
    """
    options, scores = argparse.Namespace(**run.sidecars["results.parquet"]["options"]), {}
    results, num_items = run.results, len(run.items)
    is_warm = np.bincount(run.split["train"]["user"], minlength=len(run.bank)) > 0
    asked = pd.DataFrame({"user": np.repeat(users, num_items),
                          "item": np.tile(np.arange(num_items), len(users))})
    split = {"train": run.split["train"], "valid": run.split["valid"], "asked": asked}
    for feature, of_users, of_train, sizes in (
            ("none", run.codes[:, :0], run.train_codes[:, :0], []),
            ("codes", run.codes, run.train_codes, [size + 1 for size in run.sizes])):
        row = results[(results["model"] == options.models[0]) & (results["features"] == feature)]
        if not len(row):
            continue
        row = row.iloc[0]
        fields = {name: of_users[frame["user"]] for name, frame in split.items()} | {"train": of_train}
        ids, size, unknown = table_rows(split, fields, sizes, is_warm, num_items, bool(options.id_dropout))
        labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid")}
        rows = Rows({name: part[None] for name, part in ids.items()}, labels, [size], unknown)
        member = Member(0, int(row["seed"]), *row[["lr", "weight_decay", "net_decay", "start"]].map(float))
        _, stack = train_stack(options, options.models[0], [member], rows)
        scores[feature] = stack.predict(rows, "asked")[0].reshape(len(users), num_items)
    return scores


def user_sections(args, run, user, other, words, meaning, clicks):
    """One user's page: a list of (title, header, rows). His evidence, his codes, held-out (valid) rows.

    words: for each way of finding them and each profile, (his own, the other's); clicks: {features: [M]}.
    """
    told = [(fact, values.iat[user]) for fact, values in facts_of(run.users).items() if values.iat[user]]
    sections = [("What is known of this user (told to no model)", ("fact", "value"), told)] if told else []
    titles, is_new = run.items["title"], np.ones(len(run.items), dtype=bool)
    for split, title in (("train", "Had (train rows)"), ("support", "Had (support rows: a cold user)")):
        rows = run.split[split] if split in run.split else run.split["train"][:0]
        rows = rows[rows["user"] == user].sort_values("timestamp", kind="stable")
        is_new[rows["item"]] = False
        if len(rows):
            latest = rows[-12:]
            title += f", the latest {len(latest)} of {len(rows)}" if len(rows) > len(latest) else ""
            sections.append((title, ("item", "rating"),
                             [(titles.iat[row.item], f"{row.rating:g}") for row in latest.itertuples()]))
    codes = [(name, run.codes[user, k], meaning[name][run.codes[user, k]]
              if run.codes[user, k] < run.sizes[k] else "no evidence") for k, name in enumerate(run.names)]
    sections.append(("Codes, and what their users have more often", ("profile", "code", "meaning"), codes))
    lines = [(name, way, ", ".join(by_profile[k][0]), ", ".join(by_profile[k][1]))
             for k, name in enumerate(run.names) for way, by_profile in words.items()
             if run.stored["num_evidence"][user, k] > 0]
    control = f"control: those of user {run.bank['user_id'].iat[other]}"
    sections.append(("Words of the profiles", ("profile", "way", "words", control), lines))

    ways = {"none": "without codes", "codes": "with codes"}
    order = {ways[feature]: np.argsort(-np.where(is_new, of_item, -1), kind="stable")
             for feature, of_item in clicks.items()}
    rank = {way: np.argsort(places) + 1 for way, places in order.items()}
    valid = run.split["valid"]
    held_out = [(titles.iat[row.item], f"{row.rating:g}",
                 *(f"{of_way[row.item]:,}" for of_way in rank.values()))
                for row in valid[valid["user"] == user].itertuples() if is_new[row.item]]
    if held_out:
        sections.append((f"Held-out items (valid rows), and their rank among the {is_new.sum():,} not had",
                         ("item", "rating", *(f"rank {way}" for way in rank)), held_out))
    if order:
        top = zip(*([titles.iat[item] for item in places[:args.num_items]] for places in order.values()))
        sections.append((f"Recommended by {run.sidecars['results.parquet']['options']['models'][0]}",
                         ("rank", *order), [(place, *of_way) for place, of_way in enumerate(top, 1)]))
    return sections


def as_text(sections):
    """Sections for a terminal"""
    frames = [(title, pd.DataFrame(rows, columns=header)) for title, header, rows in sections]
    return "\n\n".join(f"{title}\n{frame.to_string(index=False, max_colwidth=60)}"
                       for title, frame in frames if len(frame))


# ----------------------------------------------------------------------------------------------------------
# pictures: each returns an <img> with its text for those who cannot see it
# ----------------------------------------------------------------------------------------------------------


def picture(folder, name, figure, data, description):
    """The picture as <img>; also as folder/name.png, and what it shows as folder/name.csv"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(folder / f"{name}{suffix}") as file:
            file.write(content)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_usage(folder, run):
    """Users per code"""
    rows = []
    figure, axes = plt.subplots(1, len(run.names), figsize=(3.2 * len(run.names), 2.6), squeeze=False)
    for axis, name, codes, num_codes in zip(axes[0], run.names, run.codes.T, run.sizes):
        counts, perplexity = usage_of(codes, num_codes)
        rows += [(name, code, count) for code, count in enumerate(counts)]
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    figure.tight_layout()
    data = pd.DataFrame(rows, columns=["profile", "code", "users"])
    return picture(folder, "usage", figure, data, "Bars: users per code, for each profile")


def draw_map(folder, plane, colour, title, labels, marked):
    """plane [N, 2], colour [N] int -> scatter plot; marked: {user id: his place} of those to be ringed"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for value, label in enumerate(labels):
        mask = colour == value
        axis.scatter(*plane[mask].T, s=5, alpha=0.6, color=plt.cm.tab10(value % 10), label=str(label))
    for user, place in marked.items():
        axis.scatter(*plane[place], s=60, facecolors="none", edgecolors="black")
        axis.annotate(user, plane[place], fontsize=6, xytext=(5, 5), textcoords="offset points",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": [
        labels[value] if value < len(labels) else "unknown" for value in colour]})
    return picture(folder, f"map-{title.replace(' ', '-')}", figure, data,
                   f"Scatter plot of users' profiles in two dimensions: {title}; the users shown are ringed")


def draw_maps(folder, run, chosen, rng):
    """Profiles in two dimensions, by code and by truth: {profile: pictures}, typical users by code"""
    maps, typical = {}, {}
    user_ids = run.bank["user_id"].astype(str)
    for k, (name, num_codes) in enumerate(zip(run.names, run.sizes)):
        part, told = run.codebook[name], run.stored["num_evidence"][:, k] > 0
        z = (run.stored["profiles"][:, k] - part["mean"]) @ part["transform"]  # [N, C]
        codewords, codes, _ = VectorQuantizer(part["codebook"])(z)
        distance = (z - codewords.detach()).norm(dim=1).masked_fill(~told, float("inf"))
        nearest_first = distance.argsort(stable=True)[:int(told.sum())]
        closest = lambda code: nearest_first[codes[nearest_first] == code][:3].tolist()
        typical[name] = [user_ids.iloc[closest(code)].tolist() for code in range(num_codes)]

        centred = z[told] - z[told].mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        plane = (centred @ directions.T).numpy()  # [N', 2], or 1 for C = 1
        if plane.shape[1] == 1:  # one direction: spread over the height, so that users do not hide each other
            plane = np.column_stack([plane, rng.random(len(plane))])
        place = np.cumsum(told.numpy()) - 1
        marked = {user_ids.iat[user]: place[user] for user in chosen if told[user]}
        maps[name] = [draw_map(folder, plane, run.codes[told.numpy(), k], f"{name} by code", range(num_codes),
                               marked)]
        if f"true_{name}" in run.users:
            truth, labels = pd.factorize(run.users[f"true_{name}"][told.numpy()], sort=True)
            maps[name].append(draw_map(folder, plane, truth, f"{name} by truth", labels, marked))
    return maps, typical


def draw_attention(folder, name, before, after):
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
    return picture(folder, f"attention-{name}", figure, data, f"Heat maps of the attention from the words of "
                   f"a sentence to the soft token of {name}, before and after tuning, scaled per user")


def draw_curves(folder, run):
    """What was trained, by step: the tiny LLM and the shared start of stage 2, the losses of stage 3"""
    curves, path = {}, folder.parent / "tiny_llm" / "curve.json"
    if run.stored["llm"] == "tiny" and path.exists():
        curves["tiny LLM: nats per token, by step"] = json.loads(path.read_text())
    if curve := run.sidecars["profiles.pt"].get("curve"):
        curves["shared θ: nats per row, by step"] = curve
    for key, values in pd.DataFrame(run.sidecars["codebook.pt"].get("curve") or []).items():
        curves[f"stage 3: {key.replace('_', ' ')}, by epoch"] = list(values)
    if not curves:
        return []
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.4), squeeze=False)
    for axis, (title, values) in zip(axes[0], curves.items()):
        axis.plot(range(1, len(values) + 1), values)
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    data = pd.DataFrame([(title, step, value) for title, values in curves.items()
                         for step, value in enumerate(values, 1)], columns=["curve", "step", "value"])
    return [picture(folder, "curves", figure, data, "Lines: " + "; ".join(curves))]


def draw_mask(folder, names):
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
    return picture(folder, "mask", figure, data, "Attention mask: name and soft tokens of one profile see "
                   "only each other; evidence sees all before it")


# ----------------------------------------------------------------------------------------------------------
# the report
# ----------------------------------------------------------------------------------------------------------

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


def check_attention(args, model):
    """Exit when --layers or --heads name what the LLM does not have."""
    config = model.config
    for option, most in (("layers", config.num_hidden_layers), ("heads", config.num_attention_heads)):
        if max(getattr(args, option) or [0]) >= most:
            fail(f"--{option} {max(getattr(args, option))}: this LLM has {most}, counted from 0")


def load_eager_llm(args, stored):
    """The LLM of the profiles: attention weights are told by the eager implementation only"""
    stamp = Path(args.run_dir) / "tiny_llm" / "made_from.txt"
    if stored["llm"] == "tiny" and (not stamp.exists() or stamp.read_text() != stored["tiny_llm"]):
        fail(f"{stamp.parent} is not the LLM that profiles.pt was inferred with: run `python "
             f"02_infer_profiles.py --run-dir {args.run_dir}` again, with the options in profiles.pt.json")
    model, tokenizer = load_llm(args, stored["llm"], attn_implementation="eager")
    check_attention(args, model)
    return model, tokenizer


def write_user_page(args, folder, run, user, sections, pictures):
    """The page of --user: report/user-N.html, and on the screen"""
    title = f"User {run.bank['user_id'].iat[user]}"
    path = folder.with_name(f"{folder.name}.html")
    with whole_file(path) as file:
        file.write(page_of(title, [sections_as_html(run, user, sections), *pictures]).encode())
    print(f"{title}\n\n{as_text(sections)}\n\nwrote {path}: {len(sections)} tables, {len(pictures)} pictures")


def main(args):
    start_stage(args)
    started = time.time()
    run = read_run(args)
    chosen, scored, other = choose_users(args, run)
    folder = Path(args.run_dir) / "report"
    if args.user is not None:
        folder = folder / f"user-{chosen[0]}"
    model, tokenizer = load_eager_llm(args, run.stored)
    maps, typical = draw_maps(folder, run, chosen, np.random.default_rng(args.seed))
    cards, meaning, num_found = code_cards(args, run, typical)
    found = words_of_users(args, run, model, tokenizer, scored)
    attention, shares = attention_report(args, folder, run, model, tokenizer, scored, chosen)
    clicks = click_scores(run, chosen)
    pages = []
    for place, user in enumerate(chosen):
        words = {way: [(part[place], part[place - 1]) for part in by_profile]
                 for way, by_profile in found.items()}
        of_user = {feature: of_users[place] for feature, of_users in clicks.items()}
        pages.append(user_sections(args, run, user, other[place], words, meaning, of_user))
    if args.user is not None:
        pictures = [*(picture for of_name in maps.values() for picture in of_name), *attention]
        return write_user_page(args, folder, run, chosen[0], pages[0], pictures)

    scores = word_scores(run, found, scored, other)
    curves, usage, mask = draw_curves(folder, run), draw_usage(folder, run), draw_mask(folder, run.names)
    maps = [picture for of_name in maps.values() for picture in of_name]
    known = agreement(run)
    body = [
        "<h1>User inherent profiles: what was inferred, and is it true?</h1>",
        contents(),
        headline(*(run.sidecars[name] for name in
                   ("feature_bank.parquet", "profiles.pt", "results.parquet"))),
        f"<p>{len(run.bank):,} users, {len(run.items):,} items, {len(run.split['train']):,} train rows; LLM: "
        f"{html.escape(str(run.stored['llm']))}.</p>",
        heading("The codes"), usage, *maps, *curves,
        heading("What each code stands for"),
        f"<p>What its users have more often than all others: odds ratio ×, 95% interval; only what is surely "
        f"so (one-sided 2.5% for each list as a whole). {num_found[0]:,} such names; with the codes dealt to "
        f"users at random {num_found[1]:,}. Rating habits: means over users ± half of the 95% interval. "
        f"Train rows.</p>",
        cards_as_html(cards),
        "<p>Agreement with what is known of users: adjusted mutual information (0: chance, 1: the same), p "
        "of the chi-squared test.</p>" + table(("profile", "fact", "agreement", "p"), known) if known else "",
        heading("Do words of profiles mean anything?"),
        "<p>Share of users whose own words occur more often in their held-out (valid) items than another "
        "user's words do, ties counted half, ± half of the 95% interval; 0.5 if they tell nothing.</p>",
        table(("profile", "way", "AUC", "users"), scores),
        heading("A few users"),
        "<p class='dim'>Words of a soft prompt mean little alone; where the control reads as well, believe "
        "neither. Nearest: to the profile less the mean profile. Lens: what the LLM expects more behind it."
        "</p>",
        *(sections_as_html(run, user, sections) for user, sections in zip(chosen, pages)),
        heading("Where the LLM looks"),
        "<p>Share of the attention to the soft token that content words pay, against words such as "
        "&ldquo;The user likes&rdquo;, before (a random soft token) and after tuning; ± half of the 95% "
        "interval over users.</p>",
        table(("profile", "before", "after", "after - before", "users"), shares), *attention,
        heading("Does it help click-through models?"), markdown_tables(run.results_text),
        heading("How a profile is kept apart"), mask,
    ]
    path = write_artifact(args, "report.html", page_of("User inherent profiles", body), run.inputs,
                          words=scores, attention=shares, agreement=known, names_found=num_found,
                          seconds=time.time() - started)
    for name, way, auc, _ in scores:
        print(f"{name}: {way} words in held-out items, own against another user's: AUC {auc}")
    for name, *parts, _ in shares:
        print(f"{name}: share of attention on content words {parts[0]} before, {parts[1]} after tuning")
    num_pictures = len(maps) + len(curves) + len(attention) + 2
    print(f"wrote {path}: {len(chosen)} users, {sum(run.sizes)} codes, {num_pictures} pictures")


if __name__ == "__main__":
    main(parse_args())
