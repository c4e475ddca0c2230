"""Stage 3 of 5: quantize profiles into codes, one small integer per user and profile name.

Each profile is whitened by its noise (what sampling alone would make of it) and projected on directions in
which users differ: as many of the leading ones as stand above the noise, at most K - 1, or the one along
which labels move most, whichever makes a surrogate recommender predict the validation rows best. A codebook
per profile starts at k-means++ (the released start collapses to one code) and is trained by eq. 5: codebook
term, commitment term, and the recommendation loss of a surrogate DCN, through the straight-through estimator.
A user's code is the nearest codeword (eq. 6). `--paper` = no whitening and the paper's loss weights,
`--released` = the released code's recipe. Of profiles with folds, train rows are told by the one that has not
seen them, here and in stage 4. `--apply` gives the codes of `02 --only-users`' new users, from the codebook
as it is.

Reads   profiles.pt, interactions.parquet (train rows; valid rows choose directions), users.parquet (truth,
        for checking only); with --apply new_profiles.pt and codebook.pt instead
Writes  codebook.pt: per profile name codebook float32 [K, C], transform float32 [D, C], mean float32 [D],
        usage int64 [K] (users with train rows)
        feature_bank.parquet: user, user_id, one int column per profile name; K = no evidence of this user
        train_codes.parquet: with folds, the codes of each train row without its own fold, in order
        new_codes.parquet: with --apply, user_id and the codes

Example: python 03_quantize.py        (30 seconds)
  wrote runs/demo/feature_bank.parquet: 1,975 users | perplexity hobby 3.99 of 4, background 2.99 of 3
"""

import argparse
import itertools
import math
import time

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F

from common import (DCN, VectorQuantizer, at_least, fail, options_text, parse_with_presets, read_artifacts,
                    read_sidecar, stage_parser, start_stage, usage_of, write_artifact)

PAPER = {"whiten": False, "vq_weight": 0.001, "rec_weight": 0.001, "beta": 1.0}
RELEASED = {"whiten": False, "init": "released", "vq_weight": 0.5, "rec_weight": 0.0, "beta": 0.0, "lr": 0.01,
            "revive": False}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of k-means++ and of the training")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--released", action="store_true", help="the released code's recipe: " + options_text(RELEASED))
    add("--apply", action="store_true", help="new users of stage 2's --only-users; nothing is trained")
    add("--codes", type=at_least(2), nargs="+", metavar="K",
        help="codebook size per profile (default: 4 3, 4 for each further one, 8 where ratings are told)")
    add("--init", choices=["kmeans", "released"], default="kmeans",
        help="first codewords: k-means++, or at random at 2.5 to 3.3 times the profiles' norm")
    add("--codebook", choices=["gradient", "ema"], default="gradient",
        help="codewords follow the codebook term of eq. 5, or an exponential moving average (decay .99)")
    add("--revive", action=argparse.BooleanOptionalAction, default=True,
        help="a codeword that no user took for an epoch moves to a user at random")
    add("--whiten", action=argparse.BooleanOptionalAction, default=True,
        help="whiten by the noise and keep what stands above it, or take θ as it is")
    add("--stability", type=at_least(0), default=1, metavar="R",
        help="quantize again with R other seeds: ARI of the codes between seeds")
    add("--dims", type=at_least(0), default=0,
        help="directions kept, C (0 = chosen on valid; all above the noise, up to K - 1, "
             "if --rec-weight is 0)")
    add("--epochs", type=at_least(1), default=10, help="passes over the train rows (eq. 5)")
    add("--lr", type=at_least(0, float), default=0.003, help="learning rate of Adam")
    add("--batch-size", type=at_least(1), default=512, help="train rows per step")
    add("--vq-weight", type=at_least(0, float), default=1.0, help="weight of the quantization loss, λ")
    add("--beta", type=at_least(0, float), default=0.25, help="weight of the commitment term, β")
    add("--rec-weight", type=at_least(0, float), default=1.0, help="weight of the recommendation loss, γ")
    args = parse_with_presets(parser, argv, paper=PAPER, released=RELEASED)
    if args.paper and args.released:
        parser.error("--paper and --released are two recipes: choose one")
    given = [name for name in vars(args) if name not in ("run_dir", "apply")
             and getattr(args, name) != parser.get_default(name)]
    if args.apply and given:
        parser.error(f"--apply takes all from the codebook: leave out --{given[0].replace('_', '-')}")
    if args.dims and not args.whiten:
        parser.error("--dims counts directions of whitened profiles: leave it out, or whiten")
    return args


# ----------------------------------------------------------------------------------------------------------
# whitening: distances that count noise as 1
# ----------------------------------------------------------------------------------------------------------


def whiten(deviation, gain, noise, num_dims, most, is_to_scale=True, quiet=False):
    """Directions in which users differ more than sampling explains.

    deviation θ - θ̄ [N, D], gain [N], noise [D, D] (covariance of gain · deviation, if users did not differ)
    -> transform [D, C], all eigenvalues. Whitened, noise has variance 1; pure noise of N users in D
    dimensions stays below (1 + √(D/N))² (Marchenko and Pastur), so what stands above tells of users.
    is_to_scale: else noise is known but for a factor (a few steps of AdamW go as far as the learning rate
    says), and most directions are taken to be noise: their median is its variance.
    """
    values, vectors = torch.linalg.eigh(noise.double())
    kept = values > 1e-6 * values.max()  # what is below is float32's rounding, not a direction
    to_unit = vectors[:, kept] * values[kept].rsqrt()  # [D, R]
    z = gain.double()[:, None] * (deviation.double() @ to_unit)  # [N, R]
    eigenvalues, directions = torch.linalg.eigh(torch.atleast_2d(torch.cov(z.T)))
    eigenvalues, directions = eigenvalues.flip(0), directions.flip(1)
    level = 1.0 if is_to_scale else float(eigenvalues.median())
    edge = level * (1 + math.sqrt(noise.shape[0] / len(z))) ** 2
    above = int((eigenvalues > edge).sum())
    num_dims = min(num_dims or max(1, min(above, most)), len(eigenvalues))
    leading = " ".join(f"{value:.2f}" for value in eigenvalues[:10])
    if not quiet:
        print(f"  whitened eigenvalues (noise {level:.3g}, its edge {edge:.3g}): {leading} | "
              f"{above} above the edge, {num_dims} kept")
    return (to_unit @ directions[:, :num_dims]).float(), eigenvalues


# ----------------------------------------------------------------------------------------------------------
# model: encoder and codebook per profile, a surrogate DCN that reads the codewords
# ----------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """One profile: deviation [B, D] -> quantized [B, C], codes [B], VQ loss [], drift from the start [].

    decay: None, or that of a codebook that follows the moving average of what its codewords were given.
    """

    def __init__(self, transform, codebook, beta, decay=None):
        super().__init__()
        self.register_buffer("start", transform.clone())
        self.transform = nn.Parameter(transform.clone())  # [D, C]
        self.vq = VectorQuantizer(codebook, beta)
        self.decay = decay
        self.register_buffer("count", torch.ones(len(codebook)))  # moving averages: rows per code, their sum
        self.register_buffer("total", codebook.clone())
        self.register_buffer("taken", torch.zeros(len(codebook)))  # rows per code since the last revival

    def forward(self, deviation):
        z = deviation @ self.transform
        quantized, codes, loss = self.vq(z)
        if self.training:
            self.follow(z.detach(), codes)
        return quantized, codes, loss, (z - deviation @ self.start).square().sum(1).mean()

    @torch.no_grad()
    def follow(self, z, codes):
        """Count who took which codeword and, with a decay, move the codewords (van den Oord et al., 2017)."""
        taken = F.one_hot(codes, len(self.taken)).to(z.dtype)  # [B, K]
        self.taken += taken.sum(0)
        if self.decay is not None:
            self.count.lerp_(taken.sum(0), 1 - self.decay)
            self.total.lerp_(taken.T @ z, 1 - self.decay)
            self.vq.codebook.data = self.total / self.count.clamp(min=1e-6)[:, None]

    @torch.no_grad()
    def revive(self, deviation):
        """Move codewords that nobody took since the last call to users at random -> how many"""
        dead = self.taken == 0
        self.taken.zero_()
        if dead.any():
            chosen = deviation[torch.randint(len(deviation), (int(dead.sum()),))] @ self.transform
            self.vq.codebook.data[dead] = chosen
            self.count[dead], self.total[dead] = 1.0, chosen
        return int(dead.sum())


class Surrogate(nn.Module):
    """The recommender that supervises the codes: quantized [B, C] per profile, item [B] -> logits [B].

    The paper does not say how codewords (C wide) meet fields (E wide): a linear map per profile. No user id
    is fed: what the codes should tell must not be learnt beside them.
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


def rec_loss_of(codes, num_codes, rows, valid, num_items, seed, num_epochs=15, most=200_000):
    """Logloss of each valid row [V], at the best epoch, of a surrogate that reads item and code alone

    codes int64 [F + 1, N]; rows (user, item, label, fold) [R], the first `most` of them; valid (user, item,
    label) [V].
    """
    torch.manual_seed(seed)
    surrogate = Surrogate([num_codes + 1], num_items)
    optimizer = torch.optim.Adam(surrogate.parameters(), lr=0.01)
    one_hot = lambda code: [F.one_hot(code, num_codes + 1).float()]
    user, item, label, fold = (column[:most] for column in rows)
    best = torch.tensor(float("inf"))
    for _ in range(num_epochs):
        surrogate.train()
        for batch in torch.randperm(len(user)).split(512):
            logits = surrogate(one_hot(codes[fold[batch], user[batch]]), item[batch])
            optimizer.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(logits, label[batch]).backward()
            optimizer.step()
        surrogate.eval()
        with torch.no_grad():
            logits = surrogate(one_hot(codes[-1, valid[0]]), valid[1])
        best = min(best, F.binary_cross_entropy_with_logits(logits, valid[2], reduction="none"),
                   key=lambda losses: float(losses.mean()))
    return best.numpy()


def label_direction(transform, deviation, rows, num_items, prior_weight=3.0, ridge=1e-3):
    """The direction along which what users like moves most: transform [D, C] of whitened ones -> [D, 1]

    Ridge regression of a train row's label, less the item's mean, on the user's profile, out of fold.
    """
    user, item, label, fold = rows
    x = (deviation[fold, user] @ transform).double()  # [R, C]
    count, likes = (torch.bincount(item, weights, minlength=num_items).double()
                    for weights in (torch.ones_like(label), label))
    of_item = (likes + prior_weight * label.mean()) / (count + prior_weight)
    x, residual = x - x.mean(0), label - of_item[item]
    covariance = x.T @ x
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance))
    direction = torch.linalg.solve(covariance, x.T @ (residual - residual.mean()))
    return transform @ F.normalize(direction, dim=0).float()[:, None]


def choose_directions(args, candidates, deviation, mine, num_evidence, num_codes, rows, valid, num_items):
    """The candidate, a transform [D, C'], whose codes give the least recommendation loss on valid rows

    Eigenvalues say how far users differ, not whether it matters to what they like: of ratings, say, only how
    generous somebody is matters much, and codes spent on other directions are lost to it. But a direction in
    which users differ is given up only for a loss that is less by more than its standard error: valid rows
    are few. So the last of the `leading` candidates, that with the most directions, gives way to no tie.
    """
    losses = {}
    for name, transform in candidates.items():
        z = deviation @ transform
        kmeans = KMeans(num_codes, n_init=4, random_state=args.seed).fit(z[-1, mine].numpy())
        part = {"mean": torch.zeros(()), "transform": transform,
                "codebook": torch.from_numpy(kmeans.cluster_centers_)}
        codes = codes_of(part, deviation, num_evidence)
        losses[name] = np.mean([rec_loss_of(codes, num_codes, rows, valid, num_items, seed)
                                for seed in (args.seed, args.seed + 1)], 0)
    best = min(losses, key=lambda name: losses[name].mean())
    all_leading = [name for name in losses if name.startswith("leading")][-1]
    gain = losses[all_leading] - losses[best]  # [V]
    if gain.mean() <= gain.std() / math.sqrt(len(gain)):
        best = all_leading
    told = "  ".join(f"{name} {loss.mean():.4f}" for name, loss in losses.items())
    print(f"  recommendation loss on valid by directions kept: {told} | {best}")
    return candidates[best]


def train(args, quantizers, surrogate, deviations, user, item, label, fold, quiet=False):
    """Minimise eq. 5 (with eq. 7's L_LM near its minimum) on the train rows; returns each epoch's losses.

    deviations: per profile [F + 1, N, D]; fold [R] says which of them may tell of a row.
    # differs from the paper: θ moves here as the image of a shared linear map, and L_LM as its quadratic
    # approximation, which in whitened coordinates is the squared drift: without it, commitment shrinks all to
    # a point.
    """
    parameters = [value for name, value in quantizers.named_parameters()
                  if args.codebook == "gradient" or "codebook" not in name]
    optimizer = torch.optim.Adam([*parameters, *surrogate.parameters()], lr=args.lr)
    curve = []
    for epoch in range(args.epochs):
        started, sums = time.time(), torch.zeros(3)
        quantizers.train()
        for rows in torch.randperm(len(user)).split(args.batch_size):
            parts = [quantizer(deviation[fold[rows], user[rows]])
                     for quantizer, deviation in zip(quantizers, deviations)]
            vq_loss, drift = sum(part[2] for part in parts), sum(part[3] for part in parts)
            logits = surrogate([part[0] for part in parts], item[rows])
            rec_loss = F.binary_cross_entropy_with_logits(logits, label[rows])
            loss = drift + args.vq_weight * vq_loss + args.rec_weight * rec_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums += len(rows) * torch.stack([vq_loss, rec_loss, drift]).detach()
        means = (sums / len(user)).tolist()
        curve.append(dict(zip(("vq_loss", "rec_loss", "drift"), means)))
        revived = sum(quantizer.revive(deviation[-1][user.unique()])
                      for quantizer, deviation in zip(quantizers, deviations)) if args.revive else 0
        if not quiet:
            print(f"epoch {epoch + 1:02d}/{args.epochs} | vq {means[0]:.4f} rec {means[1]:.4f} "
                  f"drift {means[2]:.4f} | {time.time() - started:.1f}s"
                  + f" | {revived} codewords revived" * bool(revived))
    return curve


def first_codebook(args, z, num_codes, seed):
    """Codewords to start from [K, C]: z [N, C]"""
    if args.init == "kmeans":
        kmeans = KMeans(num_codes, init="k-means++", n_init=10, random_state=seed).fit(z.numpy())
        return torch.tensor(kmeans.cluster_centers_, dtype=torch.float32)
    # as measured in the released code: far outside, so that the first one taken shrinks to the
    # mean and wins all
    direction = F.normalize(torch.randn(num_codes, z.shape[1]), dim=1)
    return direction * z.norm(dim=1).mean() * (2.5 + 0.8 * torch.rand(num_codes, 1))


def fit(args, starts, deviations, told, num_items, rows, seed, quiet=False):
    """Start codebooks and surrogate by the seed and train them: quantizers, curve of the losses

    starts: transform [D, C] per profile; told: who has evidence in train rows, bool [N] per profile; rows:
    user, item, label, fold [R].
    """
    torch.manual_seed(seed)
    quantizers = nn.ModuleList()
    for transform, deviation, mine, num_codes in zip(starts, deviations, told, args.codes):
        codebook = first_codebook(args, (deviation[-1] @ transform)[mine], num_codes, seed)
        decay = 0.99 if args.codebook == "ema" else None
        quantizers.append(Quantizer(transform, codebook, args.beta, decay))
    surrogate = Surrogate([transform.shape[1] for transform in starts], num_items)
    return quantizers, train(args, quantizers, surrogate, deviations, *rows, quiet=quiet)


def codes_of(part, profiles, num_evidence):
    """Nearest codewords (eq. 6): part of codebook.pt, profiles [..., D], num_evidence [...] -> int64 [...]

    In double precision, so that a user gets the same code in any company; K where there is no evidence.
    """
    z = (profiles.double() - part["mean"]) @ part["transform"].double()  # [..., C]
    codes = torch.cdist(z, part["codebook"].double()).argmin(-1)
    return torch.where(num_evidence > 0, codes, len(part["codebook"]))


def probe_known(args, stored, names, users, told, num_dims=32):
    """MovieLens: does a logistic regression on the profiles find gender and age? AUC over 5 folds, users with
    evidence; a profile gives its 32 leading whitened directions. For checking only.
    """
    if not {"gender", "age"} <= set(users):
        return {}
    mine, parts = torch.stack(told).all(0), []
    for k in range(len(names)):
        deviation = stored["profiles"][-1, mine, k] - stored["profiles"][-1, mine, k].mean(0)
        if args.whiten:
            deviation = deviation @ whiten(deviation, stored["gain"][mine, k], stored["noise"][k], num_dims,
                                           0, quiet=True)[0]
        parts.append(deviation)
    x, known = torch.cat(parts, 1).numpy(), users[mine.numpy()]
    age = pd.to_numeric(known["age"], errors="coerce")
    facts = {}
    for name, label in (("gender", known["gender"] == "M"), ("age_over_30", age > 30)):
        facts[f"probe_{name}"] = probe_auc(x, label.to_numpy())
    print("probe (logistic regression on the profiles, 5 folds): "
          + "  ".join(f"{name.removeprefix('probe_')} AUC {value:.3f}" for name, value in facts.items()))
    return facts


def probe_auc(x, label, repeats=3):
    """AUC of a logistic regression on x [N, C] over 5 folds, mean over three ways to deal them"""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    aucs = []
    for seed in range(repeats):
        folds = StratifiedKFold(5, shuffle=True, random_state=seed)
        found = cross_val_predict(model, x, label, cv=folds, method="predict_proba")[:, 1]
        aucs.append(roc_auc_score(label, found))
    return float(np.mean(aucs))


def check_truth(codes, num_codes, users, bayes_ari):
    """On planted data: ARI of the codes with the truth, beside the best possible, and with other truths."""
    figures = {}
    for name, column in codes.items():
        for true in [column for column in users if column.startswith("true_")]:
            figures[f"{name}_vs_{true}"] = adjusted_rand_score(users[true], column)
        own, best = figures.get(f"{name}_vs_true_{name}"), bayes_ari.get(name)
        if own is not None and best:
            figures[f"{name}_share_of_bayes"] = own / best
            cross = [f"{value:.3f} {key}" for key, value in figures.items()
                     if key.startswith(f"{name}_vs_") and key != f"{name}_vs_true_{name}"]
            print(f"{name}: ARI {own:.3f} of the Bayes-optimal {best:.3f} ({own / best:.0%}); "
                  f"cross-ARI {', '.join(cross)}")
    return figures


def apply(args):
    """Codes for the new users of `02 --only-users`, from the codebook as it is."""
    stored, codebook, _ = read_artifacts(args, "new_profiles.pt", "codebook.pt", "profiles.pt")
    table = pd.DataFrame({"user_id": stored["user_id"]})
    for k, name in enumerate(stored["names"]):
        table[name] = codes_of(codebook[name], stored["profiles"][:, k], stored["num_evidence"][:, k]).numpy()
    path = write_artifact(args, "new_codes.parquet", table, ["new_profiles.pt", "codebook.pt"],
                          users=len(table))
    unknown = int((stored["num_evidence"] == 0).all(1).sum())
    print(f"wrote {path}: {len(table):,} new users, {unknown:,} of them without evidence")


def stability_of(found, num_codes):
    """Mean ARI of the codes between pairs of seeds: found, a list of codes [N]; nan for one seed"""
    pairs = [adjusted_rand_score(one[one < num_codes], two[one < num_codes])
             for one, two in itertools.combinations(found, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def is_rated(args, names):
    """Is each profile told how users rated? list of bool, by the options of stage 2"""
    options = {"ratings": "none", "route": ["none"]} | read_sidecar(args, "profiles.pt")["options"]
    routes = options["route"] if options["route"] != ["none"] else ["rating"] * len(names)
    return [options["ratings"] != "none" and "rating" in route.split("+") for route in routes]


def starts_of(args, stored, names, told, rows, valid, num_items):
    """Transform [D, C] and mean [D] of each profile (see whiten), profiles around the mean [F + 1, N, D]"""
    rated = is_rated(args, names)
    is_to_scale = read_sidecar(args, "profiles.pt")["options"].get("method", "score") == "score"
    starts, means, deviations, eigenvalues = [], [], [], {}
    for k, (name, num_codes) in enumerate(zip(names, args.codes)):
        profiles, mine = stored["profiles"][:, :, k], told[k]
        means.append(profiles[-1, mine].mean(0))
        deviation = profiles - means[-1]
        print(f"{name}: {int(mine.sum()):,} users with evidence in train rows, {num_codes} codes")
        if args.whiten:
            transform, values = whiten(deviation[-1, mine], stored["gain"][mine, k], stored["noise"][k],
                                       args.dims, num_codes - 1, is_to_scale)
            eigenvalues[f"{name}_eigenvalues"] = values.tolist()
            if not args.dims and args.rec_weight and len(valid[0]):
                every, _ = whiten(deviation[-1, mine], stored["gain"][mine, k], stored["noise"][k], 16, 0,
                                  quiet=True)
                of_label = label_direction(every, deviation, rows, num_items)
                candidates = {f"leading {dims}": transform[:, :dims]
                              for dims in range(1, transform.shape[1] + 1)} | {"of the label": of_label}
                # what ratings tell of a user's likings lies in one direction: the choice, made by a surrogate
                # on few valid rows, is noisy and would often spend the codes on others
                transform = of_label if rated[k] else choose_directions(
                    args, candidates, deviation, mine, stored["num_evidence"][:, :, k], num_codes, rows,
                    valid, num_items)
        else:
            transform = torch.eye(deviation.shape[-1])
        # one scale, so that learning rate and weights mean the same for all
        starts.append(transform / (deviation[-1, mine] @ transform).std().clamp(min=1e-12))
        deviations.append(deviation)  # users without evidence sit at the mean: no train row is theirs
    return starts, means, deviations, eigenvalues


def follow_prior(args, prior, stored, told, rounds=100):
    """The codebook's step of EM (Algorithm 1): transform and codewords of the prior, the codewords moved to
    the means of their users until nobody changes (Lloyd); the quantization loss of eq. 7 cannot rise.

    # differs from the paper: after the first round the recommendation loss moves nothing any more.
    """
    quantizers, means, losses = nn.ModuleList(), [], []
    for k, (name, part) in enumerate(prior.items()):
        z = (stored["profiles"][-1, told[k], k] - part["mean"]) @ part["transform"]
        codebook, last = part["codebook"].clone(), None
        for _ in range(rounds):
            distance, codes = torch.cdist(z, codebook).min(1)
            losses.append(float(distance.square().sum()))
            if last is not None and torch.equal(codes, last):
                break
            last = codes
            for code in codes.unique():
                codebook[code] = z[codes == code].mean(0)
        quantizers.append(Quantizer(part["transform"], codebook, args.beta))
        means.append(part["mean"])
        print(f"{name}: quantization loss {losses[0] / len(z):.4f} -> {losses[-1] / len(z):.4f} per user, "
              f"the codebook of the last round moved to its users' means")
        losses = []
    return quantizers, means, {}


def main(args):
    start_stage(args)
    started = time.time()
    if args.apply:
        return apply(args)
    stored, interactions, users = read_artifacts(args, "profiles.pt", "interactions.parquet", "users.parquet")
    names = stored["names"]
    if "prior" in stored:
        sizes = [len(part["codebook"]) for part in stored["prior"].values()]
        if args.codes not in (None, sizes):
            fail(f"--codes {' '.join(map(str, args.codes))}: the profiles were pulled to a codebook of "
                 f"{' '.join(map(str, sizes))} codes; leave --codes out, or run stage 2 without --prior")
        defaults = vars(parse_args([])) | {name: getattr(args, name) for name in ("run_dir", "seed", "codes")}
        if given := [name for name, value in vars(args).items() if value != defaults[name]]:
            fail(f"--{given[0].replace('_', '-')}: the profiles were pulled to a codebook, which now only "
                 f"moves to its users' means; leave it out, or run stage 2 without --prior")
        args.codes = sizes
    sizes = [8 if rated else size for size, rated in zip([4, 3, *[4] * len(names)], is_rated(args, names))]
    args.codes = args.codes or sizes
    if len(args.codes) != len(names):
        fail(f"--codes gives {len(args.codes)} size(s) ({' '.join(map(str, args.codes))}), but profiles.pt "
             f"holds {len(names)} profiles ({', '.join(names)}): give one size for each")
    rows = interactions[interactions["split"] == "train"]
    has_folds = "fold" in stored
    if not has_folds:
        stored |= {key: stored[key][None] for key in ("profiles", "num_evidence")}  # [1, N, P, D], [1, N, P]
    is_warm = torch.zeros(len(users), dtype=torch.bool)
    is_warm[rows["user"].unique()] = True  # nobody else moves a codeword: cold users only get a code
    known = int((stored["has_evidence"] & is_warm).sum())
    if known < max(args.codes):
        fail(f"only {known} users have evidence and train rows, fewer than the {max(args.codes)} codes asked "
             f"for: lower --codes")
    columns_of = lambda rows: (*(torch.tensor(rows[column].to_numpy()) for column in ("user", "item")),
                               torch.tensor(rows["label"].to_numpy(), dtype=torch.float32))
    user, item, label = columns_of(rows)
    fold = stored["fold"] if has_folds else torch.zeros(len(rows), dtype=torch.long)

    told = [is_warm & (stored["num_evidence"][-1, :, k] > 0) for k in range(len(names))]
    num_items, of_rows = int(interactions["item"].max()) + 1, (user, item, label, fold)
    valid = columns_of(interactions[interactions["split"] == "valid"])
    prior = stored.get("prior")
    if prior:  # a round of EM
        quantizers, means, facts = follow_prior(args, prior, stored, told)
    else:
        starts, means, deviations, facts = starts_of(args, stored, names, told, of_rows, valid, num_items)
        quantizers, facts["curve"] = fit(args, starts, deviations, told, num_items, of_rows, args.seed)
    parts = lambda fitted: [{"codebook": quantizer.vq.codebook.detach(), "mean": mean,
                             "transform": quantizer.transform.detach()}
                            for quantizer, mean in zip(fitted, means)]
    coded = lambda fitted: [codes_of(part, stored["profiles"][:, :, k],
                                     stored["num_evidence"][:, :, k]).numpy()
                            for k, part in enumerate(parts(fitted))]  # [F + 1, N] each
    codes = coded(quantizers)
    others = [coded(fit(args, starts, deviations, told, num_items, of_rows, seed, quiet=True)[0])
              for seed in range(args.seed + 1, args.seed + 1 + (0 if prior else args.stability))]

    bank, codebook = pd.DataFrame({"user": users["user"], "user_id": users["user_id"]}), {}
    for k, (name, num_codes, part) in enumerate(zip(names, args.codes, parts(quantizers))):
        bank[name] = codes[k][-1]
        usage, perplexity = usage_of(bank[name].to_numpy(), num_codes)
        share = usage.min() / max(usage.sum(), 1)
        stability = stability_of([found[k][-1] for found in [codes, *others]], num_codes)
        between = f" | ARI between seeds {stability:.3f}" if others else ""
        warning = f"  <- below K/2 = {num_codes / 2:g}: the codebook is collapsing"
        print(f"{name}: users per code {' '.join(map(str, usage))} | "
              f"perplexity {perplexity:.2f} of {num_codes} | smallest share {share:.3f}{between}"
              f"{warning if perplexity < num_codes / 2 else ''}")
        facts |= {f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_smallest_share": share,
                  f"{name}_stability": stability if stability == stability else None}
        of_warm, _ = usage_of(bank.loc[is_warm.numpy(), name].to_numpy(), num_codes)
        codebook[name] = part | {"usage": torch.tensor(of_warm)}  # cold users move nothing that others read

    bayes_ari = read_sidecar(args, "users.parquet").get("bayes_ari", {})
    facts |= check_truth({name: bank[name] for name in names}, args.codes, users, bayes_ari)
    facts |= probe_known(args, stored, names, users, told)
    facts |= {"names": names, "codes": args.codes, "users": len(bank), "seconds": time.time() - started}
    made_from = ["profiles.pt", "interactions.parquet"]
    write_artifact(args, "codebook.pt", codebook, made_from, **facts)
    made_from.append("codebook.pt")
    if has_folds:
        table = pd.DataFrame({"user": user.numpy(), "item": item.numpy()})
        for name, column in zip(names, codes):
            table[name] = column[fold.numpy(), user.numpy()]
        write_artifact(args, "train_codes.parquet", table, made_from, names=names)
    path = write_artifact(args, "feature_bank.parquet", bank, made_from, has_folds=has_folds, **facts)
    figures = [f"{name} {facts[f'{name}_perplexity']:.2f} of {num_codes}"
               for name, num_codes in zip(names, args.codes)]
    print(f"wrote {path}: {len(bank):,} users | perplexity {', '.join(figures)}")


if __name__ == "__main__":
    main(parse_args())
