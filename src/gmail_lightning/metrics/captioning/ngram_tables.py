"""Distinct n-grams of many captions, counted at once: integer arrays in the order in which a loop would meet them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray  # short for signatures: every array here is one-dimensional

_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiplicative hashing spreads consecutive keys (Knuth, volume 3, 6.4)
_NOTHING = -2  # no key, neither known (>= 0) nor unknown (-1)


class HashIndex:
    """Dense ids of equal integers, by order of first occurrence; a hash table in vector operations.

    In each round every key writes its position into a slot of a table, where the lowest position stays; keys that equal
    the one that stays are done, the others go to the next round with another hash. At least the keys that stay are
    done, so the rounds end.

    Args:
        keys: Integers >= 0.
        among: Positions of the keys that may have an equal, ascending; by default all. Those left out are not looked
            at: each gets an id of its own, and ``find`` does not find it.

    Attributes:
        ids: The id of each key, same shape as ``keys``.
        first: The position of the first key of each id, ascending.
    """

    def __init__(self, keys: Array, among: Array | None = None) -> None:
        self._keys = np.append(keys, _NOTHING)  # what an empty slot points to
        self._tables: list[Array] = []
        first = np.arange(len(keys), dtype=np.int32)
        todo = first.copy() if among is None else among.astype(np.int32)
        waiting = keys if among is None else keys[among]
        while len(todo):
            table = np.full(1 << (2 * len(todo)).bit_length(), len(keys), np.int32)
            slots = _slots(waiting, len(self._tables), table)
            np.minimum.at(table, slots, todo)
            stays = table[slots]
            first[todo] = stays
            differ = np.flatnonzero(keys[stays] != waiting)
            todo, waiting = todo[differ], waiting[differ]
            self._tables.append(table)
        is_first = first == np.arange(len(keys), dtype=np.int32)
        self.first = np.flatnonzero(is_first)
        self.ids = (np.cumsum(is_first, dtype=np.int64) - 1)[first]

    def __len__(self) -> int:
        """The number of distinct keys."""
        return len(self.first)

    def find(self, keys: Array) -> Array:
        """The ids of other keys, -1 for those that are not in the index; a key of -1 never is."""
        found = np.full(len(keys), -1)
        todo = np.flatnonzero(keys >= 0)
        for turn, table in enumerate(self._tables):
            candidate = table[_slots(keys[todo], turn, table)]
            stored = self._keys[candidate]
            done = stored == keys[todo]
            found[todo[done]] = self.ids[candidate[done]]
            todo = todo[~done & (stored != _NOTHING)]
        return found


def _slots(keys: Array, turn: int, table: Array) -> Array:
    """The upper bits of a product modulo 2^64, by another odd factor in each turn."""
    factor = np.uint64(pow(_ODD, 2 * turn + 1, 1 << 64))
    return ((keys.view(np.uint64) * factor) >> np.uint64(65 - len(table).bit_length())).view(np.int64)


@dataclass
class Tokens:
    """Captions as token ids.

    Attributes:
        vocabulary: The distinct tokens, by first occurrence.
        ids: The tokens of all captions, one caption after the other, int64.
        lengths: The number of tokens of each caption, int64.
    """

    vocabulary: pa.Array
    ids: Array
    lengths: Array

    @classmethod
    def split(cls, captions: Sequence[str]) -> Self:
        """Splits at every single space, as ``caption.split(" ")`` does: an empty caption is one empty token."""
        lists = pc.split_pattern(pa.array(captions, pa.large_string()), " ")
        if lists.null_count:
            raise ValueError(f"Caption {lists.is_null().index(True)} is None, expected a string.")
        coded = lists.flatten().dictionary_encode()
        return cls(coded.dictionary, _int64(coded.indices), np.diff(_int64(lists.offsets)))

    def words(self) -> Self:
        """The same captions split at white space of any kind, as ``caption.split()`` does: an empty one has no word."""
        tokens = self.vocabulary.to_pylist()
        if " ".join(tokens).split() == tokens:
            return self
        split = [token.split() for token in tokens]
        coded = pa.array([word for words in split for word in words], pa.large_string()).dictionary_encode()
        sizes = np.array([len(words) for words in split])
        starts = np.cumsum(sizes) - sizes
        here = sizes[self.ids]  # words in each token of the captions
        ends = np.append(0, np.cumsum(here))
        within = np.arange(ends[-1]) - np.repeat(ends[:-1], here)
        ids = _int64(coded.indices)[np.repeat(starts[self.ids], here) + within]
        return type(self)(coded.dictionary, ids, np.diff(ends[np.append(0, np.cumsum(self.lengths))]))

    def ids_in(self, vocabulary: pa.Array) -> Array:
        """The tokens of all captions as ids of another vocabulary, -1 for those that it lacks."""
        return np.asarray(_int64(pc.index_in(self.vocabulary, value_set=vocabulary).fill_null(-1))[self.ids])


def _int64(array: pa.Array) -> Array:
    return np.asarray(array, dtype=np.int64)


@dataclass
class CaptionGrams:
    """The n-grams of one order, caption by caption. An entry is an n-gram of a caption, with its count.

    Attributes:
        at: For each token position of the captions the entry of the n-gram that starts there; -1 if none does.
        position: For each entry the token position where its n-gram first starts, ascending.
        caption: For each entry the caption.
        count: For each entry how often the caption has its n-gram.
    """

    at: Array
    position: Array
    caption: Array
    count: Array


def caption_grams(tokens: Tokens, orders: int) -> list[CaptionGrams]:
    """The n-grams of orders 1 to ``orders``, entries in the order in which a loop over the captions meets them."""
    size = len(tokens.vocabulary)
    caption = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
    left = np.repeat(np.cumsum(tokens.lengths), tokens.lengths) - np.arange(len(caption))  # to the caption's end
    grams: list[CaptionGrams] = []
    for order in range(1, orders + 1):
        starts = np.flatnonzero(left >= order)
        if not grams:
            index = HashIndex(caption * size + tokens.ids)
        else:  # an n-gram occurs twice only if its first n-1 tokens do
            prefix = grams[-1].at[starts]
            twice = np.flatnonzero(grams[-1].count[prefix] > 1)
            index = HashIndex(prefix * size + tokens.ids[starts + order - 1], twice)
        at = np.full(len(caption), -1)
        at[starts] = index.ids
        position = starts[index.first]
        grams.append(CaptionGrams(at, position, caption[position], np.bincount(index.ids)))
    return grams


@dataclass
class ImageGrams:
    """The n-grams of one order in the references. A pair is an n-gram of an image, in any of its references.

    Attributes:
        captions: The n-grams caption by caption.
        pairs: The index of the pairs; ``pairs.ids`` is the pair of each entry.
        grams: The index of the n-grams of order 2 and more that can occur in two images; None for order 1.
        gram: For each pair its n-gram, -1 if it occurs in this image only.
        images: For each n-gram the number of images that have it in any reference.
        most: For each pair the highest count in one reference.
    """

    captions: CaptionGrams
    pairs: HashIndex
    grams: HashIndex | None
    gram: Array
    images: Array
    most: Array

    def frequency(self, gram: Array) -> Array:
        """The number of images that have the n-grams; 1 for -1, where 0 or 1 make no difference to any score."""
        return np.asarray(np.append(self.images, 1)[gram])


def image_grams(tokens: Tokens, image: Array, orders: int) -> list[ImageGrams]:
    """Groups the n-grams of references by image, and those of all images.

    Args:
        tokens: The references.
        image: The image of each reference.
        orders: The highest order.
    """
    size = len(tokens.vocabulary)
    tables: list[ImageGrams] = []
    for order, captions in enumerate(caption_grams(tokens, orders), start=1):
        last = tokens.ids[captions.position + order - 1]
        if not tables:
            pairs, grams = HashIndex(image[captions.caption] * size + last), None
            gram = last[pairs.first]
        else:
            before = tables[-1]
            pairs = HashIndex(before.pairs.ids[before.captions.at[captions.position]] * size + last)
            position, last = captions.position[pairs.first], last[pairs.first]
            # an n-gram is in two images only if its first and its last n-1 tokens are
            prefix, suffix = (before.gram[before.pairs.ids[before.captions.at[p]]] for p in (position, position + 1))
            shared = np.flatnonzero((prefix >= 0) & (suffix >= 0))
            grams = HashIndex(prefix[shared] * size + last[shared])
            gram = np.full(len(pairs), -1)
            gram[shared] = grams.ids
        images = np.bincount(gram[gram >= 0])
        gram[np.append(images, 0)[gram] < 2] = -1
        most = np.ones(len(pairs), np.int64)
        twice = np.flatnonzero(captions.count > 1)
        np.maximum.at(most, pairs.ids[twice], captions.count[twice])
        tables.append(ImageGrams(captions, pairs, grams, gram, images, most))
    return tables
