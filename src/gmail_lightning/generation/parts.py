"""One way to write what a stage makes: parts of a list of rows, from many processes, until none is missing.

The plan is the whole list, numbered from 0. Whoever makes rows keeps them for a minute, then writes them as a part: an
``.npz`` with the numbers of its rows under ``row_id`` and an array per column, under a temporary name first. So a kill
loses a minute, and the parts alone say what is missing, to a relaunch of any number of processes. What a row is and
what becomes of all parts is another's business: ``ArrayStore``, ``CaptionFile``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmail_lightning.datasets.store_files import RECORD, read_record
from gmail_lightning.generation.whole_files import remove_temporary, whole_file, write_record

ROW_ID = "row_id"
PART_BYTES = 2**26  # most of a part, where one batch is less
Record = dict[str, Any]
Columns = Mapping[str, np.ndarray]
Difference = Callable[[Record, Record], str | None]


class Parts:
    """The folder of the parts, and the rows of this process that are not in it yet.

    Args:
        folder: All nodes must see it.
        count: Number of rows, N; None where they are not known beforehand.
        record: What the rows are made with; ``store.json`` in the folder keeps it.
        seconds: Most time between two parts, and so what a kill loses.
    """

    def __init__(self, folder: Path, count: int | None, record: Record, seconds: float = 60.0) -> None:
        self.folder, self.count, self.seconds = folder, count, seconds
        self.record: Record = json.loads(json.dumps(record))  # as it comes back
        self._rows: list[tuple[np.ndarray, Columns]] = []
        self._kept, self._widest = 0, 0  # number of rows, and the most bytes of one: texts are padded to the longest
        self._last = time.monotonic()

    # By the first process, before and after the others write

    def open(self) -> None:
        """Makes the folder ready for this record, and removes what killed processes were writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(self.folder)
        write_record(self.folder / RECORD, self.record)

    def difference(self, compare: Difference) -> str | None:
        """In what the parts that are there were made with something else, by ``compare``; None where in nothing."""
        pending = read_record(self.folder)
        return None if pending is None else compare(pending, self.record)

    def missing(self) -> np.ndarray:
        """Numbers of the rows that no part holds, ascending; none where the rows are not known beforehand."""
        if self.count is None:
            return np.empty(0, dtype=np.int64)
        absent = np.ones(self.count, dtype=bool)
        for path in self._paths():
            with np.load(path) as part:  # reads the row numbers alone
                absent[part[ROW_ID]] = False
        return np.flatnonzero(absent)

    def read(self) -> Iterator[tuple[np.ndarray, Columns]]:
        """Yields the row numbers (n,) of each part and its columns (n, ...); a row may come in more than one part."""
        for path in self._paths():
            with np.load(path) as part:
                yield part[ROW_ID], {name: part[name] for name in part.files if name != ROW_ID}

    def remove(self) -> None:
        """Removes all parts and their record."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    # By every process

    def add(self, row_id: np.ndarray, columns: Columns) -> None:
        """Keeps rows, and writes a part now and then.

        Args:
            row_id: Numbers of the rows, shape (n,).
            columns: Arrays (n, ...) by name.
        """
        widest = max(self._widest, sum(values.nbytes for values in columns.values()) // max(len(row_id), 1))
        if (self._kept + len(row_id)) * widest > PART_BYTES:
            self.flush()
        self._rows.append((row_id, columns))
        self._kept, self._widest = self._kept + len(row_id), widest
        if time.monotonic() - self._last >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept."""
        rows, self._rows, self._kept, self._widest = self._rows, [], 0, 0
        if rows:
            row_id = np.concatenate([numbers for numbers, _ in rows])
            names = rows[0][1]
            write_part(self.folder, row_id, {name: np.concatenate([part[name] for _, part in rows]) for name in names})
        self._last = time.monotonic()


def write_part(folder: Path, row_id: np.ndarray, columns: Columns) -> None:
    """Writes rows beside the other parts, whole or not at all.

    Args:
        folder: Of the parts.
        row_id: Numbers of the rows, shape (n,).
        columns: Arrays (n, ...) by name.
    """
    name = f"{row_id[0]:010d}-{hashlib.blake2b(row_id.tobytes(), digest_size=6).hexdigest()}.npz"
    with whole_file(folder / name) as file:
        np.savez(file, row_id=row_id, **columns)  # type: ignore[arg-type]


def with_work_for_all(missing: np.ndarray, count: int, processes: int) -> np.ndarray:
    """The missing rows, and as many others as it takes to give every process one: hooks of an idle one are not called.

    Args:
        missing: Numbers of rows, ascending, shape (n,).
        count: Number of all rows.
        processes: That share them.
    """
    if len(missing) >= processes:
        return missing
    return np.union1d(missing, np.arange(min(processes, count)))


def first_difference(before: Record, now: Record) -> str | None:
    """Says in what the first name differs that two records give different values; None where in none."""
    for name in now:
        if before.get(name) != now[name]:
            return f"{name}: {before.get(name)!r} there, {now[name]!r} now"
    return None
