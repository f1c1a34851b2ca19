"""The files of a feature store: one memory-mapped array, its rows, and what it was made with.

``features.npy`` (N, D) or (N, T, W), ``rows.parquet`` with what ``store_columns`` says of each row, and
``store.json``, which is written last: a folder without it is no store. While the features are made they lie in
``parts/``, each part whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.datasets.shards import TEMPORARY, temporary, write_table

FEATURES, ROWS, RECORD, PARTS = "features.npy", "rows.parquet", "store.json", "parts"


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a finished store was made with, or the store that is being made in ``parts/``; None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes ``store.json``, whole or not at all."""
    path = temporary(folder / RECORD)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.replace(folder / RECORD)


def store_columns(rows: Sequence[tuple[ImageTextDataset, int]]) -> pa.Table:
    """Returns what a store says of its rows: ``file_id``, by which they are found, and what shows that it still holds.

    The columns are ``key`` (for messages), ``modality``, ``image_id``, ``file_id``, ``size`` and ``changed``.

    Raises:
        DataError: If an image is real in one row and generated in another.
    """
    datasets = {id(dataset): dataset for dataset, _ in rows}
    of, number = np.array([id(dataset) for dataset, _ in rows]), np.array([row for _, row in rows])
    file_id, stamps = np.empty(len(rows), dtype=np.int64), np.empty((len(rows), 2), dtype=np.int64)
    for name, dataset in datasets.items():
        mine = of == name
        file_id[mine], stamps[mine] = dataset.file_ids()[number[mine]], dataset.file_stamps(number[mine])
    table = pa.table(
        {
            "key": [dataset.sample_key(row) for dataset, row in rows],
            "modality": np.array([dataset.modality[row] for dataset, row in rows]),
            "image_id": np.array([dataset.image_id[row] for dataset, row in rows]),
            "file_id": file_id,
            "size": stamps[:, 0],
            "changed": stamps[:, 1],
        }
    )
    branches = table.group_by("file_id").aggregate([("modality", "count_distinct"), ("key", "min")])
    twice = branches.filter(pc.greater(branches["modality_count_distinct"], 1))
    if len(twice):
        raise DataError(
            f"{len(twice)} images to predict are both real and generated, such as {twice['key_min'][0].as_py()!r}: "
            "write one store per data set."
        )
    return table


def write_part(folder: Path, row_id: np.ndarray, features: np.ndarray) -> None:
    """Writes features (n, ...) of the rows (n,) beside the other parts, whole or not at all."""
    name = f"{row_id[0]:010d}-{hashlib.blake2b(row_id.tobytes(), digest_size=6).hexdigest()}.npz"
    path = temporary(folder / PARTS / name)
    with path.open("wb") as file:
        np.savez(file, row_id=row_id, features=features)
        file.flush()
        os.fsync(file.fileno())
    path.replace(folder / PARTS / name)


def finished_rows(folder: Path, count: int) -> np.ndarray:
    """Which of ``count`` rows the parts hold, shape (count,) bool."""
    finished = np.zeros(count, dtype=bool)
    for path in (folder / PARTS).glob("*.npz"):
        with np.load(path) as part:  # reads the row numbers alone
            finished[part["row_id"]] = True
    return finished


def merge_parts(folder: Path, rows: pa.Table, record: dict[str, Any]) -> tuple[int, ...]:
    """Makes one array of all parts, then the store valid, and returns the shape of the array.

    Args:
        folder: The store; its parts hold every row.
        rows: ``store_columns`` of the N rows.
        record: What the features were made with.
    """
    features: np.memmap[Any, Any] | None = None
    path = temporary(folder / FEATURES)
    for name in sorted((folder / PARTS).glob("*.npz")):
        with np.load(name) as part:
            values = part["features"]
            if features is None:
                shape = (len(rows), *values.shape[1:])
                features = np.lib.format.open_memmap(path, "w+", values.dtype, shape)  # type: ignore[no-untyped-call]
            features[part["row_id"]] = values
    assert features is not None
    features.flush()
    path.replace(folder / FEATURES)
    write_table(rows, folder / ROWS)
    write_record(folder, {**record, "shape": list(features.shape)})
    shutil.rmtree(folder / PARTS)
    return tuple(features.shape)


def clear(folder: Path) -> None:
    """Removes what makes up a store, the record first; anything else in the folder stays."""
    for name in (RECORD, FEATURES, ROWS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Removes what a killed process was writing."""
    for path in [*folder.glob(f"*{TEMPORARY}*"), *(folder / PARTS).glob(f"*{TEMPORARY}*")]:
        path.unlink(missing_ok=True)
