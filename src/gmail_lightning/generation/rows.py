"""The images that a stage makes something of: what is written down of each, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.datasets.base import ImageTextDataset
from gmail_lightning.types import DataError


def image_columns(rows: Sequence[tuple[ImageTextDataset, int]]) -> pa.Table:
    """Returns what tells images apart: ``file_id``, by which they are found, and what shows that they are the same.

    Args:
        rows: Data set and number within it of each image, length N.

    Returns:
        N rows of ``key`` (for messages), ``modality``, ``image_id``, ``file_id``, ``size`` and ``changed``.
    """
    datasets = {id(dataset): dataset for dataset, _ in rows}
    of, number = np.array([id(dataset) for dataset, _ in rows]), np.array([row for _, row in rows])
    file_id, stamps = np.empty(len(rows), dtype=np.int64), np.empty((len(rows), 2), dtype=np.int64)
    for name, dataset in datasets.items():
        mine = of == name
        file_id[mine], stamps[mine] = dataset.file_ids()[number[mine]], dataset.file_stamps(number[mine])
    return pa.table(
        {
            "key": [dataset.sample_key(row) for dataset, row in rows],
            "modality": np.array([dataset.modality[row] for dataset, row in rows]),
            "image_id": np.array([dataset.image_id[row] for dataset, row in rows]),
            "file_id": file_id,
            "size": stamps[:, 0],
            "changed": stamps[:, 1],
        }
    )


def store_columns(rows: Sequence[tuple[ImageTextDataset, int]]) -> pa.Table:
    """Returns what a store says of its rows, see :func:`image_columns`.

    Raises:
        DataError: If an image is real in one row and generated in another.
    """
    table = image_columns(rows)
    branches = table.group_by("file_id").aggregate([("modality", "count_distinct"), ("key", "min")])
    twice = branches.filter(pc.greater(branches["modality_count_distinct"], 1))
    if len(twice):
        raise DataError(
            f"{len(twice)} images to predict are both real and generated, such as {twice['key_min'][0].as_py()!r}: "
            "write one store per data set."
        )
    return table


def images_digest(rows: pa.Table) -> str:
    """Tells which images in which order, and whether one has changed."""
    digest = hashlib.sha256()
    for name in ("file_id", "modality", "size", "changed"):
        digest.update(rows[name].to_numpy().tobytes())
    return digest.hexdigest()
