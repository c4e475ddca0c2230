"""Code cards: what the users of a code have more often than all others, how they rate, who they are."""

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_mutual_info_score


def overrepresented(counts, names, num_words):
    """counts [K, W]: what each code's users have -> per code the names whose share is surely above elsewhere:
    (name, odds ratio to all other codes, its 95% interval's ends), the surest first.

    Log-odds with the whole corpus as Dirichlet prior, of a tenth of its weight. Sure: one-sided at 2.5% for
    all W names together (Bonferroni), or of a thousand words of titles some would always stand out.
    """
    prior, threshold = 0.1 * counts.sum(0) + 0.01, stats.norm.isf(0.025 / max(1, len(names)))
    result = []
    for own in counts:
        rest = counts.sum(0) - own
        first, second = own + prior, rest + prior
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


def known_facts(users):
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
        for fact, values in known_facts(run.users).items():
            mask = (run.codes[:, k] < run.sizes[k]) & values.notna().to_numpy()
            table = pd.crosstab(run.codes[mask, k], values[mask].to_numpy())
            if min(table.shape) > 1:
                agreed = adjusted_mutual_info_score(run.codes[mask, k], values[mask].astype(str))
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
    features, habits, facts = item_features(run.items), habits_of(run), known_facts(run.users)
    listed = lambda found: ", ".join(f"{name} ×{odds:.1f} ({low:.1f}–{high:.1f})"
                                   for name, odds, low, high in found) or "none above chance"
    cards, meaning, num_found = {}, {}, np.zeros(2, dtype=int)
    for k, (name, num_codes) in enumerate(zip(run.names, run.sizes)):
        dealt = np.random.default_rng([args.seed, k]).permutation(run.codes[:, k])
        is_member, at_random = (np.stack([codes == code for code in range(num_codes)]).astype(float)
                                for codes in (run.codes[:, k], dealt))  # [K, N]
        cards[name] = [[("users", f"{int(size):,}")] for size in is_member.sum(1)]
        meaning[name] = [[] for _ in range(num_codes)]
        for title, item_counts, texts in features:
            found, by_chance = (overrepresented(np.asarray((run.had.T @ member.T).T @ item_counts), texts,
                                                args.num_words) for member in (is_member, at_random))
            num_found += [sum(map(len, found)), sum(map(len, by_chance))]
            for code, code_names in enumerate(found):
                cards[name][code].append((title, listed(code_names)))
                meaning[name][code] += [text for text, *_ in code_names[:2]]
        for title, column in (("share rated positive", "positive"),
                              ("rating less the item's mean", "departure")):
            for code in range(num_codes):
                is_user = habits.index.isin(np.flatnonzero(is_member[code]))
                cards[name][code].append((title, mean_with_interval(habits.loc[is_user, column])))
        for fact, values in facts.items():
            one_hot = pd.get_dummies(values)
            found = overrepresented(is_member @ one_hot.to_numpy(float), list(one_hot.columns),
                                    args.num_words)
            for code in range(num_codes):
                cards[name][code].append((fact, listed(found[code])))
        for code in range(num_codes):
            cards[name][code].append(("typical users", ", ".join(map(str, typical[name][code]))))
            meaning[name][code] = ", ".join(map(str, meaning[name][code])) or "nothing above chance"
    return cards, meaning, num_found
