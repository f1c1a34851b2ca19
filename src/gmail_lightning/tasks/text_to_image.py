"""``TextToImageTask``: trains the denoiser of a diffusion pipeline on images and their captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from gmail_lightning.losses.diffusion import PredictionType, denoising_errors
from gmail_lightning.models.averaging import WeightAverage
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.objective import DenoisingObjective, drop_prompts
from gmail_lightning.models.generators.tuning import open_unet, refuse_frozen_random, require_tunable
from gmail_lightning.tasks.image_generation import TunesPipeline
from gmail_lightning.types import ImageTextBatch, InputSpec


class TextToImageTask(TunesPipeline):
    """Denoising of images given their captions: Stable Diffusion 1.x and 2.x in latents, or a UNet in pixel space (IF).

    All rows are trained on, real or generated, with a caption each. At the end of training the whole pipeline (averaged
    weights, adapters merged) is written to ``pipeline/`` in the run folder, for ``DiffusersGenerator`` and diffusers
    alike; ``predict`` makes images of prompts by it, which ``DatasetWriter`` stores. Noise and timesteps depend on the
    seed, the batch's number and the rank, so a resumed run draws the same.

    Args:
        generator: The pipeline; its scheduler gives the noise schedule. Its settings are those of the sample images.
        prediction_type: What the UNet predicts; by default what the scheduler's configuration says. Another one is
            written to the scheduler's configuration, and needs training from scratch or a long fine-tuning.
        min_snr_gamma: Cap of the signal-to-noise weights (arXiv 2303.09556); None weighs all timesteps alike.
        prompt_dropout: Share of rows that see the empty prompt, which guidance needs.
        ema_decay: Of the average of the trained weights (``WeightAverage``); None keeps none.
        lora_rank: Rank of adapters on the attention of the UNet (PEFT); None trains all of it.
        train_text_encoder: Train the text encoder too.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        learning_rates: See ``BaseTask``: ``{generator.parts.text_encoder: 1.0e-6}`` where that trains too.

    Raises:
        ValueError: If the pipeline has no UNet, or more than one text encoder.
    """

    uses_weights = True

    def __init__(
        self,
        generator: DiffusersGenerator,
        prediction_type: PredictionType | None = None,
        min_snr_gamma: float | None = 5.0,
        prompt_dropout: float = 0.1,
        ema_decay: float | None = 0.9999,
        lora_rank: int | None = None,
        train_text_encoder: bool = False,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, warmup_steps, learning_rates=learning_rates)
        require_tunable(generator, "TextToImageTask")
        self.generator, self.prompt_dropout = generator, prompt_dropout
        self.objective = DenoisingObjective(generator, prediction_type, min_snr_gamma)
        open_unet(generator, lora_rank)
        text_encoder = generator.part("text_encoder").requires_grad_(train_text_encoder)
        refuse_frozen_random(generator)
        trained = [p for module in (self.unet, text_encoder) for p in module.parameters() if p.requires_grad]
        if ema_decay is not None:
            self.average = WeightAverage(trained, ema_decay)
        encode = generator.text_spec.encode
        self.register_buffer("empty_text", encode([""]), persistent=False)

    @property
    def unet(self) -> Any:
        """The network that is trained."""
        return self.generator.part("unet")

    @property
    def input_spec(self) -> InputSpec:
        """Pixels at the size of the pipeline, and captions for its text encoder."""
        return InputSpec(image=self.generator.image_spec, texts={"text": self.generator.text_spec})

    @property
    def pretrained(self) -> bool:
        """False where part of the pipeline has random weights."""
        return self.generator.pretrained

    # Training

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """The weighted denoising loss."""
        draws = self.draws()
        text = drop_prompts(batch["text"], self.get_buffer("empty_text"), self.prompt_dropout, draws)
        noised = self.objective.draw(self.generator.encode_pixels(batch["image"], draws), draws)
        prediction = self.objective.denoise(noised, self.generator.encode_text(text)).prediction
        return {"loss": self.objective.loss(prediction, noised, batch.get("weight"))}

    # Evaluation

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """The plain denoising loss."""
        return {"denoising": cast(Metric, MetricCollection({"loss": MeanMetric()}))}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds the loss of each row at a timestep and noise that depend on the row alone, so that values compare."""
        clean = self.generator.encode_pixels(batch["image"])
        noised = self.objective.noise_of_rows(clean, batch["row_id"].tolist())
        first = torch.searchsorted(batch["text_row"], torch.arange(len(clean), device=clean.device))
        prediction = self.objective.denoise(noised, self.generator.encode_text(batch["text"][first])).prediction
        metrics["denoising"].update(denoising_errors(prediction, noised.target))
