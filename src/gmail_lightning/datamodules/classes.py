"""The classes that the data sets of one stream have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.types import Classes

DEFAULT_TEMPLATES = ["a photo of a {}."]  # CLIP, section 3.1.4; where no data set has its own


def agreed_classes(datasets: Sequence[ImageTextDataset], where: str) -> Classes:
    """Returns the classes, and the prompts for them, that all data sets agree on.

    Args:
        datasets: The data sets of a stream; a label must mean the same class in each.
        where: Name of the stream, for error messages.

    Raises:
        DataError: If there is no data set, one has no classes, a label is none of them, or two have not the same
            classes or prompts; names both and the first difference.
    """
    if not datasets:
        raise DataError(f"{where}: no data sets, so no classes. Give the data module some.")
    for dataset in datasets:
        if dataset.class_names is None or dataset.label is None:
            raise DataError(
                f"{where}: {_name(dataset)} has no classes. Classification needs a label and the name of its class for "
                "every row: use a data set of classes, such as ImageFolder, or ManifestDataset with class names in the "
                "column label."
            )
        outside = np.flatnonzero((dataset.label < 0) | (dataset.label >= len(dataset.class_names)))
        if len(outside):
            row = int(outside[0])
            raise DataError(
                f"{where}: {len(outside)} of {len(dataset)} rows of {_name(dataset)} have a label outside of the "
                f"{len(dataset.class_names)} classes, numbered from 0; the first is row {row} "
                f"({dataset.describe(row)}), label {dataset.label[row]}. Give every row a class, or leave out those "
                "that have none."
            )
    first = datasets[0]
    names = list(first.class_names or [])
    templates, chosen_by = first.templates, first
    for other in datasets[1:]:
        for label, (one, two) in enumerate(zip_longest(names, other.class_names or [])):
            if one != two:
                raise DataError(
                    f"{where}: the classes do not match. Label {label} is {_quoted(one)} in {_name(first)} "
                    f"({len(names)} classes) and {_quoted(two)} in {_name(other)} ({len(other.class_names or [])}). "
                    "Give all data sets of a stream the same class names, in the same order."
                )
        if templates is None:
            templates, chosen_by = other.templates, other
        elif other.templates is not None and other.templates != templates:
            raise DataError(
                f"{where}: the prompts do not match: {_name(chosen_by)} has {len(templates)}, the first "
                f"{_quoted(next(iter(templates), None))}, {_name(other)} has {len(other.templates)}, the first "
                f"{_quoted(next(iter(other.templates), None))}. Give all data sets of a stream the same templates."
            )
    return Classes(names, list(DEFAULT_TEMPLATES if templates is None else templates))


def _name(dataset: ImageTextDataset) -> str:
    place = getattr(dataset, "path", None) or getattr(dataset, "root", None)
    return type(dataset).__name__ if place is None else f"{type(dataset).__name__} {place}"


def _quoted(name: str | None) -> str:
    return "missing" if name is None else repr(name)
