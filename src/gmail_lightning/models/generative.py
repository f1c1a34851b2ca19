"""The abstract bases of what makes images, and of what writes about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from gmail_lightning.models.base import ImageReader
from gmail_lightning.types import CaptionIds, CaptionSpec, PromptIds


class GeneratedImages(NamedTuple):
    """What a generator returns for B prompts."""

    image: Tensor  # (B, 3, H, W) float32 in [0, 1], on any device; a generator that fails leaves NaN
    flagged: list[bool]  # (B,) by the safety checker of the generator; False where there is none


class ImageTokenizer(nn.Module, ABC):
    """A model between pixels and a grid of discrete codes, such as a VQ autoencoder."""

    #: True once the weights are more than a random initialisation.
    pretrained: bool = False

    @property
    @abstractmethod
    def width(self) -> int:
        """Width W of the embedding of a code."""

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Maps pixels in [0, 1], shape (B, 3, H, W), to token ids (B, T)."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """Maps token ids (B, T) to their codes, shape (B, T, W)."""

    @abstractmethod
    def decode(self, token_ids: Tensor) -> Tensor:
        """Maps token ids (B, T) to pixels in [0, 1], shape (B, 3, H, W)."""


class ImageGenerator(nn.Module, ABC):
    """A text-to-image model."""

    #: True once the weights are more than a random initialisation; generation refuses a generator without.
    pretrained: bool = False

    @abstractmethod
    def generate(self, captions: list[str], seeds: list[int]) -> GeneratedImages:
        """Makes one image per caption; each depends on its caption and its seed alone, not on the batch."""

    @abstractmethod
    def describe(self) -> dict[str, str | int | float | None]:
        """Everything that the images depend on besides caption and seed, as plain values: the generation recipe.

        Holds at least ``generator``, ``revision``, ``scheduler``, ``steps``, ``guidance`` and ``size``.
        """

    def truncated(self, captions: list[str]) -> list[bool]:
        """Whether the text encoder cuts each caption, length B."""
        return [False] * len(captions)


class Captioner(nn.Module, ABC):
    """A model that writes captions for image features. It takes what an image encoder gives, never pixels."""

    #: True once the weights are more than a random initialisation; evaluation refuses a captioner without.
    pretrained: bool = False
    #: What it sees of an image.
    reader: ImageReader
    #: Width of the features or tokens that are read; None accepts any.
    image_dim: int | None = None
    #: Captions that were cut in training so far, on this process.
    truncated: int = 0
    #: Tokens that the last ``loss`` is a mean over, as ``losses.counted_tokens``; ``loss`` sets it, for accumulated
    #: gradients.
    tokens: Tensor | None = None

    def describe(self) -> dict[str, str | int | float | bool | None]:
        """What writing depends on and no trained tensor shows; a checkpoint with other values is refused."""
        return {}

    @property
    @abstractmethod
    def caption_spec(self) -> CaptionSpec:
        """How texts become ids; from the configuration and the tokenizer. The data workers call it."""

    def encode(self, captions: list[str], questions: list[str] | None = None) -> CaptionIds:
        """Ids of B captions, and of B questions that they answer, as the data workers make them: for ``loss``."""
        return self.caption_spec.encode(captions, questions or [""] * len(captions))

    def encode_questions(self, questions: list[str]) -> PromptIds:
        """Ids of B questions, "" for nothing, as the data workers make them: for ``generate``."""
        return self.caption_spec.encode_questions(questions)

    @abstractmethod
    def loss(
        self,
        image_features: Tensor,
        ids: CaptionIds,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean negative log-likelihood of the tokens of the captions, a scalar; see ``losses.caption_loss``.

        Args:
            image_features: What ``reader`` gives, shape (B, D) or (B, T, W).
            ids: What ``caption_spec`` makes of B captions: a batch, or ``encode(captions)``; on any device.
            weight: Of each row, shape (B,).
            label_smoothing: Share of the target spread over the vocabulary.
        """

    @abstractmethod
    def generate(
        self,
        image_features: Tensor,
        prompts: PromptIds | None = None,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 67,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Writes B captions by beam search; the score of a caption is its log-probability / length ** length_penalty.

        Args:
            image_features: As ``loss``.
            prompts: What ``caption_spec`` makes of B questions: a batch, or ``encode_questions(questions)``. None asks
                nothing.
            num_beams: Width of the search; 1 is greedy.
            max_new_tokens: At most so many tokens each.
            length_penalty: 1 ranks by the mean log-probability of the tokens, 0 by their sum.
        """
