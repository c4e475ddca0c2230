"""Stage 2 of 5: infer latent profiles as soft tokens in a frozen LLM's prompt.

The prompt of user u is "This user's hobby is [θ] his background is [θ] The user has bought" and then what he
had (paper, section 2.3, eq. 3). The LLM is frozen; only the θ are fitted, to make the user's behaviour likely
(eq. 4), under the mask of Fig. 4. `--method score` (default) fits one θ̄ for all, takes the score (the
gradient of the log-likelihood at θ̄) of each catalogue item once, and moves each user along the whitened sum
of his items' scores: the cost grows with the catalogue, not with the users. `--method gradient` is the
paper's: AdamW on each user's own θ. `--route` lets each field of an item tell of its own profile only. Only
train rows are evidence; half of the users' validation rows choose step lengths, the other half report.
`--paper` = the paper's text.

Reads   interactions.parquet, items.parquet
Writes  profiles.pt: profiles float32 [N, P, D], shared float32 [P, D] (θ̄), noise float32 [P, D, D]
        (covariance of gain · (θ - θ̄) if users did not differ), gain float32 [N, P], num_evidence int64
        [N, P], has_evidence bool [N], names, texts, llm
        tiny_llm/: the LLM, where --llm is tiny

Example: python 02_infer_profiles.py        (2 minutes on two cores, half of it to pretrain the tiny LLM)
  wrote runs/demo/profiles.pt: 1,975 users x 2 profiles x 128 | held-out NLL own 1.3804, shared 1.3835
"""

import hashlib
import json
import math
import shutil
import socket
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common import (at_least, fail, fig4_mask, load_llm, options_text, parse_with_presets, read_artifacts,
                    stage_parser, start_stage, write_artifact)

FIELDS = ("title", "category", "brand", "price")
DEFAULT_PROFILES = ["hobby=This user's hobby is", "background=his background is"]
DEFAULT_ROUTE = ["title+category", "brand+price"]
PAPER = {"method": "gradient", "evidence": "history", "route": ["none"], "start": "random", "lr": 0.001,
         "steps": 10, "pull": 0.0, "stop": "none", "field_weights": "none"}


def parse_args(argv=None):
    parser = stage_parser(__doc__)
    add = parser.add_argument
    add("--seed", type=at_least(0), default=0, help="seed of everything random in this stage")
    add("--paper", action="store_true", help="the paper's text: " + options_text(PAPER))
    add("--llm", default="auto", help="hub name, folder, tiny, or auto: Llama-2-7B, GPT-2, tiny, as at hand")
    add("--profiles", nargs="+", default=DEFAULT_PROFILES, metavar="NAME=TEXT", help="names N_k, their texts")
    add("--task-text", default="The user has bought", help="task text D before the evidence")
    add("--method", choices=["score", "gradient"], default="score", help="natural gradient, or AdamW by user")
    add("--evidence", choices=["items", "history"], default="items", help="each item alone, or one sequence")
    add("--route", nargs="+", default=None, metavar="FIELDS",
        help="fields per profile (default for two profiles: title+category brand+price); none = all to all")
    add("--max-history", type=at_least(1), default=20, help="latest items of a user in one history")
    add("--start", choices=["shared", "random"], default="shared", help="gradient: start at θ̄, or at random")
    add("--steps", type=at_least(1), default=40, help="gradient: AdamW steps per user at most")
    add("--lr", type=at_least(0, float), help="gradient: learning rate (default: 0.1 of embeddings' scale)")
    add("--pull", type=at_least(0, float), default=None,
        help="pull back to θ̄: a prior that weighs like so many items (default: score estimates, gradient 10)")
    add("--stop", choices=["heldout", "none"], default="heldout", help="gradient: steps by held-out, or all")
    add("--field-weights", choices=["noise", "none"], default="noise", help="equal noise, or sum as they are")
    add("--shared-steps", type=at_least(1), default=100, help="minibatch steps that fit the shared θ̄")
    add("--map-steps", type=at_least(1), default=150, help="score: minibatch steps that fit the map to θ")
    add("--tiny-steps", type=at_least(1), default=400, help="tiny: steps of its pretraining")
    add("--batch-size", type=at_least(1), default=128, help="gradient: users per block")
    add("--tokens-per-batch", type=at_least(1), default=4096, help="tokens per forward pass, prompt included")
    add("--heldout", type=at_least(2), default=3000, help="validation rows to measure the NLL on, at most")
    args = parse_with_presets(parser, argv, paper=PAPER)
    if any("=" not in text or not all(text.split("=", 1)) for text in args.profiles):
        parser.error(f"--profiles takes NAME=TEXT, such as {DEFAULT_PROFILES[0]!r}, not {args.profiles}")
    names = [text.split("=", 1)[0] for text in args.profiles]
    if len(set(names)) < len(names) or not all(name.isidentifier() for name in names):
        parser.error(f"--profiles: the names {names} must differ and be words of letters, digits and _")
    if {"user", "user_id"} & set(names):
        parser.error("--profiles: user and user_id are columns of the feature bank; take another name")
    if args.route is None:
        args.route = DEFAULT_ROUTE if len(names) == len(DEFAULT_ROUTE) else ["none"]
    if args.route != ["none"]:
        unknown = set("+".join(args.route).split("+")) - set(FIELDS)
        if len(args.route) != len(names) or unknown:
            parser.error(f"--route takes one list of fields out of {'+'.join(FIELDS)} for each of "
                         f"{len(names)} profiles, or none")
    if not args.task_text.strip():
        parser.error("--task-text must hold a word: its last token predicts the first evidence token")
    return args


# ----------------------------------------------------------------------------------------------------------
# evidence: what users had, as streams of tokens of which each knows the field it comes from
# ----------------------------------------------------------------------------------------------------------

Texts = namedtuple("Texts", "ids field")  # ids [R, T] int64, field [R, T] int64 (index in FIELDS, -1 = pad)
Stream = namedtuple("Stream", "fields sees texts")  # fields it tells, bool [P]: the θ it may read, Texts
Pairs = namedtuple("Pairs", "user row")  # int64 [R] each: the texts of a stream that are evidence of a user


def pieces_of(item, fields):
    """Those fields of an item as (field, text) pieces: " Hiking: Rustic Boots One by Frugo for $22."

    A missing field is left out. Prices are told to two digits: the LLM would spend its likelihood on cents.
    """
    present = lambda value: value is not None and value == value and str(value).strip() not in ("", "<NA>")
    price = f"{float(f'{item.price:.2g}'):g}" if present(item.price) else ""
    texts = {"category": f" {item.category}:" if present(item.category) else "", "title": f" {item.title}",
             "brand": f" by {item.brand}" if present(item.brand) else "", "price": price and f" for ${price}"}
    pieces = [(field, text) for field, text in texts.items() if field in fields and text]
    return pieces[:-1] + [(field, text.rstrip(":") + ".") for field, text in pieces[-1:]]


def text_of(pieces):
    return "".join(text for _, text in pieces)


def tokenize(tokenizer, rows):
    """rows: lists of (field, text) pieces, maybe empty -> Texts, padded right: later tokens are not seen."""
    # a tokenizer of the Llama kind puts its own space before a text; GPT-2's needs it there
    first_token = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    shift = 1 if first_token.startswith("▁") else 0
    ids, field = [], []
    for pieces in rows:
        encoded = tokenizer(text_of(pieces)[shift:], add_special_tokens=False, return_offsets_mapping=True)
        last_letter = np.array([end for _, end in encoded["offset_mapping"]], dtype=int) + shift
        ends = np.cumsum([len(text) for _, text in pieces])
        piece = np.searchsorted(ends, last_letter)  # a token belongs where it ends
        piece = piece.clip(max=max(len(pieces) - 1, 0))
        ids.append(torch.tensor(encoded["input_ids"], dtype=torch.long))
        field.append(torch.tensor([FIELDS.index(pieces[p][0]) for p in piece], dtype=torch.long))
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return Texts(pad(ids, 0), pad(field, -1))


def routes_of(args, items, names):
    """Which fields tell of which profile: list of (fields, sees bool [P]), one per distinct set of fields.

    # differs from the paper: each set is a text of its own, and reads only its own profiles. In one text, the
    # brand's tokens would see title tokens that saw θ_hobby, and θ_background would learn what titles tell.
    A profile none of whose fields the data hold is told all fields: better than nothing, and said.
    """
    known = [field for field in FIELDS if items[field].notna().any()]
    routes = {}
    for index, name in enumerate(names):
        asked = FIELDS if args.route == ["none"] else args.route[index].split("+")
        fields = tuple(field for field in known if field in asked)
        if not fields:
            print(f"route: the data hold no {' or '.join(asked)}, so {name} reads {'+'.join(known)}")
            fields = tuple(known)
        routes.setdefault(fields, torch.zeros(len(names), dtype=torch.bool))[index] = True
    return list(routes.items())


def lengths_of(texts):
    return (texts.field >= 0).sum(1)


def cut(texts, rows):
    """Those rows of texts, without the columns that are padding in all of them."""
    length = int((texts.field[rows] >= 0).sum(1).max())
    return Texts(texts.ids[rows, :length], texts.field[rows, :length])


def batches(prompt, texts, rows, max_tokens):
    """Split rows [R] into batches of texts of about equal length, longest first: yields places in `rows`."""
    lengths = lengths_of(texts)[rows]
    order, start = torch.argsort(lengths, descending=True, stable=True), 0
    while start < len(order):
        size = max(1, max_tokens // (len(prompt.segment) + int(lengths[order[start]])))
        yield order[start:start + size]
        start += size


def evidence_of(args, tokenizer, items, item_streams, told):
    """What is evidence of whom: a list of (stream, pairs), one per route; `told`: the rows told, by time.

    items: each item alone, one text per item, so that p(H | θ) = Π p(item | θ) as in Fig. 2; history: the
    latest items of a user as one text, one text per user.
    """
    if args.evidence == "items":
        user, item = (torch.tensor(told[column].to_numpy()) for column in ("user", "item"))
        has_text = [lengths_of(stream.texts)[item] > 0 for stream in item_streams]
        return [(stream, Pairs(user[mask], item[mask])) for stream, mask in zip(item_streams, has_text)]
    latest = told.groupby("user")["item"].agg(lambda rows: list(rows)[-args.max_history:])
    evidence, records = [], list(items.itertuples())
    for stream in item_streams:
        pieces = [sum((pieces_of(records[item], stream.fields) for item in history), [])
                  for history in latest]
        texts, user = tokenize(tokenizer, pieces), torch.tensor(latest.index.to_numpy())
        has_text = lengths_of(texts) > 0
        pairs = Pairs(user[has_text], torch.arange(len(user))[has_text])
        evidence.append((stream._replace(texts=texts), pairs))
    cut_short = int((told.groupby("user").size() > args.max_history).sum())
    print(f"history: the latest {args.max_history} items of each user; "
          f"{cut_short:,} of {len(latest):,} users had more")
    return evidence


# ----------------------------------------------------------------------------------------------------------
# the prompt: profile blocks, task text, evidence; the frozen LLM's negative log-likelihood of the evidence
# ----------------------------------------------------------------------------------------------------------


class Prompt:
    """[N_1 θ_1 N_2 θ_2 … D] H (eq. 3) around a frozen LLM, with the mask of Fig. 4."""

    def __init__(self, model, tokenizer, names, name_texts, task_text):
        self.names = names
        self.model, self.device, self.num_profiles = model, model.device, len(name_texts)
        # every stream that starts blind begins as the LLM was trained to begin: with its BOS, if it has one
        bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        encode = lambda text: bos + tokenizer(text, add_special_tokens=False).input_ids
        blocks = [[*encode(text), 0] for text in name_texts]  # 0 holds the soft token's place
        blocks.append(encode(task_text))
        # differs from the paper: positions start anew in each profile block, so that a profile cannot even
        # tell how long the other's name is; the task text goes on behind the longest block
        starts = [0] * len(name_texts) + [max(map(len, blocks[:-1]))]
        as_tensor = lambda rows: torch.tensor([value for row in rows for value in row], device=self.device)
        self.segment = as_tensor([index] * len(block) for index, block in enumerate(blocks))  # [L]
        spans = [range(start, start + len(block)) for start, block in zip(starts, blocks)]
        self.position = as_tensor(spans)  # [L]
        self.soft_places = as_tensor([np.cumsum([len(block) for block in blocks[:-1]]) - 1])  # [P]
        self.embed = model.get_input_embeddings()
        self.embedding = self.embed(as_tensor(blocks)).detach()  # [L, D]
        # per dimension: GPT-2 .14, Llama-2 .02
        self.scale = float(self.embed.weight.float().square().mean().sqrt())

    def inputs(self, soft, ids, sees):
        """soft [B, P, D], ids [B, T], sees [B, P] -> embeddings [B, L + T, D], mask [B, 1, L + T, L + T],
        positions [1, L + T]"""
        (batch, num_tokens), start = ids.shape, int(self.position[-1]) + 1
        evidence = self.embed(ids)  # [B, T, D]
        prefix = self.embedding.expand(batch, -1, -1).index_copy(1, self.soft_places, soft.to(evidence.dtype))
        segment = F.pad(self.segment, (0, num_tokens), value=self.num_profiles + 1)
        is_soft = torch.zeros_like(segment, dtype=torch.bool).index_fill(0, self.soft_places, True)
        position = torch.cat([self.position, torch.arange(start, start + num_tokens, device=self.device)])
        return torch.cat([prefix, evidence], 1), fig4_mask(segment, is_soft, sees), position[None]

    def nll(self, soft, texts, sees):
        """-log P(h_t | h_<t, N, θ, D) per evidence token (eq. 4): soft [B, P, D], texts [B, T], sees [B, P]
        or [P] -> float32 [B, T], 0 at pads. Logits are made only where evidence is predicted."""
        ids, field = texts.ids.to(self.device), texts.field.to(self.device)
        sees = sees.to(self.device).expand(len(ids), -1)
        embeddings, mask, position = self.inputs(soft.to(self.device), ids, sees)
        start, end = len(self.segment) - 1, embeddings.shape[1] - 1
        places = torch.arange(start, end, device=self.device)  # each predicts the next
        logits = self.model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                            use_cache=False, logits_to_keep=places).logits  # [B, T, V]
        nll = F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        return nll * (field >= 0)

    def check_context(self, texts, what, cure):
        """Exit when a text with its prompt is longer than the LLM's context."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        needed = int(self.position[-1]) + 1 + lengths_of(texts)
        if needed.max() > limit:
            fail(f"{what} {int(needed.argmax())} needs {int(needed.max()):,} tokens with its prompt, "
                 f"but the LLM reads {limit:,} at most: {cure}")


# ----------------------------------------------------------------------------------------------------------
# the LLM: named, found, or made on the spot
# ----------------------------------------------------------------------------------------------------------


def choose_llm():
    """--llm auto: Llama-2-7B with CUDA and its weights here, else GPT-2 if here or reachable, else tiny."""
    llama = "meta-llama/Llama-2-7b-hf"
    is_here = lambda repository, file: isinstance(try_to_load_from_cache(repository, file), str)
    index_files = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    if torch.cuda.is_available() and any(is_here(llama, file) for file in index_files):
        return llama, "CUDA and its weights are on this machine"
    if is_here("gpt2", "model.safetensors"):
        return "gpt2", "its weights are on this machine"
    if not HF_HUB_OFFLINE:
        host = ENDPOINT.split("://")[-1].split("/")[0]
        name, _, port = host.partition(":")
        try:
            socket.create_connection((name, int(port or 443)), timeout=3).close()
            return "gpt2", f"it can be fetched from {host}"
        except OSError:
            pass
    return "tiny", ("no other LLM is on this machine and the model hub cannot be reached; "
                    "it is pretrained on the train items")


TINY_STAMP = "tiny_llm/made_from.txt"  # the digest of what the tiny LLM was made from
TINY = {"batch": 24, "length": 96, "lr": 2e-3, "width": 128, "layers": 4, "vocabulary": 2048, "context": 512}


def pretrain_tiny(folder, histories, name_texts, task_text, num_steps, seed):
    """A 4-layer GPT-2 of width 128, pretrained on the train items' texts -> loss

    histories: lists of texts, of a user each. It reads a user's items in random order, so that it learns what
    goes with what, as a large LLM knows from the world; random offsets train all positions. About a minute on
    two cores.
    """
    rng = np.random.default_rng([seed, 3])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [text for history in histories for text in history]
    corpus += (1 + len(corpus) // 50) * [*name_texts, task_text]  # often enough to become whole words
    trainer = trainers.BpeTrainer(vocab_size=TINY["vocabulary"], min_frequency=5, show_progress=False,
                                  special_tokens=["<|endoftext|>"],
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|endoftext|>",
                                        eos_token="<|endoftext|>")
    known = {text: tokenizer(text).input_ids for text in sorted(set(corpus))}
    opening = [tokenizer.bos_token_id, *tokenizer(task_text).input_ids]

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=TINY["context"], n_embd=TINY["width"],
                        n_layer=TINY["layers"], n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY["lr"], weight_decay=0.01, betas=(0.9, 0.95),
                                  fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TINY["lr"], total_steps=num_steps,
                                                   pct_start=0.1)
    size, stream = TINY["batch"] * TINY["length"], []
    bar = tqdm(range(num_steps), desc="pretrain tiny", unit="step", mininterval=2)
    for step in bar:
        while len(stream) < size:
            for user in rng.permutation(len(histories)):
                order = rng.permutation(len(histories[user]))
                stream += opening + [token for index in order for token in known[histories[user][index]]]
        tokens = torch.tensor(stream[:size]).view(TINY["batch"], TINY["length"])
        del stream[:size]
        offset = torch.from_numpy(rng.integers(TINY["context"] - TINY["length"], size=(TINY["batch"], 1)))
        logits = model(tokens, position_ids=offset + torch.arange(TINY["length"])).logits  # [B, T, V]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def make_tiny_llm(args, train, streams_pieces, name_texts):
    """run_dir/tiny_llm, made from this run's train rows; kept when the same texts and seed made it before.

    streams_pieces: per route, each item's pieces; the LLM reads users' items as the prompts will tell them.
    """
    of_user = train.groupby("user")["item"].agg(list)
    histories = [[text_of(pieces[item]) for item in rows if pieces[item]]
                 for pieces in streams_pieces for rows in of_user]
    recipe = json.dumps([histories, name_texts, args.task_text, args.tiny_steps, args.seed, TINY])
    made_from = hashlib.sha256(recipe.encode()).hexdigest()
    folder = Path(args.run_dir) / "tiny_llm"
    stamp = folder / "made_from.txt"
    if stamp.exists() and stamp.read_text() == made_from:
        print(f"tiny LLM: {folder} was made from the same texts, kept")
        return
    started = time.time()
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        loss = pretrain_tiny(temporary, histories, name_texts, args.task_text, args.tiny_steps, args.seed)
        (temporary / stamp.name).write_text(made_from)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"cannot write {folder}: {error.strerror}; free some space or choose another --run-dir")
    print(f"tiny LLM: pretrained on {len(train):,} train interactions in {time.time() - started:.0f} s, "
          f"loss {loss:.3f}")


# ----------------------------------------------------------------------------------------------------------
# inference: the shared point, the score, the gradient
# ----------------------------------------------------------------------------------------------------------


def weighted_nll(prompt, soft, stream, rows, weights):
    """Loss of those rows of a stream, tokens weighted by field (see field_weights): soft [B, P, D] -> []"""
    texts = cut(stream.texts, rows)
    weights = F.pad(weights, (0, 1))  # the pad's field -1 takes the last, 0
    weight = weights[texts.field].to(prompt.device)  # [B, T]
    return (prompt.nll(soft, texts, stream.sees) * weight).sum()


def fit_shared(args, prompt, evidence, weights, generator, batch_size=64):
    """One θ̄ for all users, by Adam on minibatches of their evidence -> float32 [P, D]"""
    shape = 1, prompt.num_profiles, prompt.embedding.shape[1]
    soft = (prompt.scale * torch.randn(shape, generator=generator)).to(prompt.device).requires_grad_()
    optimizer = torch.optim.Adam([soft], lr=0.3 * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.shared_steps)
    for _ in tqdm(range(args.shared_steps), desc="shared start", unit="step", mininterval=2):
        optimizer.zero_grad()
        for stream, pairs in evidence:
            rows = pairs.row[torch.randint(len(pairs.row), (batch_size,), generator=generator)]
            for index in batches(prompt, stream.texts, rows, args.tokens_per_batch):
                loss = weighted_nll(prompt, soft.expand(len(index), -1, -1), stream, rows[index], weights)
                (loss / batch_size).backward()
        optimizer.step()
        schedule.step()
    return soft.detach()[0].float().cpu()


def scores_of(prompt, stream, rows, shared, weights, max_tokens, desc):
    """g_r = ∇_θ log P(text r | θ) at θ̄, one backward pass per text: rows [R] -> float32 [R, P, D]"""
    scores = torch.empty(len(rows), *shared.shape)
    with tqdm(total=len(rows), desc=desc, unit="text", mininterval=2) as bar:
        for index in batches(prompt, stream.texts, rows, max_tokens):
            soft = shared.expand(len(index), -1, -1).to(prompt.device).requires_grad_()
            loss = weighted_nll(prompt, soft, stream, rows[index], weights)
            scores[index] = -torch.autograd.grad(loss, soft)[0].float().cpu()
            bar.update(len(index))
    return scores


def field_weights(args, prompt, item_streams, popularity, shared, generator, num_sample=512):
    """Bring every field to the same noise: 1 / (root mean square of its score at θ̄ over a sample of items) ->
    [len(FIELDS)]

    # differs from the paper: fields speak at volumes of their own, which depend on the LLM and say nothing
    # about what they tell: a title's score has more variance than a category's and knows less of the hobby.
    # In a plain sum the loudest field drowns the others.
    """
    weights = torch.zeros(len(FIELDS))
    for stream in item_streams:
        told = (popularity * lengths_of(stream.texts)).nonzero()[:, 0]
        rows = told[torch.randperm(len(told), generator=generator)[:num_sample]]
        for field in stream.fields:
            one_hot = F.one_hot(torch.tensor(FIELDS.index(field)), len(FIELDS)).float()
            scores = scores_of(prompt, stream, rows, shared, one_hot, args.tokens_per_batch,
                               f"volume of {field}")
            noise = (scores - scores.mean(0)).square().sum((1, 2)).mean()
            weights[FIELDS.index(field)] = noise.clamp(min=1e-20).rsqrt()
    told = [f"{field} {weight:.3g}" for field, weight in zip(FIELDS, weights) if weight]
    print("field weights: " + "  ".join(told))
    return weights


def information_of(prompt, item_streams, popularity, told, shared, weights, max_tokens, shrinkage=1e-3):
    """Scores of the items told [M], centred by popularity [M, P, D], and their covariance [P, D, D]: the
    noise.

    If users did not differ, a user's n items would be n draws by popularity, and the sum of their scores
    would have n times this covariance. It is also the Fisher information of θ that one item brings.
    """
    scores = torch.zeros(len(popularity), *shared.shape)
    noise = torch.zeros(len(shared), shared.shape[1], shared.shape[1])
    for stream in item_streams:
        rows = (told * lengths_of(stream.texts)).nonzero()[:, 0]
        own = scores_of(prompt, stream, rows, shared, weights, max_tokens,
                        f"score of {'+'.join(stream.fields)}")
        share = (popularity[rows] / popularity[rows].sum()).double()[:, None]
        for k in stream.sees.nonzero()[:, 0].tolist():
            centred = own[:, k].double() - (share * own[:, k].double()).sum(0)  # [R, D]
            covariance = (share * centred).T @ centred
            ridge = shrinkage * covariance.diagonal().mean().clamp(min=1e-20)
            noise[k] = (covariance + ridge * torch.eye(len(covariance))).float()
            scores[rows, k] = centred.float()
    return scores, noise


def sum_by_user(stream, pairs, of_row, num_users):
    """Σ of a user's texts: of_row [R, C] -> float64 [N, C], one sparse product"""
    incidence = torch.sparse_coo_tensor(torch.stack(pairs), torch.ones(len(pairs.user), dtype=torch.float64),
                                        (num_users, len(of_row)), check_invariants=True)
    return torch.sparse.mm(incidence.coalesce(), of_row.double())


def project_scores(stream, pairs, of_row, noise, is_warm, rank=16):
    """Whiten scores by the noise and keep the directions in which the warm users (is_warm [N]) differ most.

    of_row [R, D], noise [D, D] -> of_row [R, C], its sums by user [N, C], eigenvalues [C]. A whitened sum
    over n texts has variance n in every direction if users do not differ; an eigenvalue λ above 1 tells how
    far they do.
    """
    values, vectors = torch.linalg.eigh(noise.double())
    whiten = vectors * values.rsqrt() @ vectors.T  # Σ^-½
    count = torch.bincount(pairs.user, minlength=len(is_warm)).double()
    z = sum_by_user(stream, pairs, of_row, len(is_warm)) @ whiten / count.clamp(min=1).sqrt()[:, None]
    eigenvalues, directions = torch.linalg.eigh(torch.cov(z[is_warm & (count > 0)].T))
    projection = whiten @ directions.flip(1)[:, :rank]  # [D, C]
    of_row = of_row.double() @ projection
    return of_row, sum_by_user(stream, pairs, of_row, len(is_warm)), eigenvalues.flip(0)[:rank]


# total [N, P, C], of_item [M, P, C], count [N, P], pull [P], unit [P]
Coordinates = namedtuple("Coordinates", "total of_item count pull unit")


def coordinates_of(args, prompt, evidence, scores, noise, shared, weights, is_warm):
    """Users in the few directions of their scores in which they differ (see project_scores).

    What is estimated over users, is so over warm ones (is_warm [N]: with train rows): cold ones are only
    placed.
    """
    count, pulls, totals, of_items = torch.zeros(len(is_warm), len(shared)), [], [], []
    for k in range(len(shared)):
        stream, pairs = next((stream, pairs) for stream, pairs in evidence if stream.sees[k])
        of_row = scores[:, k]
        if args.evidence == "history":
            of_row = scores_of(prompt, stream, pairs.row, shared, weights, args.tokens_per_batch,
                               "score of histories")[:, k]
            pairs = Pairs(pairs.user, torch.arange(len(pairs.row)))
        projected, total, eigenvalues = project_scores(stream, pairs, of_row, noise[k], is_warm)
        count[:, k] = torch.bincount(pairs.user, minlength=len(is_warm))
        # λ = 1 + n · (variance between users): the prior of that variance weighs as much as n / (λ - 1) items
        edge = (1 + math.sqrt(len(noise[k])
                              / int(is_warm.sum()))) ** 2  # of pure noise (Marchenko and Pastur)
        excess = float(eigenvalues[eigenvalues > edge].mean()) - 1 if (eigenvalues > edge).any() else 0.1
        pulls.append(float(count[is_warm, k].mean()) / excess if args.pull is None else args.pull)
        totals.append(total.float())
        if args.evidence == "items":  # an item's own part, to be left out of its user's sum
            of_items.append(projected.float())
        else:  # a history does not come apart
            of_items.append(torch.zeros(len(scores), projected.shape[1]))
        leading = " ".join(f"{value:.2f}" for value in eigenvalues[:8])
        print(f"{prompt.names[k]}: pull {pulls[-1]:.1f} items; "
              f"eigenvalues of the whitened scores (noise 1, its edge {edge:.2f}): {leading}")
    total, pull = torch.stack(totals, 1), torch.tensor(pulls)
    unit = (total / (count + pull)[:, :, None])[is_warm].square().mean((0, 2)).sqrt().clamp(min=1e-6)
    return Coordinates(total, torch.stack(of_items, 1), count, pull, unit)


def fit_map(args, prompt, item_streams, train, shared, at, generator, batch_size=64):
    """The map B [P, C, D] from coordinates to soft tokens, one for all users, by Adam on their train items.

    Minimises -log P(item | θ̄ + B y_u) with the item itself left out of y_u: a profile must foretell others.
    """
    shape = len(shared), at.total.shape[2], shared.shape[1]
    lift = torch.zeros(shape, device=prompt.device, requires_grad=True)
    optimizer = torch.optim.Adam([lift], lr=0.1 * prompt.scale)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=args.map_steps)
    user, item = (torch.tensor(train[column].to_numpy()) for column in ("user", "item"))
    without = 1 if args.evidence == "items" else 0  # texts left out of the count
    ones = torch.ones(len(FIELDS))
    for _ in tqdm(range(args.map_steps), desc="map to soft tokens", unit="step", mininterval=2):
        optimizer.zero_grad()
        for stream in item_streams:
            told = (lengths_of(stream.texts)[item] > 0).nonzero()[:, 0]
            rows = told[torch.randint(len(told), (batch_size,), generator=generator)]
            count = (at.count[user[rows]] - without).clamp(min=0)
            y = (at.total[user[rows]] - at.of_item[item[rows]]) / (count + at.pull)[:, :, None]
            y = y / at.unit[:, None]  # [B, P, C]
            for index in batches(prompt, stream.texts, item[rows], args.tokens_per_batch):
                step = torch.einsum("bpc,pcd->bpd", y[index].to(prompt.device), lift)
                soft = shared.to(prompt.device) + step
                (weighted_nll(prompt, soft, stream, item[rows][index], ones) / batch_size).backward()
        optimizer.step()
        schedule.step()
    return lift.detach().cpu()


def infer_by_score(args, prompt, evidence, item_streams, train, scores, noise, shared, weights, tune,
                   is_warm, generator):
    """One step from θ̄ for all users at once: profiles [N, P, D], their noise [P, D, D], gain [N, P], pull [P]

    θ_u = θ̄ + length · B y_u with y_u = Σ_i g_i / (n_u + pull), whitened: a natural-gradient step, shrunk by a
    prior.
    # differs from the paper: B is not the inverse Fisher information but fitted (fit_map). Between users the
    # LLM is far from linear: the plain natural-gradient step made held-out items less likely than θ̄ at every
    # length tried.
    """
    at = coordinates_of(args, prompt, evidence, scores, noise, shared, weights, is_warm)
    lift = fit_map(args, prompt, item_streams, train, shared, at, generator) / at.unit[:, None, None]
    step = torch.einsum("npc,pcd->npd", at.total / (at.count + at.pull)[:, :, None], lift)
    length = choose_length(args, prompt, item_streams, step, shared, *tune)
    noise = length ** 2 * torch.einsum("pcd,pce->pde", lift, lift)  # whitened sums have unit noise per text
    return shared + length * step, noise, (at.count + at.pull) / at.count.clamp(min=1).sqrt(), at.pull


def infer_by_gradient(args, prompt, evidence, weights, start, shared, noise, pull, num_steps, users,
                      snapshots=()):
    """The paper's way (Algorithm 1, line 4): AdamW on each user's own θ, in blocks: users [U] -> [U, P, D]

    start [N, P, D]: where each θ leaves from. The loss of a user is Σ -log P(evidence) + pull/2 (θ - θ̄)ᵀ Σ
    (θ - θ̄): the prior weighs as much as `pull` items. With `snapshots` (S numbers of steps) the profiles
    after each of these come back too, [S, U, P, D].
    """
    result = start[users].clone()
    history = torch.zeros(len(snapshots), *result.shape)
    length = torch.zeros(len(start))  # of all the evidence of a user, in tokens
    for stream, pairs in evidence:
        length.index_add_(0, pairs.user, lengths_of(stream.texts)[pairs.row].float())
    shared, noise = shared.to(prompt.device), noise.to(prompt.device)
    lr = args.lr or 0.1 * prompt.scale
    with tqdm(total=len(users), desc="gradient", unit="user", mininterval=2) as bar:
        for block in torch.argsort(length[users], descending=True, stable=True).split(args.batch_size):
            place = torch.full((len(start),), -1)
            place[users[block]] = torch.arange(len(block))
            work = [(stream, pairs.row[mask], place[pairs.user[mask]].to(prompt.device))
                    for stream, pairs in evidence if (mask := place[pairs.user] >= 0).any()]
            soft = result[block].to(prompt.device).requires_grad_()
            # its state is the block's: users are independent
            optimizer = torch.optim.AdamW([soft], lr=lr, weight_decay=0.0)
            for step in range(1, num_steps + 1):
                soft.grad = pull * torch.einsum("bpd,pde->bpe", soft.detach() - shared, noise).contiguous()
                for stream, rows, owner in work:
                    for index in batches(prompt, stream.texts, rows, args.tokens_per_batch):
                        weighted_nll(prompt, soft[owner[index]], stream, rows[index], weights).backward()
                optimizer.step()
                if step in snapshots:
                    history[snapshots.index(step), block] = soft.detach().float().cpu()
            result[block] = soft.detach().float().cpu()
            bar.update(len(block))
    return (result, history) if snapshots else result


# ----------------------------------------------------------------------------------------------------------
# proof: held-out items must be likelier under the user's own profile
# ----------------------------------------------------------------------------------------------------------


def heldout_nll(args, prompt, item_streams, profiles, items, blind=False):
    """NLL of held-out items under a profile each: profiles [R, P, D], items [R] -> nats [R], tokens [R]"""
    nats, tokens = torch.zeros(len(items)), torch.zeros(len(items))
    with torch.no_grad():
        for stream in item_streams:
            told = (lengths_of(stream.texts)[items] > 0).nonzero()[:, 0]
            sees = torch.zeros_like(stream.sees) if blind else stream.sees
            for index in batches(prompt, stream.texts, items[told], args.tokens_per_batch):
                texts = cut(stream.texts, items[told[index]])
                nats[told[index]] += prompt.nll(profiles[told[index]], texts, sees).sum(1).float().cpu()
                tokens[told[index]] += lengths_of(texts)
    return nats, tokens


def interval(difference, tokens):
    """Mean difference per token and half its 95% interval: difference [R] in nats, tokens [R]"""
    mean = difference.sum() / tokens.sum()
    residual = difference - mean * tokens
    return float(mean), float(1.96 * residual.square().sum().sqrt() / tokens.sum())


def report_heldout(args, prompt, item_streams, profiles, shared, user, item, generator):
    """The four NLLs (nats per token) on held-out rows: no profile, shared, shuffled, own; prints them."""
    other = torch.randperm(len(profiles), generator=generator)
    partner = torch.empty_like(other)
    partner[other] = other.roll(1)  # everybody gets the profile of somebody else
    everyone = shared.expand(len(user), -1, -1)
    told = {"none": everyone, "shared": everyone, "shuffled": profiles[partner[user]], "own": profiles[user]}
    nats, tokens = {}, None
    for name, soft in told.items():
        nats[name], tokens = heldout_nll(args, prompt, item_streams, soft, item, blind=name == "none")
    means = {name: float(values.sum() / tokens.sum()) for name, values in nats.items()}
    print(f"held-out NLL in nats per token ({len(user):,} validation rows that chose nothing): "
          + "  ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    for name in ("shared", "shuffled"):
        mean, half = interval(nats["own"] - nats[name], tokens)
        means[f"own_minus_{name}"] = [mean, half]
        warning = "  <- not shown: the profiles tell nothing that is sure about their users"
        print(f"  own - {name}: {mean:+.4f} ± {half:.4f} (95%){'' if mean + half < 0 else warning}")
    return means


def choose_length(args, prompt, item_streams, step, shared, user, item, grid=(0.25, 0.5, 0.75, 1.0, 1.5)):
    """The step length under which held-out items are likeliest: step [N, P, D] -> one of the grid"""
    totals = []
    for length in grid:
        nats, _ = heldout_nll(args, prompt, item_streams, shared + length * step[user], item)
        totals.append(float(nats.sum()))
    best = grid[int(np.argmin(totals))]
    print(f"step length chosen on {len(user):,} held-out rows: {best} (out of {', '.join(map(str, grid))})")
    return best


def choose_steps(args, prompt, item_streams, evidence, weights, start, shared, noise, pull, user, item):
    """The number of AdamW steps under which held-out items are likeliest, on 256 users with some at most."""
    pilot = user.unique()[:256]
    chosen = torch.isin(user, pilot)
    grid = (1, 2, 4, 7, 10, 15, 20, 30, 40, 60, 80, 100)
    snapshots = sorted({step for step in grid if step < args.steps} | {args.steps})
    _, history = infer_by_gradient(args, prompt, evidence, weights, start, shared, noise, pull, args.steps,
                                   pilot, snapshots)
    place = torch.searchsorted(pilot, user[chosen])
    totals = []
    for soft in history:
        nats, _ = heldout_nll(args, prompt, item_streams, soft[place], item[chosen])
        totals.append(float(nats.sum()))
    best = snapshots[int(np.argmin(totals))]
    print(f"steps chosen on {int(chosen.sum()):,} held-out rows of {len(pilot)} users: "
          f"{best} (out of {snapshots})")
    return best


# ----------------------------------------------------------------------------------------------------------
# main
# ----------------------------------------------------------------------------------------------------------


def heldout_rows(interactions, item_streams, limit, seed):
    """Validation rows with any text, half the users to choose with, half to report: 2 x (user, item) [R]"""
    rows = interactions[interactions["split"] == "valid"]
    rows = rows.sample(min(limit, len(rows)), random_state=seed).sort_index()
    user, item = torch.tensor(rows["user"].to_numpy()), torch.tensor(rows["item"].to_numpy())
    told = sum(lengths_of(stream.texts)[item] for stream in item_streams) > 0
    return [(user[told & (user % 2 == half)], item[told & (user % 2 == half)]) for half in (0, 1)]


def parts_of(interactions, num_users):
    """Train rows; those and cold users' support rows; who has train rows, bool [N]; items that may be told.

    What a support row tells is evidence of its user's profile and of nothing else. Items that only test rows
    have stay untold.
    """
    split = interactions["split"]
    train, own = interactions[split == "train"], interactions[split.isin(["train", "support"])]
    is_warm = torch.zeros(num_users, dtype=torch.bool)
    is_warm[train["user"].unique()] = True
    if cold := len(set(own["user"]) - set(train["user"])):
        print(f"{cold:,} users are known by support rows only: these move their own profile and nothing else")
    return train, own, is_warm, set(interactions.loc[split.isin(["train", "valid", "support"]), "item"])


def main(args):
    start_stage(args)
    started = time.time()
    interactions, items = read_artifacts(args, "interactions.parquet", "items.parquet")
    num_users = int(interactions["user"].max()) + 1
    train, own, is_warm, told = parts_of(interactions, num_users)
    names, name_texts = zip(*(text.split("=", 1) for text in args.profiles))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm = args.llm
    if llm == "auto":
        llm, reason = choose_llm()
        print(f"--llm auto: {llm}, because {reason}")
    routes = routes_of(args, items.iloc[train["item"].unique()], names)
    streams_pieces = [[pieces_of(item, fields) if item.item in told else [] for item in items.itertuples()]
                      for fields, _ in routes]
    if llm == "tiny":
        make_tiny_llm(args, train, streams_pieces, name_texts)
    model, tokenizer = load_llm(args, llm, device)
    prompt = Prompt(model, tokenizer, names, name_texts, args.task_text)
    print(f"LLM: {sum(p.numel() for p in model.parameters()):,} parameters, D {prompt.embedding.shape[1]}, "
          f"{prompt.scale:.3f} per dimension, {next(model.parameters()).dtype} on {device}; "
          f"prompt of {len(prompt.segment)} tokens")

    item_streams = [Stream(fields, sees, tokenize(tokenizer, pieces))
                    for (fields, sees), pieces in zip(routes, streams_pieces)]
    evidence = evidence_of(args, tokenizer, items, item_streams, own)
    warm_evidence = [(stream, Pairs(*(column[is_warm[pairs.user]] for column in pairs)))
                     for stream, pairs in evidence]
    evidence_streams = [stream for stream, _ in evidence]
    for streams, what, cure in ((item_streams, "item", "shorten its text"),
                                (evidence_streams, "the history of user", "lower --max-history")):
        for stream in streams:
            prompt.check_context(stream.texts, what, f"{cure} or take a LLM with a longer context")
    generator = torch.Generator().manual_seed(args.seed)
    popularity, mentions = (
        torch.bincount(torch.tensor(rows["item"].to_numpy()), minlength=len(items)).float()
        for rows in (train, own))
    tune, report = heldout_rows(interactions, item_streams, args.heldout, args.seed)

    inference_started = time.time()
    weights = torch.ones(len(FIELDS))
    shared = fit_shared(args, prompt, warm_evidence, weights, generator)
    if args.field_weights == "noise":
        weights = field_weights(args, prompt, item_streams, popularity, shared, generator)
    scores, noise = information_of(prompt, item_streams, popularity, mentions, shared, weights,
                                   args.tokens_per_batch)
    if args.method == "score":
        profiles, noise, gain, pull = infer_by_score(args, prompt, evidence, item_streams, train, scores,
                                                     noise, shared, weights, tune, is_warm, generator)
    else:
        pull = 10.0 if args.pull is None else args.pull
        start = shared.expand(num_users, -1, -1)
        if args.start == "random":
            start = prompt.scale * torch.randn(num_users, *shared.shape, generator=generator)
        num_steps = args.steps
        if args.stop == "heldout":
            num_steps = choose_steps(args, prompt, item_streams, evidence, weights, start, shared, noise,
                                     pull, *tune)
        profiles = infer_by_gradient(args, prompt, evidence, weights, start, shared, noise, pull, num_steps,
                                     torch.arange(num_users))
        gain = torch.ones(num_users, len(names))
    seconds = time.time() - inference_started
    print(f"inferred {num_users:,} users in {seconds:.1f} s, the shared start included: "
          f"{num_users / seconds:,.0f} users per second")

    count = torch.zeros(num_users, len(names), dtype=torch.long)
    for stream, pairs in evidence:
        count += torch.bincount(pairs.user, minlength=num_users)[:, None] * stream.sees
    has_evidence = (count > 0).any(1)
    figures = report_heldout(args, prompt, item_streams, profiles, shared, *report, generator)

    value = {"profiles": profiles, "shared": shared, "noise": noise, "gain": gain, "num_evidence": count,
             "has_evidence": has_evidence, "names": list(names), "texts": list(name_texts), "llm": llm,
             "tiny_llm": (Path(args.run_dir) / TINY_STAMP).read_text() if llm == "tiny" else ""}
    path = write_artifact(args, "profiles.pt", value, inputs=["interactions.parquet", "items.parquet"],
                          names=names, llm=llm, users=num_users, users_with_evidence=int(has_evidence.sum()),
                          pull=pull, field_weights=dict(zip(FIELDS, weights.tolist())), heldout_nll=figures,
                          seconds=time.time() - started, inference_seconds=seconds)
    print(f"wrote {path}: {num_users:,} users x {len(names)} profiles x {profiles.shape[2]} | "
          f"held-out NLL own {figures['own']:.4f}, shared {figures['shared']:.4f}")


if __name__ == "__main__":
    main(parse_args())
