"""The abstract bases: the whole surface that a model of one's own has to fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Literal, NamedTuple

from torch import Tensor, nn

from gmail_lightning.types import ImageSpec, TextSpec

ROLES = ("q", "k", "v", "out", "fc1", "fc2")
Tower = Literal["image", "text"]


class LoRATarget(NamedTuple):
    """One matrix of one transformer block: rows ``start:stop`` of ``getattr(module, parameter)``."""

    block: int
    role: str  # one of ROLES
    module: nn.Module
    parameter: str  # name of a parameter of ``module``, shape (out, in)
    start: int  # a fused projection holds several roles, one under the other
    stop: int


class ImageEncoder(nn.Module, ABC):
    """An image tower. ``encode_*`` return unnormalised features; losses and metrics normalise, once."""

    #: True once the weights are more than a random initialisation; evaluation refuses an encoder without.
    pretrained: bool = False
    #: Name of the non-linearity and pixel statistics; they go into the fingerprint of a checkpoint's base.
    activation: str = ""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    @abstractmethod
    def image_spec(self) -> ImageSpec:
        """Size and resizing of the pixels, from the configuration."""

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width D of ``encode_image``."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to features of shape (B, D)."""

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to the hidden states of one block, shape (B, T, W); ``layer=-1`` is the last block."""
        raise NotImplementedError(f"{type(self).__name__} has no image_tokens: implement it to use patch tokens.")

    @abstractmethod
    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of a tower that play the given roles, block by block."""


class DualEncoder(ImageEncoder):
    """An image tower and a text tower with a joint embedding."""

    @property
    @abstractmethod
    def text_spec(self) -> TextSpec:
        """Tokeniser and context length, from the configuration."""

    @abstractmethod
    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to features of shape (B, D)."""

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """Scalar factor of the cosine similarities, already exponentiated."""

    @property
    def logit_bias(self) -> Tensor | None:
        """Scalar added to the scaled similarities (SigLIP), or None."""
        return None
