"""What is fixed before stage 2 fits anything, and what the run will cost."""

import os
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from userip.artifacts import fail, read_artifacts
from userip.evidence import FIELDS, Evidence, item_texts, join, make_routes, observe, tokenize
from userip.heldout import heldout_events
from userip.llm import check_tiny_llm, choose_llm, load_llm, make_tiny_llm, mix, multiplies_bfloat16
from userip.prior import read_codebook
from userip.progress import Progress, recipe_of
from userip.prompt import Prompt
from userip.rating_means import habits_by_fold
from userip.score import text_scores

SMALL_LLM = 20_000_000  # parameters below which products are too small to gain by bfloat16
MOST_DIFFERENCE = 0.05  # between scores of the two arithmetics, as a share of their variance
FREE_FLOPS = 5e11  # what each purpose may cost however small the catalogue: some seconds
BATCH = 64  # texts of a minibatch
REVIEW_TOKENS = 15  # of a review's first sentence, at most, as in the released code


def bytes_per_token(prompt):
    """What a token of a batch needs until backward has passed: about 22 numbers per layer and dimension"""
    layers = prompt.model.config.num_hidden_layers
    return 22 * prompt.embedding.shape[1] * layers * prompt.embedding.element_size()


def tokens_that_fit(prompt, share=0.8):
    """Tokens per batch that fill `share` of the free memory; on a CPU more than 4,096 gain nothing."""
    if prompt.device.type == "cuda":
        free, most = torch.cuda.mem_get_info()[0], 2**17
    else:
        try:
            free, most = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 4096
        except (ValueError, OSError):  # not every system says
            return 4096
    return int(max(16, min(most, share * free / bytes_per_token(prompt))))


def mixed_if_it_agrees(args, prompt, make_prompt, routes, num_sample=64):
    """--dtype mixed, or auto on a CPU that multiplies bfloat16: the Prompt of an LLM whose products are in
    bfloat16, if scores of a sample of texts agree with those in float32; else `prompt`. Sets args.dtype.

    Asked: a squared difference of at most MOST_DIFFERENCE of the scores' variance between texts. Rounding is
    noise of a text's score: it weighs as if a user had as much less evidence.
    """
    soft = prompt.random_soft(1, torch.Generator().manual_seed(args.seed))[0]
    generator, prompt.purpose = torch.Generator().manual_seed(args.seed), "check of bfloat16"

    def sample_scores(prompt):
        weights, max_tokens = torch.ones(len(FIELDS)), args.tokens_per_batch or 1024
        return [text_scores(prompt, route, index, soft, weights, max_tokens) for route, index in samples]

    samples = []
    for route in routes:
        index = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
        samples.append((route, index[torch.randperm(len(index), generator=generator)[:num_sample]]))
    exact, restore = sample_scores(prompt), mix(prompt.model)
    mixed = make_prompt()
    mixed.purpose = prompt.purpose
    difference = max(float((one - two).square().sum() / (one - one.mean(0)).square().sum().clamp(min=1e-30))
                     for one, two in zip(exact, sample_scores(mixed)))
    is_taken = args.dtype == "mixed" or difference <= MOST_DIFFERENCE
    print(f"--dtype {args.dtype}: with products in bfloat16, scores of {num_sample} texts differ by "
          f"{difference:.2%} of their variance ({MOST_DIFFERENCE:.0%} at most for auto): "
          f"{'mixed' if is_taken else 'float32'}")
    if not is_taken:
        restore()
    args.dtype = "mixed" if is_taken else "float32"
    return mixed if is_taken else prompt


def load_prompt(args, profiles, routes, train, rank):
    """Choose, make or load the LLM, put it into the prompt, tokenize texts -> name, tokenizer, Prompt"""
    llm = args.llm
    if llm == "auto":
        llm, reason = choose_llm()
        print(f"--llm auto: {llm}, because {reason}")
    if llm == "tiny" and rank == 0:
        histories = [[join(route.pieces[index]) for index in indices if route.pieces[index]]
                     for route in routes for indices in route.texts_by_user(train)]
        make_tiny_llm(args, histories, [*profiles.values(), args.task_text])
    if dist.is_initialized():  # the other processes read what the first has made
        dist.barrier()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_half = args.dtype == "bfloat16" or args.dtype == "auto" and device == "cuda"
    model, tokenizer = load_llm(args, llm, device, torch.bfloat16 if is_half else torch.float32)
    make_prompt = lambda: Prompt((model, tokenizer), profiles, args.task_text, args.soft_tokens, args.mask)
    try:
        prompt = make_prompt()
        prompt.check_mask()
    except Exception as error:  # whatever another architecture does not know
        fail(f"--llm {llm}: a {type(model).__name__} takes no embeddings, mask or cached keys as stage 2 "
             f"gives them ({type(error).__name__}: {error}): take an LLM of the GPT-2 or Llama kind")
    if args.method == "score" and args.rank > (width := args.soft_tokens * prompt.embedding.shape[1]):
        fail(f"--rank {args.rank}: a profile has {width} dimensions, S · D, at most")
    for route in routes:
        route.texts = tokenize(tokenizer, route.pieces, REVIEW_TOKENS if args.evidence == "review" else None)
    size = sum(weight.numel() for weight in model.parameters())
    is_auto = args.dtype == "auto" and not is_half and size >= SMALL_LLM and multiplies_bfloat16()
    if args.dtype == "mixed" or is_auto:
        prompt = mixed_if_it_agrees(args, prompt, make_prompt, routes)
    elif args.dtype == "auto":
        args.dtype = "bfloat16" if is_half else "float32"
    print(f"LLM: {size:,} parameters, D {prompt.embedding.shape[1]}, {prompt.scale:.3f} per dimension, "
          f"{args.dtype} on {device}; prompt of {len(prompt.segment)} tokens")
    return llm, tokenizer, prompt


def flops_per_token(prompt):
    """Of a forward pass and a backward pass without gradients of weights"""
    body = sum(weight.numel() for weight in prompt.body.parameters()) - prompt.embed.weight.numel()
    return 4 * (body + prompt.head.weight.numel())


def plan(args, prompt, evidence):
    """What the LLM will read -> namespace of catalogue, its tokens; tokens of an event in the mean; and
    numbers of texts: weight_texts for the weight of a field, tune and report of held-out rows. Sets
    --shared-steps and --map-steps where no option says them.

    Fitting θ̄, fitting the map and measuring on held-out rows may each cost as many tokens as the catalogue
    has, or FREE_FLOPS, if these pay for more.
    """
    routes, events = evidence.routes, evidence.events
    catalogue = sum(int(route.texts.length[(route.text_counts(events) > 0)].sum()) for route in routes)
    tokens = sum(float(route.texts.length[route.text_index(events)].float().mean()) for route in routes)
    if evidence.is_history:
        tokens *= len(events.user) / len(events.user.unique())
    texts = max(catalogue, FREE_FLOPS / flops_per_token(prompt)) / tokens  # that each purpose may cost
    share = lambda part, most: int(min(most, max(1, part * texts)))
    args.shared_steps = args.shared_steps or share(0.8 / BATCH, 100)
    if args.method == "score":  # the option means nothing without it, also to further splits
        args.map_steps = args.map_steps or share(0.75 / BATCH, 150)
    tune, report = share(1 / 8, 1500), share(1 / 4, 1500)
    if args.heldout:
        tune, report = args.heldout // 2, args.heldout - args.heldout // 2
    return SimpleNamespace(catalogue=catalogue, tokens=tokens, weight_texts=max(16, share(1 / 20, 512)),
                           tune=tune, report=report)


def set_up(args, rank, world):
    """Read the artifacts, load the LLM, go on with unfinished work -> the run, a namespace: args; llm, its
    name; profiles {name: text}; prompt; observed; routes; evidence of all users without each fold, the
    last with all rows; size, see plan; tune and report, held-out events; codebook of --prior; progress;
    habits of --ratings, how users rate, float32 [F + 1, N, H]
    """
    inputs = ["interactions.parquet", "items.parquet"]
    interactions, items = read_artifacts(args, *inputs)
    for split in ("train", "valid"):
        if split not in set(interactions["split"]):
            fail(f"{args.run_dir}/interactions.parquet has no {split} rows: run 01_prepare.py with more data")
    num_users = int(interactions["user"].max()) + 1
    observed = observe(args, interactions, num_users)
    profiles = dict(text.split("=", 1) for text in args.profiles)
    codebook = read_codebook(args, profiles)
    routes = make_routes(args, interactions, items, observed, list(profiles))
    llm, tokenizer, prompt = load_prompt(args, profiles, routes, observed.train, rank)
    own = observed.own
    kept = [*(own.select(own.fold != fold) for fold in range(args.folds)), own]
    evidence = [Evidence(args, tokenizer, routes, events, num_users) for events in kept]
    evidence[-1].check_lengths(prompt)
    size = plan(args, prompt, evidence[-1])
    tune, report = heldout_events(interactions, observed.rows, routes, (size.tune, size.report), args.seed)
    # a GPU wants large batches of texts of one length, which a large block has; profiles are the same
    if args.method == "gradient":
        args.batch_size = args.batch_size or (1024 if prompt.device.type == "cuda" else 128)
    # before tokens_per_batch is set: how much memory is free must not decide whether a run goes on
    recipe = recipe_of(args, prompt, inputs + ["codebook.pt"] * bool(args.prior))
    args.tokens_per_batch = args.tokens_per_batch or tokens_that_fit(prompt)
    habits = torch.from_numpy(habits_by_fold(interactions, observed.train.fold.numpy(), args.folds)) \
        if args.ratings else None
    generator = torch.Generator().manual_seed(args.seed)
    progress = None if args.estimate else Progress(args, recipe, generator, rank, world)
    return SimpleNamespace(args=args, llm=llm, profiles=profiles, prompt=prompt, observed=observed,
                           routes=routes, evidence=evidence, items=items, size=size, tune=tune, report=report,
                           codebook=codebook, progress=progress, habits=habits)


def load_again(args, stored, options):
    """Tokenizer and Prompt of a run that has ended: stored is profiles.pt, options those in its sidecar"""
    check_tiny_llm(args, stored)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_llm(args, stored["llm"], device,
                                torch.bfloat16 if options["dtype"] == "bfloat16" else torch.float32)
    if options["dtype"] == "mixed":
        mix(model)
    profiles = dict(zip(stored["names"], stored["texts"]))
    return tokenizer, Prompt((model, tokenizer), profiles, options["task_text"], options["soft_tokens"])


def estimate(run, sample_size=512):
    """Print users, tokens, FLOPs, memory and time of the run on this machine, from a few batches."""
    args, prompt, evidence, size = run.args, run.prompt, run.evidence[-1], run.size
    soft = prompt.random_soft(1, torch.Generator().manual_seed(args.seed))[0]
    tokens, sample_tokens, sample_seconds = 0, 0, 0.0
    for route in run.routes:
        if args.method == "gradient":
            scope = f"{args.steps} steps for each" + f", {args.folds + 1} times" * bool(args.folds)
            index, num_passes = route.text_index(evidence.events), args.steps * (args.folds + 1)
        else:
            scope = "each text of the catalogue once; a user costs a sum"
            index = (route.texts.num_scored_tokens() > 0).nonzero()[:, 0]
            num_passes = len({field == "rating" for field in route.fields})  # the item, the rating, or both
        tokens += num_passes * int(route.texts.length[index].sum())
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
        sample = index[order[:sample_size]]
        sample_tokens += int(route.texts.length[sample].sum())
        for _ in range(2):  # the first time pays for what is done only once
            started = time.time()
            text_scores(prompt, route, sample, soft, torch.ones(len(FIELDS)), args.tokens_per_batch)
        sample_seconds += time.time() - started
    steps = args.shared_steps + (args.map_steps or 0)
    fitting = int(size.tokens * (steps * BATCH + size.weight_texts))
    # forward passes, a third of the cost: three lengths of a step, four sets of profiles, the item bank
    num_tune = len(run.tune.user) * (args.method == "score")
    measuring = int(size.tokens * (3 * num_tune + 4 * len(run.report.user)))
    if args.items:
        measuring += int(item_texts(prompt, evidence.tokenizer, run.items).length.sum())
    seconds = (tokens + fitting + measuring / 3) * sample_seconds / max(1, sample_tokens)
    flops = (tokens + fitting + measuring / 3) * flops_per_token(prompt)
    weights = sum(weight.numel() * weight.element_size() for weight in prompt.model.parameters())
    profiles = 4 * (args.folds + 1) * evidence.num_users * soft.numel()
    gib = lambda num_bytes: f"{num_bytes / 2**30:.2f} GiB"
    more = " and of the item bank" * args.items
    print(f"estimate: {evidence.num_users:,} users, {len(evidence.events.user):,} rows, {tokens:,} tokens of "
          f"evidence ({scope}), {fitting:,} to fit what users share, {measuring:,} of held-out rows{more}\n"
          f"  {flops:.3g} FLOPs, {seconds:,.0f} s on {prompt.device}, as {sample_tokens:,} tokens took\n"
          f"  memory: weights {gib(weights)}, a batch of {args.tokens_per_batch:,} tokens "
          f"{gib(args.tokens_per_batch * bytes_per_token(prompt))}; disk: profiles.pt {gib(profiles)}")
