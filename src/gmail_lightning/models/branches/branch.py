"""``Branch``: the base of what generated images pass in place of the plain tower."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder


class Branch(nn.Module, ABC):
    """What generated images pass in place of the plain tower: LoRA, a full copy, or something of one's own.

    A subclass adds its tensors in ``attach`` and says in ``encode_image`` and ``image_tokens`` how images are seen with
    them. At first that should be what the plain tower sees. Checkpoints hold the tensors, frozen ones too, and
    ``settings``.
    """

    encoder: ImageEncoder

    def attach(self, encoder: ImageEncoder) -> None:
        """Makes the tensors for this encoder, which is frozen and stays so. A router calls it once.

        Raises:
            ValueError: If the branch belongs to an encoder already.
        """
        if "encoder" in self.__dict__:
            raise ValueError(f"This {type(self).__name__} belongs to another encoder already: make a branch for each.")
        self.__dict__["encoder"] = encoder  # not a part of this module: it is the router's

    @property
    def tower(self) -> ImageEncoder:
        """What generated images are seen by: the plain encoder, as far as a subclass says nothing else."""
        return self.encoder

    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to features of shape (B, D)."""
        return self.tower.encode_image(image)

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to the hidden states of one block, shape (B, T, W); see ``ImageEncoder``."""
        return self.tower.image_tokens(image, layer=layer)

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """``encode_image`` and ``image_tokens`` of the same pixels."""
        return self.encode_image(image), self.image_tokens(image, layer=layer)

    def off(self) -> AbstractContextManager[None]:
        """Inside, the encoder is the plain one; of a branch that changes the encoder itself, as LoRA does."""
        return nullcontext()

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments of the constructor as plain values, from which a checkpoint builds the branch again."""

    @property
    def unseen_settings(self) -> Any:
        """Those that neither names nor shapes of the tensors show, so that features are known by them, too."""
        return self.settings

    def behind(self, block: int) -> Iterator[nn.Module | nn.Parameter]:
        """What the patch tokens of a block do not pass, so that no loss on these reaches it.

        Here it is looked up: what gets no gradient.
        """
        own = [p for module in self.adapters() for p in module.parameters() if p.requires_grad]
        if not own:
            return iter(())
        with torch.enable_grad():
            tokens = self.image_tokens(torch.zeros(1, 3, *self.encoder.image_spec.size).to(own[0]), layer=block)
            reached = torch.autograd.grad(tokens.sum(), own, allow_unused=True) if tokens.requires_grad else None
        found = reached or [None] * len(own)
        return (p for p, gradient in zip(own, found, strict=True) if gradient is None)

    def adapters(self) -> Iterator[nn.Module]:
        """Modules that hold the tensors."""
        return iter((self,))

    def merged(self) -> dict[str, Tensor]:
        """State dict of ``encoder.wrapped`` with which the plain model sees as this branch does, to be exported.

        Raises:
            ValueError: Where there is none.
        """
        raise ValueError(f"A {type(self).__name__} cannot be merged into the plain model: keep the checkpoint.")

    def __repr__(self) -> str:
        """Class and settings in one line, for ``ModalityEncoder.describe``."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({settings})"
