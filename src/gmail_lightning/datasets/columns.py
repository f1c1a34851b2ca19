"""Typed Arrow columns out of JSONL, CSV, TSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.base import DataError

Kind = Callable[[pa.ChunkedArray], pa.ChunkedArray]  # gives a column its type
ROWS_AT_ONCE = 65536  # of a text file, turned into Arrow columns together: never a list of all rows


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Everything as text."""
    return column.cast(pa.string())


def paths_or_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes stay bytes, the rest is text."""
    holds_bytes = pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)
    return column.cast(pa.binary() if holds_bytes else pa.string())


def text_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts become lists of one text."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.list_(pa.string()))
    chunks = [
        pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk)
        for chunk in column.cast(pa.string()).chunks
    ]
    return pa.chunked_array(chunks, pa.list_(pa.string()))


def integers_or_texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Integers if all are, else texts; an empty text is null."""
    if not pa.types.is_integer(column.type) and not pa.types.is_floating(column.type):
        column = column.cast(pa.string())
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.string())


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floating point; what is empty or no number is null."""
    if pa.types.is_string(column.type):
        number = pc.match_substring_regex(column, r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
        column = pc.utf8_trim_whitespace(pc.if_else(number, column, pa.scalar(None, pa.string())))
    return column.cast(pa.float64())


def read_columns(path: Path, kinds: dict[str, Kind]) -> tuple[dict[str, pa.ChunkedArray], list[str]]:
    """Reads the columns named in ``kinds``, as far as they are there, and the names of all columns.

    Args:
        path: The manifest.
        kinds: For each column what gives it its type.

    Raises:
        DataError: If the file is missing, of an unknown kind, or malformed; names the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such manifest. Check the path; a relative one starts from {Path.cwd()}.")
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
            found = file.schema_arrow.names
            table = file.read([name for name in found if name in kinds])
            columns = {name: table[name] for name in table.column_names}
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    elif path.suffix == ".jsonl":
        columns, found = _gather(_json_records(path), list(kinds))
    elif path.suffix in (".csv", ".tsv"):
        columns, found = _gather(_csv_records(path, "," if path.suffix == ".csv" else "\t"), list(kinds))
    else:
        raise DataError(f"{path}: unknown kind of manifest {path.suffix!r}. Use .jsonl, .csv, .tsv or .parquet.")
    if not found:
        raise DataError(f"{path}: no rows.")
    for name, column in columns.items():
        try:
            columns[name] = kinds[name](column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{path}: column {name} cannot be {column.type} ({error}).") from error
    return columns, found


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {number}: expected an object, found {type(record).__name__}.")
                yield record
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number}: not valid JSON ({error}). Write one object per line.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {number}: not UTF-8 ({error}). Convert the file.") from error


def _csv_records(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(reader, [])
            for fields in reader:
                number = reader.line_num
                if fields and len(fields) != len(header):
                    raise DataError(
                        f"{path} line {number}: {len(fields)} fields, but the header has {len(header)}. "
                        "Put double quotes around texts that hold a separator, a quote or a line break."
                    )
                if fields:
                    yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} after line {number}: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} after line {number}: not UTF-8 ({error}). Convert the file.") from error


def _gather(records: Iterator[dict[str, Any]], wanted: list[str]) -> tuple[dict[str, pa.ChunkedArray], list[str]]:
    """Turns records into columns, some rows at a time."""
    parts: dict[str, list[pa.ChunkedArray]] = {name: [] for name in wanted}
    found: dict[str, None] = {}
    while rows := list(islice(records, ROWS_AT_ONCE)):
        for row in rows:
            if row.keys() - found.keys():
                found.update(dict.fromkeys(row))
        for name in wanted:
            parts[name].append(_column([row.get(name) for row in rows]))
    return {name: _join(parts[name]) for name in wanted if name in found}, list(found)


def _column(values: list[Any]) -> pa.ChunkedArray:
    if any(isinstance(value, list) for value in values):
        values = [value if isinstance(value, list) or value is None else [value] for value in values]
    try:
        return pa.chunked_array([pa.array(values)])
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # numbers and texts in one column
        return pa.chunked_array([pa.array([_as_text(value) for value in values])])


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return None if value is None else str(value)


def _join(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Puts parts end to end, whose values may have led to different types."""
    types = {part.type for part in parts} - {pa.null()}
    if any(pa.types.is_list(kind) for kind in types):
        parts = [text_lists(part) for part in parts]
    elif len(types) > 1:
        parts = [part.cast(pa.string()) for part in parts]
    elif types:
        parts = [part.cast(next(iter(types))) for part in parts]
    return pa.chunked_array([chunk for part in parts for chunk in part.chunks])
