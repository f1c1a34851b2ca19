"""Files of rows are parsed once: the data sets of a process share the rows, and large ones are kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import pyarrow as pa
from filelock import FileLock

from gmail_lightning.cache import cache_folder
from gmail_lightning.datasets.base import DataError

LARGE = 1 << 20  # bytes of a file from which its rows are kept on disk, for the other processes and the next run
STAMP = b"gmail_lightning.stamp"
VERSION = 1  # of the tables
_shared: WeakValueDictionary[str, pa.Table] = WeakValueDictionary()  # as long as a data set holds them


def read_once(path: Path, part: str, parse: Callable[[], pa.Table], keep: bool = True) -> pa.Table:
    """Returns the rows that ``parse`` makes of a file, or made of it since the file changed last.

    Args:
        path: The file; its size, its times of change and its number on the disk are compared.
        part: What of the file the rows are, and in which form.
        parse: Reads the file.
        keep: Whether the rows of a large file are kept on disk.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file. Check the path.")
    status = path.stat()
    stamp = f"{VERSION} {path.resolve()} {part} {status.st_size} {status.st_mtime_ns}"
    stamp += f" {status.st_ctime_ns} {status.st_ino}"  # of another file whose time of change was set
    table = _shared.get(stamp)
    if table is None:
        table = parse() if not keep or status.st_size < LARGE else _kept(f"{path.resolve()} {part}", stamp, parse)
        _shared[stamp] = table
    return table


def _kept(name: str, stamp: str, parse: Callable[[], pa.Table]) -> pa.Table:
    """Rows from the cache, where the first of the processes of a machine puts them while the others wait."""
    file = cache_folder() / f"annotations-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}.arrow"
    parsed = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not _is_of(file, stamp):
                parsed = parse()
                table = parsed.replace_schema_metadata({**(parsed.schema.metadata or {}), STAMP: stamp.encode()})
                temporary = file.with_suffix(".tmp")
                with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)
                temporary.replace(file)  # who has the old one mapped keeps it
            return _map(file)
    except (OSError, pa.ArrowInvalid):  # a cache that cannot be written costs time, nothing else
        return parse() if parsed is None else parsed


def _map(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _is_of(file: Path, stamp: str) -> bool:
    try:
        return (_map(file).schema.metadata or {}).get(STAMP) == stamp.encode()
    except (OSError, pa.ArrowInvalid):  # not there, or cut: made anew
        return False


def read_text(path: Path) -> str:
    """Returns what a text file holds, without a byte order mark.

    Raises:
        DataError: If there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file. Check the path; a relative one starts from {Path.cwd()}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}). Convert the file.") from error


def read_json(path: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        DataError: As ``read_text``, or if it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error
