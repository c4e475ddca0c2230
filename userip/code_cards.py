"""What the users of a code have more often than others: their items, ratings, and what is known of them."""

import numpy as np
import pandas as pd
from scipy import sparse, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_mutual_info_score

from userip.report import mean_with_interval

WORD = r"[^\W\d_]{3,}"  # at least three letters


def overrepresented(counts, names, num_words):
    """counts [K, W] of what each code's users have -> per code the names whose share is surely higher than
    in the other codes: (name, odds ratio, ends of its 95% interval), the surest first.

    Log-odds with a Dirichlet prior, a tenth of all counts (Monroe et al., 2008). Sure: one-sided at 2.5% for
    all W names together (Bonferroni), else some of a thousand words would stand out by chance.
    """
    prior, threshold = 0.1 * counts.sum(0) + 0.01, stats.norm.isf(0.025 / len(names))
    result = []
    for own in counts:
        first, second = own + prior, counts.sum(0) - own + prior
        odds = np.log(first / (first.sum() - first)) - np.log(second / (second.sum() - second))
        error = np.sqrt(1 / first + 1 / second)
        best = np.argsort(-odds / error, kind="stable")[:num_words]
        result.append([(names[k], *np.exp(odds[k] + np.array([0, -1.96, 1.96]) * error[k]).tolist())
                       for k in best if odds[k] > threshold * error[k]])
    return result


def item_features(items):
    """Categories, brands, price levels, title words: {term: (counts [M, W], names [W])}"""
    price = items["price"].astype(float)
    low, high = price.quantile([1 / 3, 2 / 3])
    level = np.select([price <= low, price <= high], [f"up to ${low:.2f}", f"${low:.2f} to ${high:.2f}"],
                      f"above ${high:.2f}")
    columns = {"categories": items["category"], "brands": items["brand"],
               "price levels": pd.Series(level).where(price.notna())}
    one_hot = {term: pd.get_dummies(column) for term, column in columns.items()}
    features = {term: (counts.to_numpy(float), list(counts)) for term, counts in one_hot.items()}
    vectorizer = CountVectorizer(token_pattern=WORD, min_df=2, stop_words="english")
    try:
        features["title words"] = vectorizer.fit_transform(items["title"]), vectorizer.get_feature_names_out()
    except ValueError:  # no word is in two titles
        pass
    return {term: part for term, part in features.items() if len(part[1]) > 1}


def user_facts(users):
    """What is known of users, as groups: {fact: values [N], None where unknown}

    Numbers of many values fall into quarters; facts with too many groups (zip codes) are left out.
    """
    facts = {}
    for column in users.columns.drop(["user", "user_id"]):
        values = users[column]
        if pd.api.types.is_numeric_dtype(values) and values.nunique() > 8:
            quarter = pd.qcut(values, 4, labels=False, duplicates="drop")
            values = values.groupby(quarter).transform(lambda part: f"{part.min():g} to {part.max():g}")
        if 1 < values.nunique() <= max(8, len(users) / 20):
            facts[column.replace("_", " ")] = values.astype(object).where(values.notna(), None)
    return facts


def agreement(run):
    """Codes against each fact of user_facts: rows of (profile, fact, adjusted mutual information, p)"""
    rows = []
    for name, codes, num_codes in zip(run.names, run.codes.T, run.sizes):
        for fact, values in run.user_facts.items():
            is_known = (codes < num_codes) & values.notna().to_numpy()
            table = pd.crosstab(codes[is_known], values[is_known].to_numpy())
            if min(table.shape) > 1:
                information = adjusted_mutual_info_score(codes[is_known], values[is_known].astype(str))
                p = stats.chi2_contingency(table).pvalue
                rows.append((name, fact, f"{information:.3f}", f"{p:.2g}" if p > 1e-16 else "below 1e-16"))
    return rows


def code_cards(run, k, num_words, seed):
    """Profile k -> cards, a data frame with a column per code; meanings of the codes, the unknown one's last;
    how many names of items are overrepresented [with these codes, with the codes shuffled among users]
    """
    train, codes, num_codes = run.split["train"], run.codes[:, k], run.sizes[k]
    shuffled = np.random.default_rng(seed).permutation(codes)
    is_member, is_shuffled = ((np.arange(num_codes)[:, None] == column).astype(float)
                              for column in (codes, shuffled))  # [K, N]
    pairs = train[["user", "item"]].drop_duplicates()
    had = sparse.csr_matrix((np.ones(len(pairs)), (pairs["user"], pairs["item"])),
                            (len(codes), len(run.items)))
    odds_text = lambda names: ", ".join(f"{name} ×{odds:.1f} ({low:.1f}–{high:.1f})"
                                        for name, odds, low, high in names) or "none above chance"
    cards = {"users": [f"{int(size):,}" for size in is_member.sum(1)]}  # {term: texts [K]}
    meanings, num_names = [[] for _ in range(num_codes)], np.zeros(2, dtype=int)
    for term, (item_counts, names) in item_features(run.items).items():
        own, control = (overrepresented(np.asarray((had.T @ member.T).T @ item_counts), names, num_words)
                        for member in (is_member, is_shuffled))
        num_names += [sum(map(len, own)), sum(map(len, control))]
        cards[term] = list(map(odds_text, own))
        for meaning, names_of_code in zip(meanings, own):
            meaning += [str(name) for name, *_ in names_of_code[:2]]
    departure = train["rating"] - train.groupby("item")["rating"].transform("mean")
    habits = pd.DataFrame({"share rated positive": train["label"], "rating less the item's mean": departure})
    for term, habit in habits.groupby(train["user"]).mean().items():  # by user with train rows
        cards[term] = [mean_with_interval(habit[member[habit.index] > 0]) for member in is_member]
    for fact, values in run.user_facts.items():
        one_hot = pd.get_dummies(values)
        names = overrepresented(is_member @ one_hot.to_numpy(float), list(one_hot.columns), num_words)
        cards[fact] = list(map(odds_text, names))
    cards = pd.DataFrame(cards, index=[f"{run.names[k]} {code}" for code in range(num_codes)])
    meanings = [", ".join(meaning) or "nothing above chance" for meaning in meanings]
    return cards.T.reset_index(names=""), [*meanings, "no evidence"], num_names
