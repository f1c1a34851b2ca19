"""What a data set of one's own must hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import torch

from gmail_lightning.datasets.base import ImageTextDataset, one_line
from gmail_lightning.testing.faults import outcome, report, require
from gmail_lightning.types import Modality

ROWS = 16  # of a data set that are looked at, spread over it


def check_dataset(dataset: ImageTextDataset) -> None:
    """Checks an ``ImageTextDataset``: its columns, some of its rows, and that a worker process gets the same ones.

    Raises:
        AssertionError: With one sentence per fault.
    """
    require(dataset, ImageTextDataset)
    report(dataset, _dataset_faults(dataset))


def _dataset_faults(dataset: ImageTextDataset) -> Iterator[str]:
    size = len(dataset)
    if size == 0:
        yield "it has no rows: raise a DataError in the constructor that says why."
        return
    for name in ("modality", "image_id", "pair_id", "label", "weight"):
        column = getattr(dataset, name)
        kind = "float32" if name == "weight" else "int64"
        if column is None and name in ("label", "weight"):
            continue
        if column.shape != (size,) or column.dtype != kind:
            yield f"{name} is {column.dtype} of shape {column.shape}: fill an array of {kind} of shape ({size},)."
    if not set(dataset.modality.tolist()) <= set(map(int, Modality)):
        yield "modality holds other values than 0 (real) and 1 (generated)."
    if (dataset.image_id < 0).any():
        yield "image_id is negative in some rows: every row shows an image, use gmail_lightning.datasets.ids."
    label, names = dataset.label, dataset.class_names
    if label is not None and names is not None and label.max() >= len(names):
        yield f"label goes up to {label.max()}, and there are {len(names)} class_names."
    rows = sorted({i * (size - 1) // max(min(ROWS, size) - 1, 1) for i in range(min(ROWS, size))})
    keys = [dataset.sample_key(row) for row in rows]
    if len(set(keys)) < len(keys):
        yield "sample_key gives two rows one name: make it unique within the data set."
    for row in rows:
        fault = next(_row_faults(dataset, row), None)
        if fault is not None:
            yield f"row {row}: {fault}"
            return
    told: dict[int, list[str]] = {row: [] for row in rows}
    for texts, of in dataset.caption_blocks():
        for text, row in zip(texts.to_pylist(), of.tolist(), strict=True):
            if row in told:
                told[row].append(one_line(text))
    if any(told[row] != [one_line(text) for text in dataset.captions(row)] for row in rows):
        yield "caption_blocks and captions differ: leave caption_blocks out, it is there for speed."
    if dataset.file_ids().shape != (size,):
        yield "file_ids does not give one number per row."
    what = "pickling, as for a worker process that is spawned,"
    other, faults = outcome(what, lambda: pickle.loads(pickle.dumps(dataset)))
    yield from faults
    if not faults and not torch.equal(other.image(rows[0]), dataset.image(rows[0])):
        yield "a copy for a worker process reads other pixels: keep what a row depends on in the object."


def _row_faults(dataset: ImageTextDataset, row: int) -> Iterator[str]:
    image = dataset.image(row)
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        yield f"image is {image.dtype} of shape {tuple(image.shape)}: return uint8 (3, H, W), as decode_image does."
    elif not torch.equal(image, dataset.image(row)):
        yield "image differs when it is read again: augment in the data module, where the draw can be resumed."
    captions = dataset.captions(row)
    if not captions or not all(isinstance(text, str) for text in captions):
        yield f"captions are {captions!r}: return at least one text."
    if dataset.no_captions is None and not all(text.strip() for text in captions):
        yield "a caption is empty: leave the row out, or say in no_captions why there are none."
