"""Stage 2 of 5: infer latent profiles as soft tokens in a frozen LLM's prompt.

The prompt of user u is "This user's hobby is [θ] his background is [θ] The user has bought" and then what
they had (paper, section 2.3, eq. 3). The LLM is frozen. Only the θ are fitted, so that the user's behaviour
becomes likely (eq. 4), under the attention mask of Fig. 4. Only train rows are evidence, and a cold user's
support rows for their own profile. Validation rows of one half of the users choose step lengths; those of the
other half are only reported.

--method score (default) fits one θ̄ for all users, takes the score (the gradient of the log-likelihood at θ̄)
of each catalogue item once, and moves each user along the whitened sum of their items' scores: the cost grows
with the catalogue, not with the users. --method gradient is the paper's: AdamW on each user's own θ
(Algorithm 1). With --route each field of an item is evidence of one profile; with --ratings evidence says
whether items were liked. It then holds labels, so that --folds F infers each user F times more, without each
fold of the train rows, and stores how the user rates (habits). --prior pulls each user to their codeword
instead of θ̄ (eq. 7): a round of EM. --only-users infers new users from scores.pt, and their habits from the
means of interactions.parquet. --items also reads the texts of all items, for the item bank of stage 3, and
--only-items those of new items. A killed run goes on where it stood; torchrun shares the users.

Reads   interactions.parquet, items.parquet; with --prior codebook.pt; with --only-users a table, scores.pt;
        with --only-items a table, profiles.pt
Writes  profiles.pt: profiles float32 [N, P, S D] ([F + 1, N, P, S D] with folds, the last with all evidence),
        shared float32 [P, S D] (θ̄), noise float32 [P, S D, S D] (covariance of gain · (θ - θ̄) if users did
        not differ), gain float32 [N, P], num_evidence int64 [N, P] ([F + 1, N, P]), has_evidence bool [N],
        names, texts, llm, tiny_llm (its digest); with folds fold int64 [train rows]; with --prior the
        codebook; with --ratings habits float32 [N, H] ([F + 1, N, H]), see userip/rating_means.py
        scores.pt: with --method score all that a new user's profile needs
        new_profiles.pt: with --only-users profiles [N', P, S D], user_id, num_evidence, has_evidence, names,
        after --ratings habits [N', H]
        item_vectors.pt: with --items vectors float32 [M, 4 D], the mean hidden states of each item's text;
        new_item_vectors.pt: with --only-items the same of new items, and item_id
        tiny_llm/: the LLM, where --llm is tiny; progress/: finished work, until the run is done

Example: python 02_infer_profiles.py        (2 minutes on two cores, half of it to pretrain the tiny LLM)
  wrote runs/demo/profiles.pt: 1,975 users x 2 profiles x 128 | held-out NLL own 1.3811, shared 1.3846
"""

import userip  # noqa: F401  (first: Ctrl-C ends in one line while the others load)
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from userip.artifacts import check_finite, write_artifact
from userip.evidence import FIELDS
from userip.heldout import heldout_nll, print_heldout
from userip.item_bank import infer_items, infer_new_items
from userip.linear_map import fit_map
from userip.llm import tiny_stamp
from userip.new_users import infer_new_users
from userip.options import (at_least, changed_options, option_name, options_text, parse_with_presets,
                            refuse_without_effect, run_program, stage_parser, start_stage)
from userip.prior import (codeword_coordinates, codeword_soft_tokens, descend, make_prior,
                          nearest_coordinates, nearest_soft_tokens)
from userip.progress import Profiles, join_processes
from userip.score import centred_scores, field_weights, find_directions, user_steps, user_sums
from userip.setup import BATCH, estimate, set_up

DEFAULT_PROFILES = ["hobby=This user's hobby is", "background=his background is"]
DEFAULT_ROUTE = ["title+category", "brand+price"]
JUDGEMENT = "judgement=his judgement is"  # a third profile, which reads ratings
PAPER = {"method": "gradient", "evidence": "history", "route": ["none"], "start": "random", "lr": 0.001,
         "steps": 10, "pull": 0.0, "field_weights": "none"}
# differs from the released code: its texts name the brand and the price of the item that is scored ("The user
# likes {brand}"), and θ starts at U(-.1, .1), not at the scale of the LLM's embeddings
RELEASED = {"method": "gradient", "evidence": "review", "route": ["none"], "mask": "causal",
            "start": "random", "lr": 0.01, "steps": 10, "pull": 0.0, "field_weights": "none", "batch_size": 8,
            "task_text": "The user says",
            "profiles": ["likes=The user likes", "level=The consumption level of this user is"]}


def parse_args(argv=None):
    parser, add = stage_parser(__doc__)
    add.data("--evidence", choices=["items", "history", "review"], default="items",
             help="each item alone, a user's items as one sequence (gradient only), or reviews")
    add.data("--ratings", action="store_true", help="say if an item was liked (a third profile reads it)")
    add.data("--folds", type=at_least(0, at_most=1000), metavar="F",
             help="infer also without each of F folds of the train rows (default: 5 with --ratings, else 0)")
    add.data("--route", nargs="+", metavar="FIELDS",
             help="fields per profile, or none (default of two: title+category brand+price; rating: a third)")
    add.data("--max-history", type=at_least(1), default=20, help="latest items of a user in one history")
    add.data("--only-users", type=Path, metavar="FILE", help="infer new users: user_id, item_id (rating)")
    add.data("--items", action="store_true", help="read each item's text also for the item bank of stage 3")
    add.data("--only-items", type=Path, metavar="FILE", help="read new items: item_id, title (see data.md)")
    add.method("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add.method("--released", action="store_true", help="the released recipe: " + options_text(RELEASED))
    add.method("--llm", default="auto", help="hub name, folder, GGUF, tiny; auto: Llama-2-7B, GPT-2 or tiny")
    add.method("--profiles", nargs="+", default=DEFAULT_PROFILES, metavar="NAME=TEXT", help="name, text N_k")
    add.method("--task-text", default="The user has bought", help="task text D before the evidence")
    add.method("--method", choices=["score", "gradient"], default="score",
               help="one whitened step from θ̄, or AdamW by user")
    add.method("--mask", choices=["fig4", "causal"], default="fig4", help="Fig. 4, or causal (ablation)")
    add.method("--soft-tokens", type=at_least(1, at_most=1000), default=1, metavar="S",
               help="soft tokens per profile, S")
    add.method("--rank", type=at_least(1), default=16, metavar="R",
               help="score: directions of a profile's S · D in which users may differ")
    add.method("--prior", type=Path, metavar="CODEBOOK",
               help="codebook.pt of this run: pull each user to their codeword (eq. 7); a round of EM")
    add.training("--seed", type=at_least(0), default=0, help="seed of everything random in this stage")
    add.training("--start", choices=["shared", "random"], default="shared", help="gradient: at θ̄ or random")
    add.training("--steps", type=at_least(1), default=40, help="gradient: AdamW steps per user")
    add.training("--lr", type=at_least(0, float), help="gradient: rate (default 0.1 of embeddings' scale)")
    add.training("--pull", type=at_least(0, float),
                 help="weight of the prior around θ̄, in items (default: score estimates it, gradient 10)")
    add.training("--field-weights", choices=["noise", "none"], default="noise",
                 help="bring each field's score to equal noise, or sum them as they are")
    add.training("--shared-steps", type=at_least(1),
                 help="minibatches that fit θ̄ (default: 100, or what the catalogue costs)")
    add.training("--map-steps", type=at_least(1), help="score: those that fit the map (default: 150 at most)")
    add.training("--tiny-steps", type=at_least(1), default=400, help="tiny: steps of its pretraining")
    add.training("--heldout", type=at_least(16), help="validation rows to measure on (default: 3000 at most)")
    add.machine("--dtype", choices=["auto", "float32", "mixed", "bfloat16"], default="auto",
                help="mixed: products in bfloat16 (auto: bfloat16 on CUDA, mixed where scores agree)")
    add.machine("--batch-size", type=at_least(1), help="gradient: users per block (default 128, CUDA 1024)")
    add.machine("--tokens-per-batch", type=at_least(1),
                help="tokens per forward pass (default: what memory holds; without CUDA at most 4096)")
    add.machine("--estimate", action="store_true",
                help="measure a few batches, print tokens, FLOPs, memory and time of the run, and stop")
    args = parse_with_presets(parser, argv, paper=PAPER, released=RELEASED)
    if args.only_users or args.only_items:
        return check_only(parser, args)
    is_gradient = args.method == "gradient"
    refuse_without_effect(parser, args, {
        **dict.fromkeys(["start", "steps", "lr", "batch_size"], (is_gradient, "--method gradient")),
        **dict.fromkeys(["rank", "map_steps"], (not is_gradient, "--method score")),
        "items": (args.mask == "fig4", "--mask fig4"),
        "max_history": (args.evidence == "history", "--evidence history"),
        "tiny_steps": (args.llm in ("auto", "tiny"), "--llm tiny")})
    check_evidence(parser, args)
    check_profiles(parser, args)
    return args


def check_only(parser, args):
    """--only-users and --only-items refuse all other options: they are those of the run."""
    only = "only_users" if args.only_users else "only_items"
    if changed := changed_options(parser, args, ("run_dir", only)):
        parser.error(f"{option_name(only)} takes all options from the run: leave out "
                     f"{option_name(changed[0])}")
    return args


def check_evidence(parser, args):
    """Refuse evidence and folds that contradict each other; set the profiles that --ratings adds."""
    if args.method == "score" and args.pull == 0:
        parser.error("--pull 0 leaves users without evidence nowhere: --method score needs a pull above 0")
    if args.method == "gradient" and args.pull is None:
        args.pull = 10.0
    if args.lr == 0:
        parser.error("--lr must be above 0")
    if args.method == "score" and args.evidence == "history":
        parser.error("--evidence history needs --method gradient: a history's score is no sum over items")
    if args.ratings and args.prior:
        parser.error("--prior cannot go with --ratings: codes of ratings read rating habits, not θ alone")
    if args.ratings and args.evidence == "review":
        parser.error("--ratings go with items: leave out --evidence review")
    if args.ratings and args.profiles == DEFAULT_PROFILES and args.route is None:
        args.profiles, args.route = [*DEFAULT_PROFILES, JUDGEMENT], [*DEFAULT_ROUTE, "rating"]
    args.folds = (5 if args.ratings else 0) if args.folds is None else args.folds
    if args.folds == 1:
        parser.error("--folds 1 leaves no evidence: 0 for none, or 2 and more")


def check_profiles(parser, args):
    """Refuse names and routes that make no sense; set the default route."""
    if any("=" not in text or not all(map(str.strip, text.split("=", 1))) for text in args.profiles):
        parser.error(f"--profiles takes NAME=TEXT, such as {DEFAULT_PROFILES[0]!r}, not {args.profiles}")
    names = [text.split("=", 1)[0] for text in args.profiles]
    is_taken = len({*names, "user", "user_id", "item"}) < len(names) + 3
    if is_taken or not all(name.isidentifier() for name in names):
        parser.error(f"--profiles: the names {names} must differ and be words of letters, digits and _, but "
                     f"not user, user_id or item, which are columns of the feature bank")
    if any("{" in text for text in args.profiles):
        parser.error("--profiles: placeholders such as {brand} are not filled in; give plain texts")
    if args.route is None:
        is_default = len(names) == len(DEFAULT_ROUTE) and args.evidence != "review"
        args.route = DEFAULT_ROUTE if is_default else ["none"]
    if args.route == ["none"]:
        return
    allowed = [*FIELDS[:4], *["rating"] * args.ratings]
    fields = set("+".join(args.route).split("+"))
    unknown = sorted(fields - set(allowed))
    if repeated := [text for text in args.route if len({*text.split("+")}) <= text.count("+")]:
        parser.error(f"--route {repeated[0]} names a field twice")
    if len(args.route) != len(names) or unknown:
        parser.error(f"--route ({', '.join(unknown) or f'{len(args.route)} lists'}) takes one list of fields "
                     f"out of {'+'.join(allowed)} for each of {len(names)} profiles, or none"
                     + "; rating needs --ratings" * ("rating" in unknown))
    if args.evidence == "review":
        parser.error("--evidence review is the same for all profiles: --route none")
    if args.ratings and "rating" not in fields:
        parser.error("--ratings are evidence of no profile: name rating in --route")


# ----------------------------------------------------------------------------------------------------------
# what all users share: θ̄, the weights of fields, the noise of a score
# ----------------------------------------------------------------------------------------------------------


def fit_shared_start(run, evidence, weights, batch_size=BATCH):
    """Minimise eq. 4 over one θ̄ for all users, by Adam on minibatches -> [P, S D], nats per text by step"""
    args, prompt, generator = run.args, run.prompt, run.progress.generator
    prompt.purpose = "shared start"
    soft = prompt.random_soft(1, generator).to(prompt.device).requires_grad_()  # [1, P, S D]
    optimizer = torch.optim.Adam([soft], lr=0.3 * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.shared_steps)
    curve = []
    for _ in tqdm(range(args.shared_steps), desc="shared start", unit="step", mininterval=2):
        optimizer.zero_grad()
        curve.append(0.0)
        for route, text, _ in evidence:
            index = text[torch.randint(len(text), (batch_size,), generator=generator)]
            for batch in prompt.batches(route.texts, index, args.tokens_per_batch):
                loss = prompt.loss(soft, route, index[batch], weights)
                (loss / batch_size).backward()
                curve[-1] += loss.item() / batch_size
        optimizer.step()
        schedule.step()
        check_finite(soft, f"the shared start, step {len(curve)}", "take another --llm")
    return soft.detach()[0].float().cpu(), curve


def fit_shared(run, max_histories=4096):
    """Fit θ̄, bring the fields to equal noise, score each text once -> namespace of soft [P, S D] (θ̄), curve
    of its fit, weights [len(FIELDS)], scores {k: TextScores}, noise [P, S D, S D] of a text's score, prior
    """
    args, progress, evidence = run.args, run.progress, run.evidence[-1]
    warm = run.observed.is_warm.nonzero()[:, 0]
    if args.evidence == "history":  # these texts are made for the purpose: not of all users
        warm = warm[torch.randperm(len(warm), generator=progress.generator)[:max_histories]]
    warm_events = evidence.events.select(torch.isin(evidence.events.user, warm))
    weights = torch.ones(len(FIELDS))
    soft, curve = progress.compute(
        "shared", lambda: fit_shared_start(run, evidence.of_events(warm_events), weights))
    if args.field_weights == "noise":
        weights = progress.compute("weights", lambda: field_weights(run, soft, run.size.weight_texts))
    run.prompt.purpose, scores = "catalogue", {}
    for route in run.routes:
        scores |= centred_scores(run, route, soft, weights)
    noise = torch.stack([scores[k].noise for k in range(run.prompt.num_profiles)])
    prior = make_prior(args, run.codebook, soft)
    return SimpleNamespace(soft=soft, curve=curve, weights=weights, scores=scores, noise=noise, prior=prior)


# ----------------------------------------------------------------------------------------------------------
# --method score: one step from θ̄ for all users at once
# ----------------------------------------------------------------------------------------------------------


def choose_length(run, soft, step, shortest=0.05, longest=1.0):
    """The step lengths [P] under which held-out rows are likeliest: step [R, P, S D]

    The rows' NLL is measured at lengths 0 (θ̄), 0.5 and 1; a parabola through these gives the best length.
    None beyond 1: there it foretold a gain with SmolLM2 where rows were less likely than at θ̄. If no length
    makes the rows likelier by more than the standard error, the shortest is as good as θ̄. (Codes do not
    depend on the length.)
    """
    user, run.prompt.purpose = run.tune.user, "step lengths"
    base, half, full = (heldout_nll(run, thetas, run.tune)[0]
                        for thetas in (soft[None], soft + 0.5 * step, soft + step))  # [R, routes] each
    slope, bend = 4 * (half - base) - (full - base), 2 * (full - base) - 4 * (half - base)
    best = (-slope.sum(0) / (2 * bend.sum(0).clamp(min=1e-9))).clamp(shortest, longest)  # [routes]
    gain = slope * best + bend * best.square()  # [R, routes], below 0 where the step helps
    helps = gain.sum(0) + gain.std(0) * math.sqrt(len(user)) < 0
    best = torch.where(helps, best, shortest)
    lengths = torch.ones(len(soft))
    for route, length in zip(run.routes, best):
        lengths[route.may_read] = length
    listed = ", ".join(f"{name} {length:.2f}" for name, length in zip(run.prompt.names, lengths.tolist()))
    print(f"step lengths chosen on {len(user):,} held-out rows: {listed} (from {shortest} to {longest})")
    return lengths


def infer_by_score(run, shared):
    """One step from θ̄ for all users at once -> Profiles, and what the profile of a new user needs (dict)

    θ_u = θ̄ + length · B y_u with y_u = Σ_i g_i / (n_u + pull), whitened: a natural-gradient step, shrunk by
    a prior. With a codebook as prior, y_u = (Σ_i g_i + pull · y_c) / (n_u + pull): the E step takes the
    codeword c nearest to the user's plain mean, the M step pulls to it (eq. 7).
    # differs from the paper: B is not the inverse Fisher information but fitted (linear_map.py). Far from θ̄
    # the LLM is not linear: the plain natural-gradient step made held-out items less likely at every length.
    """
    soft, is_warm = shared.soft, run.observed.is_warm
    directions = find_directions(run, shared.scores)
    coordinates, pull = directions.coordinates, directions.pull
    lift = run.progress.compute("map", lambda: fit_map(run, shared, directions))
    sums = [user_sums(coordinates, evidence.events, is_warm) for evidence in run.evidence]
    step = user_steps(*(part[run.tune.user] for part in sums[-1]), pull, lift)
    length = run.progress.compute("length", lambda: choose_length(run, soft, step))
    lift = length[:, None, None] * lift
    centers = [codeword_coordinates(prior, lift[k]) for k, prior in enumerate(shared.prior)]

    def read(fold, users):
        user_sum, count = (part[users] for part in sums[fold])
        user_sum = user_sum + pull[:, None] * nearest_coordinates(user_sum, count, centers)
        return soft + user_steps(user_sum, count, pull, lift)

    fitted = {"shared": soft, "lift": lift, "pull": pull, "told": [c.is_scored for c in coordinates],
              "tables": [c.new for c in coordinates],
              "num_verdicts": [c.route.num_levels for c in coordinates]}
    return Profiles((len(sums), len(is_warm), *soft.shape), read), fitted


# ----------------------------------------------------------------------------------------------------------
# --method gradient: the paper's Algorithm 1, a block of users at a time
# ----------------------------------------------------------------------------------------------------------


def start_of(args, prompt, soft, users):
    """θ̄, or a random point for each user, the same in whatever block they are: [U, P, S D]"""
    if args.start == "shared":
        return soft.expand(len(users), -1, -1)
    seeds = [np.random.SeedSequence([args.seed, 7, user]).generate_state(1)[0] for user in users.tolist()]
    return torch.cat([prompt.random_soft(1, torch.Generator().manual_seed(int(seed))) for seed in seeds])


def infer_block(run, shared, evidence, start):
    """AdamW on the θ of a block of users (Algorithm 1, line 4): their evidence (see Evidence.of_users), start
    [U, P, S D] -> [U, P, S D]

    The loss of a user is Σ -log P(evidence), its fields weighed by --field-weights, + pull/2 (θ - θ̄)ᵀ Σ
    (θ - θ̄): the prior weighs as much as `pull` items. With a codebook as prior, θ̄ gives way to the codeword
    nearest at each step, as a soft token (eq. 7).
    """
    args, prompt = run.args, run.prompt
    anchors = [codeword_soft_tokens(prior, shared.soft[k], shared.noise[k])
               for k, prior in enumerate(shared.prior)]
    center, noise = shared.soft.to(prompt.device), shared.noise.to(prompt.device)
    soft = start.clone().to(prompt.device).requires_grad_()
    # the optimizer's state is the block's: users are independent
    optimizer = torch.optim.AdamW([soft], lr=args.lr or 0.1 * prompt.scale, weight_decay=0.0)
    for step in range(1, args.steps + 1):
        anchor = nearest_soft_tokens(soft.detach(), shared.prior, anchors) if shared.prior else center
        soft.grad = args.pull * torch.einsum("bpd,pde->bpe", soft.detach() - anchor, noise).contiguous()
        for route, text, owner in evidence:
            prompt.add_gradient(soft, route, text, owner, shared.weights, args.tokens_per_batch)
        optimizer.step()
        check_finite(soft, f"AdamW's step {step}", "lower --lr or --pull")
    return soft.detach().float().cpu()


def infer_by_gradient(run, shared):
    """AdamW for all users, a block at a time, fold by fold -> Profiles; blocks on disk"""
    progress, num_users, size = run.progress, len(run.observed.is_warm), run.args.batch_size
    run.prompt.purpose = "users' own steps"
    for fold, evidence in enumerate(run.evidence):

        def infer(users):
            texts = evidence.of_users(int(users[0]), int(users[-1]) + 1)
            return infer_block(run, shared, texts, start_of(run.args, run.prompt, shared.soft, users))

        progress.compute_blocks(f"fold-{fold}", torch.arange(num_users).split(size), "user", infer)

    def read(fold, users):
        result, block = torch.empty(len(users), *shared.soft.shape), users // size
        for index in block.unique().tolist():
            mask = block == index
            result[mask] = progress.read(f"fold-{fold}-{index}")[users[mask] - index * size]
        return result

    return Profiles((len(run.evidence), num_users, *shared.soft.shape), read)


# ----------------------------------------------------------------------------------------------------------
# the proof (held-out rows must be likelier under the user's own profile) and main
# ----------------------------------------------------------------------------------------------------------


def report_heldout(run, profiles, soft):
    """The four NLLs (nats per token) on held-out rows: no profile, shared, shuffled, own; prints them."""
    run.prompt.purpose = "held-out rows"
    user, order = run.report.user, torch.randperm(profiles.shape[1], generator=run.progress.generator)
    partner = order.roll(1)[order.argsort()]  # every user gets another user's profile
    none, tokens = heldout_nll(run, soft[None], run.report, is_blind=True)  # [R, routes] each
    sets = {"shared": soft[None], "shuffled": profiles.full(partner[user]), "own": profiles.full(user)}
    nats = {"none": none} | {name: heldout_nll(run, thetas, run.report)[0] for name, thetas in sets.items()}
    return print_heldout(nats, tokens, [route.name for route in run.routes])


def main(args):
    rank, world = join_processes()
    started = time.time()
    for name, infer_new in (("only_users", infer_new_users), ("only_items", infer_new_items)):
        if file := getattr(args, name):  # the options are those of the run
            args = SimpleNamespace(run_dir=args.run_dir, seed=args.seed, **{name: file})
            start_stage(args)
            return None if rank else infer_new(args)
    start_stage(args)
    run = set_up(args, rank, world)
    if args.estimate:
        return estimate(run)

    inference_started = time.time()
    shared = fit_shared(run)
    counts = torch.stack([evidence.counts() for evidence in run.evidence])  # [F + 1, N, P]
    fitted, objective, (num_users, num_profiles) = None, None, counts.shape[1:]
    if args.method == "score":
        profiles, fitted = infer_by_score(run, shared)
        pull, noise = fitted["pull"].tolist(), fitted["lift"].mT @ fitted["lift"]  # whitened sums: 1 per text
        gain = (counts[-1] + fitted["pull"]) / counts[-1].clamp(min=1).sqrt()
    else:
        profiles = infer_by_gradient(run, shared)
        pull, noise, gain = [args.pull] * num_profiles, shared.noise, torch.ones(num_users, num_profiles)
    vectors = infer_items(run, shared.soft) if args.items else None
    if rank:  # the first process writes
        return run.progress.clear()
    if shared.prior:
        profiles, objective = descend(run, shared.prior, profiles, pull, noise)
    seconds = time.time() - inference_started
    print(f"inferred {num_users:,} users in {seconds:.1f} s, the shared start included: "
          f"{num_users / seconds:,.0f} users per second")
    heldout = report_heldout(run, profiles, shared.soft)
    tokens = dict(run.prompt.num_tokens)
    print("tokens of texts that the LLM has read: " + ", ".join(
        f"{purpose} {number:,}" for purpose, number in tokens.items()))

    names, has_evidence = run.prompt.names, (counts[-1] > 0).any(1)
    facts = {"names": names, "llm": run.llm, "users": num_users,
             "users_with_evidence": int(has_evidence.sum())}
    inputs = ["interactions.parquet", "items.parquet"]
    if fitted:
        write_artifact(args, "scores.pt", fitted | {"names": names}, inputs, **facts)
        inputs.append("scores.pt")
    shape = profiles.shape if args.folds else profiles.shape[1:]  # without folds, there is no axis for them
    tensors = {"profiles": SimpleNamespace(shape=shape, blocks=profiles.blocks), "shared": shared.soft,
               "noise": noise, "gain": gain, "num_evidence": counts if args.folds else counts[0],
               "has_evidence": has_evidence, "names": names, "llm": run.llm,
               "texts": list(run.profiles.values()),
               "tiny_llm": tiny_stamp(args.run_dir) if run.llm == "tiny" else ""}
    if args.ratings:
        tensors["habits"] = run.habits if args.folds else run.habits[0]
    if args.folds:
        tensors["fold"] = run.observed.train.fold  # of each train row, in the order of interactions.parquet
    if shared.prior:  # stage 3 goes on from it
        tensors["prior"] = {name: {key: part[key] for key in ("codebook", "transform", "mean")}
                            for name, part in run.codebook.items()}
    path = write_artifact(
        args, "profiles.pt", tensors, inputs, **facts, pull=pull, heldout_nll=heldout, objective=objective,
        field_weights=dict(zip(FIELDS, shared.weights.tolist())), curve=shared.curve, tokens=tokens,
        seconds=time.time() - started, inference_seconds=seconds)
    print(f"wrote {path}: {num_users:,} users x {num_profiles} profiles x {shape[-1]} | held-out NLL own "
          f"{heldout['own']:.4f}, shared {heldout['shared']:.4f}")
    if args.items:
        path = write_artifact(args, "item_vectors.pt", {"vectors": vectors}, ["profiles.pt", "items.parquet"])
        print(f"wrote {path}: {len(vectors):,} items x {vectors.shape[1]}")
    run.progress.clear()


if __name__ == "__main__":
    run_program(main, parse_args, is_shared=True)
