"""Fashion-MNIST: 70,000 photographs of products, grey and small, out of its idx files."""

from __future__ import annotations

import gzip
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gmail_lightning.datasets.base import DataError, ImageTextDataset, ModalityName, constant_modality, own_pair_ids
from gmail_lightning.datasets.ids import content_id, running_numbers, stable_ids
from gmail_lightning.transforms.text import fill, given_templates

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"  # of the package dataset-fashion-mnist
FIX = "Install it (apt-get install dataset-fashion-mnist), or give the folder of intact files as root."
SIDE = 28
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801  # unsigned bytes in three dimensions, and in one
PREFIX = {"train": "train", "test": "t10k"}
PUBLISHED = {"train": 60_000, "test": 10_000}

#: By label. The publication calls the first "T-shirt/top" and the second "Trouser".
CLASS_NAMES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
TEMPLATES = (
    "a photo of a {}.",
    "a black and white photo of a {}.",
    "a product photo of a {}.",
    "a low resolution photo of a {}.",
    "a gray {} on a black background.",
    "a {} from the catalog of a fashion shop.",
)


class FashionMNIST(ImageTextDataset):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747): ten classes of products, photographed, 28 px and grey.

    A row's three channels are equal, and its captions are the prompts with the name of its class. The decoded images
    (47 MB of ``train``) are read once per process and are no part of what is sent to workers.

    Args:
        root: Folder of ``train-images-idx3-ubyte.gz``, ``train-labels-idx1-ubyte.gz`` and the two of ``t10k``; a file
            without ``.gz`` is taken first. By default where Debian's ``dataset-fashion-mnist`` puts them.
        split: ``train`` (60,000 images) or ``test`` (10,000).
        modality: ``real``, or ``generated`` where the files hold generated images in the same layout.
        classes: Names of the classes that are kept, of ``CLASS_NAMES``; ``label`` numbers them in this order. By
            default all ten.
        per_class: How many images of each class are kept, chosen by a hash of split and row: always the same ones,
            whatever the classes, and those of a smaller number are among those of a larger. By default all.
        templates: The prompts, one or several with ``{}`` for the class, or the name of a published set of them, such
            as ``imagenet``. By default ``TEMPLATES``, made for gray photographs of products.
        space: With a name, images are known by it, by split and by row, otherwise by split, row and pixels
            (:mod:`gmail_lightning.datasets.ids`).

    Raises:
        DataError: If a file is missing, damaged, cut, or of another kind, images and labels differ in number, a label
            is none of ten, or a class has fewer images than ``per_class``; names the file and the fix.
        ValueError: If an argument is unknown or out of range; lists the known values.
    """

    captions_are_classes = True
    split: str
    class_names: list[str]
    templates: list[str]
    label: np.ndarray

    def __init__(
        self,
        root: str | Path = DEBIAN_FOLDER,
        split: Literal["train", "test"] = "train",
        modality: ModalityName = "real",
        classes: list[str] | None = None,
        per_class: int | None = None,
        templates: str | list[str] | None = None,
        space: str = "",
    ) -> None:
        if split not in PREFIX:
            raise ValueError(f"Unknown split {split!r} of FashionMNIST. Known: {', '.join(PREFIX)}.")
        if per_class is not None and per_class < 1:
            raise ValueError(f"per_class={per_class} of FashionMNIST: give a number from 1, or None for all images.")
        numbers = _class_numbers(classes)
        self.root, self.split = Path(root).absolute(), split
        self.class_names = [CLASS_NAMES[number] for number in numbers]
        self.templates = given_templates(list(TEMPLATES) if templates is None else templates)
        labels = _read(self.root, split)[1]
        position = np.full(len(CLASS_NAMES), -1)
        position[numbers] = np.arange(len(numbers))
        rows = np.flatnonzero(position[labels] >= 0)
        if per_class is not None:
            rows = self._chosen(rows, position[labels], per_class)
        if not len(rows):
            raise DataError(f"{_file(self.root, split, 'labels')}: no image of {', '.join(self.class_names)}.")
        self._rows = rows  # of the files
        self.label = position[labels[rows]].astype(np.int64)
        self.modality = constant_modality(modality, len(rows))
        if space:
            self.image_id = stable_ids(f"{space}/{self.sample_key(i)}" for i in range(len(rows)))
        else:
            self.image_id = self.file_ids()
        self.pair_id = own_pair_ids(self)
        published = "" if len(labels) == PUBLISHED[split] else f", not the {PUBLISHED[split]:,} published,"
        self.summary = (
            f"{self.root}: FashionMNIST, split {split}: {len(rows):,} of {len(labels):,} images{published} of "
            f"{len(self.class_names)} of {len(CLASS_NAMES)} classes."
        )

    def _chosen(self, rows: np.ndarray, position: np.ndarray, per_class: int) -> np.ndarray:
        """Returns so many of ``rows`` for each class, ascending; those whose hash is smallest."""
        of_class = np.bincount(position[rows], minlength=len(self.class_names))
        if of_class.min() < per_class:
            name = self.class_names[int(of_class.argmin())]
            raise DataError(
                f"{_file(self.root, self.split, 'labels')}: per_class={per_class}, but {of_class.min()} images are of "
                f"the class {name!r}. Lower it."
            )
        by_hash = rows[np.argsort(stable_ids(f"{self.split}/{row}" for row in rows.tolist()))]
        return np.sort(by_hash[running_numbers(position[by_hash]) < per_class])

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        gray = _read(self.root, self.split)[0][self._rows[index]]
        return torch.from_numpy(np.repeat(gray[None], 3, axis=0))

    def file_ids(self) -> np.ndarray:  # noqa: D102
        images = _read(self.root, self.split)[0]
        return stable_ids(f"{self.split}/{row}/{content_id(images[row].tobytes())}" for row in self._rows.tolist())

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [fill(template, self.class_names[self.label[index]]) for template in self.templates]

    def sample_key(self, index: int) -> str:  # noqa: D102
        return f"{self.split}/{int(self._rows[index]):05d}"

    def describe(self, index: int) -> str:  # noqa: D102
        return f"{_file(self.root, self.split, 'images')} image {int(self._rows[index]) + 1}"


def _class_numbers(classes: list[str] | None) -> list[int]:
    """Labels in the files of the chosen classes."""
    if classes is None:
        return list(range(len(CLASS_NAMES)))
    unknown = [name for name in classes if name not in CLASS_NAMES]
    if unknown or not classes:
        found = ", ".join(map(repr, unknown)) or "none given"
        raise ValueError(f"Unknown classes of FashionMNIST: {found}. Known: {', '.join(CLASS_NAMES)}.")
    if len(set(classes)) < len(classes):
        raise ValueError(f"Classes of FashionMNIST: {', '.join(classes)}. Name each class once.")
    return [CLASS_NAMES.index(name) for name in classes]


@cache
def _read(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) and labels (N,), uint8 and read-only; the data sets of a process share them."""
    images_file, labels_file = (_file(root, split, kind) for kind in ("images", "labels"))
    images, labels = _idx(images_file, IMAGES_MAGIC), _idx(labels_file, LABELS_MAGIC)
    if images.shape[1:] != (SIDE, SIDE):
        raise DataError(
            f"{images_file}: images of {images.shape[1]} x {images.shape[2]} px, not {SIDE} x {SIDE}. {FIX}"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{labels_file}: {len(labels):,} labels, but {images_file} has {len(images):,} images: they are no pair. "
            f"{FIX}"
        )
    if not len(labels):
        raise DataError(f"{labels_file}: no labels. {FIX}")
    if labels.max() >= len(CLASS_NAMES):
        row = int(np.argmax(labels >= len(CLASS_NAMES)))
        raise DataError(f"{labels_file}: label {row + 1} is {labels[row]}, and none from 0 to 9. {FIX}")
    return images, labels


def _file(root: Path, split: str, kind: str) -> Path:
    plain = root / f"{PREFIX[split]}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    return plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")


def _idx(path: Path, magic: int) -> np.ndarray:
    """Reads a file of unsigned bytes: the magic number, each size as four bytes, big-endian, then the values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file. {FIX}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, or is damaged or cut ({error}). {FIX}") from error
    dimensions = magic & 0xFF
    start = 4 + 4 * dimensions
    found = int.from_bytes(data[:4], "big")
    if len(data) < start or found != magic:
        raise DataError(
            f"{path}: magic number {found} in {len(data):,} bytes, not {magic}: another kind of file. {FIX}"
        )
    sizes = np.frombuffer(data, ">u4", dimensions, offset=4).tolist()
    expected = int(np.prod(sizes, dtype=object))
    if len(data) - start != expected:
        raise DataError(
            f"{path}: {len(data) - start:,} bytes of values, but its header promises {expected:,} "
            f"({' x '.join(map(str, sizes))}): cut or damaged. {FIX}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)
