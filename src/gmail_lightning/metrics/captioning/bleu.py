"""BLEU of one to four tokens, as pycocoevalcap's ``Bleu(4)``."""

from __future__ import annotations

import math

import numpy as np

from gmail_lightning.metrics.captioning.ngram_matches import ORDERS, NgramMatches, ReferenceNgrams, sums
from gmail_lightning.metrics.captioning.ngram_tables import Array


def bleu(matches: NgramMatches, references: ReferenceNgrams) -> tuple[dict[str, float], dict[str, Array]]:
    """BLEU of one to four tokens (Papineni et al. 2002; closest reference length).

    Returns:
        ``Bleu_1`` .. ``Bleu_4`` of the corpus, and of each image, float64 of shape (I,).
    """
    guessed = matches.lengths
    lengths = references.words.lengths
    farthest = int(lengths.max(initial=0)) + 1
    distance = np.abs(lengths - guessed[references.image]) * farthest + lengths
    closest = np.minimum.reduceat(distance, references.starts) % farthest  # of two equally close the shorter
    correct, guesses = np.empty((ORDERS, len(references))), np.empty((ORDERS, len(references)))
    for k, (grams, pair, table) in enumerate(zip(matches.grams, matches.pair, references.grams, strict=True)):
        found = np.flatnonzero(pair >= 0)
        clipped = np.minimum(grams.count[found], table.most[pair[found]])
        correct[k] = sums(clipped, grams.caption[found], len(references))
        guesses[k] = np.maximum(guessed - k, 0)
    names = [f"Bleu_{k + 1}" for k in range(ORDERS)]
    totals = (numbers.sum(axis=-1, keepdims=True) for numbers in (correct, guesses, guessed, closest))
    corpus = dict(zip(names, (float(score[0]) for score in _bleu_scores(*totals)), strict=True))
    return corpus, dict(zip(names, _bleu_scores(correct, guesses, guessed, closest), strict=True))


def _bleu_scores(correct: Array, guesses: Array, length: Array, closest: Array) -> list[Array]:
    """Geometric means of the precisions up to each order, times the penalty on short hypotheses."""
    tiny, small = 1e-15, 1e-9  # 0 of 0 is a precision of about 0
    ratio = (length + tiny) / (closest + small)
    penalty = np.array([math.exp(1 - 1 / r) if r < 1 else 1.0 for r in ratio.tolist()])
    product, scores = np.ones(len(length)), []
    for k in range(ORDERS):
        product = product * ((correct[k] + tiny) / (guesses[k] + small))
        scores.append(np.array([p ** (1.0 / (k + 1)) for p in product.tolist()]) * penalty)
    return scores
