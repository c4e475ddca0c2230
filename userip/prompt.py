"""The prompt [N_1 θ_1 N_2 θ_2 … D] H (eq. 3) around a frozen LLM, and the likelihood of H (eq. 4)."""

from collections import Counter

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from common import fig4_mask
from userip.artifacts import fail

MAX_LOGITS = 2**25  # numbers of logits held at a time


class PrefixCache(DynamicCache):
    """Keys and values of tokens that come before those of a forward pass: parts, one list per group of such
    tokens, of (keys, values) [B or 1, heads, T, width] by layer. `new` takes those of the pass itself.
    """

    def __init__(self, config, *parts):
        super().__init__(config=config)
        self.parts, self.new = parts, []

    def get_seq_length(self, *_):
        return sum(part[0][0].shape[2] for part in self.parts)

    def update(self, keys, values, layer, *_, **__):
        self.new.append((keys, values))
        join = lambda index, own: torch.cat([*(part[layer][index].expand(len(own), -1, -1, -1)
                                               for part in self.parts), own], 2)
        return join(0, keys), join(1, values)


class HeadNLL(torch.autograd.Function):
    """-log softmax(hidden Wᵀ)[target]: hidden [R, D], head Linear to V, target [R] -> float32 [R]

    In chunks, so that no [R, V] is ever held. The gradient for `hidden` is computed on the way.
    """

    @staticmethod
    def forward(ctx, hidden, head, target):
        nll = torch.empty(len(hidden), device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        all_rows = torch.arange(len(hidden), device=hidden.device)
        for rows in all_rows.split(MAX_LOGITS // head.out_features + 1):
            logits = head(hidden[rows]).float()  # [r, V]
            logits -= logits.amax(1, keepdim=True)
            at_target = torch.arange(len(rows), device=rows.device), target[rows]
            target_logit, exp = logits[at_target], logits.exp_()  # in place: each pass over [r, V] costs
            total = exp.sum(1)
            nll[rows] = total.log() - target_logit
            if gradient is not None:  # (softmax - one-hot) W; divided by the total where that is [r, D]
                exp[at_target] -= total
                gradient[rows] = (exp.to(head.weight.dtype) @ head.weight / total[:, None]).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, nll_gradient):
        gradient = ctx.saved_tensors[0]
        return gradient * nll_gradient[:, None].to(gradient.dtype), None, None


class Prompt:
    """llm: (model, tokenizer); profiles: {name: its text N_k}; task_text: D. L is the length without H.

    Under the mask of Fig. 4 no θ reaches the names nor the task text but its last token: their keys and
    values are computed once, and those of a user's θ once for all texts of the user.
    """

    def __init__(self, llm, profiles, task_text, num_soft=1, mask="fig4"):
        model, tokenizer = llm
        self.names, self.num_profiles, self.num_soft = list(profiles), len(profiles), num_soft
        self.model, self.device, self.mask = model, model.device, mask
        self.purpose, self.num_tokens = "", Counter()  # {purpose: tokens of texts that the LLM has read}
        self.body, self.head = model.base_model, model.get_output_embeddings()
        self.embed = model.get_input_embeddings()
        self.scale = float(self.embed.weight.float().square().mean().sqrt())  # GPT-2 .14, Llama-2 .02
        self._lay_out(tokenizer, profiles, task_text)
        self._check_head()
        if mask == "fig4":
            self.fixed = (~self.is_soft).nonzero()[:-1, 0]  # names and task text without its last token
            everyone = torch.ones(1, self.num_profiles, dtype=torch.bool, device=self.device)
            self.allowed = fig4_mask(self.segment, self.is_soft, everyone)[0, 0]  # [L, L]
            with torch.no_grad():
                self.fixed_keys = self._keys(self.embedding[None, self.fixed], self.fixed, self.fixed)

    def _lay_out(self, tokenizer, profiles, task_text):
        """The tokens of the prompt: segment, position, is_soft [L], soft_positions [P S], embedding [L, D]"""
        # every text that begins blind begins as the LLM was trained to begin: with its BOS, if it has one
        bos = [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []
        plain = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        blocks = [[*bos, *plain(text), *[-1] * self.num_soft] for text in profiles.values()]  # -1: soft token
        blocks.append([*bos, *plain(task_text)])
        # differs from the paper: positions start anew in each profile block, so that a profile cannot even
        # tell how long the other's name is; the task text goes on behind the longest block
        starts = [0] * self.num_profiles + [max(map(len, blocks[:-1]))]
        if self.mask == "causal":  # one text like any other: one BOS, positions in a row
            blocks = [blocks[0], *(block[len(bos):] for block in blocks[1:])]
            starts = np.cumsum([0, *map(len, blocks[:-1])]).tolist()
        as_tensor = lambda rows: torch.tensor([number for row in rows for number in row], device=self.device)
        self.segment = as_tensor([index] * len(block) for index, block in enumerate(blocks))
        self.position = as_tensor(range(start, start + len(block)) for start, block in zip(starts, blocks))
        ids = as_tensor(blocks)
        self.is_soft = ids < 0
        self.soft_positions = self.is_soft.nonzero()[:, 0]
        self.embedding = self.embed(ids.clamp(min=0)).detach()
        self.check_context(torch.ones(1), lambda _: "the shortest text", "lower --soft-tokens")

    def _check_head(self):
        """Exit when the LLM does more to its last hidden states than multiply them by the head."""
        with torch.no_grad():
            embeddings = self.embedding[None]
            logits = self.model(inputs_embeds=embeddings, use_cache=False).logits
            product = self.head(self.body(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
        if not torch.allclose(logits, product, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            fail(f"--llm: a {type(self.model).__name__} changes its logits behind the head, which is not "
                 f"supported; take an LLM of the GPT-2 or Llama kind")

    @torch.no_grad()
    def check_mask(self):
        """Exit unless the LLM honours a boolean mask: of two texts side by side, blind to each other, a token
        may move what comes behind it in its own text only, and a text reads as it does alone. Under the mask
        of Fig. 4 the short way, by cached keys, must give what the long way gives.
        """
        ids = (torch.arange(8, device=self.device) * 7 + 5) % self.embed.num_embeddings
        text, position = torch.arange(8, device=self.device) // 4, torch.arange(8, device=self.device) % 4
        changed = torch.where(torch.arange(8, device=self.device) == 2, ids.roll(1), ids)
        mask = (text[:, None] == text) & torch.ones(8, 8, dtype=torch.bool, device=self.device).tril()

        def log_probabilities(ids, rows=slice(None)):
            hidden = self.body(inputs_embeds=self.embed(ids[rows])[None], use_cache=False,
                               attention_mask=mask[None, None, rows, rows], position_ids=position[None, rows])
            return self.head(hidden.last_hidden_state)[0].float().log_softmax(1)

        before = log_probabilities(ids)
        moved = (before - log_probabilities(changed)).abs().amax(1)  # [8]
        beside = float((before[4:] - log_probabilities(ids, slice(4, 8))).abs().max())
        others, ways = float(torch.cat([moved[:2], moved[4:]]).max()), 0.0
        if self.mask == "fig4":
            soft = self.random_soft(1, torch.Generator().manual_seed(0)).to(self.device)
            may_read, owner = torch.ones(self.num_profiles, dtype=torch.bool, device=self.device), ids[:2] * 0
            long, short = (self.head(hidden).float().log_softmax(2) for hidden in (
                self.hidden_full(soft, ids.view(2, 4), may_read, owner),
                self.hidden_cached(ids.view(2, 4), owner, self.soft_keys(soft, may_read))))
            ways = float((long - short).abs().max())
        limit = 1e-4 if self.embed.weight.dtype == torch.float32 else 0.1  # each shape rounds in its own way
        if not (others <= 1e-4 and beside <= limit and ways <= 10 * limit and moved[2] > 0):
            fail(f"--llm: a {type(self.model).__name__} does not honour the mask of Fig. 4 (a token moves "
                 f"others that do not read it by {others:.2g} nats, a text beside by {beside:.2g}, cached "
                 f"keys by {ways:.2g}): take an LLM of the GPT-2 or Llama kind")

    def check_context(self, lengths, name_of, cure):
        """Exit when a text with its prompt is longer than the LLM's context: lengths [R] in tokens"""
        limit = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        needed = int(self.position[-1]) + 1 + lengths
        if needed.max() > limit:
            fail(f"{name_of(int(needed.argmax()))} needs {int(needed.max()):,} tokens with its prompt, "
                 f"but the LLM reads {limit:,} at most: {cure}")

    def random_soft(self, num, generator):
        """Soft tokens at the scale of the LLM's embeddings: [num, P, S D]"""
        shape = num, self.num_profiles, self.num_soft, self.embedding.shape[1]
        return (self.scale * torch.randn(shape, generator=generator)).flatten(2)

    # -- the long way: the whole prompt before each text --------------------------------------------------

    def inputs(self, soft, ids, may_read):
        """soft [B, P, S D], ids [B, T], may_read [B, P] -> embeddings [B, L + T, D],
        mask [B, 1, L + T, L + T], positions [1, L + T]"""
        (batch, num_tokens), start = ids.shape, int(self.position[-1]) + 1
        evidence = self.embed(ids)  # [B, T, D]
        soft = soft.to(evidence.dtype).reshape(batch, len(self.soft_positions), -1)  # [B, P S, D]
        prefix = self.embedding.expand(batch, -1, -1).index_copy(1, self.soft_positions, soft)
        segment = F.pad(self.segment, (0, num_tokens), value=self.num_profiles + 1)
        position = torch.cat([self.position, torch.arange(start, start + num_tokens, device=self.device)])
        mask = fig4_mask(segment, F.pad(self.is_soft, (0, num_tokens)), may_read, self.mask == "causal")
        return torch.cat([prefix, evidence], 1), mask, position[None]

    def hidden_full(self, soft, ids, may_read, owner):
        """Hidden states that predict the tokens of each text: soft [U, P, S D], owner [B] -> [B, T, D]"""
        embeddings, mask, position = self.inputs(soft[owner], ids, may_read.expand(len(ids), -1))
        hidden = self.body(inputs_embeds=embeddings, attention_mask=mask, position_ids=position,
                           use_cache=False).last_hidden_state
        return hidden[:, len(self.segment) - 1:-1]

    # -- the short way, under the mask of Fig. 4: what texts share is computed once -----------------------

    def _keys(self, embeddings, positions, visible, *parts):
        """Keys and values by layer of the tokens at `positions` [T], embedded [B, T, D], which attend to
        those at `visible` [T'] as Fig. 4 allows. parts: keys and values of all of `visible` but the last T.
        """
        mask = self.allowed[positions][:, visible].expand(len(embeddings), 1, -1, -1)
        cache = PrefixCache(self.model.config, *parts)
        self.body(inputs_embeds=embeddings, attention_mask=mask, use_cache=False,
                  position_ids=self.position[positions][None], past_key_values=cache)
        return cache.new

    def soft_keys(self, soft, may_read):
        """Keys and values of the θ that may be read, soft [U, P, S D]: by layer, [U, heads, P' S, width];
        none under a plain causal mask, where they depend on other tokens
        """
        if self.mask != "fig4" or not may_read.any():
            return []
        readable = self.soft_positions.view(-1, self.num_soft)[may_read].flatten()  # [P' S]
        theta = soft[:, may_read].to(self.embedding.dtype).reshape(len(soft), len(readable), -1)
        return self._keys(theta, readable, torch.cat([self.fixed, readable]), self.fixed_keys)

    def hidden_cached(self, ids, owner, keys, all_layers=False):
        """The same as hidden_full, from keys = soft_keys(soft, may_read) -> [B, T, D], or a tuple of these:
        the embeddings and the states after each layer
        """
        (batch, num_tokens), parts = ids.shape, [self.fixed_keys]
        if keys:
            parts.append([tuple(part.index_select(0, owner) for part in layer) for layer in keys])
        cache = PrefixCache(self.model.config, *parts)
        # the last task token predicts the first token of a text, and each token of the text the next
        inputs = torch.cat([self.embedding[-1].expand(batch, 1, -1), self.embed(ids[:, :-1])], 1)
        mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=self.device).tril()
        mask = F.pad(mask, (cache.get_seq_length(), 0), value=True).expand(batch, 1, -1, -1)  # [B, 1, T, T']
        position = self.position[-1] + torch.arange(num_tokens, device=self.device)
        output = self.body(inputs_embeds=inputs, attention_mask=mask, position_ids=position[None],
                           past_key_values=cache, use_cache=False, output_hidden_states=all_layers)
        return output.hidden_states if all_layers else output.last_hidden_state

    # -- the likelihood -----------------------------------------------------------------------------------

    def nll(self, soft, texts, may_read, owner=None, keys=None):
        """-log P(h_t | h_<t, N, θ, D) of each evidence token (eq. 4): soft [U, P, S D], texts [B, T],
        may_read [P] -> float32 [B, T], 0 at pads and context

        owner [B]: the row of `soft` of each text (default: one after the other, or all of the only one).
        keys: soft_keys of `soft`, if known.
        """
        ids, field = texts.ids.to(self.device), texts.field.to(self.device)
        may_read = may_read.to(self.device)
        self.num_tokens[self.purpose] += int(texts.length.sum())
        if owner is None:
            owner = torch.arange(len(ids), device=self.device).clamp(max=len(soft) - 1)
        soft, is_scored = soft.to(self.device), field >= 0
        if self.mask == "fig4":
            keys = self.soft_keys(soft, may_read) if keys is None else keys
            hidden = self.hidden_cached(ids, owner, keys)
        else:
            hidden = self.hidden_full(soft, ids, may_read, owner)
        nll = torch.zeros(ids.shape, device=self.device)
        return nll.masked_scatter(is_scored, HeadNLL.apply(hidden[is_scored], self.head, ids[is_scored]))

    def loss(self, soft, route, index, weights, owner=None, keys=None):
        """NLL of these texts of a route [B], tokens weighted by field: weights [len(FIELDS)] -> []"""
        texts = route.texts.select(index)
        weight = F.pad(weights, (0, 1))[texts.field].to(self.device)  # [B, T], 0 for the field -1
        return (self.nll(soft, texts, route.may_read, owner, keys) * weight).sum()

    def add_gradient(self, soft, route, index, owner, weights, max_tokens):
        """soft.grad += ∇ of the loss of the texts `index` [R], whose rows of `soft` are owner [R]. The keys
        and values of each θ are computed once for all batches.
        """
        owner = owner.to(self.device)
        keys = self.soft_keys(soft, route.may_read)
        leaves = [tuple(part.detach().requires_grad_() for part in layer) for layer in keys]
        for batch in self.batches(route.texts, index, max_tokens):
            self.loss(soft, route, index[batch], weights, owner[batch], leaves).backward()
        if leaves:
            flat = lambda layers: [part for layer in layers for part in layer]
            torch.autograd.backward(flat(keys), [leaf.grad for leaf in flat(leaves)])

    def batches(self, texts, index, max_tokens, min_fill=0.85):
        """Split the texts `index` [R] into batches of about equal length, longest first: yields indices of R

        A batch ends at max_tokens or, once it has enough to keep the machine busy, before texts shorter than
        `min_fill` of its longest: padding costs more than a small batch.
        """
        enough = 4096 if self.device.type == "cuda" else 256
        lengths = texts.length[index]
        order, start = torch.argsort(lengths, descending=True, stable=True), 0
        ordered = lengths[order]
        while start < len(order):
            longest = int(ordered[start])
            size = max(1, max_tokens // (len(self.segment) + longest))
            num_alike = int(torch.searchsorted(-ordered, -min_fill * longest, right=True)) - start
            size = min(size, max(num_alike, -(-enough // max(1, longest))))
            yield order[start:start + size]
            start += size
