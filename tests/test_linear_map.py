"""userip/linear_map.py: the control variate and the preconditioner of the map from coordinates to soft tokens."""

from types import SimpleNamespace

import torch

from llm_cases import events_of, prompt_of, routes_for, run_of
from userip.linear_map import OtherTexts, fit_map, inverse_root
from userip.score import Directions, TextScores


def test_the_mean_gradient_equals_a_loop_over_all_train_rows(llm):
    """Users 0 to 2 with items of five, one of them twice; user 2 has one item, so their y without it is 0"""
    train = events_of([0, 0, 0, 1, 1, 2], [0, 1, 1, 3, 4, 2])
    route, generator = routes_for(llm)[0], torch.Generator().manual_seed(0)
    coordinates, scores = torch.randn(5, 3, generator=generator), torch.randn(5, 7, generator=generator)
    part = TextScores(route, coordinates, coordinates, torch.ones(5, dtype=torch.bool), None)
    sums = torch.zeros(3, 3).index_add(0, train.user, coordinates[train.item])
    weight = torch.tensor([0.5, 2.0, 3.0])
    other = OtherTexts(part, scores, sums, weight)
    mean = torch.zeros(3, 7)
    for user, item in zip(train.user.tolist(), train.item.tolist()):
        y = (sums[user] - coordinates[item]) * weight[user]
        mean -= torch.outer(y, scores[item]) / len(train.user)
    assert torch.allclose(other.mean_gradient(train, torch.ones(3, dtype=torch.bool)), mean, atol=1e-6)
    assert torch.allclose(other.expected_gradient(train.user, train.item), mean, atol=1e-6)
    assert other.y(torch.tensor([2]), torch.tensor([2])).abs().max() < 1e-6


def test_the_inverse_root_equals_scipy_and_the_ridge_bounds_it():
    from scipy.linalg import inv, sqrtm

    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    noise = root @ root.T
    scaled = noise / noise.diagonal().mean() + torch.eye(6)
    assert torch.allclose(inverse_root(noise).double(), torch.from_numpy(inv(sqrtm(scaled.numpy()))), atol=1e-5)
    assert torch.linalg.eigvalsh(inverse_root(1e6 * noise)).max() <= 1 + 1e-6


def test_if_the_llm_were_linear_every_minibatch_would_give_the_same_map(llm, monkeypatch):
    """Then the control variate takes out all noise: what is left is the mean over all rows, times M."""
    train = events_of([0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 2, 0, 4])
    prompt, routes = prompt_of(llm), routes_for(llm)
    draw = torch.Generator().manual_seed(0)
    coordinates = [TextScores(route, table, table, torch.ones(5, dtype=torch.bool), None)
                   for route, table in zip(routes, torch.randn(2, 5, 3, generator=draw))]
    scores = {k: TextScores(route, torch.randn(5, 32, generator=draw), None, None, torch.eye(32))
              for k, route in enumerate(routes)}
    shared = SimpleNamespace(soft=torch.zeros(2, 32), scores=scores)
    directions = Directions(coordinates, torch.ones(2), torch.eye(3, 32).expand(2, 3, 32),
                            torch.ones(2, 3, dtype=torch.bool))
    monkeypatch.setattr(prompt, "loss", lambda soft, route, text, weights: -sum(
        (soft[:, k] * scores[k].train[text]).sum() for k in route.may_read.nonzero()[:, 0].tolist()))

    def fitted(seed):
        run = run_of(llm, prompt, routes, train, map_steps=4)
        run.progress.generator.manual_seed(seed)
        return fit_map(run, shared, directions)

    assert torch.allclose(fitted(0), fitted(1), rtol=1e-3, atol=1e-5)
    start = 0.003 * prompt.scale * 32**0.5
    assert (fitted(0).norm(dim=2) > 2 * start).all()
