"""The files of a store: one memory-mapped array, a row per image, and what it was made with.

``features.npy`` (N, D) or (N, T, W), or ``token_ids.npy`` (N, T); ``rows.parquet`` with what
``generation.rows.store_columns`` says of each row; and ``store.json``, which is written last: a folder without it is no
store. While the rows are made they lie in ``parts/``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gmail_lightning.types import DataError

FEATURES, TOKEN_IDS = "features.npy", "token_ids.npy"
ROWS, RECORD, PARTS = "rows.parquet", "store.json", "parts"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a finished store was made with, or the store that is being made in ``parts/``; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def open_array(path: Path) -> np.ndarray:
    """Maps the array of a store into memory.

    Raises:
        DataError: If it is missing or damaged.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}. Write the store again.") from error


def read_rows(folder: Path, record: dict[str, Any], array: np.ndarray, contents: str) -> pa.Table:
    """Returns what a store says of its rows.

    Args:
        folder: The store.
        record: What ``store.json`` holds.
        array: What the store holds of each row.
        contents: What that is, in messages.

    Raises:
        DataError: If rows, array and record are not of one length.
    """
    rows = pq.read_table(folder / ROWS, partitioning=None)
    if not len(rows) == len(array) == record["count"]:
        raise DataError(
            f"{folder}: {len(rows)} keys and {len(array)} {contents}, but {RECORD} says {record['count']}: "
            "the files do not belong together. Write the store again."
        )
    return rows
