"""What every data set is: columns that are known without decoding, and a way to read one row."""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from torch import Tensor
from torch.utils.data import Dataset

from gmail_lightning.datasets.ids import running_numbers, stable_ids

# Readers find here all that they need.
from gmail_lightning.transforms.decode import ImageDecodeError as ImageDecodeError
from gmail_lightning.transforms.decode import decode_image as decode_image
from gmail_lightning.types import DataError as DataError
from gmail_lightning.types import ImageTextSample, Modality

ModalityName = Literal["real", "generated"]
CAPTION_BLOCK = 65_536  # rows whose captions are looked at together


def one_line(text: str) -> str:
    """Runs of white space, line breaks included, become one space: a caption is one line in every file and metric."""
    return " ".join(text.split())


class ImageTextDataset(Dataset[ImageTextSample], ABC):
    """Rows of an image and its captions.

    A subclass fills the columns in its constructor, without decoding anything, and says how to read one row. Samplers
    and data modules work on the columns.

    Attributes:
        modality: :class:`~gmail_lightning.types.Modality` of each row, shape (N,).
        image_id: Equal for all rows that show the same real image, shape (N,) int64.
        pair_id: Equal for a real row and its generated partners, -1 where there is none, shape (N,) int64.
        label: Class of each row, -1 where there is none, shape (N,) int64; None where the data have no classes.
        class_names: Name of each class, or None.
        templates: Prompts that name a class, each with one ``{}`` where the name goes; None where no one chose any.
        split: Split that all rows belong to; None where the data set makes no claim.
        weight: Weight of each row in the training loss, shape (N,) float32; None where all count alike.
        summary: A line for the log: what was left out of the files, which protocol this is; None for nothing.
        not_for_training: Why no row may be trained on; None where nothing speaks against it.
        has_questions: Rows ask something, and their captions answer it.
        no_captions: Why there are none, so that the rows are for prediction alone and every caption is empty.
        captions_are_classes: Captions are made of the names of classes, so that training may well have the same.
        feature_store: What the features that stand in for pixels were made with; None where the rows have pixels.
        token_store: What the token ids that stand in for pixels were made with; None where there are none.
    """

    modality: np.ndarray
    image_id: np.ndarray
    pair_id: np.ndarray
    label: np.ndarray | None = None
    class_names: list[str] | None = None
    templates: list[str] | None = None
    split: str | None = None
    weight: np.ndarray | None = None
    summary: str | None = None
    not_for_training: str | None = None
    has_questions: bool = False
    no_captions: str | None = None
    captions_are_classes: bool = False
    feature_store: dict[str, Any] | None = None
    token_store: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.modality)

    @abstractmethod
    def read_image(self, index: int) -> Tensor:
        """Returns the pixels of a row, uint8 of shape (3, H, W); may raise ``OSError`` or ``ImageDecodeError``."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """Returns every caption of a row, at least one."""

    def question(self, index: int) -> str | None:
        """Returns what the captions of a row answer, None where nothing is asked."""
        return None

    @abstractmethod
    def sample_key(self, index: int) -> str:
        """Returns a name of the row that is unique within the data set."""

    def feature(self, index: int) -> Tensor | None:
        """Returns what a batch holds in place of the pixels of a row: cached features (D,) or (T, W), or None."""
        return None

    def token_ids(self, index: int) -> Tensor | None:
        """Returns what a batch holds in place of the pixels of a row: codes of an image tokenizer (T,) int64, or None.

        Where a row has features, too, a batch holds these.
        """
        return None

    def source(self, index: int) -> str:
        """Returns ``real``, or the name of the generator."""
        return Modality(self.modality[index]).name.lower()

    def image_file(self, index: int) -> Path | None:
        """Returns the file that a row's image is; None where it lies in a larger one, or in memory."""
        return None

    def file_ids(self) -> np.ndarray:
        """Returns what the stored image of each row is known by, shape (N,) int64; cached features go by it.

        It is the file, or the bytes, wherever they lie and in whatever order; here the key of the row.
        """
        return stable_ids(self.sample_key(row) for row in range(len(self)))

    def file_stamps(self, rows: np.ndarray) -> np.ndarray:
        """Returns size and time of change of the stored images of ``rows``, shape (n, 2) int64; zeros for no file."""
        stamps = np.zeros((len(rows), 2), dtype=np.int64)
        for i, row in enumerate(rows.tolist()):
            file = self.image_file(row)
            with suppress(FileNotFoundError):  # told when its pixels are asked for
                if file is not None:
                    status = file.stat()
                    stamps[i] = status.st_size, status.st_mtime_ns
        return stamps

    def picture(self) -> np.ndarray:
        """Returns a number per row, shape (N,), equal where rows show one file: evaluation takes each file once."""
        return np.arange(len(self))

    def caption_blocks(self) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Yields all captions, some at a time: texts (T,), and the row of each (T,) int64, ascending."""
        for start in range(0, len(self), CAPTION_BLOCK):
            rows = range(start, min(start + CAPTION_BLOCK, len(self)))
            found = [self.captions(row) for row in rows]
            texts = pa.array([text for captions in found for text in captions], pa.string())
            yield texts, np.repeat(np.array(rows), [len(captions) for captions in found])

    def perceptual_hashes(self) -> np.ndarray | None:
        """Returns :func:`~gmail_lightning.transforms.image_hash.perceptual_hash` of each row, shape (N,) int64.

        None where that would take decoding every image.
        """
        return None

    def columns(self, index: int) -> dict[str, str]:
        """Returns further columns of a row, which the images generated from it inherit in their manifest."""
        return {}

    def describe(self, index: int) -> str:
        """Names a row in error messages."""
        return f"{type(self).__name__} row {index + 1} (key {self.sample_key(index)!r})"

    def image(self, index: int) -> Tensor:
        """Returns the pixels of a row, uint8 of shape (3, H, W).

        Raises:
            ImageDecodeError: If the file is missing or does not decode; names the row.
        """
        try:
            return self.read_image(index)
        except FileNotFoundError as error:
            start = "" if Path(str(error.filename)).is_absolute() else f" (a relative path starts from {Path.cwd()})"
            raise ImageDecodeError(
                f"{self.describe(index)}: no file {error.filename}{start}{_twin(error.filename)}"
            ) from error
        except (OSError, ImageDecodeError) as error:
            raise ImageDecodeError(f"{self.describe(index)}: {error}") from error

    def __getitem__(self, index: int) -> ImageTextSample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return ImageTextSample(
            image=self.image(index),
            captions=self.captions(index),
            modality=int(self.modality[index]),
            image_id=int(self.image_id[index]),
            pair_id=int(self.pair_id[index]),
            label=-1 if self.label is None else int(self.label[index]),
            source=self.source(index),
            sample_key=self.sample_key(index),
        )


def _twin(name: Any) -> str:
    """Names the file that only looks like a missing one, its letters being composed in another way."""
    path = Path(str(name))
    try:
        names = [one.name for one in path.parent.iterdir()]
    except OSError:
        return ""
    wanted = unicodedata.normalize("NFC", path.name)
    twin = next((one for one in names if unicodedata.normalize("NFC", one) == wanted and one != path.name), None)
    if twin is None:
        return ""
    form = "NFC" if unicodedata.is_normalized("NFC", twin) else "NFD"
    return f", but one whose accents are composed otherwise (Unicode {form}): rename it, or write its name in this form"


def own_pair_ids(dataset: ImageTextDataset) -> np.ndarray:
    """Returns a ``pair_id`` for each real row, -1 for generated ones, shape (N,) int64; what is generated inherits it.

    It is a hash of ``image_id``, captions and question, whichever rows are read beside it; where the captions are
    prompts, which a recipe may choose anew, it is the ``image_id``. Rows that are equal in all are told apart by
    counting.
    """
    pair_id = np.where(dataset.modality == Modality.REAL, dataset.image_id, -1)
    real = np.flatnonzero(pair_id != -1)
    if not dataset.captions_are_classes and len(real):
        for texts, rows in dataset.caption_blocks():
            start = np.flatnonzero(np.diff(rows, prepend=-1))
            found, captions = rows[start], np.split(texts.to_numpy(zero_copy_only=False), start[1:])
            asked = (dataset.question(row) or "" if dataset.has_questions else "" for row in found.tolist())
            names = (
                "\0".join((str(id_), question, *map(one_line, own)))
                for id_, question, own in zip(pair_id[found].tolist(), asked, captions, strict=True)
            )
            pair_id[found] = np.where(pair_id[found] == -1, -1, stable_ids(names))
    repeated = running_numbers(pair_id[real])
    again = real[repeated > 0]
    pair_id[again] = stable_ids(f"{id_}/{n}" for id_, n in zip(pair_id[again], repeated[repeated > 0], strict=True))
    return pair_id


def constant_modality(name: str, length: int) -> np.ndarray:
    """Returns a column of one modality, shape (length,).

    Raises:
        ValueError: If the name is neither ``real`` nor ``generated``.
    """
    if name not in ("real", "generated"):
        raise ValueError(f"Unknown modality {name!r}: use 'real' or 'generated'.")
    return np.full(length, Modality[name.upper()], dtype=np.int64)
