"""Records out of JSONL, CSV and TSV, one at a time and strictly: an error names the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.ids import is_image_name

QUOTES = (
    "Put double quotes around texts that hold a separator, a quote or a line break, and double the quotes within; "
    "JSONL needs none of this."
)


def json_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSONL file.

    Raises:
        DataError: With the number of the line that is none, or names a key twice.
    """
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                record = json.loads(line, object_pairs_hook=_once)
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {number}: expected an object, found {type(record).__name__}.")
                yield record
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {number}: not UTF-8 ({error}). Convert the file.") from error
    except (json.JSONDecodeError, RecursionError, KeyError) as error:
        raise DataError(f"{path} line {number}: not valid JSON ({error}). Write one object per line.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise KeyError(f"{name} stands there twice")
    return record


def csv_records(path: Path, delimiter: str, image_key: str | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a CSV or TSV file with a header, read strictly.

    Args:
        path: The file.
        delimiter: Between fields.
        image_key: Name of the column of images, by which rows are told that a quote has swallowed.

    Raises:
        DataError: With the number of the line that is malformed, or a column that stands twice.
    """
    start = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines: list[str] = []  # of the record that is being read
            reader = csv.reader(_noted(file, lines), delimiter=delimiter, strict=True)
            header = next(reader, [])
            refuse_twice(path, header)
            image = header.index(image_key) if image_key in header else None
            start = reader.line_num + 1
            lines.clear()
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{path} line {start}: {len(fields)} fields, but the header has {len(header)}. {QUOTES}"
                    )
                if image is not None and len(lines) > 1 and _swallows(lines, delimiter, len(header), image):
                    raise DataError(
                        f"{path} line {start}: a quote opens there and closes in line {reader.line_num}, and what is "
                        f"between looks like rows, which would be lost. {QUOTES}"
                    )
                if fields:
                    yield dict(zip(header, fields, strict=True))
                start = reader.line_num + 1
                lines.clear()
    except csv.Error as error:
        raise DataError(f"{path} line {start}: {error}. {QUOTES}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {start}: not UTF-8 ({error}). Convert the file.") from error


def refuse_twice(path: Path, names: list[str]) -> None:
    """Refuses a table in which a column stands twice, of which one would be lost.

    Raises:
        DataError: With the name.
    """
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: the column {', '.join(twice)} stands there more than once. Give each column a name of its own; "
            "several captions of an image are a list in the column captions, or a row each."
        )


def _noted(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    """Passes lines on, and keeps them in a list."""
    for line in file:
        lines.append(line)
        yield line


def _swallows(lines: list[str], delimiter: str, width: int, image: int) -> bool:
    """Whether the lines of one record look like rows by themselves, so that a quote was opened by mistake.

    Args:
        lines: As they stand in the file.
        delimiter: Between fields.
        width: Number of columns.
        image: Number of the column of images.
    """
    rows = [parts for line in lines if len(parts := line.split(delimiter)) >= width]
    names = [parts[image].strip().strip('"') for parts in rows]
    if not names or len(lines[0].split(delimiter)) < width:
        return False
    first, *others = names
    if is_image_name(first):
        return any(map(is_image_name, others))
    return first != "" and any(_shape(first) == _shape(other) for other in others)


def _shape(name: str) -> str:
    """What is alike in the names of a data set: digits and letters stand for those of any number."""
    return re.sub(r"[^\W\d_]+", "a", re.sub("[0-9]+", "0", name))
