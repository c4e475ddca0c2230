"""Explanations: first sentences of reviews, their likelihood and generation behind soft tokens, figures."""

import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import torch
from torch.nn.utils.rnn import pad_sequence

from userip.artifacts import fail
from userip.baseline import capped
from userip.evidence import own_space
from userip.prompt import HeadNLL
from userip.text_metrics import text_figures

MAX_TOKENS = 20  # of a sentence, as in the papers
SEQUENTIAL, TOP_N, EXPLAIN = TASKS = "The user has bought", "The user likes", "The user says"


def first_sentences(args):
    """The first sentence of each row's review: a Series of texts, "" where there is none"""
    path = Path(args.run_dir) / "interactions.parquet"
    names = [name for name in pq.read_schema(path).names if name in ("user", "review")]
    reviews = pd.read_parquet(path, columns=names).reindex(columns=["review"])["review"].astype(object)
    return reviews.where(reviews.notna(), "").map(lambda text: re.split(r"(?<=[.!?])\s", text.strip())[0])


def read_reviews(args, data):
    """What reviews say in a first sentence -> a Series of texts by row, "" where there is none; of the train
    rows a text for the tiny LLM, None without reviews; at most --max-texts test rows to explain, a frame
    """
    sentences, train, test = first_sentences(args), data.split["train"], data.split["test"]
    has_reviews = bool((sentences[train.index] != "").any())
    told = [f" {text}" for text in sentences[train.index]] if has_reviews else None
    explained = test[(sentences[test.index] != "") & has_reviews]
    return sentences, told, explained.iloc[capped(len(explained), args.max_texts, args.seed)]


def text_tokens(llm, texts):
    """Texts -> ids int64 [R, T], scored bool [R, T]: behind a space, at most MAX_TOKENS, then an EOS"""
    texts = [f" {text}"[own_space(llm.tokenizer):] for text in texts]
    ids = llm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if llm.tokenizer.eos_token_id is None:
        fail("--llm: its tokenizer has no token that ends a text (EOS): take another one")
    rows = [torch.tensor(one[:MAX_TOKENS] + [llm.tokenizer.eos_token_id]) for one in ids]
    is_scored = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(is_scored, batch_first=True)


def text_nll(llm, prefix, ids, is_scored):
    """-log P of each scored token behind embeddings prefix [B, L, D]: ids, is_scored [B, T] -> [tokens]"""
    ids, is_scored = ids.to(llm.device), is_scored.to(llm.device)
    embeddings = torch.cat([prefix, llm.model.get_input_embeddings()(ids[:, :-1])], 1)  # [B, L + T - 1, D]
    embeddings = embeddings.to(llm.model.dtype)  # the prefix is float32, an LLM on CUDA is not
    hidden = llm.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden = hidden[:, prefix.shape[1] - 1:]  # [B, T, D], each predicts the next token
    return HeadNLL.apply(hidden[is_scored], llm.model.get_output_embeddings(), ids[is_scored])


@torch.no_grad()
def generate(llm, prefix):
    """Greedy texts behind embeddings prefix [B, L, D]: a list of B texts"""
    eos = llm.tokenizer.eos_token_id
    mask = torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device)
    ids = llm.model.generate(inputs_embeds=prefix.to(llm.model.dtype), attention_mask=mask, do_sample=False,
                             max_new_tokens=MAX_TOKENS, pad_token_id=eos, eos_token_id=eos)
    return [text.strip() for text in llm.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def explain(llm, make_prefix, rows, batch_size):
    """Texts generated for rows, a frame; make_prefix(users [B], items [B]) -> embeddings [B, L, D]"""
    ids = torch.tensor(rows[["user", "item"]].to_numpy())
    return [text for part in ids.split(batch_size) for text in generate(llm, make_prefix(*part.T))]


def explanation_rows(model, seed, texts, rows, sentences):
    """A row of figures of the texts generated for rows (a frame), beside the written ones"""
    return {"model": model, "task": "explanation", "seed": seed, "users": len(rows),
            **text_figures(texts, sentences[rows.index], rows.get("feature"))}


def item_review_row(train, rows, sentences):
    """The reference without an LLM: the item's latest train sentence; where it has none, the latest of all"""
    written = train[sentences[train.index] != ""].sort_values("timestamp", kind="stable")
    latest = sentences[written.index].groupby(written["item"]).last()
    texts = rows["item"].map(latest).fillna(sentences[written.index].iloc[-1])
    return explanation_rows("item's last review", None, texts, rows, sentences)
