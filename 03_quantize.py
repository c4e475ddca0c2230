"""Stage 3 of 5: quantize profiles into codes, one small integer per user and profile name.

Each profile is whitened by its noise (what sampling alone would make of it) and projected on the directions
in which users differ most: their eigenvalues, printed, tell how many kinds of users there are. A codebook per
profile starts at k-means++ (the released start collapses to one code) and is trained by eq. 5: codebook term,
commitment term, and the recommendation loss of a surrogate DCN, through the straight-through estimator. A
user's code is the nearest codeword (eq. 6). `--paper` = no whitening and the paper's loss weights.

Reads   profiles.pt, interactions.parquet (train rows), users.parquet (truth, for checking only)
Writes  codebook.pt: per profile name codebook float32 [K, C], transform float32 [D, C], mean float32 [D],
        usage int64 [K]
        feature_bank.parquet: user, user_id, one int column per profile name; K = no evidence of this user

Example: python 03_quantize.py        (10 seconds)
  wrote runs/demo/feature_bank.parquet: 1,975 users | perplexity hobby 3.99 of 4, background 2.98 of 3
"""

import math
import time

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.nn import functional as F

from common import (DCN, VectorQuantizer, at_least, fail, options_text, parse_with_presets, read_artifacts,
                    read_sidecar, stage_parser, start_stage, usage_of, write_artifact)

PAPER = {"whiten": "none", "vq_weight": 0.001, "rec_weight": 0.001, "beta": 1.0}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of k-means++ and of the training")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--codes", type=at_least(2), nargs="+", default=[4, 3], metavar="K", help="codebook size per profile")
    add("--whiten", choices=["noise", "none"], default="noise", help="whiten by the noise, or θ as it is")
    add("--dims", type=at_least(0), default=0, help="directions kept, C (0 = above the noise, up to K - 1)")
    add("--epochs", type=at_least(1), default=10, help="passes over the train rows (eq. 5)")
    add("--lr", type=at_least(0, float), default=0.003, help="learning rate of Adam")
    add("--batch-size", type=at_least(1), default=512, help="train rows per step")
    add("--vq-weight", type=at_least(0, float), default=1.0, help="weight of the quantization loss, λ")
    add("--beta", type=at_least(0, float), default=0.25, help="weight of the commitment term, β")
    add("--rec-weight", type=at_least(0, float), default=1.0, help="weight of the recommendation loss, γ")
    return parse_with_presets(parser, argv, paper=PAPER)


# ----------------------------------------------------------------------------------------------------------
# whitening: distances that count noise as 1
# ----------------------------------------------------------------------------------------------------------


def whiten(deviation, gain, noise, num_dims, most):
    """Directions in which users differ more than sampling explains.

    deviation θ - θ̄ [N, D], gain [N], noise [D, D] (covariance of gain · deviation, if users did not differ)
    -> transform [D, C], all eigenvalues. Whitened, noise has variance 1; pure noise of N users in D
    dimensions stays below (1 + √(D/N))² (Marchenko and Pastur), so what stands above tells of users.
    """
    values, vectors = torch.linalg.eigh(noise.double())
    kept = values > 1e-9 * values.max()
    to_unit = vectors[:, kept] * values[kept].rsqrt()  # [D, R]
    z = gain.double()[:, None] * (deviation.double() @ to_unit)  # [N, R]
    eigenvalues, directions = torch.linalg.eigh(torch.atleast_2d(torch.cov(z.T)))
    eigenvalues, directions = eigenvalues.flip(0), directions.flip(1)
    edge = (1 + math.sqrt(noise.shape[0] / len(z))) ** 2
    above = int((eigenvalues > edge).sum())
    num_dims = min(num_dims or max(1, min(above, most)), len(eigenvalues))
    leading = " ".join(f"{value:.2f}" for value in eigenvalues[:10])
    print(f"  whitened eigenvalues (noise 1, its edge {edge:.2f}): {leading} | "
          f"{above} above the edge, {num_dims} kept")
    return (to_unit @ directions[:, :num_dims]).float(), eigenvalues


# ----------------------------------------------------------------------------------------------------------
# model: encoder and codebook per profile, a surrogate DCN that reads the codewords
# ----------------------------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """One profile: deviation [B, D] -> quantized [B, C], codes [B], VQ loss [], drift from the start []."""

    def __init__(self, transform, codebook, beta):
        super().__init__()
        self.register_buffer("start", transform.clone())
        self.transform = nn.Parameter(transform.clone())  # [D, C]
        self.vq = VectorQuantizer(codebook, beta)

    def forward(self, deviation):
        z = deviation @ self.transform
        quantized, codes, loss = self.vq(z)
        return quantized, codes, loss, (z - deviation @ self.start).square().sum(1).mean()


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


def train(args, quantizers, surrogate, deviations, user, item, label):
    """Minimise eq. 5 (with eq. 7's L_LM near its minimum) on the train rows; returns each epoch's losses.

    # differs from the paper: θ moves here as the image of a shared linear map, and L_LM as its quadratic
    # approximation, which in whitened coordinates is the squared drift: without it, commitment shrinks all to
    # a point.
    """
    optimizer = torch.optim.Adam([*quantizers.parameters(), *surrogate.parameters()], lr=args.lr)
    curve = []
    for epoch in range(args.epochs):
        started, sums = time.time(), torch.zeros(3)
        for rows in torch.randperm(len(user)).split(args.batch_size):
            parts = [quantizer(deviation[user[rows]]) for quantizer, deviation in zip(quantizers, deviations)]
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
        print(f"epoch {epoch + 1:02d}/{args.epochs} | vq {means[0]:.4f} rec {means[1]:.4f} "
              f"drift {means[2]:.4f} | {time.time() - started:.1f}s")
    return curve


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


def main(args):
    start_stage(args)
    started = time.time()
    stored, interactions, users = read_artifacts(args, "profiles.pt", "interactions.parquet", "users.parquet")
    names = stored["names"]
    if len(args.codes) != len(names):
        fail(f"--codes gives {len(args.codes)} size(s) ({' '.join(map(str, args.codes))}), but profiles.pt "
             f"holds {len(names)} profiles ({', '.join(names)}): give one size for each")
    rows = interactions[interactions["split"] == "train"]
    is_warm = torch.zeros(len(users), dtype=torch.bool)
    is_warm[rows["user"].unique()] = True  # nobody else moves a codeword: cold users only get a code
    known = int((stored["has_evidence"] & is_warm).sum())
    if known < max(args.codes):
        fail(f"only {known} users have evidence and train rows, fewer than the {max(args.codes)} codes asked "
             f"for: lower --codes")
    user, item = (torch.tensor(rows[column].to_numpy()) for column in ("user", "item"))
    label = torch.tensor(rows["label"].to_numpy(), dtype=torch.float32)

    quantizers, deviations, facts = nn.ModuleList(), [], {}
    for k, (name, num_codes) in enumerate(zip(names, args.codes)):
        told = is_warm & (stored["num_evidence"][:, k] > 0)
        mean = stored["profiles"][told, k].mean(0)
        deviation = stored["profiles"][:, k] - mean  # [N, D]
        print(f"{name}: {int(told.sum()):,} users with evidence in train rows, {num_codes} codes")
        if args.whiten == "noise":
            transform, eigenvalues = whiten(deviation[told], stored["gain"][told, k], stored["noise"][k],
                                            args.dims, num_codes - 1)
            facts[f"{name}_eigenvalues"] = eigenvalues.tolist()
        else:
            transform = torch.eye(deviation.shape[1])
        z = deviation @ transform
        # one scale, so that learning rate and weights mean the same for all
        transform = transform / z[told].std().clamp(min=1e-12)
        z = (deviation @ transform)[told]
        kmeans = KMeans(num_codes, init="k-means++", n_init=10, random_state=args.seed).fit(z.numpy())
        centres = torch.tensor(kmeans.cluster_centers_, dtype=torch.float32)
        quantizers.append(Quantizer(transform, centres, args.beta))
        # users without evidence sit at the mean: they are in no training row, for evidence is the train rows
        deviations.append(deviation)
        facts[f"{name}_mean"] = mean
    means = [facts.pop(f"{name}_mean") for name in names]
    surrogate = Surrogate([q.transform.shape[1] for q in quantizers], int(interactions["item"].max()) + 1)
    facts["curve"] = train(args, quantizers, surrogate, deviations, user, item, label)

    bank, codebook = pd.DataFrame({"user": users["user"], "user_id": users["user_id"]}), {}
    for k, (name, num_codes, quantizer) in enumerate(zip(names, args.codes, quantizers)):
        with torch.no_grad():
            codes = quantizer(deviations[k])[1].numpy()
        bank[name] = np.where(stored["num_evidence"][:, k].numpy() > 0, codes, num_codes)
        usage, perplexity = usage_of(bank[name].to_numpy(), num_codes)
        share = usage.min() / max(usage.sum(), 1)
        warning = f"  <- below K/2 = {num_codes / 2:g}: the codebook is collapsing"
        print(f"{name}: users per code {' '.join(map(str, usage))} | "
              f"perplexity {perplexity:.2f} of {num_codes} | "
              f"smallest share {share:.3f}{warning if perplexity < num_codes / 2 else ''}")
        facts |= {f"{name}_usage": usage, f"{name}_perplexity": perplexity, f"{name}_smallest_share": share}
        codebook[name] = {"codebook": quantizer.vq.codebook.detach(),
                          "transform": quantizer.transform.detach(),
                          "mean": means[k], "usage": torch.tensor(usage)}

    bayes_ari = read_sidecar(args, "users.parquet").get("bayes_ari", {})
    facts |= check_truth({name: bank[name] for name in names}, args.codes, users, bayes_ari)
    facts |= {"names": names, "codes": args.codes, "users": len(bank), "seconds": time.time() - started}
    write_artifact(args, "codebook.pt", codebook, inputs=["profiles.pt", "interactions.parquet"], **facts)
    path = write_artifact(args, "feature_bank.parquet", bank,
                          inputs=["profiles.pt", "interactions.parquet", "codebook.pt"], **facts)
    figures = [f"{name} {facts[f'{name}_perplexity']:.2f} of {num_codes}"
               for name, num_codes in zip(names, args.codes)]
    print(f"wrote {path}: {len(bank):,} users | perplexity {', '.join(figures)}")


if __name__ == "__main__":
    main(parse_args())
