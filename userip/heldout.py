"""Held-out rows: how likely they are under given profiles."""

import torch


def heldout_events(interactions, rows, routes, limit, seed):
    """Validation rows with any text, at most `limit`: Events of half the users, to choose with, and of the
    other half, to report. rows: all interactions as Events.
    """
    valid = interactions[interactions["split"] == "valid"]
    sample = valid.sample(min(limit, len(valid)), random_state=seed).sort_index()
    events = rows.select(torch.tensor(sample.index.to_numpy()))
    has_text = sum(route.has_text(events).int() for route in routes) > 0
    return [events.select(has_text & (events.user % 2 == half)) for half in (0, 1)]


def heldout_nll(run, profiles, events, is_blind=False):
    """NLL of held-out rows under a profile each: profiles [R, P, S D] -> nats, scored tokens [R, routes]

    is_blind: no text may read a profile.
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


def print_heldout(nats, tokens, routes):
    """Print the NLLs per token of sets of profiles and what the own profile gains -> dict of these numbers

    nats: {"none", "shared", "shuffled", "own": [R, routes]}; tokens [R, routes]; routes: their names.
    """
    means = {name: float(part.sum() / tokens.sum()) for name, part in nats.items()}
    print(f"held-out NLL in nats per token ({len(tokens):,} validation rows that chose nothing): "
          + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    for name in ("shared", "shuffled"):
        difference = nats["own"] - nats[name]
        mean, half = means[f"own_minus_{name}"] = interval(difference.sum(1), tokens.sum(1))
        line = f"  own - {name}: {mean:+.4f} ± {half:.4f} (95%)"
        line += "  <- no sure sign that profiles know their users" * (mean + half >= 0)
        if len(routes) > 1:
            line += " |"
            for column, route in enumerate(routes):
                mean, half = interval(difference[:, column], tokens[:, column])
                line += f"  {route} {mean:+.4f} ± {half:.4f}"
        print(line)
    return means
