"""CIDEr-D (Vedantam et al. 2015), as pycocoevalcap's ``Cider()``."""

from __future__ import annotations

import numpy as np

from gmail_lightning.metrics.captioning.ngram_matches import ORDERS, NgramMatches, ReferenceNgrams, sums, tf_idf
from gmail_lightning.metrics.captioning.ngram_tables import Array, CaptionGrams, ImageGrams

SIGMA = 6.0  # of the penalty on a difference in length


def cider(matches: NgramMatches, references: ReferenceNgrams) -> Array:
    """CIDEr-D of each image, (I,): mean over orders and references of a clipped cosine similarity, times ten."""
    image = references.image
    # The length of a caption is its number of pairs of neighbours.
    length, hypothesis = (np.maximum(n - 1, 0) for n in (references.words.lengths, matches.lengths))
    delta = np.abs(hypothesis[image] - length)
    penalty = np.zeros(int(delta.max()) + 1)
    for value in np.flatnonzero(np.bincount(delta)).tolist():
        penalty[value] = np.e ** (-(float(value) ** 2) / (2 * SIGMA**2))
    scores = np.empty((len(references), ORDERS))
    for k, (table, (weights, norms)) in enumerate(zip(references.grams, references.weights, strict=True)):
        grams = matches.grams[k]
        own, own_norms = tf_idf(grams, matches.frequency[k], len(references), len(references))
        similarity = _similarity(grams, own, matches.pair[k], table, weights, references)
        norm = own_norms[image] * norms
        np.divide(similarity, norm, out=similarity, where=(own_norms[image] != 0) & (norms != 0))
        scores[:, k] = sums(similarity * penalty[delta], image, len(references))
    return np.asarray(np.mean(scores, axis=1) / references.sizes * 10.0)


def _similarity(
    grams: CaptionGrams, own: Array, pair: Array, table: ImageGrams, weights: Array, references: ReferenceNgrams
) -> Array:
    """Inner products of the weights of each reference with those of its hypothesis, clipped to the reference's."""
    image = references.image
    entry = np.full(len(table.pairs), -1)  # of the hypothesis, for each pair
    found = np.flatnonzero(pair >= 0)
    entry[pair[found]] = found
    entry = entry[table.pairs.ids]
    both = np.flatnonzero(entry >= 0)
    entry, caption, weights = entry[both], table.captions.caption[both], weights[both]
    # Every reference gets a row with a term for each n-gram of the hypothesis, in the hypothesis's order.
    size = np.bincount(grams.caption, minlength=len(references))
    start = np.cumsum(size) - size
    row = size[image]
    row_start = np.cumsum(row) - row
    terms = np.zeros(int(row.sum()))
    terms[(row_start - start[image])[caption] + entry] = np.minimum(own[entry], weights) * weights
    return sums(terms, np.repeat(np.arange(len(image)), row), len(image))
