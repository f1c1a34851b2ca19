"""What a row shows: pixels, features that were cached, or token ids. A further kind is one more entry of ``KINDS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gmail_lightning.datasets.base import DataError, ImageTextDataset
from gmail_lightning.transforms.image import resize
from gmail_lightning.types import ImageSpec

#: Turns the decoded pixels of a row, uint8 of shape (3, H, W), into its views, by name.
Look = Callable[[Tensor], dict[str, Tensor]]


class PictureKind(NamedTuple):
    """One way in which a picture may stand in a batch.

    Attributes:
        row: Key of a batch under which the rows that have this kind are numbered.
        read: Returns what a row has of this kind, by key of the batch; None where it has nothing.
    """

    row: str
    read: Callable[[ImageTextDataset, int, Look], dict[str, Tensor] | None]


class Picture(NamedTuple):
    """What one row shows."""

    kind: PictureKind
    values: dict[str, Tensor]  # by key of the batch


def _read_features(dataset: ImageTextDataset, index: int, look: Look) -> dict[str, Tensor] | None:
    features = dataset.feature(index)
    return None if features is None else {"image_features": features}


def _read_token_ids(dataset: ImageTextDataset, index: int, look: Look) -> dict[str, Tensor] | None:
    ids = dataset.token_ids(index)
    if ids is None:
        return None
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise DataError(
            f"{dataset.describe(index)}: token_ids returned {ids.dtype} of shape {tuple(ids.shape)}, not int64 of "
            "shape (T,)."
        )
    return {"image_token_ids": ids}


def _read_pixels(dataset: ImageTextDataset, index: int, look: Look) -> dict[str, Tensor] | None:
    return look(dataset.image(index))


FEATURES = PictureKind("feature_row", _read_features)
TOKEN_IDS = PictureKind("token_row", _read_token_ids)
PIXELS = PictureKind("image_row", _read_pixels)
#: The first that a row has is what a batch holds: pixels are decoded only where nothing was computed before.
KINDS = (FEATURES, TOKEN_IDS, PIXELS)


def read_picture(dataset: ImageTextDataset, index: int, look: Look) -> Picture:
    """Returns what a row shows.

    Args:
        dataset: Where the row is.
        index: Its number.
        look: Called with the decoded pixels, where these are what the row has.

    Raises:
        ImageDecodeError: If the pixels are needed and do not decode.
        DataError: If token ids are not what they must be.
    """
    found = ((kind, kind.read(dataset, index, look)) for kind in KINDS)
    return next(Picture(kind, values) for kind, values in found if values is not None)


def stack_pictures(pictures: Sequence[Picture], describe: Callable[[int], str]) -> dict[str, Tensor]:
    """Puts what the rows of a batch show side by side, each kind under its keys, with the rows that have it.

    Args:
        pictures: One per row of the batch.
        describe: Names a row of the batch, in messages.

    Returns:
        ``image`` (and further views) with ``image_row``, ``image_features`` with ``feature_row``, ``image_token_ids``
        with ``token_row``, as far as there are any; see ``ImageTextBatch``. The numbers of the rows ascend.

    Raises:
        DataError: If two rows of one kind have not the same shape or dtype.
    """
    batch: dict[str, Tensor] = {}
    for kind in KINDS:
        at = [i for i, picture in enumerate(pictures) if picture.kind is kind]
        for name in pictures[at[0]].values if at else ():
            batch[name] = _stack(name, [pictures[i].values[name] for i in at], at, describe)
        if at:
            batch[kind.row] = torch.tensor(at)
    return batch


def _stack(name: str, values: list[Tensor], at: list[int], describe: Callable[[int], str]) -> Tensor:
    first = values[0]
    for row, other in zip(at, values, strict=True):
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"{name} of {describe(at[0])} is {first.dtype} of shape {tuple(first.shape)}, that of {describe(row)} "
                f"{other.dtype} of shape {tuple(other.shape)}: they cannot stand in one batch. Make both with the same "
                "model."
            )
    return torch.stack(values)


def look_at(
    image: Tensor, images: Mapping[str, ImageSpec], augmentations: Sequence[nn.Module] = ()
) -> dict[str, Tensor]:
    """Returns every view of one picture, under one random draw of the augmentation.

    A single view is augmented after its resize, where it is small. Of several the picture itself is augmented, once,
    so that all show the same.

    Args:
        image: Decoded pixels, uint8 of shape (3, H, W).
        images: What each view is like, by name.
        augmentations: Map float pixels (3, h, w) in [0, 1] to the same shape; they draw from torch's generator.

    Returns:
        float32 in [0, 1], shape (3, h, w), by name.

    Raises:
        ValueError: If an augmentation changes the shape.
    """
    if not augmentations:
        return {name: resize(image, spec) for name, spec in images.items()}
    if len(images) == 1:
        return {name: _augmented(resize(image, spec), augmentations) for name, spec in images.items()}
    seen = _augmented(image.float().div_(255.0), augmentations).mul(255.0).round_().clamp_(0, 255).byte()
    return {name: resize(seen, spec) for name, spec in images.items()}


def _augmented(image: Tensor, augmentations: Sequence[nn.Module]) -> Tensor:
    for augmentation in augmentations:
        shape, image = image.shape, augmentation(image)
        if image.shape != shape:
            raise ValueError(
                f"{type(augmentation).__name__} turns an image of shape {tuple(shape)} into {tuple(image.shape)}: an "
                "augmentation keeps the shape; the resize is of the library, before it, and after it where a task asks "
                "for several views."
            )
    return image
