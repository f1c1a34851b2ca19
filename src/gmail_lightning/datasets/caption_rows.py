"""One row per caption: what the data sets of annotated images have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from gmail_lightning.datasets.base import (
    CAPTION_BLOCK,
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    folder_space,
    one_line,
    own_pair_ids,
)
from gmail_lightning.datasets.ids import id_number
from gmail_lightning.datasets.protocols import CAPTION_PROTOCOLS, compare_counts


class CaptionRow(NamedTuple):
    """A caption and its image.

    Attributes:
        caption: The text; white space is put in order.
        file: Path of the image below the folder of the images.
        image_id: Equal for the captions of one image; an integer or a text.
        caption_id: Different for every caption; an integer or a text.
    """

    caption: str
    file: str
    image_id: int | str
    caption_id: int | str


class CaptionRows(ImageTextDataset):
    """One row per caption: ``pair_id`` is the id of the caption. A subclass reads its rows and calls ``set_rows``.

    Attributes:
        annotations: The file that the captions are from.
        image_root: Folder of the images.
    """

    annotations: Path
    image_root: Path

    def set_rows(self, rows: list[CaptionRow], modality: ModalityName, space: str = "") -> None:
        """Sets the columns; ids are of ``space``, see :mod:`gmail_lightning.datasets.ids`.

        Raises:
            DataError: If there is no row, a caption is no text or empty, or an id is missing or occurs twice.
        """
        if not rows:
            raise DataError(f"{self.annotations}: no captions.")
        for row in rows if self.no_captions is None else ():
            if not isinstance(row.caption, str) or not row.caption.strip():
                found = "empty" if isinstance(row.caption, str) else f"{row.caption!r} and no text"
                raise DataError(
                    f"{self.annotations}: caption {row.caption_id} of {row.file} is {found}. Write one or remove it."
                )
        self._caption = pa.array([one_line(row.caption) for row in rows])  # one block of memory, which workers share
        self._file = pa.array([row.file for row in rows])
        self.image_id = self._ids(rows, "image_id", space)
        self.modality = constant_modality(modality, len(rows))
        self.pair_id = self._ids(rows, "caption_id", space) if self.no_captions is None else own_pair_ids(self)
        self.place = folder_space(self.image_root) if modality == "generated" else ""
        ids, first, count = np.unique(self.pair_id, return_index=True, return_counts=True)
        if len(ids) < len(rows):
            one = rows[first[count > 1][0]]
            raise DataError(
                f"{self.annotations}: {len(rows) - len(ids)} ids of captions occur more than once, one of them with "
                f"{one.file} ({one.caption_id}). Give every caption an id of its own."
            )
        self._number = _running_numbers(self.image_id)

    def _ids(self, rows: list[CaptionRow], name: Literal["image_id", "caption_id"], space: str) -> np.ndarray:
        ids = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            value = getattr(row, name)
            try:
                ids[i] = value if type(value) is int and 0 <= value < 2**63 and not space else id_number(value, space)
            except DataError as error:
                raise DataError(f"{self.annotations}: {name} of {row.file}: {error}") from error
            if ids[i] == -1:
                raise DataError(f"{self.annotations}: {name} of {row.file} is {value!r}. Give it an integer or a text.")
        return ids

    def check_protocol(self, protocol: str, enforce: bool = True) -> None:
        """Compares the counts with those of a protocol, and says in ``summary`` what the rows are.

        Raises:
            DataError: If they differ and the protocol is to be enforced; with both numbers.
        """
        published = CAPTION_PROTOCOLS[protocol]
        found = {"images": len(np.unique(self.image_id)), "captions": len(self)}
        if enforce:
            fix = f"It is {published.what}: read {published.file}, whole and unchanged."
            compare_counts(
                self.annotations, protocol, found, {"images": published.images, "captions": published.captions}, fix
            )
        name = f"protocol {protocol}, {published.what}" if enforce else f"not checked against protocol {protocol}"
        self.summary = f"{self.annotations}: {name}: {found['images']:,} images, {found['captions']:,} captions."

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image((self.image_root / self._file[index].as_py()).read_bytes())

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


def _running_numbers(group: np.ndarray) -> np.ndarray:
    """How many earlier rows are of the same group, shape (N,)."""
    order = np.argsort(group, kind="stable")
    _, start, count = np.unique(group[order], return_index=True, return_counts=True)
    numbers = np.empty(len(group), dtype=np.int64)
    numbers[order] = np.arange(len(group)) - np.repeat(start, count)
    return numbers


def first_captions(rows: list[CaptionRow], captions_per_image: int) -> list[CaptionRow]:
    """The first so many captions of each image."""
    _, image = np.unique([str(row.image_id) for row in rows], return_inverse=True)
    numbers = _running_numbers(image)
    return [row for row, number in zip(rows, numbers.tolist(), strict=True) if number < captions_per_image]
