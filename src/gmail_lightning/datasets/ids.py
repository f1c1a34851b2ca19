"""Ids: what a value, a file or the bytes of an image mean as a number, the same in every data set.

A value is an integer or a text, and its number does not depend on how it is stored: 1, 1.0, "1" and " 1 " are one id.
Values that a file states are in the common space, where integers from 0 to 2^63 - 1 keep their number, so that COCO's
ids are COCO's everywhere; all else is a hash. In a space with a name, every value is a hash of space and value, so that
two data sets that both count from 0 have no id in common. An image without a stated id is known by its name and what
it holds: it may be moved, packed anew or reached by another path, and those beside it may change.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gmail_lightning.transforms.image import SUFFIXES
from gmail_lightning.types import DataError

MISSING = {"", "nan", "<na>", "null", "none"}  # as pandas, NumPy and Python write what is not there
PLAIN = r"^(0|[1-9][0-9]{0,17})$"  # integers that Arrow turns into numbers at once
LARGEST_EXACT_FLOAT = 2**53
PIECES, PIECE = 4, 2048  # of a large image, and the bytes of each, that tell it from others of its name and size


def stable_ids(names: Iterable[str]) -> np.ndarray:
    """Maps strings to positive int64 ids, shape (N,), that no machine, order or version changes."""
    digests = (hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest() for name in names)
    return np.fromiter((int.from_bytes(d, "little") >> 1 for d in digests), dtype=np.int64)


def id_text(value: Any) -> str | None:
    """Returns the one text of a value, None where it is missing: NaN, null, empty, or -1.

    Raises:
        DataError: If it is no integer and no text, or a float beyond 2^53, whose last digits are lost.
    """
    if value is None:
        return None
    if isinstance(value, float | np.floating):
        number = float(value)
        if math.isnan(number):
            return None
        if not abs(number) <= LARGEST_EXACT_FLOAT:
            raise DataError(f"{number!r} is no exact id: its last digits are lost. Store integers or texts.")
        return id_text(int(number) if number.is_integer() else repr(number))
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer | str):
        raise DataError(f"{value!r} is no id: give an integer or a text.")
    text = unicodedata.normalize("NFC", str(value).strip())
    if integer := re.fullmatch(r"\+?(-?(?:0|[1-9][0-9]*))(?:\.0*)?", text):
        text = "0" if integer[1] == "-0" else integer[1]
    return None if text == "-1" or text.lower() in MISSING else text


def id_number(value: Any, space: str = "") -> int:
    """Returns the id of one value, -1 where it is missing; see the module.

    Raises:
        DataError: As ``id_text``.
    """
    text = id_text(value)
    if text is None:
        return -1
    if not space and re.fullmatch("[0-9]+", text) and int(text) < 2**63 and str(int(text)) == text:
        return int(text)
    return int(stable_ids([f"{space}/{text}" if space else text])[0])


def id_column(column: pa.ChunkedArray, space: str = "") -> np.ndarray:
    """Returns the ids of a column of integers, floats or texts, shape (N,) int64, -1 where there is none.

    Raises:
        DataError: As ``id_text``; the message begins with the number of the row, from 1.
    """
    if pa.types.is_boolean(column.type):
        raise DataError("row 1: true and false are no ids: give integers or texts.")
    if pa.types.is_signed_integer(column.type) and not space:
        numbers = column.cast(pa.int64()).fill_null(-1).to_numpy()
        if (numbers >= -1).all():
            return np.asarray(numbers)
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
    elif not pa.types.is_integer(column.type) and not pa.types.is_null(column.type):
        column = column.cast(pa.string())
        plain = pc.match_substring_regex(column, PLAIN).fill_null(False)
        if not space and pc.all(plain, min_count=0).as_py():
            return np.asarray(column.cast(pa.int64()).to_numpy())
    values = pc.unique(column)
    codes = pc.index_in(column, value_set=values).to_numpy()
    numbers = np.empty(len(values), dtype=np.int64)
    for i, value in enumerate(values.to_pylist()):
        try:
            numbers[i] = id_number(value, space)
        except DataError as error:
            raise DataError(f"row {int(np.argmax(codes == i)) + 1}: {error}") from error
    ids: np.ndarray = numbers[codes.astype(np.int64)]
    return ids


def content_id(data: bytes | memoryview | pa.Buffer) -> int:
    """Returns the id of an image that is known by its bytes alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def file_ids(root: str | Path, files: Sequence[str], space: str = "") -> np.ndarray:
    """Returns the ids of image files, shape (N,) int64: one file has one id, however its path is written.

    Args:
        root: Folder that relative paths start from.
        files: Paths.
        space: With a name, the ids are those of the paths below ``root`` in this space, and no file is looked at.
            Without one, each file is known by ``known_by``, and one that is not there by its path.
    """
    names, number = np.unique(np.array([os.path.join(root, file) for file in files], dtype=object), return_inverse=True)
    if space:
        start = os.path.abspath(root)
        return stable_ids(f"{space}/{Path(os.path.relpath(name, start)).as_posix()}" for name in names)[number]
    return stable_ids(_file_known_by(name) for name in names)[number]


def known_by(name: str, size: int, read: Callable[[int, int], bytes]) -> str:
    """What an image without a stated id is known by, wherever it lies: its name, its size, and its bytes.

    Of a file of more than 8 KiB four pieces of 2 KiB are read, spread over it.

    Args:
        name: Of its file, without folders; in a tar its key.
        size: In bytes.
        read: Returns so many bytes from an offset on.
    """
    digest = hashlib.blake2b(digest_size=8)
    if size <= PIECES * PIECE:
        digest.update(read(0, size))
    else:
        for number in range(PIECES):
            digest.update(read(number * (size - PIECE) // (PIECES - 1), PIECE))
    return f"{unicodedata.normalize('NFC', name)}/{size}/{digest.hexdigest()}"


def read_at(descriptor: int, start: int = 0) -> Callable[[int, int], bytes]:
    """Returns how to read so many bytes from an offset behind ``start`` of an open file."""
    return lambda offset, length: os.pread(descriptor, length, start + offset)


def _file_known_by(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # told when its pixels are asked for
        return os.path.realpath(path)
    try:
        size = os.fstat(descriptor).st_size
        return known_by(os.path.basename(path), size, read_at(descriptor))
    except OSError:  # a folder, or a disk that fails
        return os.path.realpath(path)
    finally:
        os.close(descriptor)


def running_numbers(group: np.ndarray) -> np.ndarray:
    """How many earlier rows are of the same group, shape (N,)."""
    order = np.argsort(group, kind="stable")
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    numbers = np.empty(len(group), dtype=np.int64)
    numbers[order] = np.arange(len(group)) - np.repeat(start, count)
    return numbers


def is_image_name(name: str) -> bool:
    """Whether a file of this name is an image that is meant to be seen: no hidden one, none of macOS's ``._`` files."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
