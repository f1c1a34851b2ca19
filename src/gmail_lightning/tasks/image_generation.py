"""Captions to images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.metrics.clip_score import clip_score
from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.branches.fingerprint import fingerprint
from gmail_lightning.models.generative import GeneratedImages, ImageGenerator
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.tuning import check_pipeline, pipeline_record, save_tuned
from gmail_lightning.models.weights import weights_digest
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.transforms.image import resize
from gmail_lightning.types import InputSpec, PromptBatch

WHOLE = ("32-true", "bf16-mixed", "16-mixed")  # precisions that leave the weights as they are


class ScoredImages(NamedTuple):
    """The images of B prompts and what is known of them."""

    images: GeneratedImages
    truncated: list[bool]  # (B,) the generator's text encoder cut the prompt
    clip_score: list[float | None]  # (B,)
    clip_score_reason: list[str | None]  # (B,) why there is no score


def require_whole_weights(precision: str) -> None:
    """Refuses a precision that converts the weights of a generator.

    Raises:
        MisconfigurationException: If ``trainer.precision`` is such.
    """
    if precision not in WHOLE:
        raise MisconfigurationException(
            f"precision={precision!r} converts the generator, but its recipe, by which images are named, says the type "
            "of its weights, and small updates vanish in half precision: take one of "
            f"{', '.join(WHOLE)}, and set the generator's own dtype."
        )


class MakesImages(BaseTask):
    """What ``DatasetWriter`` asks of a task: ``predict`` on prompts makes an image for each."""

    generator: ImageGenerator

    def setup(self, stage: str) -> None:
        """Refuses a precision that converts the weights, see ``require_whole_weights``."""
        super().setup(stage)
        require_whole_weights(str(self.trainer.precision))

    def image_scorer(self) -> DualEncoder | None:
        """Gives each image its CLIPScore with its caption; None: no score."""
        return None

    def describe_generator(self) -> dict[str, Any]:
        """What the images depend on besides prompt and seed; see ``ImageGenerator.describe``."""
        return dict(self.generator.describe())

    def describe_scorer(self) -> dict[str, str]:
        """Which scorer it is: its class and a short fingerprint of its weights; empty without one."""
        scorer = self.image_scorer()
        if scorer is None:
            return {}
        weights = fingerprint(scorer, ("image", "text"))["weights"]
        wave = sum(wave for _, _, wave, *_ in weights.values())  # rounded far above what the order of a sum changes
        return {"scorer": type(scorer).__name__, "scorer_weights": f"{len(weights)} tensors, wave {wave:.4f}"}

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:  # type: ignore[override]
        """One image per prompt, (B, 3, H, W), with scores.

        Raises:
            MisconfigurationException: If the batch holds no prompts.
        """
        if "seed" not in batch:
            raise MisconfigurationException(
                f"{type(self).__name__} makes images of prompts: predict with PromptDataModule and the callback "
                "DatasetWriter (recipes/emoji/generate.yaml)."
            )
        with quiet("diffusers", "transformers.tokenization_utils_base"):  # cut prompts are counted, not told each time
            images = self.generator.generate(batch["prompt"], batch["seed"])
            truncated = self.generator.truncated(batch["prompt"])
        score, reason = self._score(images.image, batch["caption"])
        return ScoredImages(images, truncated, score, reason)

    def _score(self, image: Tensor, captions: list[str]) -> tuple[list[float | None], list[str | None]]:
        """CLIPScore of images (B, 3, H, W) with their captions, None with a reason where there is none."""
        scorer = self.image_scorer()
        if scorer is None:
            return [None] * len(image), ["no scorer"] * len(image)
        # Converted and resized where the generator left them, on its device.
        finite = torch.isfinite(image).flatten(1).all(dim=1).tolist()
        image_features = features_of_bytes(scorer, as_bytes(image.nan_to_num()), self.device)
        text_features = scorer.encode_text(scorer.text_spec.encode(captions).to(self.device))
        scores = clip_score(image_features, text_features.float()).tolist()
        return (
            [score if known else None for score, known in zip(scores, finite, strict=True)],
            [None if known else "not finite" for known in finite],
        )


def as_bytes(image: Tensor) -> Tensor:
    """Pixels in [0, 1], shape (B, 3, H, W), as a file would hold them, uint8."""
    return (image.float() * 255).round_().clamp_(0, 255).to(torch.uint8)


def features_of_bytes(scorer: DualEncoder, image: Tensor, device: torch.device | None = None) -> Tensor:
    """Features (B, D) in fp32 of uint8 pixels (B, 3, H, W), resized where they are, encoded on a device; B may be 0."""
    device = image.device if device is None else device
    if not len(image):
        return torch.zeros(0, scorer.embed_dim, device=device)
    resized = torch.stack([resize(picture, scorer.image_spec) for picture in image])
    return scorer.encode_image(resized.to(device)).float()


class ImageGenerationTask(MakesImages):
    """Makes an image for each prompt, with ``predict``; the callback ``DatasetWriter`` stores them.

    Args:
        generator: The text-to-image model.
        scorer: Gives each image its CLIPScore with its caption. Take another CLIP than the one to be trained on the
            images: a selection by score favours what that CLIP knows already (SIEVE, arXiv 2310.02110).
    """

    def __init__(self, generator: ImageGenerator, scorer: DualEncoder | None = None) -> None:
        super().__init__()
        self.generator, self.scorer = generator.requires_grad_(False), scorer
        if scorer is not None:
            scorer.requires_grad_(False)

    def image_scorer(self) -> DualEncoder | None:
        """The one that was given."""
        return self.scorer

    @property
    def input_spec(self) -> InputSpec:
        """No pixels, no tokens: the data module makes prompts."""
        return InputSpec()

    @property
    def pretrained(self) -> bool:
        """Whether the generator's weights are more than a random initialisation."""
        return self.generator.pretrained


class TunesPipeline(MakesImages):
    """A task that trains a pipeline, which is evaluated, makes images and is written with the averaged weights."""

    generator: DiffusersGenerator

    def text_encoder_to_write(self) -> nn.Module | None:
        """A text encoder of transformers in the place of the pipeline's own; None: its own."""
        return None

    def weights_of_images(self) -> Iterable[tuple[str, Tensor]]:
        """The weights that images depend on, by name."""
        return self.generator.named_parameters()

    def describe_generator(self) -> dict[str, Any]:
        """The pipeline's; the revision also tells the weights, as they are evaluated."""
        described = super().describe_generator()
        with self.averaged_weights():
            digest = weights_digest(self.weights_of_images())
        return {**described, "revision": f"{described['revision']}+{digest}"}

    def on_train_end(self) -> None:
        """Writes the pipeline to ``pipeline/`` in the run folder."""
        super().on_train_end()
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "pipeline"
        on_first_rank(partial(self.save_pipeline, folder), self.trainer)
        rank_zero_info(f"Pipeline: {folder}")

    def save_pipeline(self, folder: str | Path) -> None:
        """Writes the pipeline in diffusers' layout: averaged weights, adapters merged, ready for any loader."""
        with self.averaged_weights():
            save_tuned(self.generator, folder, self.text_encoder_to_write())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the pipeline that frozen tensors come from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pipeline"] = pipeline_record(self.generator)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that leans on another pipeline.

        Raises:
            MisconfigurationException: Naming both pipelines.
        """
        super().on_load_checkpoint(checkpoint)
        check_pipeline(self.generator, checkpoint.get("pipeline", {}))


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keeps the warnings of some loggers back, and leaves the loggers as they were."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.ERROR))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
