"""ROUGE-L (Lin 2004), as pycocoevalcap's ``Rouge()``."""

from __future__ import annotations

import numpy as np

from gmail_lightning.metrics.captioning.ngram_matches import NgramMatches, ReferenceNgrams
from gmail_lightning.metrics.captioning.ngram_tables import Array, Tokens

BETA = 1.2  # weight of recall
BITS = 64  # hypotheses of at most so many tokens are compared in machine words


def rouge(tokens: Tokens, references: ReferenceNgrams) -> Array:
    """ROUGE-L of each image, (I,): F of the best precision and the best recall over its references."""
    image, lengths = references.image, references.tokens.lengths
    common = _common_subsequences(tokens, references)
    precision = np.maximum.reduceat(common / tokens.lengths[image], references.starts)
    recall = np.maximum.reduceat(common / lengths, references.starts)
    bottom = recall + BETA**2 * precision
    scores = (1 + BETA**2) * precision * recall
    return np.divide(scores, bottom, out=np.zeros(len(references)), where=(precision != 0) & (recall != 0))


def _common_subsequences(tokens: Tokens, references: ReferenceNgrams) -> Array:
    """Length of the longest common subsequence of each reference and its hypothesis.

    Bit-parallel (Hyyrö 2004): the positions of the hypothesis are the bits of a machine word, and one pass over the
    tokens of the reference clears a bit for each token in common. Hypotheses of more tokens than a word has bits go
    through Python's integers instead.
    """
    table, lengths = references.unigrams, references.tokens.lengths
    match = NgramMatches(tokens, references.tokens, [table])
    grams, pair = match.grams[0], match.pair[0]
    starts = np.cumsum(tokens.lengths) - tokens.lengths
    offset = np.arange(len(tokens.ids)) - np.repeat(starts, tokens.lengths)
    bits = np.zeros(len(pair), np.uint64)  # where the hypothesis has the token of each entry
    np.bitwise_or.at(bits, grams.at, np.where(offset < BITS, np.uint64(1) << offset.astype(np.uint64), np.uint64(0)))
    found = np.flatnonzero(pair >= 0)
    mask = np.zeros(len(table.pairs), np.uint64)
    mask[pair[found]] = bits[found]
    mask = mask[table.pairs.ids[table.captions.at]]  # by position in the references
    first = np.cumsum(lengths) - lengths
    longest = np.argsort(-lengths, kind="stable")
    active = np.cumsum(np.bincount(lengths)[::-1])[::-1]  # references of at least so many tokens
    state = np.full(len(lengths), ~np.uint64(0))
    for step, rows in enumerate(active[1:].tolist()):
        now = state[:rows]
        same = now & mask[first[longest[:rows]] + step]
        now[:] = (now + same) | (now - same)
    common = np.empty(len(lengths), np.int64)
    common[longest] = np.bitwise_count(~state)
    ids = tokens.ids_in(references.tokens.vocabulary)
    for caption in np.flatnonzero(tokens.lengths[references.image] > BITS).tolist():
        image = references.image[caption]
        hypothesis = ids[starts[image] : starts[image] + tokens.lengths[image]]
        reference = references.tokens.ids[first[caption] : first[caption] + lengths[caption]]
        common[caption] = _common_subsequence(hypothesis.tolist(), reference.tolist())
    return common


def _common_subsequence(hypothesis: list[int], reference: list[int]) -> int:
    """The same for one pair, with integers of as many bits as the hypothesis has tokens."""
    positions: dict[int, int] = {}
    for position, token in enumerate(hypothesis):
        positions[token] = positions.get(token, 0) | 1 << position
    full = (1 << len(hypothesis)) - 1
    state = full
    for token in reference:
        same = state & positions.get(token, 0)
        state = ((state + same) | (state - same)) & full
    return len(hypothesis) - state.bit_count()
