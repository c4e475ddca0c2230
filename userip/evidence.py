"""Evidence: what users had and how they rated it, as texts that are routed to profiles."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from userip.artifacts import fail

FIELDS = ("title", "category", "brand", "price", "rating", "review")


class Texts(NamedTuple):
    """R texts, padded on the right to T tokens: ids int64 [R, T]; field int64 [R, T], the index in FIELDS of
    a token that is scored, -1 at context (read, not scored) and at pads; length int64 [R]
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

    A rating says nothing without the item: if the title is not among the fields, it is `context`, read but
    not scored. Prices are cut to two digits: the LLM would spend its likelihood on cents.
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


def own_space(tokenizer):
    """1 if this tokenizer puts a space of its own before a text (Llama's kind), 0 if not (GPT-2's): where the
    text begins with a space, this one goes
    """
    return 1 if tokenizer.tokenize("a")[0].startswith("▁") else 0


def tokenize(tokenizer, rows, max_tokens=None):
    """rows: a list of (field, text) pieces per text, maybe empty -> Texts of at most `max_tokens` tokens"""
    shift = own_space(tokenizer)
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


class Events(NamedTuple):
    """Rows of interactions, int64 [R] each; level: 1 if liked, 0 without --ratings; fold: -1 if in none"""

    user: torch.Tensor
    item: torch.Tensor
    level: torch.Tensor
    row: torch.Tensor
    fold: torch.Tensor

    def select(self, rows):
        """These events: rows int64, or bool [R]"""
        return Events(*(column[rows] for column in self))


def assign_folds(train, num_folds, seed):
    """A fold for each train row, a user's rows dealt out evenly: int64 [rows]"""
    rng = np.random.default_rng([seed, 5])
    user = train["user"].reset_index(drop=True)[rng.permutation(len(train))]
    turn = user.groupby(user).cumcount() + rng.integers(num_folds, size=user.max() + 1)[user]
    return (turn % num_folds).sort_index().to_numpy()


def observe(args, interactions, num_users):
    """What is known of N users -> namespace of Events: rows (all), train, own (train rows and cold users'
    support rows, which are evidence of their user's profile and of nothing else); is_warm bool [N]: who has
    train rows; words: how each rating level is said, [""] without ratings
    """
    user, item, label = (interactions[name].to_numpy() for name in ("user", "item", "label"))
    split = interactions["split"].to_numpy()
    is_train = split == "train"
    fold = np.full(len(user), -1)
    if args.folds:
        fold[is_train] = assign_folds(interactions[is_train], args.folds, args.seed)
    level = label.astype(np.int64) * args.ratings
    rows = Events(*map(torch.tensor, (user, item, level, np.arange(len(user)), fold)))
    train, own = (rows.select(torch.tensor(mask)) for mask in (is_train, is_train | (split == "support")))
    is_warm = torch.bincount(train.user, minlength=num_users) > 0
    if num_cold := len(own.user.unique()) - int(is_warm.sum()):
        print(f"{num_cold:,} users have support rows only: these move their own profile and nothing else")
    words = ["disliked", "liked"] if args.ratings else [""]
    return SimpleNamespace(rows=rows, train=train, own=own, is_warm=is_warm, words=words)


@dataclass
class Route:
    """Texts of some fields of items, and the profiles that they are evidence of.

    fields: names out of FIELDS; may_read bool [P]: the θ that the texts may read; pieces: (field, text)
    pieces of each text; texts: the same as tokens. The text of item i at rating level l has the index
    i · num_levels + l; a review's text has the row number of its interaction.
    """

    fields: tuple
    may_read: torch.Tensor
    num_levels: int
    pieces: list
    texts: Texts | None = None

    @property
    def name(self):
        return "+".join(self.fields)

    def text_index(self, events):
        """Which text an event is: int64 [R]"""
        if "review" in self.fields:
            return events.row
        return events.item * self.num_levels + events.level % self.num_levels

    def has_text(self, events):
        """Does the event's text have a token that is scored? bool [R]"""
        return self.texts.num_scored_tokens()[self.text_index(events)] > 0

    def text_counts(self, events):
        """How many of the events are each text: float32 [texts]"""
        return torch.bincount(self.text_index(events), minlength=len(self.texts.ids)).float()

    def texts_by_user(self, events):
        """The indices of the texts of each user's events, in their order: Series of lists, by user"""
        frame = pd.DataFrame({"user": events.user.numpy(), "text": self.text_index(events).numpy()})
        return frame.groupby("user")["text"].agg(list)


def route_fields(args, items, names):
    """Which fields are evidence of which profiles: list of (fields, may_read bool [P])

    # differs from the paper: each set of fields is a text of its own, and reads its own profiles only. In one
    # text, brand tokens would see title tokens that saw θ_hobby, and θ_background would learn from titles.
    A profile none of whose fields the data hold reads all fields, and a line says so.
    """
    if args.evidence == "review":
        return [(("review",), torch.ones(len(names), dtype=torch.bool))]
    present = [field for field in FIELDS[:4] if items[field].notna().any()]
    routes = {}
    for index, name in enumerate(names):
        wanted = FIELDS if args.route == ["none"] else args.route[index].split("+")
        fields = tuple(field for field in present + ["rating"] * args.ratings if field in wanted)
        if not fields:
            print(f"route: the data hold no {' or '.join(wanted)}, so {name} reads {'+'.join(present)}")
            fields = tuple(present)
        routes.setdefault(fields, torch.zeros(len(names), dtype=torch.bool))[index] = True
    return list(routes.items())


def _first_sentences(run_dir, is_visible):
    """The first sentence of each review as pieces; none where the row is not visible (bool [rows])"""
    path = Path(run_dir) / "interactions.parquet"
    reviews = pd.read_parquet(path, columns=["review"])["review"].where(is_visible)
    if not reviews.notna().any():
        fail(f"--evidence review: {path} holds no reviews; take --evidence items")
    first = [re.split(r"(?<=[.!?])\s", text.strip())[0] for text in reviews.fillna("")]
    return [[("review", f" {text}")] if text else [] for text in first]


def make_routes(args, interactions, items, observed, names):
    """A Route for each set of fields, not tokenized yet. Items that only test rows have get no text, nor do
    test rows' reviews.
    """
    is_visible = interactions["split"].isin(["train", "valid", "support"])
    visible_items = set(interactions.loc[is_visible, "item"])
    train_items = items.iloc[observed.train.item.unique().numpy()]
    routes = []
    for fields, may_read in route_fields(args, train_items, names):
        words = observed.words if "rating" in fields else [""]
        pieces = _first_sentences(args.run_dir, is_visible) if fields == ("review",) else \
            [item_pieces(item, fields, word) if item.item in visible_items else []
             for item in items.itertuples() for word in words]
        routes.append(Route(fields, may_read, len(words), pieces))
    return routes


def item_texts(prompt, tokenizer, items):
    """For the item bank: items, a frame -> Texts, one of each item's category, title and brand"""
    pieces = [item_pieces(item, ("category", "title", "brand")) for item in items.itertuples()]
    texts = tokenize(tokenizer, pieces)
    prompt.check_context(texts.length, lambda index: f"the text {join(pieces[index])[:60]!r}",
                         "shorten it or take an LLM with a longer context")
    return texts


class Evidence:
    """The events of N users, read by blocks of users as a list of (route, text, user): text int64 [R] of that
    route is evidence of user int64 [R].

    --evidence items, review: each event is a text of its own, so that p(H | θ) = Π p(item | θ) as in Fig. 2.
    --evidence history: a user's latest items are one text, tokenized when it is read.
    """

    def __init__(self, args, tokenizer, routes, events, num_users):
        self.tokenizer, self.routes, self.num_users = tokenizer, routes, num_users
        self.is_history = args.evidence == "history"
        events = events.select(torch.argsort(events.user, stable=True))
        if self.is_history:
            user = pd.Series(events.user.numpy())
            is_latest = user.groupby(user).cumcount(ascending=False) < args.max_history
            events = events.select(torch.tensor(is_latest.to_numpy()))
        self.events = events
        self.first = torch.searchsorted(events.user, torch.arange(num_users + 1))  # [N + 1]

    def of_users(self, first, last):
        """The evidence of the users first … last - 1, who are counted from 0"""
        events = self.events.select(slice(self.first[first], self.first[last]))
        return self.of_events(events._replace(user=events.user - first))

    def of_events(self, events):
        evidence = [self._texts(route, events) for route in self.routes if len(events.user)]
        return [part for part in evidence if len(part[1])]

    def _texts(self, route, events):
        """Of --evidence history with a route whose texts are the users' histories, one each"""
        if not self.is_history:
            events = events.select(route.has_text(events))
            return route, route.text_index(events), events.user
        histories = route.texts_by_user(events)
        pieces = [sum((route.pieces[index] for index in history), []) for history in histories]
        texts, user = tokenize(self.tokenizer, pieces), torch.tensor(histories.index.to_numpy())
        text = (texts.num_scored_tokens() > 0).nonzero()[:, 0]
        return Route(route.fields, route.may_read, route.num_levels, pieces, texts), text, user[text]

    def counts(self):
        """How many texts are evidence of each user's profiles: int64 [N, P]; a history is one text"""
        counts = 0
        for route in self.routes:
            user = self.events.user[route.has_text(self.events)]
            num_texts = torch.bincount(user, minlength=self.num_users)[:, None]
            counts = counts + (num_texts.clamp(max=1) if self.is_history else num_texts) * route.may_read
        return counts

    def check_lengths(self, prompt):
        """Exit when a text and its prompt are longer than the LLM's context."""
        for route in self.routes:
            show = lambda index: f"the text {join(route.pieces[index])[:60]!r}"
            prompt.check_context(route.texts.length, show, "shorten it or take an LLM with a longer context")
            if self.is_history:
                length = route.texts.length[route.text_index(self.events)]
                prompt.check_context(torch.bincount(self.events.user, length).long(),
                                     lambda user: f"the history of user {user}",
                                     "lower --max-history or take an LLM with a longer context")
