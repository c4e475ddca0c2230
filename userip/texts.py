"""Texts as tokens that know which field of an item they come from."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

FIELDS = ("title", "category", "brand", "price", "rating", "review")


class Texts(NamedTuple):
    """R texts, padded on the right to T tokens: ids int64 [R, T]; field int64 [R, T], the index in FIELDS of a
    token that is scored, -1 at context (read, not scored) and at pads; length int64 [R].
    """

    ids: torch.Tensor
    field: torch.Tensor
    length: torch.Tensor

    def num_scored_tokens(self):
        return (self.field >= 0).sum(1)  # [R]

    def select(self, rows):
        """These rows, without the columns that are padding in all of them"""
        length = int(self.length[rows].max())
        return Texts(self.ids[rows, :length], self.field[rows, :length], self.length[rows])


def is_present(value):
    """Does an item have this field? None, nan, pandas' NA and blank texts are missing."""
    return value is not None and value == value and str(value).strip() not in ("", "<NA>")


def item_pieces(item, fields, rating=""):
    """These fields of an item as (field, text) pieces: " Hiking: Rustic Boots One by Frugo for $22 liked."

    A rating says nothing without the item: if the title is not among the fields, it is `context`, read but not
    scored. Prices are cut to two digits: the LLM would spend its likelihood on cents.
    """
    price = f"{float(f'{item.price:.2g}'):g}" if is_present(item.price) else ""
    texts = {"category": f" {item.category}:" if is_present(item.category) else "", "title": f" {item.title}",
             "brand": f" by {item.brand}" if is_present(item.brand) else "",
             "price": price and f" for ${price}", "rating": rating and f" {rating}"}
    shown = (*fields, "title") if "rating" in fields else fields
    pieces = [(field if field in fields else "context", text) for field, text in texts.items()
              if field in shown and text]
    return pieces[:-1] + [(field, text.rstrip(":") + ".") for field, text in pieces[-1:]]


def join(pieces):
    return "".join(text for _, text in pieces)


def tokenize(tokenizer, rows, max_tokens=None):
    """rows: a list of (field, text) pieces per text, maybe empty -> Texts of at most `max_tokens` tokens"""
    # a tokenizer of the Llama kind puts its own space before a text; GPT-2's needs it there
    first_token = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)[0]
    shift = 1 if first_token.startswith("▁") else 0
    index = {field: number for number, field in enumerate(FIELDS)}
    ids, field = [], []
    for pieces in rows:
        encoded = tokenizer(join(pieces)[shift:], add_special_tokens=False, return_offsets_mapping=True)
        last_letter = np.array([end for _, end in encoded["offset_mapping"]], dtype=int)[:max_tokens] + shift
        ends = np.cumsum([len(text) for _, text in pieces])
        piece = np.searchsorted(ends, last_letter)  # a token belongs to the piece that it ends in
        piece = piece.clip(max=max(len(pieces) - 1, 0))
        ids.append(torch.tensor(encoded["input_ids"][:max_tokens], dtype=torch.long))
        field.append(torch.tensor([index.get(pieces[p][0], -1) for p in piece], dtype=torch.long))
    pad = lambda rows, padding: pad_sequence(rows, batch_first=True, padding_value=padding)
    return Texts(pad(ids, 0), pad(field, -1), torch.tensor([len(row) for row in ids]))
