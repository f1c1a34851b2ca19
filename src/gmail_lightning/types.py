"""What a batch is and what a task asks of the data: the vocabulary shared by every other module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor


class DataError(ValueError):
    """The data are at fault, not the program; the message names the file, the row and what to do."""


class Modality(IntEnum):
    """The origin of an image. Generated images are a modality of their own: a column of the batch, not a code path."""

    REAL = 0
    GENERATED = 1


@dataclass(frozen=True)
class ImageSpec:
    """How an encoder wants its pixels; the encoder itself applies mean and standard deviation.

    Attributes:
        size: Height and width in pixels.
        resize_mode: ``crop`` resizes the shorter side and crops the centre, ``squash`` ignores the aspect ratio,
            ``longest`` resizes the longer side and pads with black.
        interpolation: Filter of the resize.
    """

    size: tuple[int, int]
    resize_mode: Literal["crop", "squash", "longest"] = "crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True)
class TextSpec:
    """How an encoder wants its text.

    Attributes:
        encode: Maps n strings to token ids of shape (n, context_length), int64. Runs in the data workers, so it must be
            picklable.
        context_length: Number of token ids per text.
    """

    encode: Callable[[list[str]], Tensor]
    context_length: int


class CaptionIds(TypedDict, total=False):
    """B captions as token ids; what ``Captioner.loss`` reads of a batch, made by its :class:`CaptionSpec`."""

    caption_labels: Tensor  # (B, L) int64, the ids to be written, -100 elsewhere; padded to the longest, on the right
    caption_length: list[int]  # (B,) tokens of each before any is cut; on the host, where comparing costs nothing
    caption_ids: Tensor  # (B, L) int64, prompt and caption, -100 for padding; absent where captions have no prompt
    caption_start: list[int]  # (B,) column where the caption begins; as caption_ids
    caption_image_column: Tensor  # (B,) int64, column where the image goes, one id wide; as caption_ids


class PromptIds(TypedDict, total=False):
    """B questions as token ids; what ``Captioner.generate`` goes on from."""

    prompt_ids: Tensor  # (B, L) int64, -100 for padding, on the left; L is 0 where the image alone is the prompt
    prompt_image_column: Tensor  # (B,) int64, column where the image goes, one id wide; absent where it goes before all


class CaptionSpec(ABC):
    """How a captioner wants its texts. It runs in the data workers: it must be picklable, and holds no model."""

    @abstractmethod
    def encode(self, captions: list[str], questions: list[str]) -> CaptionIds:
        """Turns captions into ids, for training.

        Args:
            captions: B texts to be written.
            questions: B texts that they answer, "" for nothing.

        Raises:
            ValueError: If a caption has no token to learn, or there are questions and the captioner answers none.
        """

    @abstractmethod
    def encode_questions(self, questions: list[str]) -> PromptIds:
        """Turns B questions into ids, for evaluation and prediction; as ``encode``."""


@dataclass(frozen=True)
class InputSpec:
    """What a task needs of a batch.

    Attributes:
        image: The view called ``image``; given alone, it is short for ``images={"image": ...}``. None: there is none.
        texts: By name in the batch; every one becomes a tensor.
        images: By name in the batch: views of one picture, under one random draw. Without any, no pixels are loaded.
        captions: Makes the ids of ``CaptionIds`` in training, those of ``PromptIds`` in evaluation and prediction.

    Raises:
        ValueError: If ``image`` and ``images`` disagree, or a name stands for an image and for a text.

    Example:
        >>> InputSpec(ImageSpec((224, 224))) == InputSpec(images={"image": ImageSpec((224, 224))})
        True
    """

    image: ImageSpec | None = None
    texts: dict[str, TextSpec] = field(default_factory=dict)
    images: dict[str, ImageSpec] = field(default_factory=dict)
    captions: CaptionSpec | None = None

    def __post_init__(self) -> None:
        if self.image is None:
            object.__setattr__(self, "image", self.images.get("image"))
        elif not self.images:
            object.__setattr__(self, "images", {"image": self.image})
        elif self.images.get("image") != self.image:
            raise ValueError("image is short for images={'image': ...}: give one of them, or both alike.")
        twice = sorted(self.images.keys() & self.texts.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)}: one key of the batch cannot hold an image and a text. Rename one.")


class ImageTextSample(TypedDict):
    """One row of a dataset, before transforms and tokenising."""

    image: Tensor  # (3, H, W) uint8, any size
    captions: list[str]  # every caption of the row; training draws one, evaluation uses all
    modality: int  # Modality
    image_id: int  # equal for all rows that show the same real image
    pair_id: int  # equal for a real row and its generated partners, -1 where there is none
    label: int  # class, -1 where there is none
    source: str  # "real", or the name of the generator
    sample_key: str  # unique within a dataset


class ModalityRows(TypedDict, total=False):
    """Which rows of a batch are real, generated and paired; made by :func:`modality_rows`, in the worker."""

    real_row: Tensor  # (R,) int64, the real rows, ascending
    generated_row: Tensor  # (G,) int64, the generated rows, ascending
    image_real_row: Tensor  # int64, which of the I images are of real rows, ascending; absent where no row has pixels
    image_generated_row: Tensor  # int64, which of them are of generated rows
    paired: bool  # the n-th generated row and the n-th real row are a pair, for all rows


class ImageTextBatch(ModalityRows, CaptionIds, PromptIds, total=False):
    """B rows, collated. A row has pixels, cached features or token ids; in the common case all have pixels, I = B.

    Where a task has a captioner, :class:`CaptionIds` in training and :class:`PromptIds` in evaluation and prediction.
    """

    image: Tensor  # (I, 3, H, W) float in [0, 1]; absent where no row has pixels. Further views under their own names
    image_row: Tensor  # (I,) int64, the row of each image, ascending; of every view
    image_features: Tensor  # (F, D), or (F, T, W) of patch tokens, in the cache's dtype; absent where no row has them
    feature_row: Tensor  # (F,) int64, the row of each
    image_token_ids: Tensor  # (K, T) int64, codes of an image tokenizer; absent where no row has them
    token_row: Tensor  # (K,) int64, the row of each
    text: Tensor  # (T, L) int64; one per row in training, all captions of an image in evaluation
    text_row: Tensor  # (T,) int64, the row of each text
    long_text: Tensor  # as text, where a task reads long captions
    long_text_row: Tensor
    short_text: Tensor  # their first sentences
    short_text_row: Tensor
    caption: list[str]  # (B,) the caption in use
    references: list[list[str]]  # (B,) all captions, in evaluation
    question: list[str]  # (B,) what the caption answers, "" for nothing; absent where no data set asks
    modality: Tensor  # (B,) int64, Modality
    image_id: Tensor  # (B,) int64
    pair_id: Tensor  # (B,) int64
    label: Tensor  # (B,) int64, where there are classes
    weight: Tensor  # (B,) float32, training only: of each row in the loss, where a data set has weights
    source: list[str]  # (B,)
    sample_key: list[str]  # (B,)
    replaced: Tensor  # (B,) bool, training only: the image of the drawn row did not decode and another row stands in
    replaced_reason: list[str]  # training only: one line per failure behind ``replaced``, mostly empty
    eval_set: str  # evaluation only: name of the set
    row_id: Tensor  # (B,) int64, evaluation only: index of the row in its set, unique over ranks


def modality_rows(batch: Mapping[str, Any]) -> ModalityRows:
    """Works out what routes the rows of a batch, on the CPU, so that a training step need not ask the device.

    Args:
        batch: Has ``modality`` and, for ``paired``, ``pair_id``; ``image_row`` where not every row has pixels.

    Returns:
        What :class:`ModalityRows` says, to be added to the batch; not ``paired`` without ``pair_id``.

    Raises:
        ValueError: If a modality is neither real nor generated.

    Example:
        >>> batch = {"modality": torch.tensor([1, 0]), "pair_id": torch.tensor([7, 7])}
        >>> modality_rows(batch)
        {'real_row': tensor([1]), 'generated_row': tensor([0]), 'paired': True}
    """
    modality, pair_id = batch["modality"], batch.get("pair_id")
    real, generated = _rows_of_each(modality)
    rows = ModalityRows(real_row=real, generated_row=generated)
    if "image" in batch or "image_row" in batch:
        of_images = modality[batch["image_row"]] if "image_row" in batch else modality  # one by hand may leave it out
        rows["image_real_row"], rows["image_generated_row"] = _rows_of_each(of_images)
    rows["paired"] = (
        pair_id is not None and bool((pair_id >= 0).all()) and torch.equal(pair_id[generated], pair_id[real])
    )
    return rows


def _rows_of_each(modality: Tensor) -> tuple[Tensor, Tensor]:
    real, generated = ((modality == which).nonzero().squeeze(1) for which in Modality)
    if len(real) + len(generated) != len(modality):
        raise ValueError(f"modality must be 0 (real) or 1 (generated), got {modality.unique().tolist()}.")
    return real, generated


class Classes(NamedTuple):
    """What a classifier tells apart.

    Attributes:
        names: Name of each class, by its label.
        templates: Prompts, each with one ``{}`` where the name goes.
    """

    names: list[str]
    templates: list[str]


class PromptBatch(TypedDict):
    """B prompts of one shard, for the generation of images."""

    shard: str  # name of the shard that the images belong to
    row: list[int]  # (B,) number of each prompt in the table of the data module
    prompt: list[str]  # (B,) what the generator reads
    caption: list[str]  # (B,) what the image is to be captioned with
    seed: list[int]  # (B,) hash of (prompt id, image index, recipe)
