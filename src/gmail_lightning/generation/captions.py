"""COCO's result file in the making: captions lie in parts, and only their places are ever in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gmail_lightning.generation.parts import Parts, Record, first_difference
from gmail_lightning.generation.plan import run_starts
from gmail_lightning.generation.whole_files import whole_file

ENTRY, IMAGE_ID = "entry", "image_id"  # columns of a part
SHARE = 2**40  # rows that one process can number where there is no list of them


class Finished(NamedTuple):
    """What became of the captions.

    Attributes:
        message: To tell.
        warning: To warn of, or None.
    """

    message: str
    warning: str | None


class CaptionFile:
    """``[{"image_id": 42, "caption": "..."}, ...]``, each image once, by ascending ``image_id``; parts lie beside it.

    ``begin`` and ``finish`` are for the first process; all ``add``.

    Args:
        path: The file; all nodes must see its folder.
        count: Number of images to caption; None where they are not known beforehand, so that no run can go on.
        record: What the captions depend on.
        seconds: See ``Parts``.
    """

    def __init__(self, path: Path, count: int | None, record: Record, seconds: float = 60.0) -> None:
        self.path, self.count = path, count
        self.parts = Parts(path.with_name(f"{path.name}.parts"), count, record, seconds)

    def begin(self) -> tuple[np.ndarray, str | None]:
        """Makes the folder ready; returns the images that are missing, and why parts that were there are removed.

        Those that were made with something else are, as the file will be replaced.
        """
        removed = self.parts.difference(first_difference)
        if self.count is None and self.parts.folder.exists():
            removed = "which images a loader of one's own gives is not known beforehand"
        if removed is not None:
            self.parts.remove()
        self.parts.open()
        return self.parts.missing(), removed

    def add(self, row_id: np.ndarray, entries: Sequence[Mapping[str, Any]]) -> None:
        """Keeps captions, and writes a part now and then.

        Args:
            row_id: Number of each image, shape (n,); see :func:`unlisted_rows`, where they are not known beforehand.
            entries: What the file says of each: ``image_id``, ``caption`` and more.
        """
        lines = np.array([json.dumps(entry).encode() for entry in entries], dtype=np.bytes_)  # ASCII, ending in }
        self.parts.add(row_id, {ENTRY: lines, IMAGE_ID: np.array([entry["image_id"] for entry in entries], np.int64)})

    def finish(self) -> Finished:
        """Writes the file of all captions that there are; parts stay as long as some are missing."""
        missing = len(self.parts.missing())
        with tempfile.TemporaryFile(dir=self.path.parent) as file:
            lines, row_id, image_id = self._spread(file)
            order = np.lexsort((row_id, image_id))  # by image, then by row
            order = order[run_starts(row_id[order])]  # a relaunch may make a few rows again
            is_first = np.zeros(len(order), dtype=bool)
            is_first[run_starts(image_id[order])] = True
            warning = _repeated(lines, row_id, order, is_first)
            self._write(lines[number] for number in order[is_first].tolist())
        message = f"Captions of {is_first.sum()} images: {self.path}"
        if not missing:
            self.parts.remove()
            return Finished(message, warning)
        more = f"{missing} of {self.count} are missing: run the same command again, without a limit on the batches."
        return Finished(f"{message}. {more}", warning)

    def _spread(self, file: IO[bytes]) -> tuple[LinesOnDisk, np.ndarray, np.ndarray]:
        """Writes the lines of all parts into a file; returns them with row number and image id of each, (N,)."""
        row_ids, image_ids, lengths = ([np.empty(0, np.int64)] for _ in range(3))
        for row_id, columns in self.parts.read():
            row_ids.append(row_id)
            image_ids.append(columns[IMAGE_ID])
            lengths.append(np.char.str_len(columns[ENTRY]))
            file.write(b"".join(columns[ENTRY].tolist()))
        return LinesOnDisk(file, np.concatenate(lengths)), np.concatenate(row_ids), np.concatenate(image_ids)

    def _write(self, lines: Iterator[bytes]) -> None:
        with whole_file(self.path) as file:
            file.write(b"[\n")
            for number, line in enumerate(lines):
                file.write(b",\n" + line if number else line)
            file.write(b"\n]\n")


class LinesOnDisk:
    """Lines that are read in any order; in memory is where each ends.

    Args:
        file: Holds the lines, one after the other.
        lengths: Number of bytes of each, shape (N,).
    """

    def __init__(self, file: IO[bytes], lengths: np.ndarray) -> None:
        self._file, self._bounds = file, np.concatenate([[0], np.cumsum(lengths)])

    def __getitem__(self, number: int) -> bytes:
        start, end = self._bounds[number], self._bounds[number + 1]
        self._file.seek(start)
        return self._file.read(end - start)


def unlisted_rows(process: int, made: int, count: int) -> np.ndarray:
    """Numbers for the next ``count`` rows of a process that has made ``made``, where there is no list of rows.

    They are unlike those of all other processes, and lower than those of later ones.
    """
    return np.arange(count, dtype=np.int64) + made + process * SHARE


def _repeated(lines: LinesOnDisk, row_id: np.ndarray, order: np.ndarray, is_first: np.ndarray) -> str | None:
    """Says how many captions are of an image that came before; hours are not lost to an image that came twice.

    Args:
        lines: All captions.
        row_id: The row of each line.
        order: Numbers of lines (n,), those of an image side by side.
        is_first: Whether each in this order is the first of its image, shape (n,).
    """
    others = order[~is_first]
    if not len(others):
        return None
    image = np.cumsum(is_first) - 1  # of each line: the how many-th image of the order
    first_of_image = order[is_first][image[~is_first]]
    different = sum(
        json.loads(lines[first])["caption"] != json.loads(lines[other])["caption"]
        for first, other in zip(first_of_image.tolist(), others.tolist(), strict=True)
    )
    earliest = json.loads(lines[int(others[row_id[others].argmin()])])["image_id"]
    return (
        f"{len(others)} captions are of an image_id that came before, such as {earliest}; {different} of them differ "
        "from the first, which is kept."
    )
