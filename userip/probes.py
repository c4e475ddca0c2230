"""Checks of codes and profiles against what is known of the users. Nothing here is read by a model."""

import itertools

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def compare_with_truth(codes, users, bayes_ari):
    """Planted data: print the adjusted Rand index (ARI) of codes with the true groups -> facts

    codes: int [N] by profile name; users: data frame with columns true_…; bayes_ari: by profile name, the ARI
    of the Bayes-optimal classifier. A profile should agree with its own truth and with no other one.
    """
    facts = {}
    truths = [column for column in users if column.startswith("true_")]
    for name, column in codes.items():
        ari = {truth: adjusted_rand_score(users[truth], column) for truth in truths}
        facts |= {f"{name}_vs_{truth}": value for truth, value in ari.items()}
        own, best = ari.pop(f"true_{name}", None), bayes_ari.get(name)
        if own is not None and best:
            facts[f"{name}_share_of_bayes"] = own / best
            cross = ", ".join(f"{value:.3f} {name}_vs_{truth}" for truth, value in ari.items())
            print(f"{name}: ARI {own:.3f} of the Bayes-optimal {best:.3f} ({own / best:.0%}); "
                  f"cross-ARI {cross}")
    return facts


def seed_agreement(codes, num_codes):
    """Mean ARI between the codes of each pair of seeds; None for a single seed

    codes: a list of int [N], one per seed. Users without evidence (code num_codes) are left out.
    """
    pairs = [adjusted_rand_score(one[one < num_codes], two[one < num_codes])
             for one, two in itertools.combinations(codes, 2)]
    return float(np.mean(pairs)) if pairs else None


def probe_demographics(features, users):
    """MovieLens: how well features [N, C] predict gender and age (AUC). Prints it, returns sidecar facts."""
    age = pd.to_numeric(users["age"], errors="coerce")
    labels = {"gender": users["gender"] == "M", "age_over_30": age > 30}
    auc = {name: probe_auc(features, label.to_numpy()) for name, label in labels.items()}
    print("probe (logistic regression on the profiles, 5 folds): "
          + "  ".join(f"{name} AUC {value:.3f}" for name, value in auc.items()))
    return {f"probe_{name}": value for name, value in auc.items()}


def probe_auc(features, labels, num_repeats=3):
    """AUC of a logistic regression on features [N, C], cross-validated in 5 folds; mean over random folds"""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    aucs = []
    for seed in range(num_repeats):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        scores = cross_val_predict(model, features, labels, cv=folds, method="predict_proba")[:, 1]
        aucs.append(roc_auc_score(labels, scores))
    return float(np.mean(aucs))
