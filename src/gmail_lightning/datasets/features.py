"""Cached features in place of pixels: a frozen tower sees each image once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.datasets.store_files import FEATURES, RECORD, open_array, read_record, read_rows


class FeatureStore(ImageTextDataset):
    """The rows of another data set, with features that ``EmbeddingTask`` and ``FeatureWriter`` wrote for its images.

    Captions, ids and labels are those of ``dataset``; its pixels are not decoded. Each picture goes by its file or its
    bytes, wherever they lie and in whatever order the rows are, so that five captions of one image share its features;
    images that were changed since are noticed. The store may hold more than ``dataset`` asks for. Whether the features
    are those of the encoder in use is checked when a run starts.

    Args:
        path: Folder of the store.
        dataset: Rows to read, those the store was written for or some of them.

    Raises:
        DataError: If the store is missing, unfinished or damaged, has no features of some image, was written for
            other data, or an image has been changed since.
    """

    feature_store: dict[str, Any]

    def __init__(self, path: str | Path, dataset: ImageTextDataset) -> None:
        self.path, self.dataset = Path(path), dataset
        self.modality, self.image_id, self.pair_id = dataset.modality, dataset.image_id, dataset.pair_id
        self.label, self.class_names, self.templates = dataset.label, dataset.class_names, dataset.templates
        self.split, self.weight, self.has_questions = dataset.split, dataset.weight, dataset.has_questions
        self.not_for_training, self.no_captions = dataset.not_for_training, dataset.no_captions
        self.captions_are_classes, self.token_store = dataset.captions_are_classes, dataset.token_store
        record = read_record(self.path)
        if record is None:
            raise DataError(
                f"{path}: no finished feature store ({RECORD} is missing). Write it with EmbeddingTask and "
                "FeatureWriter, or run the same command again where that was interrupted."
            )
        self.feature_store = {**record, "path": str(path)}
        self._features: np.ndarray | None = None
        self._row = self._join(read_rows(self.path, record, self._open(), "features"))
        self.summary = "; ".join(
            [
                *([dataset.summary] if dataset.summary else []),
                f"{path}: features in place of {len(self)} images' pixels",
            ]
        )

    def _join(self, rows: pa.Table) -> np.ndarray:
        """Row of the store of each row, shape (N,)."""
        dataset = self.dataset
        if "file_id" not in rows.column_names:
            raise DataError(
                f"{self.path} is of an earlier release, which knew images by the names of their rows: equal names do "
                "not mean equal images. Write the store again."
            )
        ids = dataset.file_ids()
        own: np.ndarray = (
            pc.index_in(pa.array(ids), value_set=rows["file_id"]).fill_null(-1).to_numpy().astype(np.int64)
        )
        found = np.flatnonzero(own >= 0)
        for name in ("modality", "image_id"):
            other = rows[name].to_numpy()[own[found]] != getattr(dataset, name)[found]
            if other.any():
                row = found[other.argmax()]
                raise DataError(
                    f"{dataset.describe(row)} has {name} {getattr(dataset, name)[row]}, but in {self.path} it is "
                    f"{rows[name][own[row]].as_py()} ({other.sum()} such rows): the store was written for other data."
                )
        missing = np.flatnonzero(own < 0)
        if len(missing):
            keys = pa.array([dataset.sample_key(row) for row in missing.tolist()], pa.string())
            known = rows["key"].cast(pa.string()).combine_chunks()
            named = pc.is_in(keys, value_set=known).to_numpy(zero_copy_only=False)
            note = (
                ", which was changed after its features were written, or is another of its name" if named.any() else ""
            )
            raise DataError(
                f"{self.path} has no features of {len(np.unique(ids[missing]))} of {len(np.unique(ids))} images, such "
                f"as {dataset.describe(int(missing[named.argmax()]))}{note}; it holds {len(rows)}. Write a store for "
                "all of them, or give the data set that it was written for."
            )
        self._refuse_changed(np.unique(ids, return_index=True)[1], own, rows)
        return own

    def _refuse_changed(self, first: np.ndarray, own: np.ndarray, rows: pa.Table) -> None:
        """Compares size and time of change of each image with those that it had, as far as there is a file."""
        now = self.dataset.file_stamps(first)
        then = np.stack([rows[name].to_numpy() for name in ("size", "changed")], axis=1)[own[first]]
        changed = (now != then).any(axis=1) & now.any(axis=1) & then.any(axis=1)
        if changed.any():
            raise DataError(
                f"{self.dataset.describe(int(first[changed.argmax()]))}: the image was changed after its features were "
                f"written to {self.path}, or copied without its time of change ({changed.sum()} such images). Write "
                "the store again, or copy the images with their times (cp -p, rsync -t)."
            )

    def _open(self) -> np.ndarray:
        if self._features is None:
            self._features = open_array(self.path / FEATURES)
        return self._features

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the array out: a worker maps the file anew."""
        return {**self.__dict__, "_features": None}

    def feature(self, index: int) -> Tensor:
        """Returns the features of a row in the dtype of the store, (D,) or (T, W)."""
        return torch.from_numpy(np.array(self._open()[self._row[index]]))

    # All else is as the data set says

    def image_file(self, index: int) -> Path | None:  # noqa: D102
        return self.dataset.image_file(index)

    def file_ids(self) -> np.ndarray:  # noqa: D102
        return self.dataset.file_ids()

    def file_stamps(self, rows: np.ndarray) -> np.ndarray:  # noqa: D102
        return self.dataset.file_stamps(rows)

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return self.dataset.read_image(index)

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return self.dataset.captions(index)

    def question(self, index: int) -> str | None:  # noqa: D102
        return self.dataset.question(index)

    def sample_key(self, index: int) -> str:  # noqa: D102
        return self.dataset.sample_key(index)

    def source(self, index: int) -> str:  # noqa: D102
        return self.dataset.source(index)

    def picture(self) -> np.ndarray:  # noqa: D102
        return self.dataset.picture()

    def caption_blocks(self) -> Iterator[tuple[pa.Array, np.ndarray]]:  # noqa: D102
        return self.dataset.caption_blocks()

    def perceptual_hashes(self) -> np.ndarray | None:  # noqa: D102
        return self.dataset.perceptual_hashes()

    def columns(self, index: int) -> dict[str, str]:  # noqa: D102
        return self.dataset.columns(index)

    def describe(self, index: int) -> str:  # noqa: D102
        return self.dataset.describe(index)
