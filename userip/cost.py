"""Before a long run: what fits into memory, and what the run will take on this machine."""

import os
import time

import torch

from userip.score import text_scores
from userip.texts import FIELDS


def bytes_per_token(prompt):
    """What a token of a batch needs until backward has passed: about 22 numbers per layer and dimension"""
    layers = prompt.model.config.num_hidden_layers
    return 22 * prompt.embedding.shape[1] * layers * prompt.embedding.element_size()


def tokens_that_fit(prompt, share=0.8):
    """Tokens per batch that fill `share` of the free memory; on a CPU more than 4,096 gain nothing."""
    if prompt.device.type == "cuda":
        free, most = torch.cuda.mem_get_info()[0], 2**17
    else:
        free, most = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 4096
    return int(max(16, min(most, share * free / bytes_per_token(prompt))))


def _timed(function):
    """Seconds of its second call: the first one pays for what is done only once."""
    for _ in range(2):
        started = time.time()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.time() - started


def _measure_score(run, shared):
    """--method score: tokens of all texts; tokens and seconds of a sample of them"""
    tokens, sample_tokens, seconds, ones = 0, 0, 0.0, torch.ones(len(FIELDS))
    for route in run.routes:
        index = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
        sample = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:512]]
        sample_tokens += int(route.texts.length[sample].sum())
        seconds += _timed(lambda: text_scores(run.prompt, route, sample, shared, ones,
                                              run.args.tokens_per_batch))
        num_passes = 1 + (route.num_levels > 1)  # for the item and for the rating
        tokens += num_passes * int(route.texts.length[index].sum())
    return tokens, sample_tokens, seconds


def _measure_gradient(run, evidence, one_step):
    """--method gradient: tokens of all steps at most; tokens and seconds of one step of a block of users"""
    args, num_users = run.args, len(evidence.first) - 1
    first = max(0, num_users // 2 - args.batch_size // 2)
    last = min(num_users, first + args.batch_size)
    block = evidence.of_users(first, last)
    sample_tokens = sum(int(route.texts.length[pairs.text].sum()) for route, pairs in block)
    num_rows = int(evidence.first[last] - evidence.first[first])
    passes = args.steps * (args.folds + 1)
    tokens = sample_tokens / max(1, num_rows) * len(evidence.events.user) * passes
    return tokens, sample_tokens, _timed(lambda: one_step(torch.arange(first, last), block))


def estimate(run, evidence, one_step):
    """Print users, tokens, FLOPs, memory and time of the run on this machine, from a few batches.

    one_step(users, their evidence): one step of the gradient method.
    """
    args, prompt = run.args, run.prompt
    shared = prompt.random_soft(1, torch.Generator().manual_seed(args.seed))[0]
    if args.method == "gradient":
        tokens, sample_tokens, sample_seconds = _measure_gradient(run, evidence, one_step)
        scope = f"{args.steps} steps at most for each" + f", {args.folds + 1} times" * bool(args.folds)
    else:
        tokens, sample_tokens, sample_seconds = _measure_score(run, shared)
        scope = "each text of the catalogue once; a user costs a sum"
    seconds = tokens * sample_seconds / max(1, sample_tokens)
    body = sum(weight.numel() for weight in prompt.body.parameters()) - prompt.embed.weight.numel()
    flops = 4 * (body + prompt.head.weight.numel())  # forward and backward, without weight gradients
    weights = sum(weight.numel() * weight.element_size() for weight in prompt.model.parameters())
    num_users = len(evidence.first) - 1
    profiles = 4 * (args.folds + 1) * num_users * shared.numel()
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    print(f"estimate: {num_users:,} users, {len(evidence.events.user):,} rows, {tokens:,.0f} tokens of "
          f"evidence ({scope})\n"
          f"  {tokens * flops:.3g} FLOPs, {seconds:,.0f} s on {prompt.device}, as measured on "
          f"{sample_tokens:,} tokens; the shared start, {args.shared_steps} minibatches of 64 texts, and the "
          f"report come on top\n"
          f"  memory: weights {gib(weights)}, a batch of {args.tokens_per_batch:,} tokens "
          f"{gib(args.tokens_per_batch * bytes_per_token(prompt))}; disk: profiles.pt {gib(profiles)}")
