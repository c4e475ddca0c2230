"""Checks of codes and profiles against what is known of the users. No model reads any of it."""

import itertools

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import usage_of


def describe_codes(name, codes, num_codes):
    """Print usage and stability of a profile's codes, a list of int [N] by seed -> sidecar facts"""
    usage, perplexity = usage_of(codes[0], num_codes)
    share, stability = usage.min() / max(usage.sum(), 1), seed_agreement(codes, num_codes)
    between = "" if stability is None else f" | ARI between seeds {stability:.3f}"
    warning = f"  <- below K/2 = {num_codes / 2:g}: the codebook is collapsing"
    print(f"{name}: users per code {' '.join(map(str, usage))} | perplexity {perplexity:.2f} of {num_codes} "
          f"| smallest share {share:.3f}{between}{warning if perplexity < num_codes / 2 else ''}")
    return {f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_smallest_share": share,
            f"{name}_stability": stability}


def compare_with_truth(bank, names, users, bayes_ari):
    """Planted data: adjusted Rand index (ARI) of each profile's codes with the true groups -> sidecar facts

    bank, users: data frames with a row per user; bayes_ari: by name, the ARI of the Bayes-optimal classifier.
    Codes should agree with their own truth and not with another profile's (cross-ARI). Prints both.
    """
    facts = {}
    for name in names:
        ari = {f"{name}_vs_{truth}": adjusted_rand_score(users[truth], bank[name])
               for truth in users if truth.startswith("true_")}
        facts |= ari
        own, best = ari.pop(f"{name}_vs_true_{name}", None), bayes_ari.get(name)
        if own is not None and best:
            facts[f"{name}_share_of_bayes"] = own / best
            cross = ", ".join(f"{value:.3f} {key}" for key, value in ari.items())
            print(f"{name}: ARI {own:.3f} of the Bayes-optimal {best:.3f} ({own / best:.0%}); "
                  f"cross-ARI {cross}")
    return facts


def seed_agreement(codes, num_codes):
    """Mean ARI between the codes of each pair of seeds: codes, a list of int [N]; None for a single seed"""
    pairs = [adjusted_rand_score(one[one < num_codes], two[one < num_codes])  # without unknown users
             for one, two in itertools.combinations(codes, 2)]
    return float(np.mean(pairs)) if pairs else None


def probe_demographics(features, users):
    """MovieLens: AUC with which features [N, C] predict gender and age -> sidecar facts. Prints it, too."""
    age = pd.to_numeric(users["age"], errors="coerce")
    labels = {"gender": users["gender"] == "M", "age_over_30": age > 30}
    facts = {f"probe_{name}": probe_auc(features, label.to_numpy()) for name, label in labels.items()}
    print("probe (logistic regression on the profiles, 5 folds): "
          + "  ".join(f"{name.removeprefix('probe_')} AUC {value:.3f}" for name, value in facts.items()))
    return facts


def probe_auc(features, labels, num_repeats=3):
    """AUC of a logistic regression on features [N, C] over 5 folds, mean of three random ways to fold"""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    aucs = []
    for seed in range(num_repeats):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        scores = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
        aucs.append(roc_auc_score(labels, scores))
    return float(np.mean(aucs))
