import math

import numpy as np
import pandas as pd
import pytest

from userip.explanations import explanation_rows
from userip.text_metrics import (bleu, distinct, feature_matching_ratio, ngrams, rouge_l, rouge_n,
                                 text_figures, unique_sentence_ratio, words)

# Papineni et al. (2002), section 2: two translations of one sentence, and three references
CANDIDATE_1 = words("It is a guide to action which ensures that the military always obeys the commands of "
                    "the party")
CANDIDATE_2 = words("It is to insure the troops forever hearing the activity guidebook that party direct")
REFERENCES = list(map(words, (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the "
    "Party", "It is the practical guide for the army always to heed the directions of the party")))
# Lin (2004), section 3.1: ROUGE-2 cannot tell the second from the third, ROUGE-L can
GUNMAN = list(map(str.split, ("police killed the gunman", "police kill the gunman",
                              "the gunman kill police")))


def random_texts(seed, num=30, num_words=5):
    rng = np.random.default_rng(seed)
    return [[f"w{word}" for word in rng.integers(num_words, size=rng.integers(1, 12))] for _ in range(num)]


def naive_right(text, reference, n):
    """n-grams of the text that can be crossed out of the reference, one by one"""
    left = [reference[i:i + n] for i in range(len(reference) - n + 1)]
    right = 0
    for i in range(len(text) - n + 1):
        if text[i:i + n] in left:
            left.remove(text[i:i + n])
            right += 1
    return right


def naive_lcs(a, b):
    if not a or not b:
        return 0
    return 1 + naive_lcs(a[1:], b[1:]) if a[0] == b[0] else max(naive_lcs(a[1:], b), naive_lcs(a, b[1:]))


def test_clipped_counts_are_those_of_the_papers_examples():
    """17/18 and 8/14 unigrams, 10/17 and 1/13 bigrams; of "the the the the the the the" 2/7"""
    for n, right in ((1, (17, 8)), (2, (10, 1))):
        most = ngrams(REFERENCES[0], n) | ngrams(REFERENCES[1], n) | ngrams(REFERENCES[2], n)
        for text, expected in zip((CANDIDATE_1, CANDIDATE_2), right):
            assert (ngrams(text, n) & most).total() == expected
            assert ngrams(text, n).total() == len(text) + 1 - n
    assert bleu([["the"] * 7], ["the cat is on the mat".split()], max_n=1) == pytest.approx(2 / 7)
    assert bleu([CANDIDATE_1], REFERENCES[:1], 2) > bleu([CANDIDATE_2], REFERENCES[:1], 2) > 0
    assert bleu([CANDIDATE_2], REFERENCES[:1], 3) == 0.0  # not smoothed


def test_bleu_equals_the_formula_with_counts_of_a_naive_loop():
    texts, references = random_texts(0), random_texts(1)
    precisions = [sum(naive_right(*pair, n) for pair in zip(texts, references))
                  / sum(max(0, len(text) - n + 1) for text in texts) for n in range(1, 5)]
    penalty = min(1, math.exp(1 - sum(map(len, references)) / sum(map(len, texts))))
    assert bleu(texts, references) == pytest.approx(penalty * math.prod(precisions) ** 0.25)
    assert bleu(texts, texts) == pytest.approx(1.0)
    half = [text[:1 + len(text) // 2] for text in references]
    assert bleu(half, references, 1) == pytest.approx(
        math.exp(1 - sum(map(len, references)) / sum(map(len, half))))


def test_rouge_is_that_of_the_papers_example():
    first, second, third = GUNMAN
    assert rouge_l(second, first) == pytest.approx(3 / 4) and rouge_l(third, first) == pytest.approx(2 / 4)
    assert rouge_n(second, first, 2) == rouge_n(third, first, 2) == pytest.approx(1 / 3)
    assert rouge_n(third, first, 1) == pytest.approx(3 / 4)


def test_rouge_equals_naive_counts():
    for text, reference in zip(random_texts(2), random_texts(3)):
        for n in (1, 2):
            right = naive_right(text, reference, n)
            sizes = max(0, len(text) - n + 1), max(0, len(reference) - n + 1)
            precision, recall = (right / max(size, 1) for size in sizes)
            expected = 2 * precision * recall / (precision + recall) if right else 0.0
            assert rouge_n(text, reference, n) == pytest.approx(expected)
        longest = naive_lcs(text, reference)
        assert rouge_l(text, reference) == pytest.approx(2 * longest / (len(text) + len(reference)))


def test_distinct_usr_and_fmr_count_what_they_say():
    texts = [words("I like it."), words("I like the plot."), words("I like it.")]
    assert distinct(texts, 1) == 6 / 13  # i like it . the plot
    assert distinct(texts, 2) == 6 / 10  # i-like like-it it-. like-the the-plot plot-.
    assert unique_sentence_ratio(texts) == 2 / 3
    assert feature_matching_ratio(texts, [["plot"], ["the", "plot"], ["it"]]) == pytest.approx(2 / 3)


def test_figures_are_of_all_texts_and_features_are_optional():
    texts, references = ["The plot is GREAT.", "bad acting"], ["the plot is great.", "good acting"]
    figures = text_figures(texts, references)
    assert figures["rouge1"] == pytest.approx((1 + 1 / 2) / 2) and "fmr" not in figures
    assert figures["usr"] == 1.0
    assert text_figures(texts, references, ["plot", "script"])["fmr"] == 0.5
    assert text_figures(texts, references, pd.Series(["Plot", None], dtype="str"))["fmr"] == 1.0
    assert math.isnan(text_figures(texts, references, [None, float("nan")])["fmr"])


def test_rows_with_a_feature_have_a_matching_ratio():
    sentences = pd.Series(["The plot is great.", "Bad acting."], index=[7, 9])
    rows = pd.DataFrame({"user": [0, 1], "item": [2, 3], "feature": ["plot", "acting"]}, index=[7, 9])
    row = lambda rows: explanation_rows("pool", 0, ["A plot.", "A plot."], rows, sentences)
    assert row(rows)["fmr"] == 0.5 and "fmr" not in row(rows.drop(columns="feature"))
