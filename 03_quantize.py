"""Stage 3 of 5: quantize profiles into codes, one small integer per user and profile name.

A profile θ is inferred from a few items, so part of it is sampling noise, whose covariance stage 2 measured.
Each profile is whitened by it and projected on the C leading directions whose variance exceeds the noise (at
most K - 1), or on the one direction that predicts the labels best; the recommendation loss of a small
surrogate model on validation rows decides. A codebook per profile starts at k-means++ and is trained by
eq. 5: codebook term, commitment term, and the recommendation loss of a surrogate DCN, through the
straight-through estimator. A user's code is the nearest codeword (eq. 6). Where `02 --prior` inferred the
profiles (a round of EM), the codewords only move to the means of their users.

With `02 --folds`, a train row is read with the profile that was inferred without its fold, here and in stage
4. `--apply` gives codes to the new users of `02 --only-users`; the codebook stays as it is.

Reads   profiles.pt, interactions.parquet (train rows; valid rows choose directions), users.parquet (truth,
        for checking only); with --apply new_profiles.pt and codebook.pt instead
Writes  codebook.pt: per profile name codebook float32 [K, C], transform float32 [D, C], mean float32 [D],
        usage int64 [K] (users with train rows)
        feature_bank.parquet: user, user_id, one int column per profile name; K = no evidence of this user
        train_codes.parquet: with folds, the code of each train row without its own fold, in the rows' order
        new_codes.parquet: with --apply, user_id and the codes

Example: python 03_quantize.py        (30 seconds)
  wrote runs/demo/feature_bank.parquet: 1,975 users | perplexity hobby 3.99 of 4, background 2.99 of 3
"""

import argparse
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F

from common import DCN, VectorQuantizer, usage_of
from userip.artifacts import fail, read_artifacts, read_sidecar, write_artifact
from userip.options import (at_least, changed_options, option_name, options_text, parse_with_presets,
                            stage_parser, start_stage)
from userip.probes import compare_with_truth, probe_demographics, seed_agreement

PAPER = {"whiten": False, "vq_weight": 0.001, "rec_weight": 0.001, "beta": 1.0}
RELEASED = {"whiten": False, "init": "released", "vq_weight": 0.5, "rec_weight": 0.0, "beta": 0.0, "lr": 0.01,
            "revive": False}


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--apply", action="store_true", help="code stage 2's --only-users users; nothing is trained")
    add.method("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add.method("--released", action="store_true", help="the released code: " + options_text(RELEASED))
    add.method("--codes", type=at_least(2), nargs="+", metavar="K",
               help="codebook size per profile (default: 4 3, then 4; 8 for profiles that read ratings)")
    add.method("--whiten", action=argparse.BooleanOptionalAction, default=True,
               help="whiten by the noise and keep directions that exceed it, or take θ as it is")
    add.method("--dims", type=at_least(0), default=0,
               help="directions kept, C (0: chosen on valid; all that exceed the noise if --rec-weight is 0)")
    add.method("--init", choices=["kmeans", "released"], default="kmeans",
               help="first codewords: k-means++, or random at 2.5 to 3.3 times the norm of the profiles")
    add.method("--revive", action=argparse.BooleanOptionalAction, default=True,
               help="after an epoch, move each codeword that no user took to a random user")
    add.method("--stability", type=at_least(0), default=1, metavar="R",
               help="quantize with R more seeds and print the ARI of the codes between seeds")
    add.training("--epochs", type=at_least(1), default=10, help="passes over the train rows (eq. 5)")
    add.training("--lr", type=at_least(0, float), default=0.003, help="learning rate of Adam")
    add.training("--batch-size", type=at_least(1), default=512, help="train rows per step")
    add.training("--vq-weight", type=at_least(0, float), default=1.0, help="weight of the VQ loss, λ")
    add.training("--beta", type=at_least(0, float), default=0.25, help="weight of the commitment term, β")
    add.training("--rec-weight", type=at_least(0, float), default=1.0,
                 help="weight of the recommendation loss, γ")
    add.training("--seed", type=at_least(0), default=0, help="seed of k-means++ and of the training")
    args = parse_with_presets(parser, argv, paper=PAPER, released=RELEASED)
    changed = changed_options(parser, args, ignored=("run_dir", "apply"))
    if args.apply and changed:
        parser.error(f"--apply uses the codebook as it is: leave out {option_name(changed[0])}")
    if args.dims and not args.whiten:
        parser.error("--dims counts directions of whitened profiles: leave it out, or whiten")
    return args


# ----------------------------------------------------------------------------------------------------------
# data: train rows, and what stage 2 inferred for each profile name
# ----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Interactions: user, item, fold int64 [R], label float32 [R]; num_items in the whole catalogue.

    fold: index into the profiles [F + 1, N, D], of those that were inferred without this row.
    """

    user: torch.Tensor
    item: torch.Tensor
    label: torch.Tensor
    fold: torch.Tensor
    num_items: int


def rows_of_split(interactions, split, fold=None):
    frame = interactions[interactions["split"] == split]
    columns = [torch.tensor(frame[name].to_numpy()) for name in ("user", "item", "label")]
    columns[2] = columns[2].float()
    fold = torch.zeros(len(frame), dtype=torch.long) if fold is None else fold
    return Rows(*columns, fold, int(interactions["item"].max()) + 1)


@dataclass
class Profile:
    """One profile name: θ of all users, and what is known of its noise."""

    name: str
    num_codes: int  # K
    theta: torch.Tensor  # [F + 1, N, D]: without each fold, and last with all evidence; F = 0 without folds
    num_evidence: torch.Tensor  # [F + 1, N]: 0 means that the user gets the code K
    gain: torch.Tensor  # [N]
    noise: torch.Tensor  # [D, D]: covariance of gain · (θ - mean), if users did not differ
    is_fitted: torch.Tensor  # bool [N]: has evidence and train rows. Only these users move a codeword
    is_rated: bool  # its evidence says how users rated
    has_noise_level: bool  # else the noise is known up to a factor

    def __post_init__(self):
        self.mean = self.theta[-1, self.is_fitted].mean(0)  # [D]
        # users without evidence are at the mean: no train row is theirs
        self.deviation = self.theta - self.mean  # [F + 1, N, D]


def reads_ratings(options, num_profiles):
    """By the options of stage 2: does the evidence of each profile say how users rated? bool by profile"""
    ratings, routes = options.get("ratings", "none"), options.get("route", ["none"])
    routes = ["rating"] * num_profiles if routes == ["none"] else routes
    return [ratings != "none" and "rating" in route.split("+") for route in routes]


def codebook_sizes(args, stored, is_rated):
    """Number of codes K of each profile; exit code 2 when the options do not fit profiles.pt"""
    names, sizes = stored["names"], args.codes
    if "prior" in stored:
        sizes = [len(part["codebook"]) for part in stored["prior"].values()]
        text = " ".join(map(str, sizes))
        if args.codes not in (None, sizes):
            fail(f"--codes {' '.join(map(str, args.codes))}: the profiles were inferred with the prior of a "
                 f"codebook of {text} codes; leave --codes out, or run stage 2 without --prior")
        defaults = vars(parse_args([])) | {"run_dir": args.run_dir, "seed": args.seed, "codes": args.codes}
        for name, value in vars(args).items():
            if value != defaults[name]:
                fail(f"{option_name(name)}: the profiles were inferred with a codebook as prior, whose "
                     f"codewords now only move to their users' means; leave it out, or run stage 2 without "
                     f"--prior")
    if sizes is None:
        defaults = [4, 3, *[4] * len(names)]
        sizes = [8 if rated else size for size, rated in zip(defaults, is_rated)]
    if len(sizes) != len(names):
        fail(f"--codes gives {len(sizes)} size(s) ({' '.join(map(str, sizes))}), but profiles.pt "
             f"holds {len(names)} profiles ({', '.join(names)}): give one size for each")
    return sizes


def read_profiles(args, stored, train_rows):
    """profiles.pt -> a Profile per name; sets args.codes to their sizes"""
    options = read_sidecar(args, "profiles.pt")["options"]
    is_rated = reads_ratings(options, len(stored["names"]))
    args.codes = codebook_sizes(args, stored, is_rated)
    theta, num_evidence = stored["profiles"], stored["num_evidence"]
    if "fold" not in stored:
        theta, num_evidence = theta[None], num_evidence[None]  # [1, N, P, D], [1, N, P]
    is_warm = torch.zeros(theta.shape[1], dtype=torch.bool)
    is_warm[train_rows.user] = True  # cold users only get a code
    num_fitted = int((stored["has_evidence"] & is_warm).sum())
    if num_fitted < max(args.codes):
        fail(f"only {num_fitted} users have evidence and train rows, fewer than the {max(args.codes)} codes "
             f"asked for: lower --codes")
    return [Profile(name, args.codes[k], theta[:, :, k], num_evidence[:, :, k], stored["gain"][:, k],
                    stored["noise"][k], is_warm & (num_evidence[-1, :, k] > 0), is_rated[k],
                    options.get("method", "score") == "score")
            for k, name in enumerate(stored["names"])]


# ----------------------------------------------------------------------------------------------------------
# whitening: which directions hold more than noise
# ----------------------------------------------------------------------------------------------------------


class Whitening(NamedTuple):
    """Coordinates in which noise has variance 1, sorted by the variance between users"""

    to_unit: torch.Tensor  # [D, R]
    directions: torch.Tensor  # [R, R]
    eigenvalues: torch.Tensor  # [R], descending

    def leading(self, num_dims):
        """Transform [D, C] to the leading directions"""
        return (self.to_unit @ self.directions[:, :num_dims]).float()


def whiten(deviation, gain, noise):
    """deviation θ - mean [N, D], gain [N], noise [D, D] -> Whitening"""
    values, vectors = torch.linalg.eigh(noise.double())
    kept = values > 1e-6 * values.max()  # smaller ones are float32's rounding, not directions
    to_unit = vectors[:, kept] * values[kept].rsqrt()  # [D, R]
    z = gain.double()[:, None] * (deviation.double() @ to_unit)  # [N, R]
    eigenvalues, directions = torch.linalg.eigh(torch.atleast_2d(torch.cov(z.T)))
    return Whitening(to_unit, directions.flip(1), eigenvalues.flip(0))


def informative_dims(eigenvalues, dim, num_users, most, has_noise_level=True):
    """Number of directions in which users differ by more than noise: at least 1, at most `most`

    Pure noise of N users in D = dim dimensions stays below (1 + √(D/N))² (Marchenko and Pastur). Where the
    level of the noise is not known (a few steps of AdamW go as far as the learning rate says), most
    directions are taken to be noise, and the median is its variance.
    """
    level = 1.0 if has_noise_level else float(eigenvalues.median())
    edge = level * (1 + math.sqrt(dim / num_users)) ** 2
    above = int((eigenvalues > edge).sum())
    kept = max(1, min(above, most))
    leading = " ".join(f"{value:.2f}" for value in eigenvalues[:10])
    print(f"  whitened eigenvalues (noise {level:.3g}, its edge {edge:.3g}): {leading} | "
          f"{above} above the edge, {kept} kept")
    return kept


def starting_transform(args, profile, train_rows, valid_rows):
    """Transform [D, C] at which training starts, and the eigenvalues of the whitened profiles (or None)"""
    deviation = profile.deviation[-1, profile.is_fitted]  # [N', D]
    print(f"{profile.name}: {len(deviation):,} users with evidence in train rows, {profile.num_codes} codes")
    transform, eigenvalues = torch.eye(deviation.shape[1]), None
    if args.whiten:
        whitening = whiten(deviation, profile.gain[profile.is_fitted], profile.noise)
        eigenvalues = whitening.eigenvalues
        num_dims = args.dims or informative_dims(eigenvalues, *deviation.shape[::-1], profile.num_codes - 1,
                                                 profile.has_noise_level)
        transform = whitening.leading(num_dims)
        if not args.dims and args.rec_weight and len(valid_rows.user):
            candidates = {f"leading {dims}": transform[:, :dims] for dims in range(1, transform.shape[1] + 1)}
            by_label = label_direction(whitening.leading(16), profile.deviation, train_rows)
            candidates["of the label"] = by_label
            # what ratings say of a user lies in one direction: the choice on few valid rows is noisy, and
            # would often spend the codes on other directions
            transform = by_label if profile.is_rated else choose_directions(args, candidates, profile,
                                                                            train_rows, valid_rows)
    # one scale, so that learning rate and weights mean the same for all profiles
    return transform / (deviation @ transform).std().clamp(min=1e-12), eigenvalues


def label_direction(transform, deviation, rows, prior_weight=3.0, ridge=1e-3):
    """The direction that predicts labels best: transform [D, C] -> [D, 1]; deviation [F + 1, N, D]

    Ridge regression of a train row's label, less the item's mean, on the user's profile, out of fold.
    """
    x = (deviation[rows.fold, rows.user] @ transform).double()  # [R, C]
    num_ratings, num_likes = (torch.bincount(rows.item, weights, minlength=rows.num_items).double()
                              for weights in (torch.ones_like(rows.label), rows.label))
    item_mean = (num_likes + prior_weight * rows.label.mean()) / (num_ratings + prior_weight)
    x, residual = x - x.mean(0), rows.label - item_mean[rows.item]
    covariance = x.T @ x
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
    direction = torch.linalg.solve(covariance, x.T @ (residual - residual.mean()))
    return transform @ F.normalize(direction, dim=0).float()[:, None]


def choose_directions(args, candidates, profile, train_rows, valid_rows):
    """The transform [D, C] among the candidates whose codes give the smallest recommendation loss on valid

    Users may differ most in a direction that says nothing of what they like. But valid rows are few: another
    candidate replaces the last of the `leading` ones, which keeps all directions above the noise, only if its
    loss is smaller by more than the standard error of the difference.
    """
    losses = {}
    for name, transform in candidates.items():
        z = profile.deviation @ transform  # [F + 1, N, C]
        kmeans = KMeans(profile.num_codes, n_init=4, random_state=args.seed)
        kmeans.fit(z[-1, profile.is_fitted].numpy())
        part = {"mean": torch.zeros(()), "transform": transform,
                "codebook": torch.from_numpy(kmeans.cluster_centers_)}
        codes = nearest_codes(part, profile.deviation, profile.num_evidence)
        losses[name] = np.mean([recommendation_losses(codes, profile.num_codes, train_rows, valid_rows, seed)
                                for seed in (args.seed, args.seed + 1)], 0)
    best = min(losses, key=lambda name: losses[name].mean())
    all_leading = [name for name in losses if name.startswith("leading")][-1]
    gain = losses[all_leading] - losses[best]  # [R] of valid
    if gain.mean() <= gain.std() / math.sqrt(len(gain)):
        best = all_leading
    means = "  ".join(f"{name} {loss.mean():.4f}" for name, loss in losses.items())
    print(f"  recommendation loss on valid by directions kept: {means} | {best}")
    return candidates[best]


def recommendation_losses(codes, num_codes, train_rows, valid_rows, seed):
    """Logloss of each valid row at the best of 15 epochs, of a surrogate that reads item and code: numpy [R]

    codes int64 [F + 1, N]. The first 200,000 train rows are enough.
    """
    torch.manual_seed(seed)
    surrogate = Surrogate([num_codes + 1], train_rows.num_items)
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=0.01)
    one_hot = lambda code: [F.one_hot(code, num_codes + 1).float()]
    user, item, label, fold = (column[:200_000] for column in train_rows[:4])
    best = torch.tensor(float("inf"))
    for _ in range(15):
        surrogate.train()
        for batch in torch.randperm(len(user)).split(512):
            logits = surrogate(one_hot(codes[fold[batch], user[batch]]), item[batch])
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(logits, label[batch]).backward()
            optimizer.step()
        surrogate.eval()
        with torch.no_grad():
            logits = surrogate(one_hot(codes[-1, valid_rows.user]), valid_rows.item)
        losses = F.binary_cross_entropy_with_logits(logits, valid_rows.label, reduction="none")
        best = min(best, losses, key=lambda losses: float(losses.mean()))
    return best.numpy()


# ----------------------------------------------------------------------------------------------------------
# model: encoder and codebook per profile, a surrogate DCN that reads the codewords
# ----------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """One profile: deviation [B, D] -> quantized [B, C], VQ loss [], squared drift from the start []"""

    def __init__(self, transform, codebook, beta):
        super().__init__()
        self.register_buffer("start", transform.clone())
        self.transform = nn.Parameter(transform.clone())  # [D, C]
        self.vq = VectorQuantizer(codebook, beta)
        self.register_buffer("usage", torch.zeros(len(codebook), dtype=torch.long))  # rows since `revive`

    def forward(self, deviation):
        z = deviation @ self.transform
        quantized, codes, loss = self.vq(z)
        self.usage += codes.bincount(minlength=len(self.usage))
        return quantized, loss, (z - deviation @ self.start).square().sum(1).mean()

    @torch.no_grad()
    def revive(self, deviation):
        """Move codewords that no row took since the last call to random users [N, D] -> how many moved"""
        dead = self.usage == 0
        self.usage.zero_()
        if dead.any():
            user = torch.randint(len(deviation), (int(dead.sum()),))
            self.vq.codebook.data[dead] = deviation[user] @ self.transform
        return int(dead.sum())


class Surrogate(nn.Module):
    """The recommender that supervises the codes: quantized [B, C] per profile, item [B] -> logits [B].

    The paper does not say how codewords (C wide) meet fields (E wide): here by a linear map per profile. It
    reads no user id, which could take over what the codes should hold.
    """

    def __init__(self, dims, num_items, field_dim=8):
        super().__init__()
        self.item = nn.Embedding(num_items, field_dim)
        nn.init.normal_(self.item.weight, std=0.05)
        self.maps = nn.ModuleList(nn.Linear(dim, field_dim) for dim in dims)
        self.dcn = DCN((len(dims) + 1) * field_dim)

    def forward(self, quantized, item):
        fields = [to_field(q) for to_field, q in zip(self.maps, quantized)] + [self.item(item)]
        return self.dcn(torch.cat(fields, 1))  # [B, (P + 1) E]


def first_codebook(args, z, num_codes, seed):
    """Codewords to start from [K, C]: z [N, C]"""
    if args.init == "kmeans":
        kmeans = KMeans(num_codes, init="k-means++", n_init=10, random_state=seed).fit(z.numpy())
        return torch.tensor(kmeans.cluster_centers_, dtype=torch.float32)
    # as measured in the released code: so far outside that the first codeword that is taken moves to the mean
    # and then takes all users
    direction = F.normalize(torch.randn(num_codes, z.shape[1]), dim=1)
    return direction * z.norm(dim=1).mean() * (2.5 + 0.8 * torch.rand(num_codes, 1))


def nearest_codes(part, theta, num_evidence):
    """Eq. 6: part of codebook.pt, theta [..., D], num_evidence [...] -> code of the nearest codeword [...]

    In double precision, so that a user's code does not depend on the batch; K where there is no evidence.
    """
    z = (theta.double() - part["mean"]) @ part["transform"].double()  # [..., C]
    codes = torch.cdist(z, part["codebook"].double()).argmin(-1)
    return torch.where(num_evidence > 0, codes, len(part["codebook"]))


# ----------------------------------------------------------------------------------------------------------
# train: eq. 5, or the codebook's step of EM
# ----------------------------------------------------------------------------------------------------------


def train(args, quantizers, surrogate, deviations, rows, is_quiet=False):
    """Minimise eq. 5 on the train rows, deviations [F + 1, N, D] by profile -> losses by epoch

    # differs from the paper: θ moves as the image of a shared linear map, and the term L_LM of eq. 7 is its
    # quadratic approximation around its minimum, in whitened coordinates the squared drift. Without it, the
    # commitment term shrinks all profiles to a point.
    """
    optimizer = torch.optim.Adam([*quantizers.parameters(), *surrogate.parameters()], lr=args.lr)
    curve = []
    for epoch in range(args.epochs):
        started, sums = time.time(), torch.zeros(3)
        for batch in torch.randperm(len(rows.user)).split(args.batch_size):
            user, fold = rows.user[batch], rows.fold[batch]
            quantized, vq_losses, drifts = zip(*[quantizer(deviation[fold, user]) for quantizer, deviation
                                                 in zip(quantizers, deviations)])
            vq_loss, drift = sum(vq_losses), sum(drifts)
            logits = surrogate(quantized, rows.item[batch])
            rec_loss = F.binary_cross_entropy_with_logits(logits, rows.label[batch])
            loss = drift + args.vq_weight * vq_loss + args.rec_weight * rec_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums += len(batch) * torch.stack([vq_loss, rec_loss, drift]).detach()
        means = (sums / len(rows.user)).tolist()
        curve.append(dict(zip(("vq_loss", "rec_loss", "drift"), means)))
        num_revived = 0
        if args.revive:
            num_revived = sum(quantizer.revive(deviation[-1][rows.user.unique()])
                              for quantizer, deviation in zip(quantizers, deviations))
        if not is_quiet:
            revived = f" | {num_revived} codewords revived" if num_revived else ""
            print(f"epoch {epoch + 1:02d}/{args.epochs} | vq {means[0]:.4f} rec {means[1]:.4f} "
                  f"drift {means[2]:.4f} | {time.time() - started:.1f}s{revived}")
    return curve


def fit(args, profiles, transforms, rows, seed):
    """Codebooks and surrogate, started and trained by the seed -> parts of codebook.pt, losses by epoch

    transforms [D, C] by profile. Prints the losses for args.seed only.
    """
    torch.manual_seed(seed)
    quantizers = nn.ModuleList()
    for profile, transform in zip(profiles, transforms):
        z = (profile.deviation[-1] @ transform)[profile.is_fitted]
        quantizers.append(Quantizer(transform, first_codebook(args, z, profile.num_codes, seed), args.beta))
    surrogate = Surrogate([transform.shape[1] for transform in transforms], rows.num_items)
    deviations = [profile.deviation for profile in profiles]
    curve = train(args, quantizers, surrogate, deviations, rows, is_quiet=seed != args.seed)
    parts = [{"codebook": quantizer.vq.codebook.detach(), "mean": profile.mean,
              "transform": quantizer.transform.detach()}
             for quantizer, profile in zip(quantizers, profiles)]
    return parts, curve


def move_codewords(profile, prior, max_rounds=100):
    """The codebook's step of EM (Algorithm 1): each codeword of the prior moves to the mean of its users,
    until no user changes (Lloyd). The VQ loss of eq. 7 cannot rise. -> part of codebook.pt

    # differs from the paper: after the first round of EM, the recommendation loss moves nothing.
    """
    z = (profile.theta[-1, profile.is_fitted] - prior["mean"]) @ prior["transform"]  # [N', C]
    codebook, previous, losses = prior["codebook"].clone(), None, []
    for _ in range(max_rounds):
        distance, codes = torch.cdist(z, codebook).min(1)
        losses.append(float(distance.square().sum()) / len(z))
        if previous is not None and torch.equal(codes, previous):
            break
        previous = codes
        for code in codes.unique():
            codebook[code] = z[codes == code].mean(0)
    print(f"{profile.name}: VQ loss {losses[0]:.4f} -> {losses[-1]:.4f} per user, the codewords of the last "
          f"round moved to their users' means")
    return {"codebook": codebook, "mean": prior["mean"], "transform": prior["transform"]}


# ----------------------------------------------------------------------------------------------------------
# evaluate
# ----------------------------------------------------------------------------------------------------------


def describe_codes(profile, codes_by_seed):
    """Print how many users have each code, and how stable codes [N] are between seeds -> sidecar facts"""
    name, num_codes = profile.name, profile.num_codes
    usage, perplexity = usage_of(codes_by_seed[0], num_codes)
    share = usage.min() / max(usage.sum(), 1)
    stability = seed_agreement(codes_by_seed, num_codes)
    text = (f"{name}: users per code {' '.join(map(str, usage))} | "
            f"perplexity {perplexity:.2f} of {num_codes} | smallest share {share:.3f}")
    if stability is not None:
        text += f" | ARI between seeds {stability:.3f}"
    if perplexity < num_codes / 2:
        text += f"  <- below K/2 = {num_codes / 2:g}: the codebook is collapsing"
    print(text)
    return {f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_smallest_share": share,
            f"{name}_stability": stability}


def probe_profiles(args, profiles, users):
    """MovieLens: do the 32 leading directions of all profiles predict gender and age? -> sidecar facts"""
    if not {"gender", "age"} <= set(users):
        return {}
    is_probed = torch.stack([profile.is_fitted for profile in profiles]).all(0)
    features = []
    for profile in profiles:
        theta = profile.theta[-1, is_probed]
        deviation = theta - theta.mean(0)
        if args.whiten:
            deviation = deviation @ whiten(deviation, profile.gain[is_probed], profile.noise).leading(32)
        features.append(deviation)
    return probe_demographics(torch.cat(features, 1).numpy(), users[is_probed.numpy()])


def apply(args):
    """Codes for the new users of `02 --only-users`, with the codebook unchanged"""
    stored, codebook, _ = read_artifacts(args, "new_profiles.pt", "codebook.pt", "profiles.pt")
    table = pd.DataFrame({"user_id": stored["user_id"]})
    for k, name in enumerate(stored["names"]):
        table[name] = nearest_codes(codebook[name], stored["profiles"][:, k], stored["num_evidence"][:, k])
    path = write_artifact(args, "new_codes.parquet", table, ["new_profiles.pt", "codebook.pt"],
                          users=len(table))
    num_unknown = int((stored["num_evidence"] == 0).all(1).sum())
    print(f"wrote {path}: {len(table):,} new users, {num_unknown:,} of them without evidence")


def main(args):
    start_stage(args)
    if args.apply:
        return apply(args)
    started = time.time()
    stored, interactions, users = read_artifacts(args, "profiles.pt", "interactions.parquet", "users.parquet")
    train_rows = rows_of_split(interactions, "train", stored.get("fold"))
    valid_rows = rows_of_split(interactions, "valid")
    profiles, facts = read_profiles(args, stored, train_rows), {}

    if "prior" in stored:  # a round of EM
        fits = [[move_codewords(*pair) for pair in zip(profiles, stored["prior"].values())]]
    else:
        transforms = []
        for profile in profiles:
            transform, eigenvalues = starting_transform(args, profile, train_rows, valid_rows)
            transforms.append(transform)
            if eigenvalues is not None:
                facts[f"{profile.name}_eigenvalues"] = eigenvalues
        seeds = range(args.seed, args.seed + 1 + args.stability)
        fits, curves = zip(*[fit(args, profiles, transforms, train_rows, seed) for seed in seeds])
        facts["curve"] = curves[0]

    bank, codebook = pd.DataFrame({"user": users["user"], "user_id": users["user_id"]}), {}
    train_codes = pd.DataFrame({"user": train_rows.user, "item": train_rows.item})
    for k, profile in enumerate(profiles):
        codes = [nearest_codes(parts[k], profile.theta, profile.num_evidence).numpy() for parts in fits]
        bank[profile.name] = codes[0][-1]
        train_codes[profile.name] = codes[0][train_rows.fold, train_rows.user]
        usage, _ = usage_of(bank.loc[train_rows.user.unique(), profile.name].to_numpy(), profile.num_codes)
        codebook[profile.name] = fits[0][k] | {"usage": torch.tensor(usage)}  # of cold users, nothing
        facts |= describe_codes(profile, [of_seed[-1] for of_seed in codes])
    bayes_ari = read_sidecar(args, "users.parquet").get("bayes_ari", {})
    facts |= compare_with_truth({profile.name: bank[profile.name] for profile in profiles}, users, bayes_ari)
    facts |= probe_profiles(args, profiles, users)

    facts |= {"names": stored["names"], "codes": args.codes, "users": len(bank),
              "seconds": time.time() - started}
    inputs, has_folds = ["profiles.pt", "interactions.parquet"], "fold" in stored
    write_artifact(args, "codebook.pt", codebook, inputs, **facts)
    inputs.append("codebook.pt")
    if has_folds:
        write_artifact(args, "train_codes.parquet", train_codes, inputs, names=stored["names"])
    path = write_artifact(args, "feature_bank.parquet", bank, inputs, has_folds=has_folds, **facts)
    figures = ", ".join(f"{profile.name} {facts[f'{profile.name}_perplexity']:.2f} of {profile.num_codes}"
                        for profile in profiles)
    print(f"wrote {path}: {len(bank):,} users | perplexity {figures}")


if __name__ == "__main__":
    main(parse_args())
