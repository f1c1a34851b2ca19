"""The data sets that the loaders read: whole batches, transformed and tokenised in the workers."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import Dataset

from gmail_lightning.datamodules.collate import RowTable, asked, collate
from gmail_lightning.datasets.base import DataError, ImageDecodeError, ImageTextDataset
from gmail_lightning.datasets.pictures import Picture, look_at, read_picture
from gmail_lightning.samplers.mixed_modality import Pairs, stable_hash
from gmail_lightning.types import ImageTextBatch, InputSpec, Modality

MAX_REPLACEMENTS = 8  # candidates that are tried for one image that does not decode


class TrainRows(Dataset[ImageTextBatch]):
    """Rows for training, by the items (row, epoch, position) of a :class:`MixedModalitySampler`.

    Every random choice is a hash of (seed, epoch, position): which caption of a row, how it is augmented, and which row
    stands in for one whose image does not decode (with its pair, where ``pairs`` are given). The two rows of a pair
    share their choices: what moves or colours the generated image moves or colours the real one alike.
    """

    def __init__(
        self,
        table: RowTable,
        spec: InputSpec,
        *,
        seed: int = 0,
        pairs: Pairs | None = None,
        augmentation: nn.Module | None = None,
        generated_augmentation: nn.Module | None = None,
    ) -> None:
        for dataset in table.datasets:
            if dataset.not_for_training is not None:
                raise DataError(f"{type(dataset).__name__} cannot be trained on: {dataset.not_for_training}")
            if dataset.feature_store is not None or dataset.token_store is not None:
                _refuse_augmentation(dataset, augmentation, generated_augmentation)
        self.table, self.spec, self.seed, self.pairs = table, spec, seed, pairs
        of_real = [augmentation] if augmentation is not None else []
        of_generated = [*of_real, generated_augmentation] if generated_augmentation is not None else of_real
        self.augmentation = {Modality.REAL: of_real, Modality.GENERATED: of_generated}
        adopt_real_ids(table)  # a pair shows one real image, whatever the generated row's own table calls it

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, int, int]) -> ImageTextBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: list[tuple[int, int, int]]) -> ImageTextBatch:
        """Returns one training batch; in paired mode the rows of a pair are neighbours."""
        index, epoch, position = np.array(items, dtype=np.int64).T
        shared = position if self.pairs is None else position - position % 2  # that of the first row of the pair
        draw = stable_hash(self.seed, epoch, shared).tolist()
        replaced = np.zeros(len(index), dtype=bool)
        pictures: list[Picture] = []
        reasons: list[str] = []
        if self.spec.images:
            pictures, replaced, reasons = self._read(index, epoch, position, draw)
        rows = [self.table.locate(i) for i in index.tolist()]
        captions = [dataset.captions(row) for dataset, row in rows]
        texts = [options[number % len(options)] for options, number in zip(captions, draw, strict=True)]
        batch = collate(self.table, rows, index, self.spec, pictures, texts, list(range(len(index))))
        batch["caption"] = texts
        if self.spec.captions is not None:
            cast(Any, batch).update(self.spec.captions.encode(texts, asked(batch)))
        batch["replaced"] = torch.from_numpy(replaced)
        batch["replaced_reason"] = reasons
        if self.table.weight is not None:
            batch["weight"] = torch.from_numpy(self.table.weight[index])
        return batch

    def _picture(self, index: int, seed: int) -> Picture:
        """What a row shows; whatever is random about it is drawn with ``seed``."""
        augmentations = self.augmentation[Modality(int(self.table.modality[index]))]

        def look(image: Tensor) -> dict[str, Tensor]:
            if not augmentations:
                return look_at(image, self.spec.images)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return look_at(image, self.spec.images, augmentations)

        return read_picture(*self.table.locate(index), look)

    def _read(
        self, index: np.ndarray, epoch: np.ndarray, position: np.ndarray, draw: list[int]
    ) -> tuple[list[Picture], np.ndarray, list[str]]:
        """Reads what the rows show; ``index`` is changed where another row stands in."""
        pictures: dict[int, Picture] = {}
        replaced, reasons = np.zeros(len(index), dtype=bool), []
        for i, row in enumerate(index.tolist()):
            if replaced[i]:  # as the partner of the row before
                continue
            try:
                pictures[i] = self._picture(row, draw[i])
            except ImageDecodeError as error:
                reasons.append(str(error))
                unit = [i] if self.pairs is None else [i - i % 2, i - i % 2 + 1]
                key = stable_hash(self.seed, epoch[i], position[unit[0]])
                index[unit], stand_ins = self._replace(index[i], key, [draw[j] for j in unit])
                replaced[unit] = True
                pictures.update(zip(unit, stand_ins, strict=True))
        return [pictures[i] for i in range(len(index))], replaced, reasons

    def _replace(self, index: int, key: np.ndarray, seeds: list[int]) -> tuple[np.ndarray, list[Picture]]:
        """Finds another pair, or another row of the same modality, that decodes."""
        pool = np.flatnonzero(self.table.modality == self.table.modality[index])
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            draw = stable_hash(key.view(np.int64), attempt)
            if self.pairs is None:
                rows = pool[draw % np.uint64(len(pool))][None]
            else:
                unit = (draw % np.uint64(len(self.pairs.real))).astype(np.int64)
                rows = np.array([self.pairs.draw(unit, draw.view(np.int64)), self.pairs.real[unit]])
            try:
                return rows, [self._picture(row, seed) for row, seed in zip(rows.tolist(), seeds, strict=True)]
            except ImageDecodeError as error:
                last = error
        raise DataError(
            f"{self.table.describe(index)} does not decode, nor do {MAX_REPLACEMENTS} rows drawn in its place, "
            f"the last of them: {last}"
        )


def _refuse_augmentation(
    dataset: ImageTextDataset, augmentation: nn.Module | None, generated_augmentation: nn.Module | None
) -> None:
    """A pair shares its draw, and what a store holds was computed before any draw."""
    what = "features" if dataset.feature_store is not None else "token ids"
    of_generated = generated_augmentation if Modality.GENERATED in dataset.modality else None
    for name, given in (("augmentation", augmentation), ("generated_augmentation", of_generated)):
        if given is not None:
            raise MisconfigurationException(
                f"{name} cannot change the {what} of {dataset.describe(0)}: they were cached for the image as it is, "
                f"and the partner of a pair would show another view. Leave {name} out, or give the data set without "
                "its store."
            )


def adopt_real_ids(table: RowTable) -> None:
    """Gives every generated row the ``image_id`` of the real row of its ``pair_id``, where there is one."""
    real = np.flatnonzero((table.modality == Modality.REAL) & (table.pair_id >= 0))
    generated = np.flatnonzero((table.modality == Modality.GENERATED) & (table.pair_id >= 0))
    if len(real) == 0 or len(generated) == 0:
        return
    real = real[np.argsort(table.pair_id[real], kind="stable")]
    at = np.searchsorted(table.pair_id[real], table.pair_id[generated]).clip(max=len(real) - 1)
    known = table.pair_id[real[at]] == table.pair_id[generated]
    table.image_id[generated[known]] = table.image_id[real[at[known]]]


class EvaluationRows(Dataset[ImageTextBatch]):
    """Each image once, with all its captions: rows of one file within a data set become one.

    A generated row goes by the ``image_id`` of the real row of its pair, and the rows of an image are neighbours, so
    that an evaluation cut short still holds pairs. In prediction the order is that of the data sets.

    Args:
        table: All rows of the set.
        spec: What a batch must hold.
        eval_set: Name of the set, None in prediction.
    """

    def __init__(self, table: RowTable, spec: InputSpec, eval_set: str | None = None) -> None:
        self.table, self.spec, self.eval_set = table, spec, eval_set
        first: list[np.ndarray] = []
        for start, dataset in zip(table.starts, table.datasets, strict=False):
            _, at, group = np.unique(dataset.picture(), return_index=True, return_inverse=True)
            first.append(start + at[group])  # rows of one picture go by the first of them
        self.first, count = np.unique(np.concatenate(first), return_counts=True)
        self.rows = np.argsort(np.concatenate(first), kind="stable")
        self.starts = np.concatenate([[0], np.cumsum(count)])
        self.order = np.arange(len(self.first))
        if eval_set is not None:
            adopt_real_ids(table)
            self.order = np.argsort(table.image_id[self.first], kind="stable")

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, item: int) -> ImageTextBatch:
        return self.__getitems__([item])

    def __getitems__(self, items: list[int]) -> ImageTextBatch:
        """Returns one evaluation batch.

        Raises:
            ImageDecodeError: If an image does not decode; nothing stands in for it here.
        """
        groups = self.order[items]
        index = self.first[groups]
        rows = [self.table.locate(i) for i in index.tolist()]
        references: list[list[str]] = []
        for item in groups:
            members = self.rows[self.starts[item] : self.starts[item + 1]].tolist()
            located = [self.table.locate(i) for i in members]
            references.append([caption for dataset, row in located for caption in dataset.captions(row)])
        look = partial(look_at, images=self.spec.images)
        pictures = [read_picture(*located, look) for located in rows] if self.spec.images else []
        texts = [text for captions in references for text in captions]
        text_row = [i for i, captions in enumerate(references) for _ in captions]
        batch = collate(self.table, rows, index, self.spec, pictures, texts, text_row)
        batch["caption"] = [captions[0] for captions in references]
        batch["references"] = references
        if self.spec.captions is not None:
            cast(Any, batch).update(self.spec.captions.encode_questions(asked(batch)))
        batch["row_id"] = torch.tensor(items)
        if self.eval_set is not None:
            batch["eval_set"] = self.eval_set
        return batch
