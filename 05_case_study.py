"""Stage 5 of 5: report in one page what was inferred, how far it can be trusted, and whether it helped.

Code cards: what the users of a code have more often than all others. For a few users: their items, codes, the
words of their profiles (table 5 of the paper) beside those of another user as a control, and what a click
model recommends without and with codes. Words are the tokens nearest to θ_u - mean θ, and by a lens those
that the LLM expects more after "This user's hobby is" θ_u than after the mean θ; are the own words found in
held-out items more often than the control's? Attention (figure 7): how much the words of "The user likes …"
attend to the soft token, before and after tuning. Held-out rows are valid ones, never test. The LLM runs on
the CPU in float32.

Reads   all artifacts of the run, and the LLM
Writes  report.html, one file with its pictures inside; report/: each picture as PNG, its data as csv
        with --user ID: report/user-N.html instead, and its tables on the screen

Example: python 05_case_study.py        (15 seconds)
  wrote runs/demo/report.html: 4 users, 7 codes, 6 pictures
"""

import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import argparse
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from userip.artifacts import fail, read_artifacts, read_sidecar, whole_file, write_artifact
from userip.ctr_training import Member, Rows, table_rows, train_stack
from userip.features import described_columns
from userip.llm import check_tiny_llm, load_llm
from userip.options import (at_least, changed_options, refuse_without_effect, run_program, stage_parser,
                            start_stage)
from userip.report import (WORD, agreement, code_cards, draw_attention, draw_maps, mean_with_interval,
                           page, report_page, tables_as_html, user_facts)


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--user", metavar="ID", help="one user's page instead of the report: the id as in the data")
    add.data("--num-users", type=at_least(1), default=4, help="users shown")
    add.data("--seed", type=at_least(0), default=0, help="seed of the choice of users and of the controls")
    add.method("--num-words", type=at_least(1), default=6, help="words shown per profile and per code")
    add.method("--num-scored", type=at_least(2), default=1000, help="users over whom scores are computed")
    args = parser.parse_args(argv)
    refuse_without_effect(parser, args, dict.fromkeys(
        ["num_users", "num_scored"], (args.user is None, "the report of all users, without --user")))
    if args.num_scored < args.num_users and "num_scored" in changed_options(parser, args):
        parser.error(f"--num-scored {args.num_scored}: the {args.num_users} of --num-users are scored, too")
    return args


# ----------------------------------------------------------------------------------------------------------
# data: the artifacts of the run
# ----------------------------------------------------------------------------------------------------------


def read_run(args):
    """The artifacts of the run, checked: data frames, sidecars, profiles [N, P, S D], codes [N, P]"""
    inputs = ["interactions.parquet", "items.parquet", "users.parquet", "profiles.pt", "codebook.pt",
              "feature_bank.parquet", "results.parquet", "results.md"]
    sidecars = {name: read_sidecar(args, name) for name in inputs}
    inputs += ["train_codes.parquet"] * sidecars["feature_bank.parquet"].get("has_folds", False)
    interactions, items, users, stored, codebook, bank, results, text, *folded = read_artifacts(args, *inputs)
    names, split = stored["names"], dict(list(interactions.groupby("split")))
    codes = bank[names].to_numpy(dtype=np.int64)
    train_codes = codes[split["train"]["user"]]
    if "fold" in stored:  # the last profile has read all evidence; a train row's code has not read its fold
        stored |= {key: stored[key][-1] for key in ("profiles", "num_evidence", "habits")
                   if key in stored}
        train_codes = folded[0][names].to_numpy(dtype=np.int64)
    return SimpleNamespace(
        inputs=inputs, sidecars=sidecars, items=items, users=users, user_facts=user_facts(users), split=split,
        stored=stored, names=names, profiles=stored["profiles"], has_evidence=stored["num_evidence"] > 0,
        codebook=codebook, codes=codes, train_codes=train_codes, results=results, results_text=text,
        sizes=sidecars["feature_bank.parquet"]["codes"], user_ids=bank["user_id"].astype(str),
        has_spaces=items["title"].str.contains("[A-Za-z]{3}").mean() >= 0.5)


def choose_users(args, run):
    """Users shown, and users measured: these and more. The control of each is the one before (cyclic)"""
    candidates, rng = np.flatnonzero(run.stored["has_evidence"]), np.random.default_rng(args.seed)
    if args.user is None:
        chosen = np.sort(rng.choice(candidates, min(args.num_users, len(candidates)), replace=False))
        num_more = max(0, args.num_scored - len(chosen))
    else:
        chosen, num_more = np.flatnonzero(run.user_ids == args.user), 1
        if not len(chosen):
            fail(f"--user {args.user}: there is no such user; for example {run.user_ids[0]}")
    rest = np.setdiff1d(candidates, chosen)
    return chosen, np.concatenate([chosen, rng.choice(rest, min(len(rest), num_more), replace=False)])


# ----------------------------------------------------------------------------------------------------------
# words of profiles (table 5)
# ----------------------------------------------------------------------------------------------------------


def vocabulary_words(tokenizer, has_spaces=True):
    """Tokens that begin a word of ASCII letters, or where titles are in a script without spaces any token of
    letters: ids, texts [W]. "Ġ" (GPT-2), "▁" (Llama): the space.
    """
    tokens, words = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), {}
    for index, token in enumerate(tokens):
        if has_spaces and (match := re.fullmatch("[Ġ▁]([A-Za-z]{3,})", token or "")):
            words[index] = match[1]
        elif not has_spaces and (text := tokenizer.convert_tokens_to_string([token]).strip()).isalpha():
            words[index] = text
    return torch.tensor(list(words), dtype=torch.long), np.array(list(words.values()))


def nearest_scores(deviation, embeddings):
    """Cosine of θ_u - mean θ [B, D] with each word's centred embedding [W, D]: [B, W]"""
    return F.normalize(deviation, dim=1) @ F.normalize(embeddings - embeddings.mean(0), dim=1).T


def name_and_soft(model, prefix, soft):
    """Embeddings of a name text, token ids `prefix` [L], and θ behind it: soft [B, S D] -> [B, L + S, D]"""
    name = model.get_input_embeddings()(torch.tensor(prefix)).expand(len(soft), -1, -1)  # [B, L, D]
    return torch.cat([name, soft.unflatten(1, (-1, name.shape[2])).to(name.dtype)], 1)


@torch.no_grad()
def lens_scores(model, ids, prefix, soft, shared, batch_size=256):
    """How much the log-probability of each word, ids [W], is higher after θ_u, soft [B, S D], than after the
    mean θ, shared [S D]: [B, W]. prefix: token ids of "This user's hobby is"
    """

    def log_probability(theta):
        inputs = name_and_soft(model, prefix, theta)
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(1)[:, ids]

    shared = log_probability(shared[None])
    return torch.cat([log_probability(part) - shared for part in soft.split(batch_size)])


def words_of_profiles(args, run, model, tokenizer, users):
    """{(profile, method): the words of each of the users [B, num_words]}"""
    ids, words = vocabulary_words(tokenizer, run.has_spaces)
    embeddings, result = model.get_input_embeddings().weight[ids].float(), {}
    for k, name in enumerate(run.names):
        soft, shared = run.profiles[users, k], run.profiles[run.has_evidence[:, k], k].mean(0)
        deviation = (soft - shared).unflatten(1, (-1, embeddings.shape[1])).mean(1)  # of the S soft tokens
        prefix = tokenizer(run.stored["texts"][k]).input_ids
        for method, score in (("nearest", nearest_scores(deviation, embeddings)),
                              ("lens", lens_scores(model, ids, prefix, soft, shared))):
            result[name, method] = words[score.topk(min(args.num_words, len(words)), dim=1).indices]
    return result


def held_out_wins(words, texts):
    """Do a user's words occur in their held-out items, a set of words or a text per user, more often than
    those of the control, the user before? -> 1, 0 or 0.5 (a tie) for each user with such items, whose mean is
    an AUC; none where no word occurs at all
    """
    hits = lambda index, text: sum(word.lower() in text for word in words[index])
    pairs = np.array([(hits(index, text), hits(index - 1, text)) for index, text in enumerate(texts) if text])
    return 0.5 + 0.5 * np.sign(pairs[:, 0] - pairs[:, 1]) if pairs.any() else np.array([])


def score_words(run, words, scored):
    """held_out_wins of each profile and method: rows of (profile, method, AUC with interval, users)"""
    texts = run.items[["title", "category", "brand"]].fillna("").agg(" ".join, axis=1).str.lower()
    valid = run.split["valid"].groupby("user")["item"]
    held_out = {user: " ".join(texts.iloc[index]) for user, index in valid}
    if run.has_spaces:
        held_out = {user: set(re.findall(WORD, text)) for user, text in held_out.items()}
    wins = {key: held_out_wins(own, [held_out.get(user) for user in scored]) for key, own in words.items()}
    return [(*key, mean_with_interval(values, ".3f"), f"{len(values):,}") for key, values in wins.items()]


# ----------------------------------------------------------------------------------------------------------
# attention (figure 7)
# ----------------------------------------------------------------------------------------------------------


def sentences_of(profile, rows, items, num_content=3):
    """The sentences of figure 7, by train rows: the noise words of all, {user: content words}. First profile:
    "The user likes" and the most frequent words of their items' titles and categories. Other profiles, if
    there are prices: "The spending level of this user is" low, medium or high.
    """
    price = rows["item"].map(items["price"])
    if profile and price.notna().any():
        median = price.groupby(rows["user"]).median().dropna()
        level = np.searchsorted(median.quantile([1 / 3, 2 / 3]), median)
        content = {user: [("low", "medium", "high")[third]] for user, third in zip(median.index, level)}
        return "The spending level of this user is".split(), content
    words = (items["category"].fillna("") + " " + items["title"]).str.findall(WORD)
    counts = {user: words.iloc[index].explode().value_counts(sort=False)
              for user, index in rows.groupby("user")["item"]}
    content = {user: list(count.nlargest(num_content).index) for user, count in counts.items() if len(count)}
    return "The user likes".split(), content


@torch.no_grad()
def attention_by_word(model, tokenizer, prefix, soft, sentences, batch_size=64):
    """Attention that the words of B sentences pay to the soft tokens before them [B, S D]: B arrays [words].
    The LLM reads name text, θ, sentence. Mean over layers, heads and a word's tokens, sum over the S tokens.
    """
    ids = [[tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
           for words in sentences]
    # pads change nothing before them: attention is causal
    text, result = pad_sequence([torch.tensor(sum(row, [])) for row in ids], batch_first=True), []  # [B, T]
    for theta, tokens in zip(soft.split(batch_size), text.split(batch_size)):
        before = name_and_soft(model, prefix, theta)
        inputs = torch.cat([before, model.get_input_embeddings()(tokens)], 1)
        attentions = model(inputs_embeds=inputs, use_cache=False, output_attentions=True).attentions
        weights = torch.stack(attentions, 1).float().mean((1, 2))  # [b, layers, heads, Q, K] -> [b, Q, K]
        num_read = before.shape[1]
        for row in weights[:, num_read:, len(prefix):num_read].sum(2):  # [T]
            lengths = list(map(len, ids[len(result)]))
            result.append(np.array([float(part.mean()) for part in row[:sum(lengths)].split(lengths)]))
    return result


def content_share(attention, num_noise):
    """Share that the words behind the noise words pay, mean over words within each kind: [users]"""
    means = np.array([(weights[num_noise:].mean(), weights[:num_noise].mean()) for weights in attention])
    return means[:, 0] / means.sum(1)


def measure_attention(args, folder, run, model, tokenizer, scored):
    """Figure 7 of each profile -> pictures, rows of (profile, share before, after, difference, users). Before
    tuning a soft token is random, as in the paper: normal, at the scale of the LLM's embeddings.
    """
    scale = float(model.get_input_embeddings().weight.float().square().mean().sqrt())
    generator, pictures, rows = torch.Generator().manual_seed(args.seed), [], []
    shown, rest = np.split(scored, [args.num_users])
    for k, name in enumerate(run.names):
        noise, content = sentences_of(k, run.split["train"], run.items)
        users = [user for user in [*shown, *np.sort(rest)] if user in content]
        if not users:
            continue
        sentences = [noise + content[user] for user in users]
        soft, prefix = run.profiles[users, k], tokenizer(run.stored["texts"][k]).input_ids
        start = scale * torch.randn(soft.shape, generator=generator)
        attention = {when: attention_by_word(model, tokenizer, prefix, theta, sentences)
                     for when, theta in (("before", start), ("after", soft))}
        by_user = dict(zip(run.user_ids[users[:args.num_users]], sentences))
        pictures.append(draw_attention(folder, name, len(noise), by_user, attention))
        before, after = (content_share(weights, len(noise)) for weights in attention.values())
        rows.append((name, mean_with_interval(before, ".3f"), mean_with_interval(after, ".3f"),
                     mean_with_interval(after - before, "+.4f"), f"{len(users):,}"))
    return pictures, rows


# ----------------------------------------------------------------------------------------------------------
# one user
# ----------------------------------------------------------------------------------------------------------


def click_scores(run, users):
    """Click probability of every item for the users: {"without codes": [B, M], "with codes": [B, M]}, by the
    first model of stage 4, which keeps no weights: trained once more, with the options of its first row
    """
    options, scores = argparse.Namespace(**run.sidecars["results.parquet"]["options"]), {}
    num_items, split = len(run.items), run.sidecars["interactions.parquet"].get("split")
    dropped = 1 if split == "cold-item" else 0 if options.id_dropout else None
    asked = pd.MultiIndex.from_product([users, range(num_items)], names=["user", "item"]).to_frame()
    split = {"train": run.split["train"], "valid": run.split["valid"], "asked": asked}
    labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid")}
    columns = described_columns(getattr(options, "fields", []), run.items, run.users, split["train"])
    described = [column.read(split) for column in columns]
    for title, feature, num_fields in (("without codes", "none", 0), ("with codes", "codes", len(run.names))):
        rows = run.results.query("model == @options.models[0] and features == @feature")
        if not len(rows) or options.models == ["means"]:
            print(f"scores {title} are left out: stage 4 trained no model with the features `{feature}`")
            continue
        if "with_means" in rows and rows["with_means"].iloc[0]:
            print(f"scores {title} are left out: this row of stage 4 also reads the two means (--with-means)")
            continue
        fields = {name: run.codes[frame["user"], :num_fields] for name, frame in split.items()}
        fields["train"] = run.train_codes[:, :num_fields]
        fields = {name: np.column_stack([part, *(codes[name] for codes in described)])
                  for name, part in fields.items()}
        sizes = [size + 1 for size in run.sizes[:num_fields]] + [column.size for column in columns]
        ids, size, unknown = table_rows(split, fields, sizes, len(run.users), num_items, dropped)
        inputs = Rows({name: part[None] for name, part in ids.items()}, labels, [size], unknown, dropped)
        row = rows.iloc[0]
        member = Member(0, int(row["seed"]), *row[["lr", "weight_decay", "start"]].map(float))
        _, stack = train_stack(options, options.models[0], [member], inputs)
        scores[title] = stack.predict(inputs, "asked")[0].reshape(len(users), num_items)
    return scores


def user_tables(run, found, index):
    """Of user scored[index], {title: data frame}: items they had, codes, words beside those of the control,
    held-out rows, new items. found: scored, words, clicks, and by profile the meanings of its codes
    """
    user, control = found.scored[[index, index - 1]]
    titles = run.items["title"].to_numpy()
    of_user = {name: rows[rows["user"] == user] for name, rows in run.split.items()}
    rated = lambda rows: {"item": titles[rows["item"]], "rating": rows["rating"].map("{:g}".format)}
    facts = [(fact, values.iat[user]) for fact, values in run.user_facts.items()
             if values.iat[user] is not None]
    tables = {"What is known of the user (no model reads it)": pd.DataFrame(facts, columns=["fact", "value"])}
    had = pd.concat([of_user[name] for name in ("train", "support") if name in of_user])
    had = had.sort_values("timestamp", kind="stable")  # support rows: of a cold user
    title = f"Had ({' '.join(had['split'].unique())} rows), the latest {len(had[-12:])} of {len(had)}"
    tables[title] = pd.DataFrame(rated(had[-12:]))
    tables["Codes, and what their users have more often"] = pd.DataFrame({
        "profile": run.names, "code": run.codes[user],
        "meaning": [texts[code] for texts, code in zip(found.meanings, run.codes[user])]})
    words = [(name, method, ", ".join(own[index]), ", ".join(own[index - 1]))
             for (name, method), own in found.words.items()
             if run.has_evidence[user, run.names.index(name)]]
    tables["Words of the profiles"] = pd.DataFrame(
        words, columns=["profile", "method", "words", f"control: those of user {run.user_ids[control]}"])

    is_new = ~np.isin(np.arange(len(titles)), had["item"])
    order = {title: np.argsort(-np.where(is_new, score[index], -1), kind="stable")
             for title, score in found.clicks.items()}
    held_out = of_user["valid"][is_new[of_user["valid"]["item"]]]
    tables[f"Held-out items (valid rows), and their rank among the {is_new.sum():,} not had"] = pd.DataFrame(
        rated(held_out) | {f"rank {title}": 1 + np.argsort(items)[held_out["item"]]
                           for title, items in order.items()})
    best = {title: titles[items[:min(5, is_new.sum())]] for title, items in order.items()}
    tables[f"Recommended by {run.sidecars['results.parquet']['options']['models'][0]}"] = pd.DataFrame(best)
    return {title: table for title, table in tables.items() if len(table)}


def main(args):
    start_stage(args)
    started = time.time()
    run = read_run(args)
    chosen, scored = choose_users(args, run)
    check_tiny_llm(args, run.stored)
    # no other kind of attention returns it
    model, tokenizer = load_llm(args, run.stored["llm"], attn_implementation="eager")
    cards, meanings, num_names = zip(*[code_cards(run, k, args.num_words, [args.seed, k])
                                       for k in range(len(run.names))])
    words = words_of_profiles(args, run, model, tokenizer, scored)
    found = SimpleNamespace(scored=scored, words=words, clicks=click_scores(run, chosen), meanings=meanings)
    tables = [user_tables(run, found, index) for index in range(len(chosen))]
    pages = [tables_as_html(f"User {run.user_ids[user]}", part) for user, part in zip(chosen, tables)]
    folder = Path(args.run_dir) / "report"
    if args.user is not None:
        for title, table in tables[0].items():
            print(f"\n{title}\n{table.to_string(index=False, max_colwidth=60)}")
        path = folder / f"user-{chosen[0]}.html"
        with whole_file(path) as file:
            file.write(page(f"User {args.user}", pages[0]).encode())
        print(f"wrote {path}: {len(tables[0])} tables")
        return

    maps = draw_maps(folder, run, chosen)
    attention, shares = measure_attention(args, folder, run, model, tokenizer, scored)
    facts = {"words": score_words(run, words, scored), "attention": shares, "agreement": agreement(run),
             "names_found": sum(num_names)}
    path = write_artifact(args, "report.html", report_page(run, maps, cards, pages, attention, facts),
                          run.inputs, **facts, seconds=time.time() - started)
    for name, method, auc, _ in facts["words"]:
        print(f"{name}: {method} words in held-out items, own against another user's: AUC {auc}")
    for name, *parts, _ in shares:
        print(f"{name}: share of attention on content words {parts[0]} before, {parts[1]} after tuning")
    print(f"wrote {path}: {len(chosen)} users, {sum(run.sizes)} codes, {len(maps + attention)} pictures")


if __name__ == "__main__":
    run_program(main, parse_args)
