"""From profiles to words: the vocabulary's nearest, and a lens; do words occur in held-out items?"""

import numpy as np
import torch


def vocabulary_words(tokenizer):
    """Tokens that begin a word and hold letters only: ids, texts [W]. "Ġ" (GPT-2), "▁" (Llama): the space."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [(index, token[1:]) for index, token in enumerate(tokens)
             if token and token[0] in "Ġ▁" and len(token) > 3 and token[1:].isascii() and token[1:].isalpha()]
    return torch.tensor([index for index, _ in words], dtype=torch.long), [word for _, word in words]


def nearest_words(deviation, embeddings, words, num_words):
    """deviation θ_u - mean θ [B, D], embeddings [W, D] -> for each row the words of the largest cosine"""
    centred = torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=1)
    cosine = torch.nn.functional.normalize(deviation, dim=1) @ centred.T  # [B, W]
    nearest = cosine.topk(min(num_words, len(words)), dim=1).indices.tolist()
    return [[words[index] for index in row] for row in nearest]


@torch.no_grad()
def lens_words(model, vocabulary, prefix, soft, shared, num_words, batch_size=256):
    """The words whose log-probability after the name text and θ_u rises most against θ̄: a list per user

    vocabulary: ids and texts [W] of its words; prefix: token ids of "This user's hobby is"; soft
    [B, S D], shared [S D].
    """
    (ids, words), embed = vocabulary, model.get_input_embeddings()
    before = embed(torch.tensor(prefix))[None]  # [1, L, D]

    def log_probability(theta):
        theta = theta.unflatten(1, (-1, before.shape[2])).to(before.dtype)  # [b, S, D]
        inputs = torch.cat([before.expand(len(theta), -1, -1), theta], 1)
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(1)[:, ids]

    usual, result = log_probability(shared[None]), []
    for part in soft.split(batch_size):
        rise = log_probability(part) - usual
        for row in rise.topk(min(num_words, len(words)), dim=1).indices.tolist():
            result.append([words[index] for index in row])
    return result


def held_out_score(own, control, texts):
    """How much more often a user's words occur in the user's held-out items than a control's do: AUC, half of
    its 95% interval, number of users.

    own, control: a list of words per user; texts: the words of the user's held-out items, a set per user.
    AUC: the share of users whose own words hit more often, ties counted half; 0.5 if words say nothing.
    """
    wins = []
    for own_words, control_words, text in zip(own, control, texts):
        if text:
            hits = [sum(word.lower() in text for word in words) for words in (own_words, control_words)]
            wins.append(0.5 + 0.5 * np.sign(hits[0] - hits[1]))
    if len(wins) < 2:
        return float("nan"), float("nan"), len(wins)
    return float(np.mean(wins)), float(1.96 * np.std(wins, ddof=1) / np.sqrt(len(wins))), len(wins)


def words_in(items, rows):
    """The words of the items of those rows by user: dict of sets"""
    texts = items["title"].fillna("") + " " + items["category"].fillna("") + " " + items["brand"].fillna("")
    item_words = texts.str.lower().str.findall(r"[^\W\d_]{3,}")
    return {user: set().union(*item_words.iloc[user_items])
            for user, user_items in rows.groupby("user")["item"]}
