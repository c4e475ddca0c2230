"""Stage 3 of 5: quantize profiles into codes, one small integer per user and profile name.

A profile θ is inferred from few items, so part of it is sampling noise, whose covariance stage 2 measures.
Each profile is whitened by it and projected on the leading directions whose variance exceeds the noise (at
most K - 1), or on the one direction that predicts the labels; the recommendation loss of a small model on
validation rows decides. Of ratings it is one direction: how the user's rating habits, which stand beside θ,
predict labels, with θ only where that lowers this loss. A codebook per profile starts at k-means++ and is
trained by eq. 5: codebook term, commitment term, and the recommendation loss of a surrogate DCN, through the
straight-through estimator. A user's code is the nearest codeword (eq. 6). In a round of EM (after `02
--prior`), the codewords only move to the means of their users. With `02 --folds`, a train row is read with
the profile inferred without its fold. After `02 --items`, items get a code each: what texts of other items
foretell of its ratings, quantized.

Reads   profiles.pt, interactions.parquet, users.parquet; after `02 --items` item_vectors.pt, items.parquet;
        with --apply new_profiles.pt and codebook.pt (items: new_item_vectors.pt, item_codebook.pt) instead
Writes  codebook.pt: per profile name codebook float32 [K, C], transform float32 [D, C], mean float32 [D],
        usage int64 [K] (users with train rows); of ratings D + H instead of D, H rating habits
        feature_bank.parquet: user, user_id, one int column per profile name; K = no evidence of this user
        train_codes.parquet: with folds, the code of each train row without its own fold, in the rows' order
        item_bank.parquet: after `02 --items` item, item_id, code; item_codebook.pt: for new items
        new_codes.parquet, new_item_codes.parquet: with --apply, user_id or item_id and the codes

Example: python 03_quantize.py        (30 seconds)
  wrote runs/demo/feature_bank.parquet: 1,975 users | perplexity hobby 3.99 of 4, background 2.99 of 3
"""

import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import argparse
import math
import time

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from common import DCN, VectorQuantizer, usage_of
from userip.artifacts import check_finite, fail, read_artifacts, read_sidecar, write_artifact
from userip.item_bank import apply_to_items, write_item_bank
from userip.options import (at_least, changed_options, option_name, options_text, parse_with_presets,
                            refuse_without_effect, run_program, stage_parser, start_stage)
from userip.profiles import (compare_with_truth, describe_codes, nearest_codes, probe_auc, probe_labels,
                             read_profiles, read_rows, theta_of)

PAPER = {"whiten": False, "batch_size": 128, **dict.fromkeys(("lr", "vq_weight", "rec_weight", "beta"), 1e-3)}
RELEASED = {"whiten": False, "init": "released", "vq_weight": 0.5, "rec_weight": 0.0, "beta": 0.0, "lr": 0.01}


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--apply", nargs="?", const="users", choices=["users", "items"],
             help="code the users of 02 --only-users, or the items of --only-items; nothing is trained")
    add.method("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add.method("--released", action="store_true", help="the released code: " + options_text(RELEASED))
    add.method("--codes", type=at_least(2), nargs="+", metavar="K",
               help="codebook size per profile (default: 4 3, further ones 4; of ratings 16, or fewer)")
    add.method("--item-codes", type=at_least(2, at_most=256), metavar="K",
               help="codebook size of items, after 02 --items (default: 8)")
    add.method("--whiten", action=argparse.BooleanOptionalAction, default=True,
               help="whiten θ by the noise and keep directions that exceed it, or take θ as it is")
    add.method("--init", choices=["kmeans", "released"], default="kmeans",
               help="first codewords: k-means++, later moved to a user if they have none, or random and far")
    add.method("--stability", type=at_least(0, at_most=100), default=1, metavar="R",
               help="quantize again with R other seeds: ARI of the codes between seeds")
    add.training("--epochs", type=at_least(1), default=10, help="passes over the train rows (eq. 5)")
    add.training("--lr", type=at_least(1e-12, float), default=0.003, help="learning rate of Adam")
    add.training("--batch-size", type=at_least(1), default=512, help="train rows per step")
    add.training("--vq-weight", type=at_least(0, float), default=1.0, help="weight of the VQ loss, λ")
    add.training("--beta", type=at_least(0, float), default=0.25, help="weight of the commitment term, β")
    add.training("--rec-weight", type=at_least(0, float), default=1.0, help="weight of the rec. loss, γ")
    add.training("--seed", type=at_least(0), default=0, help="seed of k-means++ and of the training")
    args = parse_with_presets(parser, argv, paper=PAPER, released=RELEASED)
    if args.seed + args.stability >= 2**32:
        parser.error(f"--seed {args.seed}: seeds must be below 2**32 = {2**32}")
    refuse_without_effect(parser, args, {"beta": (args.vq_weight > 0, "--vq-weight above 0")})
    if args.apply and (changed := changed_options(parser, args, ignored=("run_dir", "apply"))):
        parser.error(f"--apply uses the codebook as it is: leave out {option_name(changed[0])}")
    return args


# ----------------------------------------------------------------------------------------------------------
# whitening: which directions hold more than noise, and which of them matter
# ----------------------------------------------------------------------------------------------------------


def whiten(deviation, gain, noise):
    """Coordinates in which noise has variance 1, by falling variance between users: deviation [N, D], gain
    [N], noise [D, D] (covariance of gain · deviation of equal users) -> transform [D, R], eigenvalues [R]
    """
    values, vectors = torch.linalg.eigh(noise.double())
    kept = values > 1e-6 * values.max()  # smaller ones are float32's rounding
    to_unit = vectors[:, kept] * values[kept].rsqrt()  # [D, R]
    z = gain.double()[:, None] * (deviation.double() @ to_unit)  # [N, R]
    eigenvalues, directions = torch.linalg.eigh(torch.atleast_2d(torch.cov(z.T)))
    return (to_unit @ directions.flip(1)).float(), eigenvalues.flip(0)


def first_transform(args, profile, train_rows, valid_rows):
    """The transform [D, C] that training starts from, eigenvalues of the whitened profiles (None if not)

    Pure noise of N users in D dimensions stays below (1 + √(D/N))² times its level (Marchenko and Pastur),
    which `02 --method gradient` does not know: as most directions are noise, it is their median.
    """
    deviation, num_codes = profile.deviation[-1, profile.is_fitted], profile.num_codes  # [N', D + H]
    theta_dim = profile.theta_dim  # D, without the H rating habits
    print(f"{profile.name}: {len(deviation):,} users with evidence in train rows, {num_codes} codes")
    transform, eigenvalues = torch.eye(deviation.shape[1])[:, :theta_dim], None
    if not (deviation.any() and profile.noise.any()):
        print(f"  all users have the same {profile.name}: its codes say nothing")
        return transform[:, :1], eigenvalues
    if args.whiten:
        whitened, eigenvalues = whiten(deviation[:, :theta_dim], profile.gain[profile.is_fitted],
                                       profile.noise)
        whitened = F.pad(whitened, (0, 0, 0, deviation.shape[1] - theta_dim))  # [D + H, R]
        level = 1.0 if profile.has_noise_level else float(eigenvalues.median())
        edge = level * (1 + math.sqrt(theta_dim / len(deviation))) ** 2
        num_above = int((eigenvalues > edge).sum())
        transform = whitened[:, :max(1, min(num_above, num_codes - 1))]
        leading = " ".join(f"{value:.2f}" for value in eigenvalues[:10])
        print(f"  whitened eigenvalues (noise {level:.3g}, its edge {edge:.3g}): {leading} | "
              f"{num_above} above the edge, {transform.shape[1]} kept"
              + "  <- its codes may be noise" * (num_above == 0))
        if args.rec_weight and len(valid_rows.user):
            candidates = rating_directions(whitened, profile, train_rows) if profile.reads_ratings else {
                "of the label": label_direction(whitened[:, :16], profile.deviation, train_rows),
                **{f"leading {dims}": transform[:, :dims] for dims in range(1, transform.shape[1] + 1)}}
            transform = choose_directions(args, profile, candidates, train_rows, valid_rows)
    # one scale, so that learning rate and weights mean the same for all profiles
    z = profile.deviation[:, profile.is_fitted] @ transform
    return transform / z.std().clamp(min=1e-12), eigenvalues


def label_direction(transform, deviation, rows, prior_weight=3.0, ridge=1e-3):
    """Ridge regression of a train row's label, less the item's mean, on the user's profile, out of fold:
    transform [D, C], deviation [F + 1, N, D] -> the direction that predicts labels best [D, 1]
    """
    x = (deviation @ transform)[rows.fold, rows.user].double()  # [R, C]
    num_rows, num_likes = rows.item.bincount().double(), rows.item.bincount(rows.label).double()  # by item
    item_mean = (num_likes + prior_weight * rows.label.mean()) / (num_rows + prior_weight)
    x, residual = x - x.mean(0), rows.label - item_mean[rows.item]
    covariance = x.T @ x
    covariance += ridge * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance))
    direction = torch.linalg.solve(covariance, x.T @ (residual - residual.mean()))
    return transform @ F.normalize(direction, dim=0).float()[:, None]


def rating_directions(whitened, profile, rows):
    """What ratings say of a user lies in one direction, of two candidates [D + H, 1]: by how the H rating
    habits predict labels, with the titles, that is the direction of θ that predicts labels best, or without.

    whitened [D + H, R]: of θ. Its first four directions gave no worse codes than 16 (docs/notebook.md).
    """
    titles = label_direction(whitened[:, :4], profile.deviation, rows)  # [D + H, 1]
    habits = torch.eye(len(titles))[:, profile.theta_dim:]  # [D + H, H]
    candidates = {"habits and titles": torch.cat([habits, titles], 1), "habits": habits}
    for name, parts in candidates.items():
        # over all folds: in one of them habits may not differ, and would be blown up
        scale = (profile.deviation[:, profile.is_fitted] @ parts).std((0, 1)).clamp(min=1e-12)
        candidates[name] = label_direction(parts / scale, profile.deviation, rows)
    return candidates


def choose_directions(args, profile, candidates, train_rows, valid_rows):
    """The candidate {name: transform [D, C']} whose codes give the smallest recommendation loss on valid rows

    Users may differ most in what says nothing of their likes. Valid rows are few: the last candidate is kept
    unless the loss of another is lower by more than the standard error of the difference.
    """
    losses = {}
    for name, transform in candidates.items():
        z = profile.deviation[-1, profile.is_fitted] @ transform  # [N', C']
        kmeans = KMeans(profile.num_codes, n_init=4, random_state=args.seed).fit(z.numpy())
        part = {"mean": 0.0, "transform": transform, "codebook": torch.tensor(kmeans.cluster_centers_)}
        codes = nearest_codes(part, profile.deviation, profile.num_evidence)
        losses[name] = np.mean([recommendation_losses(codes, profile.num_codes, train_rows, valid_rows, seed)
                                for seed in (args.seed, args.seed + 1)], 0)
    lowest = min(losses, key=lambda name: losses[name].mean())
    last = list(candidates)[-1]
    gain = losses[last] - losses[lowest]  # [R] of valid
    best = lowest if gain.mean() > gain.std() / math.sqrt(len(gain)) else last
    means = "  ".join(f"{name} {loss.mean():.4f}" for name, loss in losses.items())
    print(f"  recommendation loss on valid by directions kept: {means} | {best}")
    return candidates[best]


def recommendation_losses(codes, num_codes, rows, valid_rows, seed):
    """codes int64 [F + 1, N] -> logloss of each valid row [R] at the best of 15 epochs on the (train) rows"""
    torch.manual_seed(seed)
    surrogate = Surrogate([num_codes + 1], rows.num_items)
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=0.01)
    one_hot = lambda code: [F.one_hot(code, num_codes + 1).float()]
    losses = []
    for _ in range(15):
        surrogate.train()
        for batch in torch.randperm(len(rows.user))[:200_000].split(512):
            logits = surrogate(one_hot(codes[rows.fold[batch], rows.user[batch]]), rows.item[batch])
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(logits, rows.label[batch]).backward()
            optimizer.step()
        surrogate.eval()
        with torch.no_grad():
            logits = surrogate(one_hot(codes[-1, valid_rows.user]), valid_rows.item)
            losses.append(F.binary_cross_entropy_with_logits(logits, valid_rows.label, reduction="none"))
    return min(losses, key=lambda loss: float(loss.mean())).numpy()


# ----------------------------------------------------------------------------------------------------------
# model: encoder and codebook per profile, a surrogate DCN that reads the codewords
# ----------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """One profile: deviation [B, D] -> quantized [B, C]; of rows with evidence VQ loss [], squared drift"""

    def __init__(self, transform, codebook, beta):
        super().__init__()
        self.register_buffer("start", transform.clone())
        self.transform = nn.Parameter(transform.clone())  # [D, C]
        self.vq = VectorQuantizer(codebook, beta)
        self.register_buffer("num_rows", torch.zeros(len(codebook), dtype=torch.long))  # per codeword

    def forward(self, deviation, has_evidence):
        z = deviation @ self.transform
        quantized, codes, loss = self.vq(z)
        if not has_evidence.all():
            z, deviation = z[has_evidence], deviation[has_evidence]  # [B', C], [B', D]
            if not len(z):
                return quantized, z.sum(), z.sum()
            _, codes, loss = self.vq(z)
        self.num_rows += codes.bincount(minlength=len(self.num_rows))
        return quantized, loss, (z - deviation @ self.start).square().sum(1).mean()

    @torch.no_grad()
    def revive(self, deviation):
        """Move codewords that no row took since the last call to random users' θ [N, D]"""
        dead = self.num_rows == 0
        users = torch.randint(len(deviation), (int(dead.sum()),))
        self.vq.codebook.data[dead] = deviation[users] @ self.transform
        self.num_rows.zero_()


class Surrogate(nn.Module):
    """The recommender that supervises the codes: quantized [B, C] per profile, item [B] -> logits [B].

    A linear map makes a field of a codeword. No user id, which could learn what the codes should hold.
    """

    def __init__(self, dims, num_items, field_dim=8):
        super().__init__()
        self.item = nn.Embedding(num_items, field_dim)
        nn.init.normal_(self.item.weight, std=0.05)
        self.maps = nn.ModuleList(nn.Linear(dim, field_dim) for dim in dims)
        self.dcn = DCN(len(dims) + 1, field_dim, dropout=0.2)

    def forward(self, quantized, item):
        fields = [to_field(q) for to_field, q in zip(self.maps, quantized)] + [self.item(item)]
        return self.dcn(torch.stack(fields, 1))  # [B, P + 1, E]


# ----------------------------------------------------------------------------------------------------------
# train (eq. 5, or the codebook's step of EM) and evaluate
# ----------------------------------------------------------------------------------------------------------


def train(args, quantizers, surrogate, profiles, rows, is_quiet=False):
    """Minimise eq. 5 on the train rows -> losses by epoch

    # differs from the paper: θ moves as the image of a shared linear map, and L_LM of eq. 7 is approximated
    # by the squared drift in whitened coordinates. Without it, the commitment term shrinks θ to a point.
    """
    optimizer = torch.optim.Adam([*quantizers.parameters(), *surrogate.parameters()], lr=args.lr)
    curve = []
    for epoch in range(1, args.epochs + 1):
        started, sums = time.time(), torch.zeros(3)
        for batch in torch.randperm(len(rows.user)).split(args.batch_size):
            index = rows.fold[batch], rows.user[batch]
            outputs = [quantizer(profile.deviation[index], profile.num_evidence[index] > 0)
                       for quantizer, profile in zip(quantizers, profiles)]
            quantized, vq_losses, drifts = zip(*outputs)
            vq_loss, drift = sum(vq_losses), sum(drifts)
            logits = surrogate(quantized, rows.item[batch])
            rec_loss = F.binary_cross_entropy_with_logits(logits, rows.label[batch])
            optimizer.zero_grad(set_to_none=True)
            (drift + args.vq_weight * vq_loss + args.rec_weight * rec_loss).backward()
            optimizer.step()
            sums += len(batch) * torch.stack([vq_loss, rec_loss, drift]).detach()
        check_finite(sums, f"epoch {epoch}", "lower --lr or the weights of the losses")
        curve.append(dict(zip(("vq_loss", "rec_loss", "drift"), (sums / len(rows.user)).tolist())))
        if args.init == "kmeans":
            for quantizer, profile in zip(quantizers, profiles):
                quantizer.revive(profile.deviation[-1, profile.is_fitted])
        if not is_quiet:
            losses = " ".join(f"{name.removesuffix('_loss')} {loss:.4f}" for name, loss in curve[-1].items())
            print(f"epoch {epoch:02d}/{args.epochs} | {losses} | {time.time() - started:.1f}s")
    return curve


def fit(args, profiles, transforms, rows, seed):
    """Start at transforms [D, C] by the seed and train: a part of codebook.pt per profile, losses by epoch"""
    torch.manual_seed(seed)
    quantizers = nn.ModuleList()
    for profile, transform in zip(profiles, transforms):
        z = (profile.deviation[-1] @ transform)[profile.is_fitted]  # [N', C]
        if args.init == "kmeans":
            kmeans = KMeans(profile.num_codes, n_init=10, random_state=seed).fit(z.numpy())
            codebook = torch.tensor(kmeans.cluster_centers_, dtype=torch.float32)
        else:  # as in the released code: far outside, so that the first one taken wins all users
            direction = F.normalize(torch.randn(profile.num_codes, z.shape[1]), dim=1)
            codebook = direction * z.norm(dim=1).mean() * (2.5 + 0.8 * torch.rand(profile.num_codes, 1))
        quantizers.append(Quantizer(transform, codebook, args.beta))
    surrogate = Surrogate([transform.shape[1] for transform in transforms], rows.num_items)
    curve = train(args, quantizers, surrogate, profiles, rows, is_quiet=seed != args.seed)
    return [{"codebook": quantizer.vq.codebook.detach(), "mean": profile.mean,
             "transform": quantizer.transform.detach()}
            for quantizer, profile in zip(quantizers, profiles)], curve


def move_codewords(profile, prior, max_rounds=100):
    """The codebook's step of EM (Algorithm 1): codewords of the prior move to the means of their users, until
    no code changes (Lloyd). The VQ loss of eq. 7 cannot rise. -> part of codebook.pt

    # differs from the paper: after the first round the recommendation loss moves nothing.
    """
    z = (profile.theta[-1, profile.is_fitted] - prior["mean"]) @ prior["transform"]  # [N', C]
    codebook, previous, losses = prior["codebook"].clone(), torch.tensor([]), []
    for _ in range(max_rounds):
        distance, codes = torch.cdist(z, codebook).min(1)
        losses.append(float(distance.square().sum()) / len(z))
        if torch.equal(codes, previous):
            break
        previous = codes
        for code in codes.unique():
            codebook[code] = z[codes == code].mean(0)
    print(f"{profile.name}: VQ loss {losses[0]:.4f} -> {losses[-1]:.4f} per user, codewords at users' means")
    return {"codebook": codebook, "mean": prior["mean"], "transform": prior["transform"]}


def probe_profiles(args, profiles, users):
    """AUC with which the 32 leading directions predict gender and age (MovieLens) -> sidecar facts"""
    labels, aucs = probe_labels(users), {}
    is_probed, features = torch.stack([profile.is_fitted for profile in profiles]).all(0), []
    for profile in profiles if labels else []:
        if args.whiten and not profile.noise.any():  # users do not differ
            continue
        theta, gain = profile.theta[-1, is_probed, :profile.theta_dim], profile.gain[is_probed]  # no habits
        deviation = theta - theta.mean(0)  # times gain: noise has variance 1 for any number of texts
        features.append(gain[:, None] * (deviation @ whiten(deviation, gain, profile.noise)[0][:, :32])
                        if args.whiten else deviation)
    for name, label in labels.items() if features else ():
        label = label[is_probed.numpy()].reset_index(drop=True).dropna().astype(bool)
        if min(label.sum(), len(label) - label.sum()) < 5:
            print(f"probe of {name}: left out, it takes five known users of each kind")
            continue
        aucs[name] = probe_auc(torch.cat(features, 1).numpy()[label.index], label.to_numpy())
    if aucs:
        print("probe of the profiles: " + "  ".join(f"{name} AUC {auc:.3f}" for name, auc in aucs.items()))
    return {f"probe_{name}": auc for name, auc in aucs.items()}


def apply(args):
    """Codes for the new users of `02 --only-users`"""
    stored, codebook, _ = read_artifacts(args, "new_profiles.pt", "codebook.pt", "profiles.pt")
    table = pd.DataFrame({"user_id": stored["user_id"]})
    for k, name in enumerate(stored["names"]):
        theta = theta_of(stored, k, len(codebook[name]["mean"]))
        table[name] = nearest_codes(codebook[name], theta, stored["num_evidence"][:, k]).numpy()
    path = write_artifact(args, "new_codes.parquet", table, ["new_profiles.pt", "codebook.pt"],
                          users=len(table))
    num_unknown = int((stored["num_evidence"] == 0).all(1).sum())
    print(f"wrote {path}: {len(table):,} new users, {num_unknown:,} of them without evidence")


def main(args):
    start_stage(args)
    if args.apply:
        return apply(args) if args.apply == "users" else apply_to_items(args)
    started, facts = time.time(), {}
    stored, interactions, users = read_artifacts(args, "profiles.pt", "interactions.parquet", "users.parquet")
    has_folds, names = "fold" in stored, stored["names"]
    has_items = read_sidecar(args, "profiles.pt")["options"].get("items", False)
    if args.item_codes and not has_items:
        fail(f"--item-codes: {args.run_dir}/profiles.pt was made without --items; leave it out")
    train_rows = read_rows(interactions, "train", stored.get("fold"))
    valid_rows = read_rows(interactions, "valid")
    profiles = read_profiles(args, stored, train_rows, vars(parse_args([])))
    if "prior" in stored:  # a round of EM
        fits = [[move_codewords(*pair) for pair in zip(profiles, stored["prior"].values())]]
    else:
        transforms, eigenvalues = zip(*[first_transform(args, profile, train_rows, valid_rows)
                                        for profile in profiles])
        facts |= {f"{name}_eigenvalues": values for name, values in zip(names, eigenvalues) if args.whiten}
        seeds = range(args.seed, args.seed + 1 + args.stability)
        fits, curves = zip(*[fit(args, profiles, transforms, train_rows, seed) for seed in seeds])
        facts["curve"] = curves[0]

    bank, codebook = users[["user", "user_id"]].copy(), {}
    train_codes = pd.DataFrame({"user": train_rows.user, "item": train_rows.item})
    for k, profile in enumerate(profiles):
        codes = [nearest_codes(parts[k], profile.theta, profile.num_evidence).numpy() for parts in fits]
        bank[profile.name] = codes[0][-1]
        train_codes[profile.name] = codes[0][train_rows.fold, train_rows.user]
        facts |= describe_codes(profile.name, [of_seed[-1] for of_seed in codes], profile.num_codes)
        usage, _ = usage_of(codes[0][-1, train_rows.user.unique()], profile.num_codes)  # not of cold users
        codebook[profile.name] = fits[0][k] | {"usage": torch.tensor(usage)}
    bayes_ari = read_sidecar(args, "users.parquet").get("bayes_ari", {})
    facts |= compare_with_truth(bank, names, users, bayes_ari) | probe_profiles(args, profiles, users)
    facts |= {"names": names, "codes": args.codes, "users": len(bank), "seconds": time.time() - started}

    inputs = ["profiles.pt", "interactions.parquet", "codebook.pt"]
    write_artifact(args, "codebook.pt", codebook, inputs[:2], **facts)
    if has_folds:
        write_artifact(args, "train_codes.parquet", train_codes, inputs, names=names)
    if has_items:
        write_item_bank(args, interactions, args.item_codes or 8)
    path = write_artifact(args, "feature_bank.parquet", bank, inputs, has_folds=has_folds, **facts)
    perplexities = [f"{name} {facts[f'{name}_perplexity']:.2f} of {num_codes}"
                    for name, num_codes in zip(names, args.codes)]
    print(f"wrote {path}: {len(bank):,} users | perplexity {', '.join(perplexities)}")


if __name__ == "__main__":
    run_program(main, parse_args)
