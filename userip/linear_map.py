"""The linear map B from users' coordinates to soft tokens: θ_u = θ̄ + B y_u, one B for all users."""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from userip.artifacts import check_finite
from userip.evidence import FIELDS
from userip.score import texts_of_users, user_sums
from userip.setup import BATCH

RATE = 0.1  # of Adam, in units of the embeddings' scale


class OtherTexts(NamedTuple):
    """y_u of a profile for each of a user's texts, made without this text: a profile must predict others"""

    part: NamedTuple  # TextScores in C directions
    scores: torch.Tensor  # [R, S D], of each text at θ̄
    sums: torch.Tensor  # [N, C]
    weight: torch.Tensor  # [N]

    def y(self, user, text):
        """user, text int64 [B] -> [B, C]"""
        return (self.sums[user] - self.part.train[text]) * self.weight[user, None]

    def expected_gradient(self, user, text):
        """Of the mean NLL for B [C, S D], if the NLL were linear in θ: user, text [B] -> [C, S D]"""
        return self.y(user, text).T @ self.scores[text] / -len(text)

    def mean_gradient(self, train, is_warm):
        """The same over all train rows; in float64, so that the order of a sum does not matter much"""
        user_texts, _ = texts_of_users(self.part.route, train, is_warm)
        user_texts = user_texts[:, :len(self.scores)]  # the columns of warm users
        weight = self.weight.double().numpy()
        y = user_texts.T @ (self.sums.double().numpy() * weight[:, None])  # [R, C]
        y -= self.part.train.double().numpy() * (user_texts.T @ weight)[:, None]
        return torch.from_numpy(y.T @ self.scores.double().numpy() / -user_texts.sum()).float()


def inverse_root(noise, ridge=1.0):
    """(Σ / mean variance + ridge)^-½ of the covariance Σ of a text's score: [..., S D, S D] -> the same"""
    values, vectors = torch.linalg.eigh(noise.double())
    values = values / values.mean(-1, keepdim=True).clamp(min=1e-30) + ridge
    return (vectors * values.rsqrt()[..., None, :] @ vectors.mT).float()


def fit_map(run, shared, directions, batch_size=BATCH):
    """B [P, C, S D] by Adam on train rows: minimises -log P(text | θ̄ + B y_u), y_u without the text itself.

    Only directions above the noise are fitted; the others keep a short start. B = start + A M: Adam fits A,
    and M shortens steps along which scores differ most, where the LLM is least linear. Scores at θ̄ say what
    the gradient of a minibatch would be if the NLL were linear, and the mean of that over all train rows is
    known: a control variate (as in SVRG, Johnson and Zhang 2013), which takes out most of a minibatch's
    noise. docs/notebook.md, "The map from coordinates", holds what was tried.
    """
    coordinates, pull, start, is_above = directions
    args, prompt, train, is_warm = run.args, run.prompt, run.observed.train, run.observed.is_warm
    device, prompt.purpose = prompt.device, "map"
    sums, counts = user_sums(coordinates, train, is_warm)  # [N, P, C], [N, P]
    unit = (sums / (counts + pull)[:, :, None])[is_warm].square().mean((0, 2)).sqrt().clamp(min=1e-6)  # [P]
    weight = 1 / (counts - 1 + pull).clamp(min=1e-6) / unit  # [N, P]
    others = [OtherTexts(part, shared.scores[k].train, sums[:, k], weight[:, k])
              for k, part in enumerate(coordinates)]
    mean = torch.stack([other.mean_gradient(train, is_warm) for other in others])  # [P, C, S D]
    start = 0.003 * prompt.scale * math.sqrt(start.shape[2]) * start  # .003 of an embedding's length
    shorten = torch.stack([inverse_root(shared.scores[k].noise) for k in range(len(start))])  # M
    free = torch.zeros_like(start).requires_grad_()  # A [P, C, S D]; M [P, S D, S D]
    optimizer = torch.optim.Adam([free], lr=RATE * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.map_steps)
    covariance, variance = torch.zeros(2, len(start))  # of the gradient with what is expected
    for _ in tqdm(range(args.map_steps), desc="map to soft tokens", unit="step", mininterval=2):
        lift = (start + free.detach() @ shorten).to(device).requires_grad_()
        expected = torch.zeros_like(mean)
        for route in run.routes:
            rows = route.has_text(train).nonzero()[:, 0]
            rows = rows[torch.randint(len(rows), (batch_size,), generator=run.progress.generator)]
            text, user = route.text_index(train)[rows], train.user[rows]
            y = torch.zeros(batch_size, *start.shape[:2])  # [B, P, C]
            for k in route.may_read.nonzero()[:, 0].tolist():
                y[:, k], expected[k] = others[k].y(user, text), others[k].expected_gradient(user, text)
            for batch in prompt.batches(route.texts, text, args.tokens_per_batch):
                step = torch.einsum("bpc,pcd->bpd", y[batch].to(device), lift)
                theta = shared.soft.to(device) + step
                loss = prompt.loss(theta, route, text[batch], torch.ones(len(FIELDS)))
                (loss / batch_size).backward()
        gradient = lift.grad.cpu()
        covariance = 0.7 * covariance + (gradient * expected).sum((1, 2))
        variance = 0.7 * variance + expected.square().sum((1, 2))
        slope = (covariance / variance.clamp(min=1e-30)).clamp(min=0)[:, None, None]
        free.grad = (gradient - slope * (expected - mean)) @ shorten * is_above[:, :, None]
        optimizer.step()
        schedule.step()
        check_finite(free, "the map to soft tokens", "lower --pull or take another --llm")
    return (start + free.detach() @ shorten) / unit[:, None, None]
