"""Images of classes: sorted into one folder per class, and what all data sets of classes have in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from gmail_lightning.datasets.base import (
    DataError,
    ImageTextDataset,
    ModalityName,
    constant_modality,
    decode_image,
    folder_space,
)
from gmail_lightning.datasets.ids import file_ids
from gmail_lightning.transforms.image import SUFFIXES
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

    def set_rows(self, files: list[str], label: Sequence[int], modality: ModalityName) -> None:
        """Sets the columns but for ``image_id``."""
        self._files = files
        self.label = np.array(label, dtype=np.int64)
        self.pair_id = np.full(len(files), -1)
        self.modality = constant_modality(modality, len(files))
        self.place = folder_space(self.root) if modality == "generated" else ""

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image((self.root / self._files[index]).read_bytes())

    def captions(self, index: int) -> list[str]:  # noqa: D102
        return [fill(template, self.class_names[self.label[index]]) for template in self.templates]

    def sample_key(self, index: int) -> str:  # noqa: D102
        return self._files[index]

    def describe(self, index: int) -> str:  # noqa: D102
        return str(self.root / self._files[index])


class ImageFolder(ClassImages):
    """``ROOT/CLASS/**/*.jpg`` and the like; the label is the number of the class, captions are prompts with its name.

    Args:
        root: Folder of the class folders, numbered in alphabetical order.
        modality: ``real`` or ``generated``.
        class_names: What captions call the classes: one name per folder in alphabetical order, or a mapping from folder
            to name; also a file with the one or the other in JSON (``.json``), or with one name per line. By default
            the folders' names, with spaces for underscores.
        templates: The prompts, one or several with ``{}`` for the class, or the name of a published set of them, such
            as ``imagenet`` (:func:`~gmail_lightning.transforms.text.prompt_templates`).

    Raises:
        DataError: If there is no such folder, no class folder, a class without images, or a folder without a name.
        ValueError: If a template has no ``{}``, or no set of them has this name.
    """

    def __init__(
        self,
        root: str | Path,
        modality: ModalityName = "real",
        class_names: list[str] | dict[str, str] | str | Path | None = None,
        templates: str | list[str] = "a photo of a {}.",
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder. Check the path.")
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root}: no class folders. Put the images of each class into a folder of its name.")
        self.class_names = given_names(self.root, folders, class_names) or [
            folder.replace("_", " ") for folder in folders
        ]
        self.templates = given_templates(templates)
        all_files: list[str] = []
        label: list[int] = []
        for number, folder in enumerate(folders):
            paths = (self.root / folder).rglob("*")
            files = sorted(p.relative_to(self.root).as_posix() for p in paths if p.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"{self.root / folder}: no images ({', '.join(sorted(SUFFIXES))}). Remove the folder.")
            all_files += files
            label += [number] * len(files)
        self.set_rows(all_files, label, modality)
        self.image_id = file_ids(self.root, all_files)


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
    text = path.read_text(encoding="utf-8-sig")
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
