"""The codebook as a prior of the profiles (eq. 7): EM, one round per turn of stages 2 and 3."""

from pathlib import Path
from types import SimpleNamespace

import torch

from userip.artifacts import fail, read_artifacts
from userip.heldout import heldout_nll
from userip.progress import Profiles


def read_codebook(args, names):
    """codebook.pt, which --prior names, of the profiles `names`; an empty dict without --prior"""
    if not args.prior:
        return {}
    own = Path(args.run_dir) / "codebook.pt"
    if args.prior.resolve() != own.resolve():
        fail(f"--prior {args.prior}: give the codebook of this run, {own}")
    codebook = read_artifacts(args, "codebook.pt")[0]
    if list(codebook) != list(names):
        fail(f"--prior {args.prior} has the profiles {', '.join(codebook)}, not {', '.join(names)}")
    return codebook


def make_prior(args, codebook, shared):
    """The codebook and θ̄, shared [P, S D] -> a list of namespaces of codebook [K, C'], transform [S D, C'],
    mean [S D], shared [C'] (θ̄ transformed); empty without --prior
    """
    prior = [SimpleNamespace(**part) for part in codebook.values()]
    for part, soft in zip(prior, shared):
        if len(part.mean) != len(soft):
            fail(f"--prior {args.prior} is of profiles {len(part.mean)} wide, not {len(soft)}: "
                 f"take the same --llm and --soft-tokens as before")
        part.shared = (soft - part.mean) @ part.transform
    return prior


def codeword_coordinates(prior, lift):
    """Codewords in the coordinates of the score method: y_c [K, C] with θ̄ + y_c B nearest to codeword c"""
    return (prior.codebook - prior.shared) @ torch.linalg.pinv(lift @ prior.transform)


def nearest_coordinates(sums, counts, centers):
    """E step of the score method: y_c of the codeword nearest to a user's mean: sums [N, P, C], counts
    [N, P] -> [N, P, C]. Zero, that is θ̄, without a prior and for users without evidence.
    """
    result = torch.zeros_like(sums)
    for k, center in enumerate(centers):
        difference = center - center.mean(0)
        subspace = torch.linalg.pinv(difference) @ difference  # in which codewords differ
        mean = sums[:, k] / counts[:, k].clamp(min=1)[:, None]
        nearest = torch.cdist(mean @ subspace, center @ subspace).argmin(1)
        result[:, k] = center[nearest] * (counts[:, k] > 0)[:, None]
    return result


def codeword_soft_tokens(prior, shared, noise):
    """Codewords as soft tokens [K, S D]: of all θ that T maps to a codeword, the nearest to θ̄ in the metric
    of the noise; shared [S D], noise [S D, S D]
    """
    inverse = torch.linalg.solve(noise, prior.transform)  # Σ^-1 T [D, C']
    lift = torch.linalg.solve(prior.transform.T @ inverse, inverse.T)  # [C', D], T maps it to the identity
    return shared + (prior.codebook - prior.shared) @ lift


def nearest_soft_tokens(soft, prior, soft_tokens):
    """E step of the gradient method: soft [B, P, S D] -> the codeword of each, as a soft token"""
    nearest = []
    for k, (part, tokens) in enumerate(zip(prior, soft_tokens)):
        z = (soft[:, k].cpu() - part.mean) @ part.transform
        nearest.append(tokens[torch.cdist(z, part.codebook).argmin(1)])
    return torch.stack(nearest, 1).to(soft.device)


def prior_loss(profiles, prior, pull, noise):
    """Σ_u λ L_Q of eq. 7 in nats: pull/2 · squared distance to the nearest codeword, noise as unit -> []"""
    loss = torch.zeros(())
    for k, part in enumerate(prior):
        z = (profiles[:, k] - part.mean) @ part.transform
        unit = (part.transform.T @ noise[k] @ part.transform).diagonal().mean()
        loss += pull[k] / 2 * torch.cdist(z, part.codebook).min(1).values.square().sum() / unit
    return loss


def descend(run, prior, profiles, pull, noise, num_sample=3000):
    """The M step must not raise the objective (eq. 7): go from the last round's profiles to the new ones as
    far as it falls -> Profiles, (L_LM, λ L_Q) per train row. L_LM is of the same rows in every round.
    """
    run.prompt.purpose = "objective"
    path, train = Path(run.args.run_dir) / "profiles.pt", run.observed.train
    before = torch.load(path, weights_only=True, mmap=True)["profiles"]
    before = before if before.dim() == 4 else before[None]
    if before.shape != profiles.shape:
        fail(f"--prior goes on from {path}, which has other profiles: run stage 2 without --prior first")
    generator = torch.Generator().manual_seed(run.args.seed)
    events = train.select(torch.randperm(len(train.user), generator=generator)[:num_sample])

    def between(length):
        """Profiles at `length` of the way to the new ones"""
        return Profiles(profiles.shape, lambda fold, users: before[fold, users] + length * (
            profiles.read(fold, users) - before[fold, users]))

    objective = {}
    for length in (1.0, 0.5, 0.25, 0.0):
        full = between(length).full
        nats, _ = heldout_nll(run, full(events.user), events)
        penalty = sum(float(prior_loss(full(users), prior, pull, noise))
                      for users in torch.arange(profiles.shape[1]).split(2**14))
        objective[length] = float(nats.sum() / len(events.user)), penalty / len(train.user)
    best = min(objective, key=lambda length: sum(objective[length]))
    text = lambda parts: f"L_LM {parts[0]:.4f} + prior {parts[1]:.4f} = {sum(parts):.4f}"
    print(f"objective (eq. 7) in nats per train row: before {text(objective[0.0])}; "
          f"after {text(objective[best])} ({best:g} of the way to the new profiles)")
    return between(best), objective[best]
