"""Before a long run: what fits into memory, and what the run will take on this machine."""

import os
import time

import torch

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


def _sample(run, size=512):
    """Tokens of evidence in the whole run, and a sample of its texts: list of (route, text [R], θ of each [R])"""
    args, evidence, tokens = run.args, run.evidence[-1], 0
    if args.method == "gradient":  # one step of a block of users
        first = max(0, evidence.num_users // 2 - args.batch_size // 2)
        last = min(evidence.num_users, first + args.batch_size)
        sample = evidence.of_users(first, last)
        tokens = sum(int(route.texts.length[text].sum()) for route, text, _ in sample)
        num_rows = int(evidence.first[last] - evidence.first[first])
        return tokens / max(1, num_rows) * len(evidence.events.user) * args.steps * (args.folds + 1), sample
    sample = []
    for route in run.routes:
        index = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
        num_passes = 1 + (route.num_levels > 1)  # for the item and for the rating
        tokens += num_passes * int(route.texts.length[index].sum())
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))[:size]
        sample.append((route, index[order], torch.arange(len(order))))
    return tokens, sample


def _seconds(prompt, sample, soft, max_tokens):
    """Forward and backward of a sample; the second time, as the first pays for what is done only once"""
    for _ in range(2):
        started = time.time()
        for route, index, owner in sample:
            thetas = soft.repeat(int(owner.max()) + 1, 1, 1).to(prompt.device).requires_grad_()
            prompt.add_gradient(thetas, route, index, owner, torch.ones(len(FIELDS)), max_tokens)
            thetas.grad.cpu()  # waits for the GPU
    return time.time() - started


def estimate(run):
    """Print users, tokens, FLOPs, memory and time of the run on this machine, from a few batches."""
    args, prompt, evidence = run.args, run.prompt, run.evidence[-1]
    soft = prompt.random_soft(1, torch.Generator().manual_seed(args.seed))[0]
    tokens, sample = _sample(run)
    sample_tokens = sum(int(route.texts.length[text].sum()) for route, text, _ in sample)
    seconds = tokens * _seconds(prompt, sample, soft, args.tokens_per_batch) / max(1, sample_tokens)
    scope = "each text of the catalogue once; a user costs a sum"
    if args.method == "gradient":
        scope = f"{args.steps} steps for each" + f", {args.folds + 1} times" * bool(args.folds)
    body = sum(weight.numel() for weight in prompt.body.parameters()) - prompt.embed.weight.numel()
    flops = 4 * (body + prompt.head.weight.numel())  # forward and backward, without weight gradients
    weights = sum(weight.numel() * weight.element_size() for weight in prompt.model.parameters())
    profiles = 4 * (args.folds + 1) * evidence.num_users * soft.numel()
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    print(f"estimate: {evidence.num_users:,} users, {len(evidence.events.user):,} rows, {tokens:,.0f} tokens "
          f"of evidence ({scope})\n"
          f"  {tokens * flops:.3g} FLOPs, {seconds:,.0f} s on {prompt.device}, as measured on "
          f"{sample_tokens:,} tokens; the shared start, {args.shared_steps} minibatches of 64 texts, and the "
          f"report come on top\n"
          f"  memory: weights {gib(weights)}, a batch of {args.tokens_per_batch:,} tokens "
          f"{gib(args.tokens_per_batch * bytes_per_token(prompt))}; disk: profiles.pt {gib(profiles)}")
