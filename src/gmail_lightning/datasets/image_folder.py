"""Images of classes: sorted into one folder per class, and what all data sets of classes have in common."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from gmail_lightning.datasets.base import (
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    own_pair_ids,
)
from gmail_lightning.datasets.ids import file_ids, is_image_name
from gmail_lightning.datasets.tables.parsed import read_text
from gmail_lightning.transforms.text import fill, given_templates


class ClassImages(ImageTextDataset):
    """One row per image; its captions are the prompts with the name of its class. A subclass calls ``set_rows``.

    Attributes:
        root: Folder that the paths of the images start from.
    """

    captions_are_classes = True
    root: Path
    class_names: list[str]
    templates: list[str]
    label: np.ndarray

    def set_rows(self, files: list[str], label: Sequence[int], modality: ModalityName, space: str) -> None:
        """Sets the columns; ids are of ``space``, see :func:`~gmail_lightning.datasets.ids.file_ids`."""
        self._files = files
        self.label = np.array(label, dtype=np.int64)
        self.modality = constant_modality(modality, len(files))
        self.image_id = file_ids(self.root, files, space)
        self.pair_id = own_pair_ids(self)

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image(self.image_file(index).read_bytes())

    def image_file(self, index: int) -> Path:  # noqa: D102
        return self.root / self._files[index]

    def file_ids(self) -> np.ndarray:  # noqa: D102
        return file_ids(self.root, self._files)

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [fill(template, self.class_names[self.label[index]]) for template in self.templates]

    def sample_key(self, index: int) -> str:  # noqa: D102
        return self._files[index]

    def describe(self, index: int) -> str:  # noqa: D102
        return str(self.root / self._files[index])


class ImageFolder(ClassImages):
    """``ROOT/CLASS/**/*.jpg`` and the like; the label is the number of the class, captions are prompts with its name.

    Links to folders are followed. Hidden files and folders are left out, and so is what no suffix that Pillow reads
    marks as an image; ``summary`` counts it.

    Args:
        root: Folder of the class folders, numbered in alphabetical order.
        modality: ``real`` or ``generated``.
        class_names: What captions call the classes: one name per folder in alphabetical order, or a mapping from folder
            to name; also a file with the one or the other in JSON (``.json``), or with one name per line. By default
            the folders' names, with spaces for underscores.
        templates: The prompts, one or several with ``{}`` for the class, or the name of a published set of them, such
            as ``imagenet`` (:func:`~gmail_lightning.transforms.text.prompt_templates`).
        space: With a name, images are known by it and by their paths below ``root``, otherwise by the name of the
            file and what it holds (:mod:`gmail_lightning.datasets.ids`).

    Raises:
        DataError: If there is no such folder, no class folder, a class without images, a folder without a name, or one
            that cannot be listed.
        ValueError: If a template has no ``{}``, or no set of them has this name.
    """

    def __init__(
        self,
        root: str | Path,
        modality: ModalityName = "real",
        class_names: list[str] | dict[str, str] | str | Path | None = None,
        templates: str | list[str] = "a photo of a {}.",
        space: str = "",
    ) -> None:
        self.root = Path(root)
        found = class_folders(self.root)
        self.class_names = given_names(self.root, found.folders, class_names) or [
            folder.replace("_", " ") for folder in found.folders
        ]
        self.templates = given_templates(templates)
        self.set_rows(found.files, found.label, modality, space)
        if found.left_out:
            self.summary = f"{root}: {len(self):,} images of {len(self.class_names):,} classes; {found.left_out}."


class ClassFolders(NamedTuple):
    """What lies in a folder of class folders.

    Attributes:
        folders: Names of the class folders, in alphabetical order.
        files: Paths of the images below the folder, class by class, in alphabetical order.
        label: Number of the class folder of each image.
        left_out: How much of what was left out, for a summary; empty where nothing was.
    """

    folders: list[str]
    files: list[str]
    label: list[int]
    left_out: str


def class_folders(root: Path) -> ClassFolders:
    """Lists the images of one folder per class; links are followed, what is hidden is left out.

    Raises:
        DataError: If there is no such folder, no class folder, a class without images, or a folder cannot be listed.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Check the path.")
    left_out: Counter[str] = Counter()
    entries = _visible(root, left_out)
    left_out.update(_kind(entry.name) for entry in entries if not entry.is_dir())
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if not folders:
        raise DataError(f"{root}: no class folders. Put the images of each class into a folder of its name.")
    files: list[str] = []
    label: list[int] = []
    for number, folder in enumerate(folders):
        left_out_here: Counter[str] = Counter()
        below = images_below(root / folder, left_out_here, (os.path.realpath(root),))
        if not below:
            seen = listed(left_out_here) or "it is empty"
            raise DataError(f"{root / folder}: no images of a format that Pillow reads ({seen}). Remove the folder.")
        left_out += left_out_here
        files += [f"{folder}/{file}" for file in below]
        label += [number] * len(below)
    return ClassFolders(folders, files, label, listed(left_out))


def images_below(folder: Path, left_out: Counter[str], above: tuple[str, ...] = ()) -> list[str]:
    """Returns the paths of the images below a folder, in alphabetical order.

    Links are followed, but for those to a folder that they are in; what is hidden is left out.

    Args:
        folder: Where to look.
        left_out: Counts what is left out, by kind.
        above: Real paths of the folders around it.

    Raises:
        DataError: If a folder cannot be listed.
    """
    here = os.path.realpath(folder)
    if here in above:
        left_out["linked to a folder around it"] += 1
        return []
    files: list[str] = []
    for entry in _visible(folder, left_out):
        if entry.is_dir():
            below = images_below(folder / entry.name, left_out, (*above, here))
            files += [f"{entry.name}/{file}" for file in below]
        elif not entry.is_file():
            left_out["of a link to nothing, or of a device"] += 1
        elif is_image_name(entry.name):
            files.append(entry.name)
        else:
            left_out[_kind(entry.name)] += 1
    return sorted(files)


def _visible(folder: Path, left_out: Counter[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}). Check its permissions.") from error
    left_out.update("hidden" for entry in found if entry.name.startswith("."))
    return [entry for entry in found if not entry.name.startswith(".")]


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def listed(left_out: Counter[str]) -> str:
    """Returns how much was left out, for a summary; empty where nothing was."""
    return "left out: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(left_out.items())) if left_out else ""


def given_names(
    root: Path, classes: list[str], class_names: list[str] | dict[str, str] | str | Path | None
) -> list[str] | None:
    """The names that a user gives to ``classes``, in their order; None where there are none given.

    Raises:
        DataError: If the file is missing or malformed, or the names are not those of the classes.
    """
    if isinstance(class_names, str | Path):
        class_names = _read_names(Path(class_names))
    if class_names is None:
        return None
    if isinstance(class_names, list):
        if len(class_names) != len(classes):
            raise DataError(
                f"{root}: {len(class_names)} class_names for {len(classes)} folders. Give one per folder, in "
                f"alphabetical order of the folders ({', '.join(classes[:3])}, ...)."
            )
        return list(class_names)
    nameless = [name for name in classes if name not in class_names]
    if nameless:
        raise DataError(f"{root}: class_names has no name for the folders {', '.join(nameless[:5])}.")
    return [class_names[name] for name in classes]


def _read_names(path: Path) -> list[str] | dict[str, str]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such file of class names. Check the path; a relative one starts from {Path.cwd()}."
        )
    text = read_text(path)
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names: list[str] | dict[str, str] = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}).") from error
    values = names.values() if isinstance(names, dict) else names
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in values):
        raise DataError(f"{path}: expected a list of names, or an object from folder to name.")
    return names
