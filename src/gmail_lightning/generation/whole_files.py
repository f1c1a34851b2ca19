"""Files that are whole or not there: a temporary name, then a rename."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

TEMPORARY = ".tmp-"


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process uses and every reader ignores."""
    return path.with_name(f"{path.name}{TEMPORARY}{uuid.uuid4().hex}")


def is_temporary(path: Path) -> bool:
    """Whether it is a file in the making, or one that a killed process left."""
    return TEMPORARY in path.name


def remove_temporary(folder: Path) -> None:
    """Removes what killed processes were writing."""
    for path in filter(is_temporary, list(folder.iterdir())):
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write; after the block it is on the disk under its name, or, after an error, nowhere."""
    unfinished = temporary(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_table(table: pa.Table, path: Path, row_group_size: int | None = None) -> None:
    """Writes a Parquet file, whole or not at all."""
    with whole_file(path) as file:
        pq.write_table(table, file, row_group_size=row_group_size)
