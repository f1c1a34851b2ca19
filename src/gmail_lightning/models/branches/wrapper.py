"""An encoder around another one, which it is as far as it says nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

from torch import Tensor, nn

from gmail_lightning.models.base import DualEncoder, ImageEncoder, LoRATarget, Tower
from gmail_lightning.models.branches.state import rename_state
from gmail_lightning.types import ImageSpec, TextSpec


class WrappedEncoder(DualEncoder):
    """Hands everything on to ``encoder``; of one without text tower what concerns texts is a ``TypeError``.

    In a state dict the keys of the encoder stand beside those of the other parts, without ``encoder.``.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__(encoder.mean, encoder.std)
        self.encoder = encoder
        self.pretrained, self.activation = encoder.pretrained, encoder.activation
        rename_state(self, _plain_name, _stored_name)

    def _fqn_modifiers(self) -> dict[str, str]:
        """Tells torch.distributed.checkpoint that ``encoder.`` is left out of the keys."""
        parts = (self.encoder.named_children(), self.encoder.named_parameters(recurse=False))
        return {name: "encoder" for part in parts for name, _ in part}

    @property
    def image_spec(self) -> ImageSpec:
        """As the plain encoder's."""
        return self.encoder.image_spec

    @property
    def embed_dim(self) -> int:
        """As the plain encoder's."""
        return self.encoder.embed_dim

    @property
    def plain(self) -> ImageEncoder:
        """The plain encoder."""
        return self.encoder

    @property
    def wrapped(self) -> nn.Module:
        """As the plain encoder's."""
        return self.encoder.wrapped

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """As the plain encoder's."""
        return self.encoder.lora_targets(roles, tower)

    @property
    def text_spec(self) -> TextSpec:
        """As the plain encoder's; None where it has no text tower."""
        return cast(TextSpec, self.encoder.text_spec)

    def encode_text(self, text: Tensor) -> Tensor:
        """As the plain encoder's."""
        return self.encoder.encode_text(text)

    def text_tokens(self, text: Tensor) -> Tensor:
        """As the plain encoder's; a projection of the text side acts in the joint space and so takes no part."""
        return cast(DualEncoder, self.encoder).text_tokens(text)

    def text_features_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_text`` and ``text_tokens`` of the same ids."""
        return cast(DualEncoder, self.encoder).text_features_and_tokens(text)

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """As the plain encoder's."""
        return self.encoder.text_parameters()

    @property
    def logit_scale(self) -> Tensor:
        """As the plain encoder's."""
        return self.encoder.logit_scale

    @property
    def log_scale(self) -> nn.Parameter | None:
        """As the plain encoder's."""
        return cast(DualEncoder, self.encoder).log_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """As the plain encoder's."""
        return cast(DualEncoder, self.encoder).logit_bias


def _plain_name(wrapper: nn.Module, name: str) -> str:
    return name.removeprefix("encoder.")


def _stored_name(wrapper: nn.Module, name: str) -> str:
    beside = {part for part, _ in wrapper.named_children()} - {"encoder"}
    return name if name.partition(".")[0] in beside else f"encoder.{name}"
