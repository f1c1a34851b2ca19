"""Images sorted into one folder per class."""

from __future__ import annotations

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
    stable_ids,
)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".avif", ".tif", ".tiff"}


class ImageFolder(ImageTextDataset):
    """``ROOT/CLASS/**/*.jpg`` and the like; the caption is "a photo of a CLASS", the label the number of the class.

    Args:
        root: Folder of the class folders, numbered in alphabetical order.
        modality: ``real`` or ``generated``.
        class_names: What captions call the classes: one name per folder in alphabetical order, or a mapping from folder
            to name. By default the folders' names, with spaces for underscores.

    Raises:
        DataError: If there is no such folder, no class folder, a class without images, or a folder without a name.
    """

    captions_are_classes = True

    def __init__(
        self,
        root: str | Path,
        modality: ModalityName = "real",
        class_names: list[str] | dict[str, str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: no such folder. Check the path.")
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root}: no class folders. Put the images of each class into a folder of its name.")
        self.class_names = self._names(folders, class_names)
        self._files: list[str] = []
        label = []
        for number, folder in enumerate(folders):
            paths = (self.root / folder).rglob("*")
            files = sorted(p.relative_to(self.root).as_posix() for p in paths if p.suffix.lower() in SUFFIXES)
            if not files:
                raise DataError(f"{self.root / folder}: no images ({', '.join(sorted(SUFFIXES))}). Remove the folder.")
            self._files += files
            label += [number] * len(files)
        self.label = np.array(label, dtype=np.int64)
        self.image_id = stable_ids(self._files)
        self.id_space = folder_space(self.root)
        self.pair_id = np.full(len(label), -1)
        self.modality = constant_modality(modality, len(label))

    def _names(self, folders: list[str], class_names: list[str] | dict[str, str] | None) -> list[str]:
        if class_names is None:
            return [folder.replace("_", " ") for folder in folders]
        if isinstance(class_names, list):
            if len(class_names) != len(folders):
                raise DataError(f"{self.root}: {len(class_names)} class_names for {len(folders)} folders.")
            return list(class_names)
        nameless = [folder for folder in folders if folder not in class_names]
        if nameless:
            raise DataError(f"{self.root}: class_names has no name for the folders {', '.join(nameless[:5])}.")
        return [class_names[folder] for folder in folders]

    def read_image(self, index: int) -> Tensor:  # noqa: D102
        return decode_image((self.root / self._files[index]).read_bytes())

    def captions(self, index: int) -> list[str]:  # noqa: D102
        assert self.label is not None
        assert self.class_names is not None
        return [f"a photo of a {self.class_names[self.label[index]]}"]

    def sample_key(self, index: int) -> str:  # noqa: D102
        return self._files[index]

    def describe(self, index: int) -> str:  # noqa: D102
        return str(self.root / self._files[index])
