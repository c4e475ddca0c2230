"""Held-out rows: how likely they are under given profiles."""

import torch

from userip.artifacts import fail


def heldout_events(interactions, rows, routes, limits, seed):
    """Validation rows with any text: Events of half the users, to choose with, and of the other half, to
    report; of each at most as many as its limit says. rows: all interactions as Events.
    """
    is_valid = torch.tensor((interactions["split"] == "valid").to_numpy())
    events = rows.select(is_valid)
    has_text = sum(route.has_text(events).int() for route in routes) > 0
    generator = torch.Generator().manual_seed(seed)
    user, halves = events.user, []
    if len((user[has_text] % 2).unique()) < 2:  # then by their order
        user = user.unique(return_inverse=True)[1]
    for half, limit in enumerate(limits):
        index = (has_text & (user % 2 == half)).nonzero()[:, 0]
        if not len(index):
            fail("the valid rows hold texts of one user only: half of the users choose step lengths, half "
                 "report; run 01_prepare.py with more data")
        sample = torch.randperm(len(index), generator=generator)[:limit].sort().values
        halves.append(events.select(index[sample]))
    return halves


def heldout_nll(run, profiles, events, is_blind=False):
    """NLL of held-out rows: profiles [R, P, S D], one each, or [1, P, S D], one for all, so that each text is
    read once -> nats, scored tokens [R, routes]

    is_blind: no text may read a profile.
    """
    nats, tokens = (torch.zeros(len(events.user), len(run.routes)) for _ in range(2))
    with torch.no_grad():
        for column, route in enumerate(run.routes):
            rows = route.has_text(events).nonzero()[:, 0]
            index = route.text_index(events)[rows]
            tokens[rows, column] = route.texts.num_scored_tokens()[index].float()
            text, of_row = index, torch.arange(len(index))
            if len(profiles) == 1:
                text, of_row = index.unique(return_inverse=True)
            may_read = torch.zeros_like(route.may_read) if is_blind else route.may_read
            text_nats = torch.empty(len(text))
            for batch in run.prompt.batches(route.texts, text, run.args.tokens_per_batch):
                soft = profiles[rows[batch]] if len(profiles) > 1 else profiles
                texts = route.texts.select(text[batch])
                text_nats[batch] = run.prompt.nll(soft, texts, may_read).sum(1).float().cpu()
            nats[rows, column] = text_nats[of_row]
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
