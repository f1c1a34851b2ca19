"""Counts what training and evaluation sets have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import ImageDecodeError, ImageTextDataset
from gmail_lightning.transforms.image_hash import near_pairs, perceptual_hash

PIXEL_DISTANCE = 1  # differing bits of the same picture; a match stops the run, so fewer than in the audit of a store
MAX_DECODED = 10_000  # evaluation images that are decoded for their hashes
HASH_BLOCK = 1 << 22  # training hashes looked at together

Row = tuple[ImageTextDataset, int]


class Shared(NamedTuple):
    """What one evaluation set and training have in common, of one kind; see ``Overlap``."""

    shared: int
    total: int
    example: str = ""
    unchecked: str = ""


def normalized(captions: pa.Array) -> pa.Array:
    """What two captions must have equal to be one: lower case letters and digits, one space between the words."""
    captions = captions.cast(pa.string())
    folded = pc.utf8_lower(pc.utf8_normalize(captions, form="NFKC"))
    words = pc.utf8_trim_whitespace(pc.replace_substring_regex(folded, r"[^\p{L}\p{M}\p{N}]+", " "))
    return pc.if_else(pc.equal(words, ""), captions, words)  # nothing but signs: they are the caption


def shared_captions(
    train: Sequence[ImageTextDataset], evaluation: Mapping[str, Sequence[ImageTextDataset]]
) -> dict[str, Shared]:
    """Looks up every training caption among those of the evaluation, block by block; names of classes are left out."""
    compared = {name: [d for d in datasets if not d.captions_are_classes] for name, datasets in evaluation.items()}
    sets = {name: _distinct_captions(list(_blocks(datasets))) for name, datasets in compared.items()}
    every = pa.chunked_array([texts for texts, _ in sets.values()], pa.string()).unique()
    seen = np.full(len(every), -1)  # the training row that first has it, counted over all blocks
    blocks: list[tuple[ImageTextDataset, np.ndarray]] = []
    start = 0
    for dataset, texts, rows in _blocks(train if len(every) else []):
        at = pc.index_in(normalized(texts), value_set=every).fill_null(-1).to_numpy()
        hits, position = np.unique(at, return_index=True)
        new = (hits >= 0) & (seen[hits] < 0)
        seen[hits[new]] = start + np.arange(int(new.sum()))
        blocks.append((dataset, rows[position[new]]))
        start += int(new.sum())
    owner = [(dataset, int(row)) for dataset, rows in blocks for row in rows]
    found: dict[str, Shared] = {}
    for name, (texts, first) in sets.items():
        source = seen[pc.index_in(texts, value_set=every).to_numpy()]
        shared, example = np.flatnonzero(source >= 0), ""
        if len(shared):
            i = int(shared[0])
            example = f"{texts[i].as_py()!r} in {_describe(first[i])} and in {_describe(owner[int(source[i])])}"
        classes = [dataset for dataset in evaluation[name] if dataset.captions_are_classes]
        unchecked = ", ".join(f"{len(dataset):,} rows of {_type(dataset)} (they name classes)" for dataset in classes)
        found[name] = Shared(len(shared), len(texts), example, unchecked)
    return found


def _blocks(datasets: Sequence[ImageTextDataset]) -> Iterator[tuple[ImageTextDataset, pa.Array, np.ndarray]]:
    for dataset in datasets:
        for texts, rows in dataset.caption_blocks():
            yield dataset, texts, rows


def _distinct_captions(blocks: list[tuple[ImageTextDataset, pa.Array, np.ndarray]]) -> tuple[pa.Array, list[Row]]:
    """Distinct normalised captions, and a row of each."""
    captions = pa.chunked_array([normalized(texts) for _, texts, _ in blocks], pa.string())
    codes = captions.combine_chunks().dictionary_encode()
    _, first = np.unique(codes.indices.to_numpy(), return_index=True)
    row_of = np.concatenate([rows for _, _, rows in blocks] or [np.empty(0, np.int64)])[first]
    block_of = np.repeat(np.arange(len(blocks)), [len(rows) for _, _, rows in blocks])[first]
    return codes.dictionary, [(blocks[b][0], int(r)) for b, r in zip(block_of, row_of, strict=True)]


def _describe(row: Row) -> str:
    return row[0].describe(row[1])


def _type(dataset: ImageTextDataset) -> str:
    return type(dataset).__name__


def shared_image_ids(
    train: Sequence[ImageTextDataset], evaluation: Mapping[str, Sequence[ImageTextDataset]]
) -> dict[str, Shared]:
    """Compares the ids of images; -1 is none."""
    found: dict[str, Shared] = {}
    for name, datasets in evaluation.items():
        ids = np.unique(np.concatenate([dataset.image_id for dataset in datasets]))
        ids = ids[ids != -1]
        seen = np.zeros(len(ids), dtype=bool)
        example = ""
        for dataset in train if len(ids) else ():
            at = np.searchsorted(ids, dataset.image_id).clip(max=len(ids) - 1)
            hit = ids[at] == dataset.image_id
            seen[at[hit]] = True
            if not example and hit.any():
                row = int(np.argmax(hit))
                value = int(dataset.image_id[row])
                other = next((d, int(np.argmax(d.image_id == value))) for d in datasets if value in d.image_id)
                example = f"image_id {value} in {_describe(other)} and in {_describe((dataset, row))}"
        found[name] = Shared(int(seen.sum()), len(ids), example, "")
    return found


def picture_hashes(dataset: ImageTextDataset) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Perceptual hashes of an evaluation set, whose pictures are decoded where it does not know them.

    Returns:
        A row of each of its P pictures (P,); their hashes (P,) int64, or None and the reason.
    """
    rows = np.unique(dataset.picture(), return_index=True)[1]
    stored = dataset.perceptual_hashes()
    if stored is not None:
        return rows, stored[rows], ""
    what = f"{len(rows):,} pictures of {_type(dataset)}"
    if len(rows) > MAX_DECODED:
        return rows, None, f"{what} (no stored hashes, too many)"
    try:
        found = [perceptual_hash(dataset.image(row)) for row in rows.tolist()]
    except ImageDecodeError as error:
        return rows, None, f"{what} ({error})"
    return rows, np.array(found, np.int64), ""


def shared_pictures(
    train: Sequence[ImageTextDataset], evaluation: Mapping[str, Sequence[ImageTextDataset]]
) -> dict[str, Shared]:
    """Compares perceptual hashes; evaluation images are decoded where their data set does not know them."""
    known: list[tuple[ImageTextDataset, np.ndarray]] = []
    unknown: dict[str, int] = {}
    for dataset in train:
        stored = dataset.perceptual_hashes()
        if stored is None:
            unknown[_type(dataset)] = unknown.get(_type(dataset), 0) + len(dataset)
        else:
            known.append((dataset, stored))
    without = [f"{count:,} training rows of {name} (no stored hashes)" for name, count in unknown.items()]
    found: dict[str, Shared] = {}
    for name, datasets in evaluation.items():
        unchecked, hashes, rows = list(without), [np.empty(0, np.int64)], []
        for dataset in datasets if known else []:
            picture, of_pictures, fault = picture_hashes(dataset)
            if of_pictures is None:
                unchecked.append(fault)
                continue
            hashes.append(of_pictures)
            rows += [(dataset, row) for row in picture.tolist()]
        shared, example = _near(known, np.concatenate(hashes), rows)
        found[name] = Shared(shared, len(rows), example, ", ".join(unchecked))
    return found


def _near(known: list[tuple[ImageTextDataset, np.ndarray]], hashes: np.ndarray, rows: list[Row]) -> tuple[int, str]:
    """Number of evaluation pictures that are near a training picture, and an example."""
    reference, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    seen, example = np.zeros(len(reference), dtype=bool), ""
    for dataset, trained in known:
        for start in range(0, len(trained), HASH_BLOCK):
            block = trained[start : start + HASH_BLOCK]
            query, row = np.unique(block, return_index=True)
            left, right, distance = near_pairs(query, reference, PIXEL_DISTANCE)
            seen[right] = True
            if len(left) and not example:
                ours = (dataset, start + int(row[left[0]]))
                example = (
                    f"{_describe(rows[int(first[right[0]])])} and {_describe(ours)}, {distance[0]} of 64 bits apart"
                )
    return int(seen[group].sum()), example
