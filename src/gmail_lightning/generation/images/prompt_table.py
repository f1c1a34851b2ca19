"""The images to make, one row each, and the batches that a generator reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from gmail_lightning.datasets.base import DataError, ImageTextDataset, one_line
from gmail_lightning.datasets.shards import SCHEMA
from gmail_lightning.generation.images.image_names import image_key, image_keys, image_seed, prompt_id, prompt_number
from gmail_lightning.types import PromptBatch


class PromptTable:
    """The images to make: ``images_per_caption`` in a row for each prompt, prompts in the order of the data sets.

    A prompt is an image id and a caption; where several rows have both alike, the first stands for all. Columns are
    arrays, 36 bytes a prompt; captions are read from the data sets when they are needed.

    Args:
        datasets: Where the captions are.
        images_per_caption: Number of images of each prompt.
        captions_per_row: Only so many captions of each row, the first; None takes all.
        template: What the generator reads; ``{caption}`` stands for the caption.
    """

    def __init__(
        self,
        datasets: Sequence[ImageTextDataset],
        images_per_caption: int = 1,
        captions_per_row: int | None = None,
        template: str = "{caption}",
    ) -> None:
        self.datasets, self.images_per_caption, self.template = list(datasets), images_per_caption, template
        found = [_prompts(number, dataset, captions_per_row) for number, dataset in enumerate(datasets)]
        every = _Prompts(*(np.concatenate(column) for column in zip(*found, strict=True)))
        _, first = np.unique(every.prompt, return_index=True)
        first.sort()
        #: Rows whose image id and caption an earlier one has.
        self.repeated = len(every.prompt) - len(first)
        kept = _Prompts(*(column[first] for column in every))
        self.prompt, self.image_id, self.pair_id = kept.prompt, kept.image_id, kept.pair_id
        self.dataset, self.row, self._caption = kept.dataset, kept.row, kept.caption

    def __len__(self) -> int:
        return len(self.prompt) * self.images_per_caption

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the prompt of an image, and of the image among those of its prompt."""
        return divmod(index, self.images_per_caption)

    def keys(self, recipe: str) -> pa.Array:
        """Names of all images, in order."""
        return image_keys(self.prompt, self.images_per_caption, recipe)

    def describe(self, prompt: int) -> str:
        """Names the row that a prompt comes from, in messages."""
        dataset: ImageTextDataset = self.datasets[self.dataset[prompt]]
        return dataset.describe(int(self.row[prompt]))

    def caption(self, index: int) -> str:
        """The caption of an image, on one line."""
        prompt, _ = self._place(index)
        dataset = self.datasets[self.dataset[prompt]]
        return one_line(dataset.captions(int(self.row[prompt]))[self._caption[prompt]])

    def key(self, index: int, recipe: str) -> str:
        """Name of an image."""
        prompt, image_index = self._place(index)
        return image_key(prompt_id(int(self.prompt[prompt])), image_index, recipe)

    def columns(self, index: int) -> dict[str, Any]:
        """What the manifest takes over from the row behind an image."""
        prompt, image_index = self._place(index)
        return {
            "prompt_id": prompt_id(int(self.prompt[prompt])),
            "image_index": image_index,
            "image_id": int(self.image_id[prompt]),
            "pair_id": int(self.pair_id[prompt]),
            **self.datasets[self.dataset[prompt]].columns(int(self.row[prompt])),
        }

    def manifest_rows(self, batch: PromptBatch, recipe: str) -> list[dict[str, Any]]:
        """What the manifest says of the images of a batch before they are made."""
        return [
            {"key": self.key(row, recipe), **self.columns(row), "caption": caption, "prompt": prompt, "seed": seed}
            for row, caption, prompt, seed in zip(
                batch["row"], batch["caption"], batch["prompt"], batch["seed"], strict=True
            )
        ]

    def batch(self, shard: str, rows: np.ndarray, recipe: str) -> PromptBatch:
        """The prompts of some images of a shard."""
        index = rows.tolist()
        captions = [self.caption(i) for i in index]
        return PromptBatch(
            shard=shard,
            row=index,
            prompt=[self.template.replace("{caption}", caption) for caption in captions],
            caption=captions,
            seed=[image_seed(self.key(i, recipe)) for i in index],
        )


class _Prompts(NamedTuple):
    """Columns of N prompts."""

    prompt: np.ndarray  # uint64, ``prompt_number``
    image_id: np.ndarray
    pair_id: np.ndarray
    dataset: np.ndarray  # number of the data set
    row: np.ndarray  # within it
    caption: np.ndarray  # number within the row


def _prompts(number: int, dataset: ImageTextDataset, captions_per_row: int | None) -> _Prompts:
    """The prompts of one data set."""
    if len(dataset):
        _refuse_foreign_columns(dataset.columns(0))
    chunks = [[np.empty(0, dtype) for dtype in (np.uint64, np.int64, np.int16)]]
    for texts, row in dataset.caption_blocks():
        caption = np.arange(len(row)) - np.searchsorted(row, row)  # number of the caption within its row
        keep = caption < (captions_per_row or len(row))
        row, caption = row[keep], caption[keep]
        prompts = np.empty(len(row), np.uint64)
        image_ids = dataset.image_id[row].tolist()
        for i, (image_id, text) in enumerate(zip(image_ids, texts.filter(pa.array(keep)).to_pylist(), strict=True)):
            if not text.strip():
                raise DataError(f"{dataset.describe(int(row[i]))}: caption {caption[i] + 1} is blank: no prompt.")
            prompts[i] = prompt_number(image_id, text)
        chunks.append([prompts, row, caption.astype(np.int16)])
    prompt, row, caption = (np.concatenate(column) for column in zip(*chunks, strict=True))
    image_id, pair_id = (np.asarray(column, dtype=np.int64)[row] for column in (dataset.image_id, dataset.pair_id))
    return _Prompts(prompt, image_id, pair_id, np.full(len(row), number, np.int16), row, caption)


class PromptBatches:
    """Batches of prompts, shard by shard; no batch holds prompts of two shards. Each pass begins anew."""

    def __init__(self, table: PromptTable, recipe: str, shards: list[tuple[str, np.ndarray]], batch_size: int) -> None:
        self.table, self.recipe, self.shards, self.batch_size = table, recipe, shards, batch_size

    def __iter__(self) -> Iterator[PromptBatch]:
        for shard, rows in self.shards:
            for start in range(0, len(rows), self.batch_size):
                yield self.table.batch(shard, rows[start : start + self.batch_size], self.recipe)


def _refuse_foreign_columns(names: Iterable[str]) -> None:
    """Refuses columns of a data set that the manifest has itself."""
    clash = sorted(set(names) & set(SCHEMA.names))
    if clash:
        raise DataError(f"The manifest has columns of its own named {', '.join(clash)}: rename those of the data set.")
