"""What is fixed before stage 2 fits anything: the LLM in its prompt, the texts, whose evidence they are."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from userip.artifacts import read_artifacts
from userip.cost import tokens_that_fit
from userip.evidence import Evidence, make_routes, observe
from userip.heldout import heldout_events
from userip.llm import choose_llm, load_llm, make_tiny_llm
from userip.prior import read_codebook
from userip.progress import Progress, recipe_of
from userip.prompt import Prompt
from userip.texts import join, tokenize

REVIEW_TOKENS = 15  # of a review's first sentence, at most, as in the released code


def load_prompt(args, profiles, routes, train, rank):
    """Choose, make or load the LLM, put it into the prompt, tokenize the routes' texts -> name, tokenizer, Prompt"""
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
    model, tokenizer = load_llm(args, llm, device)
    prompt = Prompt((model, tokenizer), profiles, args.task_text, args.soft_tokens, args.mask)
    print(f"LLM: {sum(weight.numel() for weight in model.parameters()):,} parameters, D "
          f"{prompt.embedding.shape[1]}, {prompt.scale:.3f} per dimension, {next(model.parameters()).dtype} "
          f"on {device}; prompt of {len(prompt.segment)} tokens")
    for route in routes:
        route.texts = tokenize(tokenizer, route.pieces, REVIEW_TOKENS if args.evidence == "review" else None)
    return llm, tokenizer, prompt


def set_up(args, rank, world):
    """Read the artifacts, load the LLM, go on with unfinished work -> the run, a namespace of args, llm (name),
    profiles {name: text}, prompt, observed, routes; evidence: of all users without each fold in turn, the last
    with all rows; tune, report: the two halves of the held-out events; codebook: that of --prior; progress
    """
    inputs = ["interactions.parquet", "items.parquet"]
    interactions, items = read_artifacts(args, *inputs)
    codebook, num_users = read_codebook(args), int(interactions["user"].max()) + 1
    observed = observe(args, interactions, num_users)
    profiles = dict(text.split("=", 1) for text in args.profiles)
    routes = make_routes(args, interactions, items, observed, list(profiles))
    llm, tokenizer, prompt = load_prompt(args, profiles, routes, observed.train, rank)
    own = observed.own
    kept = [*(own.select(own.fold != fold) for fold in range(args.folds)), own]
    evidence = [Evidence(args, tokenizer, routes, events, num_users) for events in kept]
    evidence[-1].check_lengths(prompt)
    tune, report = heldout_events(interactions, observed.rows, routes, args.heldout, args.seed)
    # a GPU wants large batches of texts of one length, which a large block has; profiles are the same
    args.batch_size = args.batch_size or (1024 if prompt.device.type == "cuda" else 128)
    # before tokens_per_batch is set: how much memory is free must not decide whether a run goes on
    recipe = recipe_of(args, prompt, inputs + ["codebook.pt"] * bool(args.prior))
    args.tokens_per_batch = args.tokens_per_batch or tokens_that_fit(prompt)
    generator = torch.Generator().manual_seed(args.seed)
    progress = None if args.estimate else Progress(args, recipe, generator, rank, world)
    return SimpleNamespace(args=args, llm=llm, profiles=profiles, prompt=prompt, observed=observed, routes=routes,
                           evidence=evidence, tune=tune, report=report, codebook=codebook, progress=progress)
