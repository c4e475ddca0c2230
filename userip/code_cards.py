"""What the users of a code have more often than others: their items, ratings, and what is known of them."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse, stats
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import adjusted_mutual_info_score

from common import VectorQuantizer
from userip.page import mean_with_interval

WORD = r"[^\W\d_]{3,}"  # at least three letters


class CodeCards(NamedTuple):
    """Of one profile: per code its card, a list of (term, text), and its meaning in a few words; how many
    names of items are overrepresented [with these codes, with the codes shuffled among users]
    """

    cards: list
    meanings: list
    num_names: np.ndarray


def observe(items, users, train):
    """What is compared between codes: had [N, M] (1 where a user has a train row of the item), item_features,
    habits (how users rate: a data frame with a row per user who has train rows), user_facts
    """
    pairs = train[["user", "item"]].drop_duplicates()
    had = sparse.csr_matrix((np.ones(len(pairs)), (pairs["user"], pairs["item"])), (len(users), len(items)))
    departure = train["rating"] - train.groupby("item")["rating"].transform("mean")
    habits = pd.DataFrame({"share rated positive": train["label"], "rating less the item's mean": departure})
    return SimpleNamespace(had=had, item_features=item_features(items), user_facts=user_facts(users),
                           habits=habits.groupby(train["user"]).mean())


def overrepresented(counts, names, num_words):
    """counts [K, W] of what each code's users have -> per code the names whose share is surely higher than
    in the other codes: (name, odds ratio, ends of its 95% interval), the surest first.

    Log-odds with a Dirichlet prior, a tenth of all counts (Monroe et al., 2008). Sure: one-sided at 2.5% for
    all W names together (Bonferroni); of a thousand words some would always stand out by chance.
    """
    prior, threshold = 0.1 * counts.sum(0) + 0.01, stats.norm.isf(0.025 / max(1, len(names)))
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
    """Categories, brands, price levels, title words: list of (title, counts [M, W], names [W])"""
    price = items["price"].astype(float)
    low, high = price.quantile([1 / 3, 2 / 3]) if price.notna().any() else (0, 0)
    level = np.select([price <= low, price <= high], [f"up to ${low:.2f}", f"${low:.2f} to ${high:.2f}"],
                      f"above ${high:.2f}")
    columns = {"categories": items["category"], "brands": items["brand"],
               "price levels": pd.Series(np.where(price.isna(), None, level))}
    one_hot = {title: pd.get_dummies(column) for title, column in columns.items()}
    features = [(title, table.to_numpy(float), list(table)) for title, table in one_hot.items()
                if len(table.columns)]
    vectorizer = CountVectorizer(token_pattern=WORD, min_df=2, stop_words="english")
    try:
        counts = vectorizer.fit_transform(items["title"])
        features.append(("title words", counts, list(vectorizer.get_feature_names_out())))
    except ValueError:  # no word is in two titles
        pass
    return features


def user_facts(users):
    """What is known of users, as groups: {fact: texts [N], None where unknown}

    Numbers of many values fall into quarters; facts with too many groups (zip codes) are left out.
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
    """Codes against each fact of user_facts: rows of (profile, fact, adjusted mutual information, p)"""
    rows = []
    for name, codes, num_codes in zip(run.names, run.codes.T, run.sizes):
        for fact, values in run.observations.user_facts.items():
            is_known = (codes < num_codes) & values.notna().to_numpy()
            table = pd.crosstab(codes[is_known], values[is_known].to_numpy())
            if min(table.shape) > 1:
                information = adjusted_mutual_info_score(codes[is_known], values[is_known].astype(str))
                p = stats.chi2_contingency(table).pvalue
                rows.append((name, fact, f"{information:.3f}", f"{p:.2g}" if p > 1e-16 else "below 1e-16"))
    return rows


def typical_users(run, k):
    """By code of profile k, the ids of the three users nearest to the codeword"""
    codewords, _, _ = VectorQuantizer(run.codebook[run.names[k]]["codebook"])(run.z[k])  # [N, C]
    distance, result = (run.z[k] - codewords.detach()).norm(dim=1), []
    for code in range(run.sizes[k]):
        users = np.flatnonzero(run.codes[:, k] == code)
        nearest = distance[users].argsort(stable=True)[:3]
        result.append(", ".join(run.user_ids.iloc[users[nearest]]))
    return result


def code_cards(run, k, num_words, seed):
    """CodeCards of profile k; run: what stage 5 read, see its read_run"""
    codes, num_codes, observations = run.codes[:, k], run.sizes[k], run.observations
    shuffled = np.random.default_rng(seed).permutation(codes)
    is_member, is_shuffled = (np.stack([column == code for code in range(num_codes)]).astype(float)
                              for column in (codes, shuffled))  # [K, N]
    odds_text = lambda names: ", ".join(f"{name} ×{odds:.1f} ({low:.1f}–{high:.1f})"
                                        for name, odds, low, high in names) or "none above chance"
    lines = [("users", [f"{int(size):,}" for size in is_member.sum(1)])]  # (term, text of each code)
    meanings, num_names = [[] for _ in range(num_codes)], np.zeros(2, dtype=int)
    for title, item_counts, names in observations.item_features:
        own, control = (overrepresented(np.asarray((observations.had.T @ member.T).T @ item_counts), names,
                                        num_words) for member in (is_member, is_shuffled))
        num_names += [sum(map(len, own)), sum(map(len, control))]
        lines.append((title, list(map(odds_text, own))))
        for meaning, names_of_code in zip(meanings, own):
            meaning += [str(name) for name, *_ in names_of_code[:2]]
    for title, habit in observations.habits.items():
        lines.append((title, [mean_with_interval(habit[member[habit.index] > 0]) for member in is_member]))
    for fact, values in observations.user_facts.items():
        one_hot = pd.get_dummies(values)
        names = overrepresented(is_member @ one_hot.to_numpy(float), list(one_hot.columns), num_words)
        lines.append((fact, list(map(odds_text, names))))
    lines.append(("typical users", typical_users(run, k)))
    cards = [[(term, texts[code]) for term, texts in lines] for code in range(num_codes)]
    return CodeCards(cards, [", ".join(meaning) or "nothing above chance" for meaning in meanings], num_names)
