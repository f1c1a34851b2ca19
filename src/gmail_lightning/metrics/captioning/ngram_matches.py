"""The n-grams of reference captions, and where hypotheses have the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from gmail_lightning.metrics.captioning.ngram_tables import (
    Array,
    CaptionGrams,
    ImageGrams,
    Tokens,
    caption_grams,
    image_grams,
)

ORDERS = 4  # n-grams of one to four tokens


class ReferenceNgrams:
    """The n-gram tables of reference captions, built once and used for many sets of hypotheses.

    Args:
        references: The references of each image, at least one; tokens separated by single spaces.

    Raises:
        ValueError: If there is no image, an image has no reference, or a reference is None.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        if len(references) == 0:
            raise ValueError("Expected the references of at least one image, got none.")
        for image, captions in enumerate(references):
            if isinstance(captions, str) or len(captions) == 0:
                raise ValueError(f"Image {image} needs a list of at least one reference, got {captions!r}.")
        self.sizes = np.array([len(captions) for captions in references])
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.image = np.repeat(np.arange(len(references)), self.sizes)
        self.tokens = Tokens.split(list(chain.from_iterable(references)))
        self.words = self.tokens.words()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.sizes)

    @cached_property
    def grams(self) -> list[ImageGrams]:
        """The n-grams of the words, for BLEU and CIDEr."""
        return image_grams(self.words, self.image, ORDERS)

    @cached_property
    def unigrams(self) -> ImageGrams:
        """The single tokens, for ROUGE-L; they differ from the words where captions are empty or oddly spaced."""
        return self.grams[0] if self.words is self.tokens else image_grams(self.tokens, self.image, 1)[0]

    @cached_property
    def weights(self) -> list[tuple[Array, Array]]:
        """For each order the CIDEr weight of each entry, and the norm of each reference."""
        return [
            tf_idf(grams.captions, grams.frequency(grams.gram[grams.pairs.ids]), len(self), len(self.image))
            for grams in self.grams
        ]


class NgramMatches:
    """The n-grams of hypotheses, and where the references have them.

    Attributes:
        lengths: Tokens of each hypothesis.
        grams: The n-grams of each order.
        pair: By order, for each entry the pair of the references of its image, -1 if none has the n-gram.
        frequency: By order, for each entry the number of images with the n-gram (1 may stand for 0).
    """

    def __init__(self, tokens: Tokens, vocabulary: Tokens, tables: list[ImageGrams]) -> None:
        self.lengths = tokens.lengths
        self.grams = caption_grams(tokens, len(tables))
        self.pair: list[Array] = []
        self.frequency: list[Array] = []
        size = len(vocabulary.vocabulary)
        ids = tokens.ids_in(vocabulary.vocabulary)
        for order, (entries, table) in enumerate(zip(self.grams, tables, strict=True), start=1):
            last = ids[entries.position + order - 1]
            if table.grams is None:
                self.pair.append(table.pairs.find(_key(entries.caption, last, size)))
                gram = last
            else:
                prefix = self.grams[order - 2].at[entries.position]
                self.pair.append(table.pairs.find(_key(self.pair[-1][prefix], last, size)))
                gram = table.grams.find(_key(gram[prefix], last, size))
            self.frequency.append(table.frequency(gram))


def _key(prefix: Array, last: Array, size: int) -> Array:
    return np.where((prefix >= 0) & (last >= 0), prefix * size + last, -1)


def tf_idf(grams: CaptionGrams, frequency: Array, images: int, captions: int) -> tuple[Array, Array]:
    """Term frequency times inverse document frequency of each entry, and the norm of each caption."""
    idf, square = np.zeros(images + 1), np.zeros(images + 1)
    for value in np.flatnonzero(np.bincount(frequency)).tolist():
        idf[value] = np.log(float(images)) - np.log(max(1.0, float(value)))
        square[value] = pow(idf[value], 2)
    weights, squares = grams.count * idf[frequency], square[frequency]
    repeated = np.flatnonzero(grams.count > 1)
    squares[repeated] = [pow(weight, 2) for weight in weights[repeated]]
    return weights, np.sqrt(sums(squares, grams.caption, captions))


def sums(values: Array, group: Array, groups: int) -> Array:
    """Sums by group, each in array order."""
    return np.bincount(group, values, groups).astype(np.float64, copy=False)  # integers if there is no value
