"""Scores: the gradient of each text's log-likelihood at θ̄, whitened and summed over the texts of a user."""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F

from userip.evidence import FIELDS, Route

BLOCK = 2048  # texts whose scores are one piece of progress
USERS_AT_ONCE = 2**12  # their sums fit the processor's cache


class TextScores(NamedTuple):
    """The scores of a route's texts for one profile, [R, S D] or in C directions [R, C]. train: what a text
    adds for a user of the train rows; new: for any other. noise [S D, S D]: covariance of a train row's score
    """

    route: Route
    train: torch.Tensor
    new: torch.Tensor
    is_scored: torch.Tensor
    noise: torch.Tensor


def text_scores(prompt, route, index, shared, weights, max_tokens):
    """g_t = ∇_θ log P(text t | θ) at θ̄, one backward pass per text: index [R] -> float32 [R, P, S D]"""
    scores = torch.empty(len(index), *shared.shape)
    for batch in prompt.batches(route.texts, index, max_tokens):
        soft = shared.expand(len(batch), -1, -1).to(prompt.device).requires_grad_()
        loss = prompt.loss(soft, route, index[batch], weights)
        scores[batch] = -torch.autograd.grad(loss, soft)[0].float().cpu()
    return scores


def field_weights(run, shared, num_sample):
    """1 / (root mean square of a field's score at θ̄ over texts): [len(FIELDS)]; 0 where no two texts of the
    sample tell anything. A field's sample is of texts that have it: one that few have is not missed.

    # differs from the paper: the scores of fields have variances that depend on the LLM and say nothing about
    # what they know: a title's has more than a category's and knows less of the hobby. In a plain sum the
    # field with the largest variance drowns the others.
    """
    weights, run.prompt.purpose = torch.zeros(len(FIELDS)), "field weights"
    for route in run.routes:
        scored = (route.text_counts(run.observed.train) * route.texts.num_scored_tokens()).nonzero()[:, 0]
        scored = scored[torch.randperm(len(scored), generator=run.progress.generator)]
        for number, field in [(FIELDS.index(field), field) for field in route.fields]:
            has_field = (route.texts.field[scored] == number).any(1)
            index, share = scored[has_field][:num_sample], float(has_field.float().mean())
            if len(index) > 1:
                only = torch.tensor([float(other == field) for other in FIELDS])
                scores = text_scores(run.prompt, route, index, shared, only, run.args.tokens_per_batch)
                mean = scores.mean(0)  # of all texts share · mean: those without the field have score 0
                spread = (scores - mean).square().sum((1, 2)).mean()
                noise = share * (spread + (1 - share) * mean.square().sum())
                weights[number] = noise.rsqrt() if noise > 0 else 0.0
            if not weights[number]:
                print(f"field {field} is left out: its texts do not differ ({len(index)} were read)")
    listed = "  ".join(f"{field} {weight:.3g}" for field, weight in zip(FIELDS, weights) if weight)
    print(f"field weights: {listed}")
    return weights


def audience(counts, weight=3.0):
    """How an item's other raters rated it: counts [M, L] of rating levels in train rows -> shares [M, L, L]
    for a rater who gave the level of axis 1 and is one of them, and shares [M, L] for any other user.

    The prior, how all items are rated, weighs like `weight` raters.
    """
    prior = (counts.sum(0) + 1) / (counts.sum() + counts.shape[1])
    with_prior = counts + weight * prior  # [M, L]
    all_raters = with_prior / with_prior.sum(1, keepdim=True)
    others = (with_prior[:, None] - torch.eye(counts.shape[1])).clamp(min=0)
    return others / others.sum(2, keepdim=True), all_raters


def _scores_of(fields, run, route, index, shared, weights):
    """The scores of these fields' tokens, in blocks of texts, each on disk when it is done -> [R, P, S D], 0
    but for the texts `index`
    """
    scores = torch.zeros(len(route.texts.ids), *shared.shape)
    if fields:
        name, blocks = f"scores-{'+'.join(fields)}-of-{route.name}", index.split(BLOCK)
        weights = weights * torch.tensor([field in fields for field in FIELDS])
        run.progress.compute_blocks(name, blocks, "text", lambda block: text_scores(
            run.prompt, route, block, shared, weights, run.args.tokens_per_batch)[:, route.may_read])
        for number, block in enumerate(blocks):
            scores[block[:, None], route.may_read.nonzero()[:, 0]] = run.progress.read(f"{name}-{number}")
    return scores


def centred_scores(run, route, shared, weights, shrinkage=1e-3):
    """Score the texts of a route that any user had: {k: TextScores} for the profiles k that may be read.

    Which item a user had is centred by popularity. How a user rated it is centred by how the others rated it
    (for train rows without the user's own rating), so that the user's own deviation remains. If users did not
    differ, a user's n rows would be n draws, and the sum of their scores would have n times the noise.
    """
    counts, levels = route.text_counts(run.observed.train), route.num_levels
    # all levels of an item are scored where one occurs: the others are those of its audience
    occurs = (route.text_counts(run.observed.own).view(-1, levels).sum(1) > 0).repeat_interleave(levels)
    is_scored = occurs & (route.texts.num_scored_tokens() > 0)
    index = is_scored.nonzero()[:, 0]
    share = (counts[index] / counts[index].sum()).double()[:, None]
    item_score, rating_score = (
        _scores_of([field for field in route.fields if (field == "rating") == is_rating], run, route, index,
                   shared, weights) for is_rating in (False, True))
    other_shares, all_shares = audience(counts.view(-1, levels))
    result = {}
    for k in route.may_read.nonzero()[:, 0].tolist():
        mean = (share * item_score[index, k].double()).sum(0)
        centred = torch.zeros(len(counts), shared.shape[1], dtype=torch.float64)
        centred[index] = item_score[index, k].double() - mean
        train = new = centred
        if levels > 1:
            by_item = rating_score[:, k].double().view(-1, levels, shared.shape[1])  # [M, L, D]
            train = train + (by_item - other_shares.double() @ by_item).flatten(0, 1)
            new = new + (by_item - all_shares.double()[:, None] @ by_item).flatten(0, 1)
        covariance = (share * train[index]).T @ train[index]
        ridge = shrinkage * covariance.diagonal().mean().clamp(min=1e-20)
        noise = (covariance + ridge * torch.eye(len(covariance))).float()
        result[k] = TextScores(route, train.float(), new.float(), is_scored, noise)
    return result


def incidence(user, text, shape):
    """How often each user has each text, sparse `shape` [N, texts], and how many texts each has, float32 [N].
    In the order of texts, so that a user's sum over their texts has the same bits in any company.
    """
    matrix = sparse.coo_matrix((np.ones(len(user)), (user.numpy(), text.numpy())), shape=shape).tocsr()
    matrix.sum_duplicates()
    return matrix, torch.bincount(user, minlength=shape[0]).float()


def texts_of_users(route, events, is_warm):
    """The same for a route: [N, 2 R], the last R columns for users without train rows"""
    events = events.select(route.has_text(events))
    column = route.text_index(events) + len(route.texts.ids) * ~is_warm[events.user]
    return incidence(events.user, column, (len(is_warm), 2 * len(route.texts.ids)))


def project_scores(user_texts, table, count, noise, is_warm, rank):
    """Whiten scores by the noise and keep the directions in which warm users (is_warm [N]) differ most.

    user_texts sparse [N, R] and table [R, D]: the texts of users and their scores; count [N] texts, noise
    [D, D] -> projection [D, C], eigenvalues [C]. A whitened sum over n texts has variance n in each direction
    if users do not differ; an eigenvalue λ above 1 says how far they do.
    """
    eigenvalues, vectors = torch.linalg.eigh(noise.double())
    whiten = vectors * eigenvalues.rsqrt() @ vectors.T  # Σ^-½
    table = (table.double() @ whiten).numpy()
    users = (is_warm & (count > 0)).nonzero()[:, 0]
    moment, mean = torch.zeros_like(whiten), torch.zeros(len(whiten), dtype=torch.float64)
    for block in users.split(USERS_AT_ONCE):
        z = torch.from_numpy(user_texts[block.numpy()] @ table) / count[block].double().sqrt()[:, None]
        moment += z.T @ z
        mean += z.sum(0)
    mean /= len(users)
    covariance = (moment - len(users) * torch.outer(mean, mean)) / (len(users) - 1)
    eigenvalues, directions = torch.linalg.eigh(covariance)
    return whiten @ directions.flip(1)[:, :rank], eigenvalues.flip(0)[:rank]


class Directions(NamedTuple):
    """The leading C directions of each profile, in which users' scores differ most"""

    coordinates: list  # TextScores in these directions, of each profile
    pull: torch.Tensor  # [P], the prior's weight in texts
    start: torch.Tensor  # [P, C, S D], unit vectors: the mean score of users one unit along a direction
    is_above: torch.Tensor  # bool [P, C]: is its eigenvalue above that of pure noise?


def find_directions(run, scores):
    """Directions of scores {k: TextScores}, estimated over warm users: cold ones are only placed."""
    is_warm, coordinates, pulls, starts, masks = run.observed.is_warm, [], [], [], []
    for k, name in enumerate(run.prompt.names):
        route, train, new, _, noise = scores[k]
        user_texts, count = texts_of_users(route, run.observed.own, is_warm)
        projection, eigenvalues = project_scores(user_texts, torch.cat([train, new]), count, noise, is_warm,
                                                 run.args.rank)
        # λ = 1 + n · (variance between users): the prior of that variance weighs as much as n / (λ - 1) items
        edge = (1 + math.sqrt(len(noise) / int(is_warm.sum()))) ** 2  # of pure noise (Marchenko and Pastur)
        is_above = eigenvalues > edge
        excess = float(eigenvalues[is_above].mean()) - 1 if is_above.any() else 0.1
        pulls.append(float(count[is_warm].mean()) / excess if run.args.pull is None else run.args.pull)
        train, new = ((table.double() @ projection).float() for table in (train, new))
        coordinates.append(scores[k]._replace(train=train, new=new))
        starts.append(F.normalize((noise.double() @ projection).T, dim=1).float())
        masks.append(is_above)
        leading = " ".join(f"{eigenvalue:.2f}" for eigenvalue in eigenvalues[:8])
        print(f"{name}: pull {pulls[-1]:.1f} items; "
              f"eigenvalues of the whitened scores (noise 1, its edge {edge:.2f}): {leading}")
    return Directions(coordinates, torch.tensor(pulls), torch.stack(starts), torch.stack(masks))


def user_sums(coordinates, events, is_warm):
    """Σ_i g_i over the texts of each user, and their number: float32 [N, P, C], [N, P]"""
    sums, counts = [], []
    for part in coordinates:
        user_texts, count = texts_of_users(part.route, events, is_warm)
        sums.append(torch.from_numpy(user_texts @ torch.cat([part.train, part.new]).double().numpy()).float())
        counts.append(count)
    return torch.stack(sums, 1), torch.stack(counts, 1)


def user_steps(sums, counts, pull, lift):
    """θ_u - θ̄ = B y_u with y_u = Σ_i g_i / (n_u + pull): sums [N, P, C], counts [N, P], pull [P], lift (B)
    [P, C, S D] -> [N, P, S D]. Summed by a loop: a user gets the same bits in any company.
    """
    y = sums / (counts + pull)[:, :, None]  # [N, P, C]
    step = torch.zeros(*sums.shape[:2], lift.shape[2])
    for c in range(y.shape[2]):
        step += y[:, :, c, None] * lift[:, c]
    return step
