"""Profiles as stage 3 reads them; checks of profiles and codes against known facts, which no model reads."""

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common import usage_of
from userip.artifacts import fail, read_sidecar
from userip.checks import reads_ratings
from userip.options import option_name

USERS_PER_CODE = 20  # of ratings, at least: fewer users have fewer codes


def read_rows(interactions, split, fold=None):
    """The rows of a split: user, item, fold int64 [R], label float32 [R], num_items in the catalogue. fold:
    index of the profiles that were inferred without the row, zero without folds
    """
    frame = interactions[interactions["split"] == split]
    user, item, label = (torch.tensor(frame[name].to_numpy()) for name in ("user", "item", "label"))
    fold = torch.zeros_like(user) if fold is None else fold
    return SimpleNamespace(user=user, item=item, label=label.float(), fold=fold,
                           num_items=int(interactions["item"].max()) + 1)


def theta_of(stored, k, width):
    """θ of profile k, [..., N, D], and behind it the users' rating habits, if codes are D + H wide"""
    theta = stored["profiles"][..., k, :]
    return theta if theta.shape[-1] == width else torch.cat([theta, stored["habits"]], -1)


def nearest_codes(part, theta, num_evidence):
    """Eq. 6: part of codebook.pt, theta [..., D], num_evidence [...] -> codes [...], K without evidence"""
    # in double precision, so that a user's code does not depend on the other users of the batch
    mean, transform, codebook = part["mean"], part["transform"].double(), part["codebook"].double()
    codes = torch.cat([torch.cdist((block.double() - mean) @ transform, codebook).argmin(-1)
                       for block in theta.flatten(0, -2).split(2**16)]).view(theta.shape[:-1])
    return torch.where(num_evidence > 0, codes, len(codebook))


def read_profiles(args, stored, rows, defaults):
    """profiles.pt -> a namespace per profile name, θ of all users without each of the F folds and, last, with
    all evidence; sets args.codes. defaults: of stage 3's options
    """
    if "fold" not in stored:
        stored |= {key: stored[key][None] for key in ("profiles", "num_evidence", "habits") if key in stored}
    is_warm = rows.user.bincount(minlength=stored["profiles"].shape[1]) > 0
    options, names = read_sidecar(args, "profiles.pt")["options"], stored["names"]
    is_rated, num_fitted = reads_ratings(options, len(names)), int((stored["has_evidence"] & is_warm).sum())
    num_rated = min(16, max(2, num_fitted // USERS_PER_CODE))
    sizes = args.codes or [num_rated if reads else 3 if k == 1 else 4 for k, reads in enumerate(is_rated)]
    if "prior" in stored:
        sizes = [len(part["codebook"]) for part in stored["prior"].values()]
        for name, default in defaults.items():
            if name not in ("run_dir", "seed", "item_codes") and getattr(args, name) != default:
                fail(f"{option_name(name)}: the profiles have a codebook of {sizes} codes as prior, which "
                     f"only moves to its users' means now; leave it out, or run stage 2 without --prior")
    if len(sizes) != len(names):
        fail(f"--codes gives {len(sizes)} size(s) ({' '.join(map(str, sizes))}), but profiles.pt holds "
             f"{len(names)} profiles ({', '.join(names)}): give one size for each")
    args.codes, profiles = sizes, []
    for k, name in enumerate(names):
        theta_dim = len(stored["noise"][k])
        width = theta_dim + (stored["habits"].shape[-1] if is_rated[k] else 0)
        theta = theta_of(stored, k, width)  # [F + 1, N, D], of ratings D + H wide
        num_evidence = stored["num_evidence"][:, :, k]  # [F + 1, N]
        is_fitted = is_warm & (num_evidence[-1] > 0)  # [N], whose θ moves codewords
        if is_fitted.sum() < sizes[k]:
            fail(f"only {int(is_fitted.sum())} users have evidence of {name} and train rows, fewer than the "
                 f"{sizes[k]} codes asked for: lower --codes, or leave the profile out of stage 2")
        mean = theta[-1, is_fitted].mean(0)  # [D]
        profiles.append(SimpleNamespace(
            name=name, num_codes=sizes[k], theta=theta, theta_dim=theta_dim, num_evidence=num_evidence,
            is_fitted=is_fitted, mean=mean, deviation=theta - mean, gain=stored["gain"][:, k],
            noise=stored["noise"][k],
            has_noise_level=options.get("method", "score") == "score", reads_ratings=is_rated[k]))
    return profiles


def describe_codes(name, codes, num_codes):
    """Print usage and mean ARI between seeds of a profile's codes, a list of int [N] -> sidecar facts"""
    usage, perplexity = usage_of(codes[0], num_codes)
    known = [column[column < num_codes] for column in codes]
    aris = [adjusted_rand_score(*pair) for pair in itertools.combinations(known, 2)]
    share, stability = usage.min() / max(usage.sum(), 1), float(np.mean(aris)) if aris else None
    between = f" | ARI between seeds {stability:.3f}" if aris else ""
    warning = "  <- below K/2: the codebook is collapsing" if perplexity < num_codes / 2 else ""
    print(f"{name}: users per code {' '.join(map(str, usage))} | perplexity {perplexity:.2f} of {num_codes} "
          f"| smallest share {share:.3f}{between}{warning}")
    return {f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_smallest_share": share,
            f"{name}_stability": stability}


def compare_with_truth(bank, names, users, bayes_ari):
    """Planted data: print the adjusted Rand index (ARI) of codes with their own truth, beside that of the
    Bayes-optimal classifier, and with another profile's (cross-ARI). bank, users: frames -> sidecar facts
    """
    facts = {}
    for name in names:
        known = {truth: users[truth].dropna() for truth in users if truth.startswith("true_")}
        ari = {f"{name}_vs_{truth}": adjusted_rand_score(groups, bank.loc[groups.index, name])
               for truth, groups in known.items() if len(groups)}
        facts |= ari
        if f"{name}_vs_true_{name}" in ari and bayes_ari.get(name):
            own, best = ari.pop(f"{name}_vs_true_{name}"), bayes_ari[name]
            facts[f"{name}_share_of_bayes"] = own / best
            cross = ", ".join(f"{value:.3f} {key}" for key, value in ari.items())
            print(f"{name}: ARI {own:.3f} of the Bayes-optimal {best:.3f} ({own / best:.0%}); "
                  f"cross-ARI {cross}")
    return facts


def probe_labels(users):
    """What users.parquet knows of gender and age: {name: Series [N] of bool, missing where it is unknown}"""
    labels = {}
    if "gender" in users:
        gender = users["gender"].astype(str).where(users["gender"].notna())
        if gender.nunique() > 2:
            print(f"gender has {gender.nunique()} codes, not two: no probe")
        else:
            labels["gender"] = (gender == gender.max()).where(gender.notna())
    if "age" in users:  # of a range such as 25-34 its lower end
        age = users["age"].astype(str).str.extract(r"(\d+)")[0].astype(float)
        labels["age_over_30"] = (age > 30).where(age.notna())
    return labels


def probe_auc(features, labels):
    """AUC of a logistic regression on features [N, C] over 5 folds, mean of three random ways to fold"""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = [StratifiedKFold(5, shuffle=True, random_state=seed) for seed in range(3)]
    scores = [cross_val_predict(model, features, labels, cv=fold, method="predict_proba") for fold in folds]
    return float(np.mean([roc_auc_score(labels, score[:, 1]) for score in scores]))
