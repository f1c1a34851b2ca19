"""Rows of two modalities, each through what its images pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gmail_lightning.models.base import ImageTower
from gmail_lightning.models.branches.adapters import Projection
from gmail_lightning.models.chunks import in_chunks
from gmail_lightning.types import Modality, modality_rows

Read = Callable[[ImageTower, Tensor], Tensor]
T = TypeVar("T")


class ModalityIndex(NamedTuple):
    """Which rows are real and which generated, as index tensors: nothing then has to be asked of the device."""

    real: Tensor  # (R,) int64
    generated: Tensor  # (G,) int64


class Side(NamedTuple):
    """What the images of one modality pass."""

    tower: ImageTower
    projection: Projection | None
    frozen: bool  # no gradient reaches the tower
    context: Callable[[], AbstractContextManager[None]]  # that it is run in

    def encode_image(self, image: Tensor) -> Tensor:
        """Features of shape (B, D), projected."""
        return self._projected(self._run(self.tower.encode_image, image))

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Patch tokens of shape (B, T, W); the projection acts in the joint space and takes no part."""
        return self._run(self.tower.image_tokens, image, layer=layer)

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """Both."""
        features, tokens = self._run(self.tower.image_features_and_tokens, image, layer=layer)
        return self._projected(features), tokens

    def _run(self, see: Callable[..., T], image: Tensor, **settings: int) -> T:
        if not self.frozen:
            return see(image, **settings)
        with torch.no_grad(), self.context():
            return see(image, **settings)

    def _projected(self, features: Tensor) -> Tensor:
        return features if self.projection is None else self.projection(features)


def route(
    read: Read, image: Tensor, modality: Tensor | ModalityIndex, sides: tuple[Side, Side], chunk_size: int | None
) -> Tensor:
    """Reads images, the real ones through the first side and the generated ones through the second.

    Args:
        read: Maps a tower and pixels of n rows to a tensor of n rows.
        image: Pixels, shape (B, 3, H, W).
        modality: ``Modality`` of each row, shape (B,), or which rows are which.
        sides: By ``Modality``.
        chunk_size: See ``in_chunks``.

    Returns:
        What was read, B rows.
    """
    index = modality if isinstance(modality, ModalityIndex) else _index(modality, len(image))
    for which, rows in zip(Modality, index, strict=True):
        if len(rows) == len(image):
            return through(sides[which], read, image, chunk_size)
    parts = [through(sides[which], read, image[rows], chunk_size) for which, rows in zip(Modality, index, strict=True)]
    return torch.cat(parts)[torch.cat(index).argsort()]


def through(side: Side, read: Read, image: Tensor, chunk_size: int | None) -> Tensor:
    """Reads images through one side; rows that no gradient reaches run once, in chunks too."""
    return in_chunks(lambda piece: read(side, piece), image, chunk_size=chunk_size, recompute=not side.frozen)


def _index(modality: Tensor, num_images: int) -> ModalityIndex:
    if modality.shape != (num_images,):
        raise ValueError(f"{num_images} images, but modality has shape {tuple(modality.shape)}: give one per image.")
    rows = modality_rows({"modality": modality})
    return ModalityIndex(rows["real_row"], rows["generated_row"])
