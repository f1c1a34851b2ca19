"""Typed Arrow columns out of JSONL, CSV, TSV and Parquet files."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gmail_lightning.datasets.base import DataError
from gmail_lightning.datasets.ids import id_text
from gmail_lightning.datasets.tables.parsed import read_once
from gmail_lightning.datasets.tables.records import csv_records, json_records, refuse_twice

Kind = Callable[[pa.ChunkedArray], pa.ChunkedArray]  # gives a column its type
LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
FOUND = b"gmail_lightning.found"  # the names of all columns of the file
ROWS_AT_ONCE = 65536  # of a text file, turned into Arrow columns together: never a list of all rows


def texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Everything as text; a number is the same text in every kind of file."""
    if pa.types.is_floating(column.type):
        return pa.chunked_array([pa.array([id_text(value) for value in column.to_pylist()], pa.string())])
    return column.cast(pa.string())


def ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values for :func:`~gmail_lightning.datasets.ids.id_column`, as they are."""
    if pa.types.is_nested(column.type):
        raise pa.ArrowInvalid("an id is one integer or text")
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def paths_or_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes stay bytes, the rest is text; of Hugging Face's images (bytes, path) the bytes, where there are any."""
    if pa.types.is_struct(column.type):
        names = {column.type.field(i).name for i in range(column.type.num_fields)}
        parts = {name: pc.struct_field(column, name) for name in ("bytes", "path") if name in names}
        filled = [part for part in parts.values() if part.null_count < len(part)] or list(parts.values())
        if not filled:
            raise pa.ArrowInvalid(f"its fields are {', '.join(sorted(names))}, and neither bytes nor path is one")
        column = filled[0]
    if is_binary(column):
        return column.cast(pa.binary() if column.nbytes < 2**31 else pa.large_binary())
    return column.cast(pa.string())


def is_binary(column: pa.ChunkedArray) -> bool:
    """Whether a column holds bytes."""
    return bool(pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type))


def text_lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts become lists of one text; a list that was written as text becomes a list again."""
    kind = column.type
    is_list = isinstance(kind, LISTS)
    value = kind.value_type if is_list or pa.types.is_dictionary(kind) else kind
    if value not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise pa.ArrowInvalid(f"its values are {value}, and no texts")
    if is_list:
        return column.cast(pa.list_(pa.string()))
    column = column.cast(pa.string())
    trimmed = pc.utf8_trim_whitespace(column)
    if pc.any(pc.and_(pc.starts_with(trimmed, "["), pc.ends_with(trimmed, "]"))).as_py():
        values = [None if text is None else _written_list(text) for text in column.to_pylist()]
        return pa.chunked_array([pa.array(values, pa.list_(pa.string()))])
    chunks = [
        pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk) for chunk in column.chunks
    ]  # a text that is null becomes a list that holds null
    return pa.chunked_array(chunks, pa.list_(pa.string()))


def _written_list(text: str) -> list[str]:
    """The texts of a list that JSON or Python wrote into one field; any other text alone."""
    written = text.strip()
    if not re.match(r"""\[\s*["']""", written) or not written.endswith("]"):
        return [text]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        beside = re.search(r"""["']\s+["']""", written)  # numpy leaves the commas out, and Python joins such texts
        if isinstance(found, list) and all(isinstance(one, str) for one in found) and not beside:
            return found
    if not re.search(r"""["']\s*(,|\]$)|["']\s+["']""", written):  # a text that begins with a quotation in brackets
        return [text]
    raise pa.ArrowInvalid(f"{text[:80]!r} is a list written as text, which does not read as one: write it as JSON")


def numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floating point; what is empty or no number is null."""
    if pa.types.is_string(column.type):
        number = pc.match_substring_regex(column, r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
        column = pc.utf8_trim_whitespace(pc.if_else(number, column, pa.scalar(None, pa.string())))
    return column.cast(pa.float64())


def read_columns(path: Path, kinds: dict[str, Kind]) -> tuple[pa.Table, list[str]]:
    """Reads the columns named in ``kinds``, as far as they are there, and the names of all columns.

    Data sets of one file share the table, as long as one of them holds it.

    Args:
        path: The manifest.
        kinds: For each column what gives it its type.

    Raises:
        DataError: If the file is missing, of an unknown kind, or malformed; names the line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such manifest. Check the path; a relative one starts from {Path.cwd()}.")
    part = " ".join(f"{name}:{kind.__name__}" for name, kind in kinds.items())
    table = read_once(path, part, lambda: _read(path, kinds), keep=False)
    return table, json.loads(table.schema.metadata[FOUND])


def _read(path: Path, kinds: dict[str, Kind]) -> pa.Table:
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
            found = file.schema_arrow.names
            refuse_twice(path, found)
            table = file.read([name for name in found if name in kinds])
            columns = {name: table[name] for name in table.column_names}
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a readable Parquet file ({error}).") from error
    elif path.suffix == ".jsonl":
        columns, found = _gather(path, json_records(path), kinds)
    elif path.suffix in (".csv", ".tsv"):
        image_key = next((name for name, kind in kinds.items() if kind is paths_or_bytes), None)
        records = csv_records(path, "," if path.suffix == ".csv" else "\t", image_key)
        columns, found = _gather(path, records, kinds)
    else:
        raise DataError(f"{path}: unknown kind of manifest {path.suffix!r}. Use .jsonl, .csv, .tsv or .parquet.")
    if not found:
        raise DataError(f"{path}: no rows.")
    for name, column in columns.items():
        try:
            columns[name] = kinds[name](column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{path}: column {name} cannot be {column.type} ({error}).") from error
    return pa.table(columns, metadata={FOUND: json.dumps(found)})


def _gather(
    path: Path, records: Iterator[dict[str, Any]], kinds: dict[str, Kind]
) -> tuple[dict[str, pa.ChunkedArray], list[str]]:
    """Turns records into columns, some rows at a time."""
    parts: dict[str, list[pa.ChunkedArray]] = {name: [] for name in kinds}
    found: dict[str, None] = {}
    start = 0
    while rows := list(islice(records, ROWS_AT_ONCE)):
        for row in rows:
            if row.keys() - found.keys():
                found.update(dict.fromkeys(row))
        for name, kind in kinds.items():
            try:
                parts[name].append(_column([row.get(name) for row in rows], kind))
            except DataError as error:
                at = next(i for i, row in enumerate(rows) if _is_wrong(row.get(name), kind))
                raise DataError(f"{path} row {start + at + 1}, {name}: {error}") from error
        start += len(rows)
    return {name: _join(parts[name]) for name in kinds if name in found}, list(found)


def _is_wrong(value: Any, kind: Kind) -> bool:
    try:
        _column([value], kind)
    except DataError:
        return True
    return False


def _column(values: list[Any], kind: Kind) -> pa.ChunkedArray:
    """A column of values as JSON and CSV give them."""
    try:
        return _typed(values, kind)
    except UnicodeEncodeError as error:
        raise DataError(f"{error.object[:80]!a} holds half of a character. Mend it.") from error


def _typed(values: list[Any], kind: Kind) -> pa.ChunkedArray:
    if kind is text_lists:
        values = [_caption(value) for value in values]
        if any(isinstance(value, list) for value in values):
            values = [value if isinstance(value, list) or value is None else [value] for value in values]
        return pa.chunked_array([pa.array(values)])
    if kind is numbers:
        values = [None if isinstance(value, list | dict) else value for value in values]
        if len({type(value) for value in values} - {type(None)}) > 1:
            values = [None if value is None else str(value) for value in values]
        return pa.chunked_array([pa.array(values)])
    if all(value is None or type(value) is str for value in values):
        return pa.chunked_array([pa.array(values, pa.string())])
    if all(type(value) is int and abs(value) < 2**63 for value in values):
        return pa.chunked_array([pa.array(values, pa.int64())])
    values = [value if isinstance(value, str) else id_text(value) for value in values]
    return pa.chunked_array([pa.array(values, pa.string())])


def _caption(value: Any) -> Any:
    """A text, a list of texts, or None where there is none."""
    if isinstance(value, list):
        return [_caption(one) for one in value]
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str):
        raise DataError(f"{value!r} is no text. Put quotes around it if it is one.")
    return value


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
