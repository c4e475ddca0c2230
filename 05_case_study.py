"""Stage 5 of 5: report in one page what was inferred, how far it can be believed, and whether it helped.

For each code a card lists the categories, brands, words and prices that its users have more often than all
others (log-odds with a Dirichlet prior; Monroe et al., 2008), how they rate, and what is known of them. A few
users are shown with the items they had, their codes, the words of their profiles (table 5 of the paper)
beside those of a control, another user drawn at random, and what a click-through model recommends without
and with the codes. Two methods give words: the vocabulary's nearest to θ_u - θ̄, and a lens: the words that
the LLM expects more after "This user's hobby is" θ_u than after θ̄. Over many users: do a user's words occur
in the user's held-out items more often than the control's? And where does the LLM look (figure 7 of the
paper): the attention from the words of "The user likes …" to the soft token, before and after tuning, and the
share of it on content words, with an interval. Items shown are of train rows, held-out rows are valid ones,
never test.

Reads   all artifacts of the run, and the LLM
Writes  report.html: one file with its pictures inside, opens without a network
        report/: each picture as PNG, and its data as csv
        with --user ID: report/user-N.html and report/user-N/ instead, and the page as text on the screen

Example: python 05_case_study.py        (15 seconds)
  wrote runs/demo/report.html: 4 users, 7 codes, 9 pictures
"""

import argparse
import html
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from common import with_interval
from userip.artifacts import fail, read_artifacts, read_sidecar, whole_file, write_artifact
from userip.code_cards import agreement, code_cards, known_facts
from userip.ctr_training import Member, Rows, table_rows, train_stack
from userip.llm import load_llm, tiny_stamp
from userip.options import at_least, stage_parser, start_stage
from userip.page import (as_text, cards_as_html, contents, heading, headline, markdown_tables, page_of,
                         sections_as_html, table)
from userip.pictures import draw_attention, draw_curves, draw_maps, draw_mask, draw_usage
from userip.words import held_out_score, lens_words, nearest_words, vocabulary_words, words_in


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--user", metavar="ID", help="one user's page instead of the report: the id as in the data")
    add.data("--num-users", type=at_least(1), default=4, help="users shown")
    add.data("--num-words", type=at_least(1), default=6, help="words shown per profile and per code")
    add.data("--num-items", type=at_least(1), default=5, help="items recommended to each user shown")
    add.method("--num-scored", type=at_least(2), default=1000, 
               help="users whose words and attention are measured")
    add.method("--layers", type=at_least(0), nargs="+",
               help="layers whose attention is averaged (default: all)")
    add.method("--heads", type=at_least(0), nargs="+",
               help="attention heads that are averaged (default: all)")
    add.method("--seed", type=at_least(0), default=0, help="seed of the choice of users and of the control")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------------
# data: the artifacts of the run, the users shown and measured
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
    """Users shown, users measured (these first), and the control of each of the latter"""
    candidates = np.flatnonzero(run.stored["has_evidence"])
    rng, num_scored = np.random.default_rng(args.seed), args.num_scored
    if args.user is None:
        chosen = np.sort(rng.choice(candidates, min(args.num_users, len(candidates)), replace=False))
    else:
        chosen = np.flatnonzero(run.bank["user_id"].astype(str) == args.user)
        if not len(chosen):
            fail(f"--user {args.user}: there is no such user; for example {run.bank['user_id'].iat[0]}")
        num_scored = 2  # this user and a control
    rest = np.setdiff1d(candidates, chosen)
    more = min(len(rest), max(0, num_scored - len(chosen)))
    scored = np.concatenate([chosen, rng.choice(rest, more, replace=False)])
    return chosen, scored, np.roll(scored, 1)


# ----------------------------------------------------------------------------------------------------------
# words of profiles (table 5)
# ----------------------------------------------------------------------------------------------------------


def words_of_users(args, run, model, tokenizer, users):
    """{method: by profile, a list of words for each of these users}"""
    ids, words = vocabulary_words(tokenizer)
    embeddings = model.get_input_embeddings().weight[ids].float()
    words_by_method, stored = {"nearest": [], "lens": []}, run.stored
    for k in range(len(run.names)):
        soft, has_evidence = stored["profiles"][:, k], stored["num_evidence"][:, k] > 0
        mean = soft[has_evidence].mean(0)  # [S D]
        deviation = (soft - mean)[users].unflatten(1, (-1, embeddings.shape[1])).mean(1)  # [B, D]
        words_by_method["nearest"].append(nearest_words(deviation, embeddings, words, args.num_words))
        prefix = tokenizer(stored["texts"][k]).input_ids
        words_by_method["lens"].append(lens_words(model, (ids, words), prefix, soft[users], mean,
                                                  args.num_words))
    return words_by_method


def word_scores(run, words_by_method, scored, control):
    """Do own words occur in held-out items more often than the control's? Rows (profile, method, AUC, n)"""
    texts, rows = words_in(run.items, run.split["valid"]), []
    row_of = {user: row for row, user in enumerate(scored)}
    heldout_words = [texts.get(user, set()) for user in scored]
    for k, name in enumerate(run.names):
        for method, by_profile in words_by_method.items():
            control_words = [by_profile[k][row_of[user]] for user in control]
            auc, half, num = held_out_score(by_profile[k], control_words, heldout_words)
            rows.append((name, method, f"{auc:.3f} ± {half:.3f}", f"{num:,}"))
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

    Of the first profile: "The user likes" and the words that titles and categories of the train items hold
    most; of the others, where prices are known, "The spending level of this user is" and low, medium or high.
    """
    price = rows["item"].map(items["price"])
    if profile and price.notna().any():
        median = price.groupby(rows["user"]).median().dropna()
        level = np.searchsorted(median.quantile([1 / 3, 2 / 3]), median)
        return {user: (["The", "spending", "level", "of", "this", "user", "is"],
                       [("low", "medium", "high")[number]]) for user, number in zip(median.index, level)}
    texts = (items["category"].fillna("") + " " + items["title"]).str.findall(r"[^\W\d_]{3,}")
    result = {}
    for user, user_items in rows.groupby("user")["item"]:
        words = pd.Series([word for words in texts.iloc[user_items] for word in words])
        counts = words.value_counts(sort=False)
        if len(counts):
            result[user] = (["The", "user", "likes"], list(counts.nlargest(num_content).index))
    return result


def attention_by_word(args, model, tokenizer, prefix, soft, sentences, batch_size=64):
    """Attention of each word of a user's sentence to the user's soft token: (words, is content, weights)"""
    ids = [[tokenizer(f" {word}", add_special_tokens=False).input_ids for word in noise + content]
           for noise, content in sentences]
    length = np.array([sum(map(len, word_ids)) for word_ids in ids])
    result = [None] * len(ids)
    for same in np.unique(length):  # sentences of one length need no padding
        for users in np.split(np.flatnonzero(length == same), range(batch_size, len(ids), batch_size)):
            if not len(users):
                continue
            text = torch.tensor([sum(ids[user], []) for user in users])
            weights = attention_to_soft(model, prefix, soft[users], text, args.layers, args.heads)
            for user, token_weights in zip(users, weights):
                parts = token_weights.tensor_split(np.cumsum([len(part) for part in ids[user]])[:-1].tolist())
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
    for feature, codes, train_codes, sizes in (
            ("none", run.codes[:, :0], run.train_codes[:, :0], []),
            ("codes", run.codes, run.train_codes, [size + 1 for size in run.sizes])):
        row = results[(results["model"] == options.models[0]) & (results["features"] == feature)]
        if not len(row):
            continue
        row = row.iloc[0]
        fields = {name: codes[frame["user"]] for name, frame in split.items()} | {"train": train_codes}
        ids, size, unknown = table_rows(split, fields, sizes, is_warm, num_items, bool(options.id_dropout))
        labels = {name: split[name]["label"].to_numpy(copy=True) for name in ("train", "valid")}
        rows = Rows({name: part[None] for name, part in ids.items()}, labels, [size], unknown)
        member = Member(0, int(row["seed"]), *row[["lr", "weight_decay", "start"]].map(float))
        _, stack = train_stack(options, options.models[0], [member], rows)
        scores[feature] = stack.predict(rows, "asked")[0].reshape(len(users), num_items)
    return scores


def user_sections(args, run, user, control, words, meaning, clicks):
    """One user's page: a list of (title, header, rows): items, codes, words, held-out (valid) rows.

    Seven parameters: what stage 5 measured about the user. words: {method: by profile, (own words, the
    control's)}; meaning: {profile: a code's meaning in a few words}; clicks: {features: probabilities [M]}.
    """
    facts = [(fact, values.iat[user]) for fact, values in known_facts(run.users).items() if values.iat[user]]
    sections = [("What is known of this user (no model reads it)", ("fact", "value"), facts)] if facts else []
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
    lines = [(name, method, ", ".join(by_profile[k][0]), ", ".join(by_profile[k][1]))
             for k, name in enumerate(run.names) for method, by_profile in words.items()
             if run.stored["num_evidence"][user, k] > 0]
    control_title = f"control: those of user {run.bank['user_id'].iat[control]}"
    sections.append(("Words of the profiles", ("profile", "method", "words", control_title), lines))

    titles_of_features = {"none": "without codes", "codes": "with codes"}
    order = {titles_of_features[feature]: np.argsort(-np.where(is_new, probabilities, -1), kind="stable")
             for feature, probabilities in clicks.items()}
    rank = {features: np.argsort(items) + 1 for features, items in order.items()}
    valid = run.split["valid"]
    held_out = [(titles.iat[row.item], f"{row.rating:g}",
                 *(f"{ranks[row.item]:,}" for ranks in rank.values()))
                for row in valid[valid["user"] == user].itertuples() if is_new[row.item]]
    if held_out:
        sections.append((f"Held-out items (valid rows), and their rank among the {is_new.sum():,} not had",
                         ("item", "rating", *(f"rank {features}" for features in rank)), held_out))
    if order:
        top = zip(*([titles.iat[item] for item in items[:args.num_items]] for items in order.values()))
        sections.append((f"Recommended by {run.sidecars['results.parquet']['options']['models'][0]}",
                         ("rank", *order), [(number, *names) for number, names in enumerate(top, 1)]))
    return sections


# ----------------------------------------------------------------------------------------------------------
# the report
# ----------------------------------------------------------------------------------------------------------


def check_attention(args, model):
    """Exit when --layers or --heads name what the LLM does not have."""
    config = model.config
    for option, most in (("layers", config.num_hidden_layers), ("heads", config.num_attention_heads)):
        if max(getattr(args, option) or [0]) >= most:
            fail(f"--{option} {max(getattr(args, option))}: this LLM has {most}, counted from 0")


def load_eager_llm(args, stored):
    """The LLM of the profiles: only the eager implementation returns attention weights"""
    if stored["llm"] == "tiny" and tiny_stamp(args.run_dir) != stored["tiny_llm"]:
        fail(f"{args.run_dir}/tiny_llm is not the LLM that profiles.pt was inferred with: run `python "
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
    chosen, scored, control = choose_users(args, run)
    folder = Path(args.run_dir) / "report"
    if args.user is not None:
        folder = folder / f"user-{chosen[0]}"
    model, tokenizer = load_eager_llm(args, run.stored)
    maps, typical = draw_maps(folder, run, chosen, np.random.default_rng(args.seed))
    cards, meaning, num_found = code_cards(args, run, typical)
    words_by_method = words_of_users(args, run, model, tokenizer, scored)
    attention, shares = attention_report(args, folder, run, model, tokenizer, scored, chosen)
    clicks = click_scores(run, chosen)
    pages = []
    for row, user in enumerate(chosen):
        words = {method: [(part[row], part[row - 1]) for part in by_profile]
                 for method, by_profile in words_by_method.items()}
        user_clicks = {feature: probabilities[row] for feature, probabilities in clicks.items()}
        pages.append(user_sections(args, run, user, control[row], words, meaning, user_clicks))
    if args.user is not None:
        pictures = [*(picture for pictures in maps.values() for picture in pictures), *attention]
        return write_user_page(args, folder, run, chosen[0], pages[0], pictures)

    scores = word_scores(run, words_by_method, scored, control)
    curves, usage, mask = draw_curves(folder, run), draw_usage(folder, run), draw_mask(folder, run.names)
    maps = [picture for pictures in maps.values() for picture in pictures]
    agreements = agreement(run)
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
        "of the chi-squared test.</p>" + table(("profile", "fact", "agreement", "p"), agreements)
        if agreements else "",
        heading("Do words of profiles mean anything?"),
        "<p>Share of users whose own words occur more often in their held-out (valid) items than another "
        "user's words do, ties counted half, ± half of the 95% interval; 0.5 if they tell nothing.</p>",
        table(("profile", "method", "AUC", "users"), scores),
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
                          words=scores, attention=shares, agreement=agreements, names_found=num_found,
                          seconds=time.time() - started)
    for name, method, auc, _ in scores:
        print(f"{name}: {method} words in held-out items, own against another user's: AUC {auc}")
    for name, *parts, _ in shares:
        print(f"{name}: share of attention on content words {parts[0]} before, {parts[1]} after tuning")
    num_pictures = len(maps) + len(curves) + len(attention) + 2
    print(f"wrote {path}: {len(chosen)} users, {sum(run.sizes)} codes, {num_pictures} pictures")


if __name__ == "__main__":
    main(parse_args())
