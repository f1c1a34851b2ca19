"""What is read of a picture: pooled features, patch tokens of a block, or something of one's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gmail_lightning.models.base import ROLES, ImageEncoder, ImageReader, ImageTower
from gmail_lightning.models.generative import ImageTokenizer


@dataclass(frozen=True)
class PooledFeatures(ImageReader):
    """``encode_image``: one vector per image, in the joint space of a dual encoder."""

    def read(self, tower: ImageTower, image: Tensor) -> Tensor:
        """Features of shape (B, D)."""
        return tower.encode_image(image)

    def width(self, encoder: ImageEncoder) -> int:
        """The encoder's ``embed_dim``."""
        return encoder.embed_dim


@dataclass(frozen=True)
class PatchTokens(ImageReader):
    """``image_tokens``: the hidden states of one block, patch by patch, without class token.

    Attributes:
        layer: The block; -2 is the last but one, as LLaVA reads (arXiv 2304.08485).
    """

    layer: int = -2

    gives_tokens = True

    def read(self, tower: ImageTower, image: Tensor) -> Tensor:
        """Tokens of shape (B, T, W)."""
        return tower.image_tokens(image, layer=self.layer)

    def last_block(self, encoder: ImageEncoder) -> int:
        """``layer``, counted from the front."""
        return block_number(encoder, self.layer)


class TokenCodes(nn.Module, ImageReader):
    """Codes of an image tokenizer, of pixels or of token ids that a generator made without any (Synth2).

    The branches take no part: the tokenizer is one of its own.

    Args:
        tokenizer: It stays as it is.
    """

    gives_tokens = True

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.requires_grad_(False).eval()

    def read(self, tower: ImageTower, image: Tensor) -> Tensor:
        """Codes of shape (B, T, W)."""
        return self.read_ids(self.tokenizer.encode(image))

    def read_ids(self, token_ids: Tensor) -> Tensor:
        """Codes of shape (B, T, W)."""
        return self.tokenizer.embed(token_ids)

    def width(self, encoder: ImageEncoder) -> int:
        """The tokenizer's."""
        return self.tokenizer.width


def block_number(encoder: ImageEncoder, layer: int, name: str = "layer") -> int:
    """Number of a block of the image tower, counted from the front.

    Raises:
        ValueError: If there is no such block; ``name`` is what the layer is called where it was given.
    """
    num_blocks = 1 + max((target.block for target in encoder.lora_targets(ROLES)), default=-1)
    if not -num_blocks <= layer < num_blocks:
        raise ValueError(f"{name}={layer}: this tower has {num_blocks} blocks, and -1 is the last.")
    return layer % num_blocks
