"""One row per caption: what the data sets of annotated images have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from gmail_lightning.datasets.ids import file_ids, id_column, id_text, running_numbers
from gmail_lightning.datasets.protocols import CAPTION_PROTOCOLS, compare_counts, subset_of


class CaptionRow(NamedTuple):
    """A caption and its image.

    Attributes:
        caption: The text; white space is put in order. None where the image has none.
        file: Path of the image below the folder of the images.
        image_id: Equal for the captions of one image; an integer or a text.
        caption_id: Different for every caption; an integer or a text.
        split: Split of the file that the row is of, where it holds several.
        entry: Number of the image in the file, where it lists the images.
    """

    caption: str | None
    file: str
    image_id: int | str
    caption_id: int | str
    split: str = ""
    entry: int = 0


SCHEMA = pa.schema(
    {
        "caption": pa.string(),
        "file": pa.string(),
        "image_id": pa.string(),
        "caption_id": pa.string(),
        "split": pa.string(),
        "entry": pa.int64(),
    }
)


def caption_table(annotations: Path, rows: Iterable[CaptionRow]) -> pa.Table:
    """Returns the rows as Arrow columns, which processes share.

    Raises:
        DataError: If a caption is no text, or an id is missing or neither an integer nor a text.
    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        if not isinstance(row.caption, str | None):
            raise DataError(
                f"{annotations}: caption {row.caption_id} of {row.file} is {row.caption!r} and no text. Write one or "
                "remove it."
            )
        columns["caption"].append(row.caption if row.caption is None else one_line(row.caption))
        columns["file"].append(row.file)
        for name, value in (("image_id", row.image_id), ("caption_id", row.caption_id)):
            columns[name].append(str(value) if type(value) is int and value >= 0 else _text(annotations, row, name))
        columns["split"].append(row.split)
        columns["entry"].append(row.entry)
    try:
        return pa.table(columns, schema=SCHEMA)
    except UnicodeEncodeError:
        bad = next(i for i, row in enumerate(zip(*columns.values(), strict=True)) if not _is_utf8(row))
        one = {name: values[bad] for name, values in columns.items()}
        raise DataError(
            f"{annotations}: caption {one['caption_id']!a} of {one['file']!a} holds half of a character: "
            f"{one['caption']!a}. Mend it."
        ) from None


def _is_utf8(values: Iterable[Any]) -> bool:
    try:
        "".join(value for value in values if isinstance(value, str)).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(annotations: Path, row: CaptionRow, name: str) -> str:
    value = getattr(row, name)
    try:
        text = id_text(value)
    except DataError as error:
        raise DataError(f"{annotations}: {name} of {row.file}: {error}") from error
    if text is None:
        raise DataError(f"{annotations}: {name} of {row.file} is {value!r}. Give it an integer or a text.")
    return text


class CaptionRows(ImageTextDataset):
    """One row per caption: ``pair_id`` is the id of the caption. A subclass reads its rows and calls ``set_rows``.

    Attributes:
        annotations: The file that the captions are from.
        image_root: Folder of the images.
    """

    annotations: Path
    image_root: Path

    def set_rows(self, rows: pa.Table, modality: ModalityName, space: str = "") -> None:
        """Sets the columns; ids are of ``space``, see :mod:`gmail_lightning.datasets.ids`.

        Args:
            rows: As ``caption_table`` returns them, all of them or those of a split.
            modality: ``real`` or ``generated``.
            space: Name of the data set that the ids are of.

        Raises:
            DataError: If there is no row, a caption is missing or empty, or two captions have one id.
        """
        if not len(rows):
            raise DataError(f"{self.annotations}: no captions.")
        if self.no_captions is None:
            empty = pc.index(pc.equal(rows["caption"], "").fill_null(True), True).as_py()
            if empty >= 0:
                row = rows.slice(empty, 1).to_pylist()[0]
                fault = f"{row['file']} is {'null' if row['caption'] is None else 'empty'}. Write one or remove it."
                raise DataError(f"{self.annotations}: caption {row['caption_id']} of {fault}")
        rows = rows.combine_chunks()
        self._caption, self._file = (rows[name].combine_chunks() for name in ("caption", "file"))
        self.image_id = id_column(rows["image_id"], space)
        self.modality = constant_modality(modality, len(rows))
        if self.no_captions is not None:
            self._caption = pa.array([""] * len(rows))
            self.pair_id = own_pair_ids(self)
        else:
            self.pair_id = id_column(rows["caption_id"], space)
        ids, first, count = np.unique(self.pair_id, return_index=True, return_counts=True)
        if len(ids) < len(rows):
            one = rows.slice(int(first[count > 1][0]), 1).to_pylist()[0]
            raise DataError(
                f"{self.annotations}: {len(rows) - len(ids)} ids of captions occur more than once, one of them with "
                f"{one['file']} ({one['caption_id']}). Give every caption an id of its own."
            )
        self._number = running_numbers(self.image_id)

    def check_protocol(self, protocol: str, subset: bool = False) -> None:
        """Compares the counts with those of a protocol, and says in ``summary`` what the rows are.

        Raises:
            DataError: If they differ, with both numbers; not of a subset.
        """
        published = CAPTION_PROTOCOLS[protocol]
        found = {"images": len(np.unique(self.image_id)), "captions": len(self)}
        expected = {"images": published.images, "captions": published.captions}
        if not subset:
            fix = f"It is {published.what}: read {published.file}, whole and unchanged, or say subset=True."
            compare_counts(self.annotations, protocol, found, expected, fix)
        name = f"{subset_of(expected) if subset else ''}protocol {protocol}, {published.what}"
        self.summary = f"{self.annotations}: {name}: {found['images']:,} images, {found['captions']:,} captions."

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image(self.image_file(index).read_bytes())

    def image_file(self, index: int) -> Path:  # noqa: D102
        return self.image_root / str(self._file[index])

    def file_ids(self) -> np.ndarray:  # noqa: D102
        return file_ids(self.image_root, self._file.to_pylist())

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [self._caption[index].as_py()]

    def caption_blocks(self) -> Iterator[tuple[pa.Array, np.ndarray]]:  # noqa: D102
        for start in range(0, len(self), CAPTION_BLOCK):
            texts = self._caption[start : start + CAPTION_BLOCK]
            yield texts, np.arange(start, start + len(texts))

    def sample_key(self, index: int) -> str:
        """Returns the path of the image and the number of the caption among those of the image, from 0."""
        return f"{self._file[index].as_py()}#{self._number[index]}"

    def picture(self) -> np.ndarray:  # noqa: D102
        return self.image_id

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{self.annotations} {self.sample_key(index)}"


def first_captions(rows: pa.Table, captions_per_image: int) -> pa.Table:
    """The first so many captions of each image."""
    image = pc.index_in(rows["image_id"], value_set=pc.unique(rows["image_id"])).to_numpy()
    return rows.filter(pa.array(running_numbers(image) < captions_per_image))
