"""The abstract bases of encoders: the surface that one of one's own has to fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple, Protocol, cast

import torch
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
    """An image tower. ``encode_*`` return unnormalised features; losses and metrics normalise, once.

    Args:
        mean: Mean of the pixels, per channel; by default the class attribute.
        std: Standard deviation of the pixels, per channel; by default the class attribute.
    """

    #: True once the weights are more than a random initialisation; evaluation refuses an encoder without.
    pretrained: bool = False
    #: Name of the non-linearity and pixel statistics; they go into the fingerprint of a checkpoint's base.
    activation: str = ""
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self.mean = self.mean if mean is None else tuple(float(value) for value in mean)
        self.std = self.std if std is None else tuple(float(value) for value in std)
        self.register_buffer("pixel_mean", torch.tensor(self.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.std).view(-1, 1, 1), persistent=False)

    def normalize_pixels(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to ``(image - mean) / std``.

        Raises:
            ValueError: If the pixels are not of the size in ``image_spec`` or not floating point.
        """
        size = self.image_spec.size
        if image.ndim != 4 or tuple(image.shape[2:]) != size or not image.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes float pixels in [0, 1] of shape (B, 3, {size[0]}, {size[1]}), "
                f"got {image.dtype} of shape {tuple(image.shape)}."
            )
        return (image - self.get_buffer("pixel_mean")).div_(self.get_buffer("pixel_std"))

    @property
    @abstractmethod
    def image_spec(self) -> ImageSpec:
        """Size and resizing of the pixels, from the configuration."""

    @property
    def text_spec(self) -> TextSpec | None:
        """Tokeniser and context length of the text tower; None: there is none, as in all but a ``DualEncoder``."""
        return None

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width D of ``encode_image``."""

    @abstractmethod
    def encode_image(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to features of shape (B, D)."""

    @property
    def wrapped(self) -> nn.Module:
        """The model whose state dict a merged export holds: the encoder itself, unless it wraps one."""
        return self

    def plain_only(self) -> AbstractContextManager[None]:
        """Inside, an encoder that routes modalities sees as the plain one; any other does anyway."""
        return nullcontext()

    @property
    def plain(self) -> ImageEncoder:
        """The encoder itself; of one that routes modalities the encoder that it routes."""
        return self

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """Maps pixels to the hidden states of one block, shape (B, T, W); ``layer=-1`` is the last block.

        Patch tokens only, as LLaVA reads them: a class token is dropped, and no final norm is applied.
        """
        raise NotImplementedError(f"{type(self).__name__} has no image_tokens: implement it to use patch tokens.")

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """``encode_image`` and ``image_tokens`` of the same pixels; here in two passes, an encoder may do it in one."""
        return self.encode_image(image), self.image_tokens(image, layer=layer)

    def lora_targets(self, roles: Collection[str], tower: Tower = "image") -> list[LoRATarget]:
        """Lists the matrices of a tower that play the given roles, block by block; here none, which LoRA refuses."""
        return []

    def encode_text(self, text: Tensor) -> Tensor:
        """Of a ``DualEncoder`` alone.

        Raises:
            TypeError: Here.
        """
        raise TypeError(f"{type(self).__name__} has no text tower: give a DualEncoder.")

    @property
    def logit_scale(self) -> Tensor:
        """As ``encode_text``."""
        raise TypeError(f"{type(self).__name__} has no text tower: give a DualEncoder.")

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the text tower and of the logits: all but those of the image tower."""
        return iter(())


class DualEncoder(ImageEncoder):
    """An image tower and a text tower with a joint embedding."""

    @property
    @abstractmethod
    def text_spec(self) -> TextSpec:
        """Tokeniser and context length, from the configuration."""

    @abstractmethod
    def encode_text(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to features of shape (B, D)."""

    def text_tokens(self, text: Tensor) -> Tensor:
        """Maps token ids of shape (B, L) to the hidden states behind the final norm, shape (B, L, W).

        What a diffusion model attends to of its text encoder, so that one text tower can serve both.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no text_tokens: implement it to share the text tower with a diffusion model."
        )

    def text_features_and_tokens(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """``encode_text`` and ``text_tokens`` of the same ids; here in two passes, an encoder may do it in one."""
        return self.encode_text(text), self.text_tokens(text)

    def check_token_ids(self, text: Tensor) -> None:
        """For the text tower's methods.

        Raises:
            ValueError: If token ids are not of shape (B, L), L being the context length of ``text_spec``.
        """
        if text.ndim != 2 or text.shape[1] != self.text_spec.context_length:
            raise ValueError(
                f"Token ids of shape {tuple(text.shape)}, but this text tower has context length "
                f"{self.text_spec.context_length}: tokenise with the encoder's own text_spec."
            )

    @property
    @abstractmethod
    def logit_scale(self) -> Tensor:
        """Scalar factor of the cosine similarities, already exponentiated."""

    @property
    def log_scale(self) -> nn.Parameter | None:
        """The parameter whose exponential is ``logit_scale``, which training caps; None where there is none."""
        if "_log_scale" not in self.__dict__:  # looked for once: values are compared, which waits for a device
            scale = self.logit_scale.detach().squeeze()
            scalars = (p for p in self.parameters() if p.numel() == 1)
            found = next((p for p in scalars if torch.equal(p.detach().exp().squeeze(), scale)), None)
            self.__dict__["_log_scale"] = found
        return cast(nn.Parameter | None, self.__dict__["_log_scale"])

    @property
    def logit_bias(self) -> Tensor | None:
        """Scalar added to the scaled similarities (SigLIP), or None."""
        return None

    def stretch_context(self, length: int, keep: int) -> None:
        """Gives the text tower a longer context, in place; see ``models.stretch_context``.

        Raises:
            TypeError: If the encoder cannot.
        """
        raise TypeError(f"stretch_context needs an encoder that implements it, not {type(self).__name__}.")

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the text tower and of the logits: all but those of the image tower."""
        raise NotImplementedError(f"{type(self).__name__} has no text_parameters: implement it for text_side: full.")


class ImageTower(Protocol):
    """What images can be seen by: an ``ImageEncoder``, a ``Branch``, or one side of a router."""

    def encode_image(self, image: Tensor) -> Tensor:
        """See ``ImageEncoder``."""

    def image_tokens(self, image: Tensor, layer: int = -2) -> Tensor:
        """See ``ImageEncoder``."""

    def image_features_and_tokens(self, image: Tensor, layer: int = -2) -> tuple[Tensor, Tensor]:
        """See ``ImageEncoder``."""


class ImageReader(ABC):
    """How a task or a captioner looks at images; a router hands it the tower that each row goes through."""

    #: Block whose patch tokens are read, as feature stores record it; None where the whole tower is.
    layer: int | None = None
    #: Whether it is a sequence of tokens, shape (B, T, W), and not one vector (B, D).
    gives_tokens: bool = False

    @abstractmethod
    def read(self, tower: ImageTower, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to what is read, shape (B, D) or (B, T, W)."""

    def read_ids(self, token_ids: Tensor) -> Tensor:
        """Maps token ids of images (B, T), made without pixels, to what ``read`` would give.

        Raises:
            TypeError: Of a reader that looks at pixels.
        """
        raise TypeError(
            f"{type(self).__name__} reads pixels, and the batch holds token ids of images: give a reader of them, such "
            "as TokenCodes, or data sets with pixels."
        )

    def width(self, encoder: ImageEncoder) -> int | None:
        """Width D or W of what is read; None where it shows only once something is."""
        return None

    def last_block(self, encoder: ImageEncoder) -> int | None:
        """Number of the last block that is passed, counted from the front; None where the whole tower is.

        Raises:
            ValueError: If the tower has no such block.
        """
        return None
