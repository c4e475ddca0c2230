"""Held-out rows: how likely they are under given profiles."""

import torch

from userip.evidence import select_events


def heldout_events(interactions, level, routes, limit, seed):
    """Validation rows with any text, at most `limit`: Events of half the users, to choose with, and of the
    other half, to report.
    """
    valid = interactions[interactions["split"] == "valid"]
    sample = valid.sample(min(limit, len(valid)), random_state=seed)
    events = select_events(interactions, interactions.index.isin(sample.index), level)
    has_text = sum(route.texts.num_scored_tokens()[route.text_index(events)] for route in routes) > 0
    return [events.select(has_text & (events.user % 2 == half)) for half in (0, 1)]


def heldout_nll(run, profiles, events, is_blind=False):
    """NLL of held-out rows under a profile each: profiles [R, P, S D] -> nats, scored tokens [R, routes]

    run: args, prompt and routes of stage 2. is_blind: no text may read a profile.
    """
    nats, tokens = (torch.zeros(len(events.user), len(run.routes)) for _ in range(2))
    with torch.no_grad():
        for column, route in enumerate(run.routes):
            index = route.text_index(events)
            rows = route.has_text(events).nonzero()[:, 0]
            may_read = torch.zeros_like(route.may_read) if is_blind else route.may_read
            for batch in run.prompt.batches(route.texts, index[rows], run.args.tokens_per_batch):
                batch = rows[batch]
                texts = route.texts.select(index[batch])
                nats[batch, column] = run.prompt.nll(profiles[batch], texts, may_read).sum(1).float().cpu()
                tokens[batch, column] = texts.num_scored_tokens().float()
    return nats, tokens


def interval(difference, tokens):
    """Mean difference per token and half its 95% interval: difference [R] in nats, tokens [R]"""
    mean = difference.sum() / tokens.sum()
    residual = difference - mean * tokens
    return float(mean), float(1.96 * residual.square().sum().sqrt() / tokens.sum())
