"""How near generated texts are to written ones: BLEU, ROUGE, distinct n-grams, unique sentences, features.

All are fractions from 0 to 1. A text is a list of words, see `words`; each generated text has one reference.
"""

import math
import re
from collections import Counter

import numpy as np


def words(text):
    """The lower-case words and punctuation marks of a text: a list of texts"""
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())


def ngrams(text, n):
    """How often each n-gram is in a text: Counter of tuples"""
    return Counter(zip(*(text[start:] for start in range(n))))


def bleu(texts, references, max_n=4):
    """BLEU of a corpus (Papineni et al., 2002): the brevity penalty times the geometric mean of the clipped
    n-gram precisions up to max_n, not smoothed, so 0 if no n-gram of some length is right
    """
    right, total = np.zeros(max_n), np.zeros(max_n)
    for text, reference in zip(texts, references):
        for n in range(1, max_n + 1):
            counts = ngrams(text, n)
            right[n - 1] += (counts & ngrams(reference, n)).total()
            total[n - 1] += counts.total()
    if not right.all():
        return 0.0
    length, reference_length = sum(map(len, texts)), sum(map(len, references))
    penalty = min(1.0, math.exp(1 - reference_length / length))
    return float(penalty * np.exp(np.log(right / total).mean()))


def f1(num_right, num_generated, num_written):
    """The harmonic mean of precision and recall"""
    return 2 * num_right / (num_generated + num_written) if num_right else 0.0


def rouge_n(text, reference, n):
    """ROUGE-N (Lin, 2004) as F1: the n-grams that both have"""
    counts, written = ngrams(text, n), ngrams(reference, n)
    return f1((counts & written).total(), counts.total(), written.total())


def rouge_l(text, reference):
    """ROUGE-L (Lin, 2004) as F1: the longest common subsequence of words"""
    longest = [0] * (len(reference) + 1)  # of the words read so far and the first j of the reference
    for word in text:
        previous = longest.copy()
        for j, other in enumerate(reference):
            longest[j + 1] = previous[j] + 1 if word == other else max(previous[j + 1], longest[j])
    return f1(longest[-1], len(text), len(reference))


def distinct(texts, n):
    """Different n-grams per n-gram over all texts (Li et al., 2016)"""
    counts = Counter()
    for text in texts:
        counts.update(ngrams(text, n))
    return len(counts) / max(counts.total(), 1)


def unique_sentence_ratio(texts):
    """USR (Li et al., 2020): different texts per text"""
    return len({tuple(text) for text in texts}) / len(texts)


def feature_matching_ratio(texts, features):
    """FMR (Li et al., 2020): of the texts whose reference has a feature (words, maybe none), the share of
    those that name it; nan if none has
    """
    is_named = [tuple(feature) in ngrams(text, len(feature))
                for text, feature in zip(texts, features) if feature]
    return float(np.mean(is_named)) if is_named else float("nan")


def text_figures(texts, references, features=None):
    """The figures of generated texts beside written ones, both plain texts: a dict of fractions; FMR where
    the features of the references are known (texts, missing where one has none)
    """
    texts, references = (list(map(words, part)) for part in (texts, references))
    rouge = {"rouge1": lambda *pair: rouge_n(*pair, 1), "rouge2": lambda *pair: rouge_n(*pair, 2),
             "rougeL": rouge_l}
    figures = {"bleu4": bleu(texts, references)}
    figures |= {name: float(np.mean([metric(*pair) for pair in zip(texts, references)]))
                for name, metric in rouge.items()}
    figures |= {"distinct1": distinct(texts, 1), "distinct2": distinct(texts, 2),
                "usr": unique_sentence_ratio(texts)}
    if features is not None:
        figures["fmr"] = feature_matching_ratio(
            texts, [words(feature) if isinstance(feature, str) else [] for feature in features])
    return figures
