"""Rows listed in one file: JSONL, CSV, TSV or Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from gmail_lightning.datasets.base import (
    CAPTION_BLOCK,
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    one_line,
    own_pair_ids,
)
from gmail_lightning.datasets.ids import MISSING, content_id, file_ids, id_column, id_text, running_numbers
from gmail_lightning.datasets.tables.columns import (
    Kind,
    ids,
    is_binary,
    numbers,
    paths_or_bytes,
    read_columns,
    text_lists,
    texts,
)
from gmail_lightning.types import Modality

INTEGER = "-?[0-9]{1,18}"


class ManifestDataset(ImageTextDataset):
    """One row per line or record; the columns stay in Arrow memory, so that tens of millions of rows fit.

    Columns, all but the first two optional: ``image`` (a path, or in Parquet the encoded bytes or Hugging Face's
    ``struct<bytes, path>``); ``caption`` (a text) or ``captions`` (a list of texts), without which the file is for
    prediction alone; ``modality`` (real, generated, 0, 1); ``image_id`` (by default one id for each file, or for equal
    bytes); ``pair_id`` (empty for none; without the column, a real row has one of its own, made of image and caption,
    which what is generated from it inherits); ``label`` (integers, or class names); ``weight`` (of the row in the loss,
    for tasks whose ``uses_weights`` is True); ``question`` (that the caption answers; empty for none); ``source`` (name
    of the generator); ``key`` (unique; by default the path, or a digest of the bytes, and a number). Ids are integers
    or texts, see :mod:`gmail_lightning.datasets.ids`.

    Args:
        path: A file ending in .jsonl, .csv, .tsv or .parquet, UTF-8.
        image_root: Folder that relative image paths start from; by default that of the manifest.
        modality: ``real`` or ``generated`` for the whole file, over what its column says.
        source: Name of the generator for the whole file, over what its column says.
        image_key: Name of the image column.
        caption_key: Name of the caption column; texts or lists of texts.
        space: Name of the data set that the ids are of: equal ids of two spaces are different images. By default ids
            that are written in the file are those of every other file, and other images are known by name and content.

    Raises:
        DataError: If the file, a column or a value is missing or malformed; names file, row and key. Rows count from 1,
            without the header.
    """

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | None = None,
        modality: ModalityName | None = None,
        source: str | None = None,
        image_key: str = "image",
        caption_key: str = "caption",
        space: str = "",
    ) -> None:
        self.path = Path(path)
        self.image_root = self.path.parent if image_root is None else Path(image_root)
        kinds: dict[str, Kind] = {image_key: paths_or_bytes, "captions": text_lists, caption_key: text_lists}
        kinds |= dict.fromkeys(("key", "source", "modality", "question"), texts)
        kinds["weight"] = numbers
        kinds |= dict.fromkeys(("image_id", "pair_id", "label"), ids)
        self._table, found = read_columns(self.path, kinds)
        columns = {name: self._table[name] for name in self._table.column_names}
        if caption_key == "caption" and "caption" not in columns and "captions" in columns:
            caption_key = "captions"
        missing = [image_key] if image_key not in columns else []
        if caption_key not in columns and (missing or caption_key != "caption"):
            missing.append(caption_key)  # without captions alone, a file is for prediction
        if modality is None and "modality" not in columns:
            missing.append("modality")
        if missing:
            hint = "Rename it, or name yours by image_key and caption_key."
            if missing == ["modality"]:
                hint = "Add the column, or give modality='real' or 'generated' for the whole file."
            raise DataError(f"{self.path}: no column {', '.join(missing)} (found: {', '.join(found)}). {hint}")
        if unread := [name for name in found if name not in kinds]:
            self.summary = f"{self.path}: columns that are not read: {', '.join(unread)}."
        self._image, self._caption = columns[image_key], columns.get(caption_key)
        self._content: np.ndarray | None = None  # of bytes, by which they are known
        if self._caption is None:
            self.no_captions = (
                f"{self.path}: no column {caption_key} (found: {', '.join(found)}), so that the file is for prediction "
                "alone. Rename the column of the captions, or name yours by caption_key."
            )
        self._key, self._source, self._question = columns.get("key"), columns.get("source"), columns.get("question")
        self.has_questions = self._question is not None
        self._whole_source = source
        if len(self._image) == 0:
            raise DataError(f"{self.path}: no rows.")
        self._refuse(pc.equal(pc.binary_length(self._image), 0), f"{image_key} is empty. Give every row an image")
        if self._caption is not None:
            self._refuse(_blank(self._caption), f"{caption_key} is empty. Write a caption, or remove the row")
        self._check_keys()

        length = len(self._image)
        if modality is None:
            self.modality = self._read_modality(columns["modality"])
        else:
            self.modality = constant_modality(modality, length)
        self._space = space
        self._set_ids(columns)
        if "label" in columns:
            self._read_labels(columns["label"])
        if "weight" in columns:
            bad = pc.invert(pc.and_(pc.is_finite(columns["weight"]), pc.greater_equal(columns["weight"], 0.0)))
            self._refuse(bad, "weight is no number from 0 up. Fill it in, or leave the column out")
            self.weight = columns["weight"].to_numpy().astype(np.float32)

    @property
    def _holds_bytes(self) -> bool:
        return is_binary(self._image)

    def _set_ids(self, columns: dict[str, pa.ChunkedArray]) -> None:
        if self._holds_bytes:
            self._content = np.array([content_id(v.as_buffer()) for v in self._image])
            self._number = running_numbers(self._content)
        if "image_id" in columns:
            self.image_id = self._ids("image_id", columns["image_id"])
            self._refuse(
                pa.chunked_array([self.image_id == -1]), "image_id is empty. Fill it in, or leave the column out"
            )
        elif self._content is not None:
            self.image_id = self._content
        else:
            self.image_id = self._files_known_by(self._space)
        if "pair_id" in columns:
            self.pair_id = self._ids("pair_id", columns["pair_id"])
        else:
            self.pair_id = own_pair_ids(self)

    def _ids(self, name: str, column: pa.ChunkedArray) -> np.ndarray:
        try:
            return id_column(column, self._space)
        except DataError as error:
            raise DataError(f"{self.path} {name}, {error}") from error

    def _refuse(self, wrong: pa.ChunkedArray, complaint: str) -> None:
        """Raises a DataError for the first row where ``wrong`` holds, or is null."""
        wrong = wrong.fill_null(True)
        row = pc.index(wrong, True).as_py()
        if row >= 0:
            raise DataError(f"{self.describe(row)}: {complaint} ({pc.sum(wrong).as_py()} such rows).")

    def _check_keys(self) -> None:
        if self._key is None:
            return
        self._refuse(pc.equal(pc.binary_length(self._key), 0), "key is empty. Fill it in, or leave the column out")
        if pc.count_distinct(self._key).as_py() < len(self._key):
            counts = pc.value_counts(self._key)
            key = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()].as_py()
            first, second = np.flatnonzero(pc.equal(self._key, key).to_numpy())[:2] + 1
            raise DataError(f"{self.path}: key {key!r} stands in row {first} and in row {second}. Make keys unique.")

    def _read_modality(self, column: pa.ChunkedArray) -> np.ndarray:
        number = pc.index_in(pc.utf8_lower(column), value_set=pa.array(["real", "0", "generated", "1"]))
        row = pc.index(number.is_null(), True).as_py()
        if row >= 0:
            value = column[row].as_py()
            self._refuse(number.is_null(), f"unknown modality {value!r}. Use real (0) or generated (1)")
        return np.asarray(number.to_numpy()).astype(np.int64) // 2

    def _read_labels(self, column: pa.ChunkedArray) -> None:
        values, codes = _codes(column)
        try:
            names = [_class_name(value) for value in values.to_pylist()]
            if all(name is None or name.lower() in MISSING or re.fullmatch(INTEGER, name) for name in names):
                names = [id_text(name) for name in names]  # among numbers, "nan" is none
        except DataError as error:
            raise DataError(f"{self.path} label: {error}") from error
        known = {name for name in names if name is not None}
        if all(re.fullmatch(INTEGER, name) for name in known):
            number = {name: int(name) for name in known}
        else:
            self.class_names = sorted(known)
            number = {name: i for i, name in enumerate(self.class_names)}
        labels = np.array([*(-1 if name is None else number[name] for name in names), -1], dtype=np.int64)
        self.label = labels[codes]

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        file = self.image_file(index)
        return decode_image(self._image[index].as_py() if file is None else file.read_bytes())

    def image_file(self, index: int) -> Path | None:  # noqa: D102
        return None if self._holds_bytes else self.image_root / self._image[index].as_py()

    def file_ids(self) -> np.ndarray:  # noqa: D102
        if self._content is not None:
            return self._content
        return self._files_known_by("")

    def _files_known_by(self, space: str) -> np.ndarray:
        values, codes = _codes(self._image)
        ids: np.ndarray = file_ids(self.image_root, values.to_pylist(), space)[codes]
        return ids

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [""] if self._caption is None else [one_line(text) for text in self._caption[index].as_py()]

    def caption_blocks(self) -> Iterator[tuple[pa.Array, np.ndarray]]:  # noqa: D102
        start = 0
        for chunk in [] if self._caption is None else self._caption.chunks:
            for offset in range(0, len(chunk), CAPTION_BLOCK):
                block = chunk.slice(offset, CAPTION_BLOCK)
                yield block.flatten(), start + offset + pc.list_parent_indices(block).to_numpy().astype(np.int64)
            start += len(chunk)

    def question(self, index: int) -> str | None:  # noqa: D102
        return None if self._question is None else one_line(self._question[index].as_py() or "")

    def sample_key(self, index: int) -> str:  # noqa: D102
        if self._key is not None:
            return str(self._key[index].as_py())
        if self._content is None:
            return f"{self._image[index].as_py()}#{index + 1}"
        number = int(self._number[index])  # of the rows with equal bytes
        return f"{self._content[index]:016x}" + (f"#{number + 1}" if number else "")

    def source(self, index: int) -> str:  # noqa: D102
        if self.modality[index] == Modality.REAL:
            return "real"
        value = None if self._source is None else self._source[index].as_py()
        return self._whole_source or value or "generated"

    def picture(self) -> np.ndarray:  # noqa: D102
        return _codes(self._image)[1] if self._content is None else self._content

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self.path} row {index + 1} (key {self.sample_key(index)!r})"


def _class_name(value: Any) -> str | None:
    """The text of a label; a class may be called "none"."""
    name = value.strip() if isinstance(value, str) else None
    return name if name is not None and name.lower() in MISSING - {""} else id_text(value)


def _codes(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """Returns the distinct values, and for each row the number of its value, -1 where it is null."""
    values = pc.unique(column.drop_null())
    return values, pc.index_in(column, value_set=values).fill_null(-1).to_numpy().astype(np.int64)


def _blank(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Says of each list of texts whether it is null, empty, or holds a blank text."""
    masks = []
    for chunk in column.chunks:
        mask = pc.equal(pc.list_value_length(chunk), 0).fill_null(True).to_numpy(zero_copy_only=False).copy()
        blank = pc.equal(pc.utf8_trim_whitespace(chunk.flatten()), "").fill_null(True)
        mask[pc.list_parent_indices(chunk).to_numpy()[blank.to_numpy(zero_copy_only=False)]] = True
        masks.append(pa.array(mask))
    return pa.chunked_array(masks, pa.bool_())
