"""What is fixed before stage 2 fits anything: the LLM in its prompt, the texts, whose evidence they are."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from userip.evidence import Evidence, Events, Observed, make_routes, observe, tokenize_routes, user_texts
from userip.llm import choose_llm, load_llm, make_tiny_llm
from userip.progress import Progress
from userip.prompt import Prompt


@dataclass
class Run:
    """What is fixed before anything is fitted.

    prompt: the frozen LLM in its prompt; routes: the texts, by the profiles that read them; observed: train
    and support rows; evidence: of all users without each fold in turn, the last with all rows; tune and
    report: the two halves of the held-out events.
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


def set_up(args, interactions, items, num_users, rank=0):
    """Choose, make or load the LLM, and put it into the prompt -> Run"""
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
    tokenize_routes(args, tokenizer, routes)
    own = observed.own
    kept = [*(own.select(own.fold != fold) for fold in range(args.folds)), own]
    evidence = [Evidence(args, tokenizer, routes, events, num_users) for events in kept]
    return Run(args, llm, profiles, prompt, observed, routes, evidence)
