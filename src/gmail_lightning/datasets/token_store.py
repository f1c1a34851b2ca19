"""Token ids in place of pixels, as a stage wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.store_files import RECORD, TOKEN_IDS, open_array, read_record, read_rows
from gmail_lightning.types import DataError


class TokenStore:
    """The token ids of images, memory-mapped; a picture goes by its ``file_id``, wherever it lies.

    Args:
        path: Folder of the store.

    Attributes:
        record: What the ids were made with, as ``store.json`` has it.
        rows: What is known of the N images: ``key``, ``modality``, ``image_id``, ``file_id``, ``size``, ``changed``.
        length: Number of ids of an image, T.
        vocabulary: Number of values that an id may take; ids count from 0.

    Raises:
        DataError: If the store is missing, unfinished or damaged, or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        record = read_record(self.path)
        if record is None:
            raise DataError(
                f"{path}: no finished token store ({RECORD} is missing). Run the command that writes it, again where "
                "it was interrupted."
            )
        if "tokenizer" not in record:
            raise DataError(f"{path}: {RECORD} names no tokenizer: this is another kind of store, without token ids.")
        self.record = record
        self.length, self.vocabulary = int(record["length"]), int(record["vocabulary"])
        self._token_ids: np.ndarray | None = None
        ids = self._open()
        if ids.ndim != 2 or ids.shape[1] != self.length or ids.dtype.kind not in "iu":
            raise DataError(
                f"{self.path / TOKEN_IDS} is {ids.dtype} of shape {ids.shape}, but {RECORD} says {self.length} ids of "
                "an image: the files do not belong together. Write the store again."
            )
        self.rows = read_rows(self.path, record, ids, "rows of token ids")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What tells the tokenizer from others, in its own words."""
        return dict(self.record["tokenizer"])

    @property
    def file_id(self) -> np.ndarray:
        """What each image is known by, shape (N,) int64; see ``ImageTextDataset.file_ids``."""
        return np.asarray(self.rows["file_id"].to_numpy())

    @property
    def modality(self) -> np.ndarray:
        """``Modality`` of each image, shape (N,) int64."""
        return np.asarray(self.rows["modality"].to_numpy())

    def find(self, file_ids: np.ndarray) -> np.ndarray:
        """Returns the row of each image (n,), by its ``file_id`` (n,); -1 where the store has no such image."""
        found = pc.index_in(pa.array(file_ids), value_set=self.rows["file_id"])
        return np.asarray(found.fill_null(-1).to_numpy()).astype(np.int64)

    def token_ids(self, rows: np.ndarray) -> np.ndarray:
        """Returns the ids of some rows (n,) of the store, shape (n, T) int64."""
        return np.asarray(self._open()[rows], dtype=np.int64)

    def _open(self) -> np.ndarray:
        if self._token_ids is None:
            self._token_ids = open_array(self.path / TOKEN_IDS)
        return self._token_ids

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the array out: a worker maps the file anew."""
        return {**self.__dict__, "_token_ids": None}
