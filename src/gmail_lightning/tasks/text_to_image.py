"""``TextToImageTask``: trains the denoiser of a diffusion pipeline on images and their captions."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.losses.diffusion import PredictionType
from gmail_lightning.models.generators.averaging import WeightAverage
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.objective import DenoisingObjective, drop_prompts
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.types import ImageTextBatch, InputSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class TextToImageTask(BaseTask):
    """Denoising of images given their captions: Stable Diffusion 1.x and 2.x in latents, or a UNet in pixel space (IF).

    All rows are trained on, real or generated, with a caption each. At the end of training the whole pipeline (averaged
    weights, adapters merged) is written to ``pipeline/`` in the run folder, for ``DiffusersGenerator`` and diffusers
    alike. Noise and timesteps depend on the seed, the batch's number and the rank, so a resumed run draws the same.

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
        unet = generator.part("unet", "TextToImageTask trains")
        if generator.dtype != "float32":
            raise ValueError(
                f"dtype={generator.dtype!r}: small updates vanish in half precision. Train with the generator in "
                "dtype='float32' and trainer.precision='bf16-mixed'."
            )
        if "text_encoder_2" in generator.parts:
            raise ValueError(
                f"{type(generator.pipeline).__name__} has several text encoders; TextToImageTask trains pipelines with "
                "one: Stable Diffusion 1.x and 2.x, and IF."
            )
        self.generator, self.prompt_dropout = generator, prompt_dropout
        self.objective = DenoisingObjective(generator, prediction_type, min_snr_gamma)
        text_encoder = generator.part("text_encoder")
        self._select_trainable(lora_rank, train_text_encoder)
        trained = [p for module in (unet, text_encoder) for p in module.parameters() if p.requires_grad]
        self.average = None if ema_decay is None else WeightAverage(trained, ema_decay)
        encode = generator.text_spec.encode
        self.register_buffer("empty_text", encode([""]), persistent=False)
        self._evaluation = ExitStack()
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))

    def _select_trainable(self, lora_rank: int | None, train_text_encoder: bool) -> None:
        self.generator.requires_grad_(False)
        self.generator.part("text_encoder").requires_grad_(train_text_encoder)
        if lora_rank is None:
            self.unet.requires_grad_(True)
            return
        from peft import LoraConfig

        self.unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(LORA_TARGETS)))

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
        draws = torch.Generator().manual_seed(self._draw())
        text = drop_prompts(batch["text"], self.get_buffer("empty_text"), self.prompt_dropout, draws)
        noised = self.objective.draw(self.generator.encode_pixels(batch["image"], draws), draws)
        prediction = self.objective.denoise(noised, self.generator.encode_text(text)).prediction
        return {"loss": self.objective.loss(prediction, noised, batch.get("weight"))}

    def _draw(self) -> int:
        """Seed of the noise of one batch; the same for a resumed run, another on every rank."""
        number = 0 if self._trainer is None else self.trainer.fit_loop.epoch_loop.total_batch_idx
        digest = hashlib.blake2b(f"{self._seed} {number} {self.global_rank}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def on_fit_start(self) -> None:
        """Brings the average to the device of the weights."""
        super().on_fit_start()
        if self.average is not None:
            self.average.to(self.device)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the average too, before any callback writes a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update()

    def on_train_end(self) -> None:
        """Writes the pipeline."""
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "pipeline"
        on_first_rank(partial(self.save_pipeline, folder), self.trainer)
        rank_zero_info(f"Pipeline: {folder}")

    # Evaluation

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Within it, the networks hold the averaged weights."""
        return nullcontext() if self.average is None else self.average.swapped_in()

    def on_validation_epoch_start(self) -> None:
        """Evaluates the averaged weights."""
        self._evaluation.enter_context(self.averaged_weights())

    def on_validation_epoch_end(self) -> None:
        """Goes back to the trained weights, and logs."""
        self._evaluation.close()
        super().on_validation_epoch_end()

    def on_test_epoch_start(self) -> None:
        """Evaluates the averaged weights."""
        self._evaluation.enter_context(self.averaged_weights())

    def on_test_epoch_end(self) -> None:
        """Goes back to the trained weights, and logs."""
        self._evaluation.close()
        super().on_test_epoch_end()

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """The plain denoising loss."""
        return {"denoising": cast(Metric, MetricCollection({"loss": MeanMetric()}))}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds the loss of each row at a timestep and noise that depend on the row alone, so that values compare."""
        clean = self.generator.encode_pixels(batch["image"])
        draws = [torch.Generator().manual_seed(row) for row in batch["row_id"].tolist()]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=draw) for draw in draws]).to(clean)
        steps = len(self.objective.alphas_cumprod)
        timestep = torch.cat([torch.randint(steps, (1,), generator=draw) for draw in draws])
        first = torch.searchsorted(batch["text_row"], torch.arange(len(clean), device=clean.device))
        noised = self.objective.noised(clean, noise, timestep)
        prediction = self.objective.denoise(noised, self.generator.encode_text(batch["text"][first])).prediction
        metrics["denoising"].update((prediction.float() - noised.target).square().flatten(1).mean(dim=1))

    def predict_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Images are made by another task, out of prompts.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(
            "TextToImageTask trains a generator. To make images with it, predict with ImageGenerationTask and the "
            "pipeline that training wrote (recipes/emoji/generate.yaml)."
        )

    # What is kept

    def save_pipeline(self, folder: str | Path) -> None:
        """Writes the pipeline in diffusers' layout: averaged weights, adapters merged, ready for any loader."""
        pipeline = self.generator.pipeline
        with self.averaged_weights():
            trained = self.unet
            if hasattr(trained, "peft_config"):  # merging changes the weights, so a copy is merged
                pipeline.unet = copy.deepcopy(trained)
                pipeline.unet.fuse_lora()
                pipeline.unet.unload_lora()
            try:
                pipeline.save_pretrained(folder)
            finally:
                pipeline.unet = trained

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the average, and the pipeline that frozen tensors come from."""
        super().on_save_checkpoint(checkpoint)
        described = self.generator.describe()
        checkpoint["pipeline"] = {key: described[key] for key in ("generator", "revision")}
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that leans on another pipeline, and restores the average.

        Raises:
            MisconfigurationException: Naming both pipelines.
        """
        super().on_load_checkpoint(checkpoint)
        recorded, described = checkpoint.get("pipeline", {}), self.generator.describe()
        if recorded.get("revision") != described["revision"]:
            raise MisconfigurationException(
                f"The checkpoint was trained on {recorded.get('generator')} at {recorded.get('revision')}, but the "
                f"generator is {described['generator']} at {described['revision']}. Give the pipeline it started from."
            )
        if self.average is not None and "ema" in checkpoint:
            self.average.load_state_dict(checkpoint["ema"])
