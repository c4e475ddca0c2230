"""What is fixed before stage 2 fits anything: the LLM in its prompt, the texts, whose evidence they are."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from userip.artifacts import read_artifacts
from userip.cost import tokens_that_fit
from userip.evidence import Evidence, Events, Observed, make_routes, observe, texts_by_user
from userip.heldout import heldout_events
from userip.llm import choose_llm, load_llm, make_tiny_llm
from userip.prior import read_codebook
from userip.progress import Progress, recipe_of
from userip.prompt import Prompt
from userip.texts import join, tokenize

REVIEW_TOKENS = 15  # of a review's first sentence, at most, as in the released code


@dataclass
class Run:
    """What is fixed before anything is fitted.

    profiles: {name: text}; prompt: the frozen LLM in its prompt; routes: the texts, by the profiles that read
    them; evidence: of all users without each fold in turn, the last with all rows; tune and report: the two
    halves of the held-out events; codebook: that of --prior.
    """

    args: SimpleNamespace
    llm: str
    profiles: dict
    prompt: Prompt
    observed: Observed
    routes: list
    evidence: list
    tune: Events | None = None
    report: Events | None = None
    progress: Progress | None = None
    codebook: dict | None = None


def user_texts(routes, events):
    """What each user had, as a list of texts per user and route: what the tiny LLM is pretrained on"""
    return [[join(route.pieces[index]) for index in indices if route.pieces[index]]
            for route in routes for indices in texts_by_user(route, events)]


def prompt_and_evidence(args, interactions, items, rank):
    """Choose, make or load the LLM, put it into the prompt, and tokenize what users had -> Run"""
    num_users = int(interactions["user"].max()) + 1
    observed = observe(args, interactions, num_users)
    profiles = dict(text.split("=", 1) for text in args.profiles)
    routes = make_routes(args, interactions, items, observed, list(profiles))
    llm = args.llm
    if llm == "auto":
        llm, reason = choose_llm()
        print(f"--llm auto: {llm}, because {reason}")
    if llm == "tiny" and rank == 0:
        make_tiny_llm(args, user_texts(routes, observed.train), [*profiles.values(), args.task_text])
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
    own = observed.own
    kept = [*(own.select(own.fold != fold) for fold in range(args.folds)), own]
    evidence = [Evidence(args, tokenizer, routes, events, num_users) for events in kept]
    return Run(args, llm, profiles, prompt, observed, routes, evidence)


def set_up(args, rank, world):
    """Read the artifacts, load the LLM, go on with unfinished work -> Run"""
    inputs = ["interactions.parquet", "items.parquet"]
    interactions, items = read_artifacts(args, *inputs)
    codebook = read_codebook(args)
    run = prompt_and_evidence(args, interactions, items, rank)
    run.codebook = codebook
    # a GPU wants large batches of texts of one length, which a large block has; profiles are the same
    args.batch_size = args.batch_size or (1024 if run.prompt.device.type == "cuda" else 128)
    run.evidence[-1].check_lengths(run.prompt)
    # before tokens_per_batch is set: how much memory is free must not decide whether a run goes on
    recipe = recipe_of(args, run.prompt, inputs + ["codebook.pt"] * bool(args.prior))
    args.tokens_per_batch = args.tokens_per_batch or tokens_that_fit(run.prompt)
    if not args.estimate:
        run.tune, run.report = heldout_events(interactions, run.observed.rows, run.routes, args.heldout,
                                              args.seed)
        run.progress = Progress(args, recipe, torch.Generator().manual_seed(args.seed), rank, world)
    return run
