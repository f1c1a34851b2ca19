"""The published evaluation protocols: which file, which split, and how many images and texts it must come to."""

from __future__ import annotations

from typing import NamedTuple

from gmail_lightning.datasets.base import DataError


class CaptionProtocol(NamedTuple):
    """An evaluation set of images and captions.

    Attributes:
        images: Number of images.
        captions: Number of captions.
        file: The annotations to read.
        split: What the set is called; as training data, anything but ``train`` is refused.
        what: How the field describes it.
        captions_per_image: So many captions of each image, the first in the file; None for all.
    """

    images: int
    captions: int
    file: str
    split: str
    what: str
    captions_per_image: int | None = None


CAPTION_PROTOCOLS = {
    "coco_5k": CaptionProtocol(
        5_000, 25_000, "captions_val2017.json", "val", "COCO val2017, the first five captions of each image", 5
    ),
    "karpathy_test": CaptionProtocol(
        5_000, 25_010, "dataset_coco.json", "test", "Karpathy's test split of COCO, all captions"
    ),
    "flickr30k_train": CaptionProtocol(
        29_000, 145_000, "dataset_flickr30k.json", "train", "Karpathy's training split of Flickr30k"
    ),
    "flickr30k_val": CaptionProtocol(
        1_014, 5_070, "dataset_flickr30k.json", "val", "Karpathy's validation split of Flickr30k"
    ),
    "flickr30k_1k": CaptionProtocol(
        1_000, 5_000, "dataset_flickr30k.json", "test", "Karpathy's test split of Flickr30k"
    ),
    # What Long-CLIP's evaluation reads, and so what the numbers of GMAIL's Tables 3 and 7 imply.
    "flickr30k_full": CaptionProtocol(
        31_783, 158_915, "results_20130124.token", "full", "the whole of Flickr30k, as Long-CLIP evaluates"
    ),
    "sharegpt4v_1k": CaptionProtocol(
        1_000,
        1_000,
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "val",
        "the first 1,000 entries of ShareGPT4V, as Long-CLIP evaluates",
    ),
    "urban1k": CaptionProtocol(1_000, 1_000, "caption/*.txt", "test", "Urban1k, as Long-CLIP evaluates"),
}


class ClassProtocol(NamedTuple):
    """A set of classes, as CLIP (arXiv 2103.00020, Table 9) evaluates it.

    Attributes:
        classes: Number of classes.
        images: Number of images of each split.
        split: The split that is evaluated.
        folder: Below the root, as torchvision lays it out.
        metric: What CLIP reports.
        note: What the source leaves open, and how it is settled here.
    """

    classes: int
    images: dict[str, int]
    split: str
    folder: str
    metric: str = "accuracy"
    note: str = ""


CLASS_PROTOCOLS = {
    "caltech101": ClassProtocol(
        102,
        {"train": 3_060, "test": 6_084, "all": 9_144},
        "test",
        "caltech101/101_ObjectCategories",
        "mean per class",
        "no list of a split is published: a stable hash takes 30 images of each class for training",
    ),
    "dtd": ClassProtocol(
        47, {"train": 1_880, "val": 1_880, "test": 1_880}, "test", "dtd/dtd", note="first of ten partitions"
    ),
    "fgvc_aircraft": ClassProtocol(
        100,
        {"train": 3_334, "val": 3_333, "trainval": 6_667, "test": 3_333},
        "test",
        "fgvc-aircraft-2013b",
        "mean per class",
    ),
    "food101": ClassProtocol(101, {"train": 75_750, "test": 25_250}, "test", "food-101"),
    "imagenet": ClassProtocol(1_000, {"train": 1_281_167, "val": 50_000}, "val", "imagenet"),
    "oxford_pets": ClassProtocol(37, {"trainval": 3_680, "test": 3_669}, "test", "oxford-iiit-pet", "mean per class"),
    "stanford_cars": ClassProtocol(196, {"train": 8_144, "test": 8_041}, "test", "stanford_cars"),
    "sun397": ClassProtocol(
        397,
        {"train": 19_850, "test": 19_850, "all": 108_754},
        "test",
        "SUN397",
        note="first of ten partitions, Training_01.txt and Testing_01.txt in the folder",
    ),
}


def subset_of(expected: dict[str, int]) -> str:
    """What a summary calls a data set whose counts are not compared, before the name of the protocol."""
    return f"a subset ({' and '.join(f'{count:,} {kind}' for kind, count in expected.items())} are published), not "


def compare_counts(place: object, protocol: str, found: dict[str, int], expected: dict[str, int], fix: str) -> None:
    """Compares what a data set holds with what its protocol says.

    Args:
        place: The file or folder.
        protocol: Name of the protocol.
        found: Number of each kind of thing, such as ``images``.
        expected: The same of the protocol.
        fix: What to do where they differ.

    Raises:
        DataError: If any number differs; names all of them.
    """
    wrong = [f"{found[kind]:,} {kind} instead of {count:,}" for kind, count in expected.items() if found[kind] != count]
    if wrong:
        raise DataError(f"{place}: not the protocol {protocol}: {', '.join(wrong)}. {fix}")
