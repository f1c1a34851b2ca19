"""The eight sets of classes of zero-shot evaluation, through torchvision."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gmail_lightning.datasets.base import DataError, ModalityName
from gmail_lightning.datasets.ids import stable_ids
from gmail_lightning.datasets.image_folder import ClassImages, class_folders, given_names, images_below, listed
from gmail_lightning.datasets.protocols import CLASS_PROTOCOLS, compare_counts, subset_of
from gmail_lightning.datasets.tables.parsed import read_text
from gmail_lightning.transforms.text import prompt_class_names, prompt_templates

SetName = Literal["caltech101", "dtd", "fgvc_aircraft", "food101", "imagenet", "oxford_pets", "stanford_cars", "sun397"]
BY_FOLDER = ("caltech101", "imagenet")  # the published names are in alphabetical order of the folders
TRAIN_PER_CLASS = 30  # of Caltech101
SUN397_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}


class ClassificationDataset(ClassImages):
    """One of the sets that CLIP and GMAIL (Table 4) classify, in the layout of torchvision's data set of that name.

    Prompts and class names are those that CLIP published. Caltech101 has its background class, as CLIP has it. For
    ImageNet the folders are ``imagenet/train`` and ``imagenet/val``, with one folder per WordNet id.

    Args:
        name: ``caltech101``, ``dtd``, ``fgvc_aircraft``, ``food101``, ``imagenet``, ``oxford_pets``, ``stanford_cars``
            or ``sun397``.
        root: Folder that holds the folder of the set, such as ``ROOT/dtd/dtd/images``.
        split: As torchvision calls it; ``test`` by default, ``val`` for ImageNet. For Caltech101 and SUN397, which
            torchvision does not split, also ``all``.
        modality: ``real``, or ``generated`` where the folder holds generated images in the same layout.
        class_names: Other names than the published ones; see ``ImageFolder``.
        subset: Whether classes and images may be others than published; ``summary`` says so.
        check_counts: False is the earlier name of ``subset=True``.
        space: As in ``ImageFolder``.

    Raises:
        DataError: If files are missing, a class has no published name, or the counts differ.
        ValueError: If the set or the split is unknown; lists the known ones.
    """

    def __init__(
        self,
        name: SetName,
        root: str | Path,
        split: str | None = None,
        modality: ModalityName = "real",
        class_names: list[str] | dict[str, str] | str | Path | None = None,
        subset: bool = False,
        check_counts: bool = True,
        space: str = "",
    ) -> None:
        subset = subset or not check_counts
        if name not in CLASS_PROTOCOLS:
            raise ValueError(f"Unknown set {name!r}. Known: {', '.join(CLASS_PROTOCOLS)}.")
        protocol = CLASS_PROTOCOLS[name]
        split = protocol.split if split is None else split
        if split not in protocol.images:
            raise ValueError(f"Unknown split {split!r} of {name}. Known: {', '.join(protocol.images)}.")
        self.name, self.root = name, Path(root)
        place = self.root / protocol.folder
        note = f" ({protocol.note})" if protocol.note else ""
        try:
            paths, label, classes, left_out = _read(name, self.root, split)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{place}: not {name} as torchvision reads it: {error}. Unpack it there{note}.") from error
        files = [path.relative_to(self.root).as_posix() for path in paths]
        if not files:
            raise DataError(f"{place}: split {split!r} has no images.")
        expected = {"classes": protocol.classes, "images": protocol.images[split]}
        if not subset:
            found = {"classes": len(classes), "images": len(files)}
            fix = f"Unpack the whole archive for the split {split!r}, or say subset=True."
            compare_counts(place, name, found, expected, fix)
        order = sorted(range(len(files)), key=files.__getitem__)  # torchvision's may be that of the file system
        self.class_names = given_names(place, classes, class_names) or published_names(name, classes)
        self.templates = prompt_templates(name)
        self.set_rows([files[i] for i in order], [label[i] for i in order], modality, space)
        self.split = "train" if split in ("train", "trainval") else split
        self.summary = (
            f"{place}: {subset_of(expected) if subset else ''}protocol {name}, split {split}{note}: "
            f"{len(classes):,} classes, {len(files):,} images, {len(self.templates)} prompts; CLIP reports "
            f"{protocol.metric}{'; ' * bool(left_out)}{left_out}."
        )


def published_names(name: str, classes: list[str]) -> list[str]:
    """Returns the published names of ``classes``, in their order; spelling may differ in all but letters and digits.

    Raises:
        DataError: If a class has none, or a folder is none of the archive's.
    """
    published = prompt_class_names(name)
    if name in BY_FOLDER:
        if len(classes) != len(published):
            raise DataError(
                f"{name}: {len(classes)} class folders instead of {len(published)}, so that it is not known which is "
                "which. Complete them, or give class_names."
            )
        strange = [one for one, own in zip(classes, published, strict=True) if not _is_folder_of(name, one, own)]
        if strange:
            rule = "WordNet ids, such as n01440764" if name == "imagenet" else "those of 101_ObjectCategories"
            raise DataError(
                f"{name}: {len(strange)} class folders are not where the published names have them: "
                f"{', '.join(strange[:5])}. Name the folders as the archive does ({rule}), or give class_names."
            )
        return published
    by_letters = {_letters(one): one for one in published}
    unknown = [one for one in classes if _letters(one) not in by_letters]
    if unknown:
        raise DataError(
            f"{name}: {len(unknown)} classes have no published name: {', '.join(unknown[:5])}. Check the files, or "
            "give class_names."
        )
    return [by_letters[_letters(one)] for one in classes]


def _is_folder_of(name: str, folder: str, published: str) -> bool:
    """Whether a folder may hold the class: a WordNet id; or, for Caltech101, its first word is in the class's name."""
    if name == "imagenet":
        return re.fullmatch(r"n\d{8}", folder) is not None
    words, known = (
        [word.removesuffix("s") for word in re.findall("[a-z]+", one.lower())] for one in (folder, published)
    )
    return bool(words) and words[0] in known


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _read(name: str, root: Path, split: str) -> tuple[list[Path], list[int], list[str], str]:
    """Files, labels, classes and what was left out; from torchvision's data sets where lists name the files.

    Without decoding, their columns are private there.
    """
    if name in BY_FOLDER:
        folder = root / (f"imagenet/{split}" if name == "imagenet" else CLASS_PROTOCOLS[name].folder)
        found = class_folders(folder)
        paths = [folder / file for file in found.files]
        keep = _caltech101_split(paths, found.label, split) if name == "caltech101" else range(len(paths))
        return [paths[i] for i in keep], [found.label[i] for i in keep], found.folders, found.left_out
    if name == "sun397":
        return _sun397(root / "SUN397", split)
    from torchvision import datasets

    data: Any
    if name == "dtd":
        data = datasets.DTD(root, split)
    elif name == "fgvc_aircraft":
        data = datasets.FGVCAircraft(root, split)
    elif name == "food101":
        data = datasets.Food101(root, split)
    elif name == "oxford_pets":
        data = datasets.OxfordIIITPet(root, split)
        return data._images, data._labels, data.classes, ""
    elif name == "stanford_cars":
        if find_spec("scipy") is None:
            raise ModuleNotFoundError("Stanford Cars lists its images in .mat files: install scipy to read them.")
        data = datasets.StanfordCars(root, split)
        return [Path(path) for path, _ in data._samples], [int(i) for _, i in data._samples], data.classes, ""
    return [Path(path) for path in data._image_files], data._labels, data.classes, ""


def _sun397(folder: Path, split: str) -> tuple[list[Path], list[int], list[str], str]:
    """Not by torchvision, which does not follow links, and reads hidden folders."""
    classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines()]
    left_out: Counter[str] = Counter()
    if split == "all":
        files = images_below(folder, left_out)
    else:
        files = [line.lstrip("/") for line in read_text(folder / SUN397_LISTS[split]).split()]
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} images of the list are missing, the first is {folder / missing[0]}"
            )
    number = {name: i for i, name in enumerate(classes)}
    label = [number["/".join(Path(file).parts[1:-1])] for file in files]
    return [folder / file for file in files], label, classes, listed(left_out)


def _caltech101_split(paths: list[Path], label: list[int], split: str) -> list[int]:
    """Numbers of the images of a split: of each class, those with the smallest hashes are for training."""
    if split == "all":
        return list(range(len(paths)))
    hashes = stable_ids(f"{path.parent.name}/{path.name}" for path in paths)
    order = np.lexsort((hashes, np.array(label)))
    _, start, count = np.unique(np.array(label)[order], return_index=True, return_counts=True)
    rank = np.arange(len(paths)) - np.repeat(start, count)
    chosen: list[int] = order[(rank < TRAIN_PER_CLASS) == (split == "train")].tolist()
    return chosen
