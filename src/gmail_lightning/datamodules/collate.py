"""From rows to one batch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.datasets.pictures import Picture, stack_pictures
from gmail_lightning.types import ImageTextBatch, InputSpec, TextSpec, modality_rows


class RowTable:
    """Several data sets end to end: their columns, and where each row is."""

    def __init__(self, datasets: Sequence[ImageTextDataset]) -> None:
        if not datasets or not all(len(dataset) for dataset in datasets):
            empty = [type(dataset).__name__ for dataset in datasets if not len(dataset)]
            raise DataError(f"No rows in {', '.join(empty)}." if empty else "No data sets were given.")
        self.datasets = list(datasets)
        self.starts: list[int] = np.cumsum([0] + [len(dataset) for dataset in datasets]).tolist()
        self.modality = np.concatenate([dataset.modality for dataset in datasets]).astype(np.int64)
        self.image_id = np.concatenate([dataset.image_id for dataset in datasets]).astype(np.int64)
        self.pair_id = np.concatenate([dataset.pair_id for dataset in datasets]).astype(np.int64)
        self.label: np.ndarray | None = None
        if any(dataset.label is not None for dataset in datasets):
            self.label = np.concatenate([np.full(len(d), -1) if d.label is None else d.label for d in datasets])
        self.weight: np.ndarray | None = None
        if any(dataset.weight is not None for dataset in datasets):
            weights = [np.ones(len(d)) if d.weight is None else d.weight for d in datasets]
            self.weight = np.concatenate(weights).astype(np.float32)

        self.has_questions = any(dataset.has_questions for dataset in datasets)

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: int) -> tuple[ImageTextDataset, int]:
        """Returns the data set of a row and the row's number within it."""
        number = bisect_right(self.starts, index) - 1
        return self.datasets[number], index - self.starts[number]

    def describe(self, index: int) -> str:
        """Names a row in error messages."""
        dataset, row = self.locate(index)
        return dataset.describe(row)


def encode_texts(name: str, spec: TextSpec, texts: list[str]) -> Tensor:
    """Returns the token ids of ``texts``, shape (T, L).

    Raises:
        ValueError: If ``encode`` returns another shape than the spec promises.
    """
    tokens = spec.encode(texts)
    if tokens.shape != (len(texts), spec.context_length):
        raise ValueError(
            f"texts[{name!r}]: encode returned shape {tuple(tokens.shape)} for {len(texts)} texts, but the context "
            f"length of the model is {spec.context_length}. Let the tokeniser pad and truncate to that length."
        )
    return tokens


def collate(
    table: RowTable,
    rows: list[tuple[ImageTextDataset, int]],
    indices: np.ndarray,
    spec: InputSpec,
    pictures: list[Picture],
    texts: list[str],
    text_row: list[int],
) -> ImageTextBatch:
    """Puts B rows together.

    Args:
        table: Columns of all rows.
        rows: Data set and number within it of each row, length B.
        indices: Number in the table of each row, shape (B,).
        spec: What the batch must hold.
        pictures: One per row; empty if the spec has no images.
        texts: T captions, each of one of the rows.
        text_row: The row of each text, ascending.
    """
    batch: dict[str, Any] = {
        "modality": torch.from_numpy(table.modality[indices]),
        "image_id": torch.from_numpy(table.image_id[indices]),
        "pair_id": torch.from_numpy(table.pair_id[indices]),
        "source": [dataset.source(row) for dataset, row in rows],
        "sample_key": [dataset.sample_key(row) for dataset, row in rows],
    }
    if table.label is not None:
        batch["label"] = torch.from_numpy(table.label[indices])
    if table.has_questions:
        batch["question"] = [dataset.question(row) or "" for dataset, row in rows]
    batch.update(stack_pictures(pictures, lambda i: table.describe(indices[i])))
    for name, text_spec in spec.texts.items():
        batch[name] = encode_texts(name, text_spec, texts)
        batch[f"{name}_row"] = torch.tensor(text_row)
    batch.update(modality_rows(batch))
    return cast(ImageTextBatch, batch)


def asked(batch: ImageTextBatch) -> list[str]:
    """What the caption of each row answers, "" for nothing."""
    return batch.get("question", [""] * len(batch["modality"]))


def as_is(batch: Any) -> Any:
    """The data sets of the loaders make whole batches; nothing is left to collate."""
    return batch
