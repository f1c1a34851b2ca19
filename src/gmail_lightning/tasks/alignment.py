"""``AlignmentTask``: GMAIL's alignment of the generated-image branch to the frozen real branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.losses import alignment_loss, clip_loss, sigmoid_loss
from gmail_lightning.metrics import ImageTextRecall, ModalityGap
from gmail_lightning.models import DualEncoder, ImageEncoder, ModalityEncoder
from gmail_lightning.tasks.base import BaseTask, paired_rows
from gmail_lightning.tasks.retrieval import update_recall
from gmail_lightning.types import ImageTextBatch, InputSpec


class AlignmentTask(BaseTask):
    """Trains LoRA on an image tower so that generated images land where the frozen tower puts their real partners.

    Eq. 1 of GMAIL (arXiv 2602.15368) by default: one-directional InfoNCE from generated to real images. Rows of the
    same real image are never negatives of one another.

    Args:
        encoder: The pretrained encoder. It stays frozen; LoRA is added to its image tower.
        rank: Rank of LoRA.
        alpha: LoRA is scaled by ``alpha / rank``.
        targets: Roles of the adapted matrices, of ``q k v out fc1 fc2``.
        real_path: Branch that real images take: ``frozen`` (Algorithm 1), ``projected`` or ``adapted`` (section 3.2).
        projection: A linear map on the generated side, from the identity; the other two real paths always have both.
        loss: ``info_nce`` (Eq. 1) or ``sigmoid`` (SigLIP form).
        temperature: Divides the cosine similarities.
        learnable_temperature: Train the temperature (and the bias of the sigmoid form) with the adapters.
        symmetric: Add the real-to-generated direction of InfoNCE.
        alignment_weight: Weight of the alignment term; 0 with a text weight is LoRA without alignment.
        cosine_weight: Weight of 1 - paired cosine, which has no negatives. It holds the generated cloud in place, where
            InfoNCE alone lets it drift as a whole; with ``alignment_weight: 0`` it is the plain distillation control.
        generated_text_weight: Weight of the contrastive term between generated images and captions (section 3.1).
        real_text_weight: The same for real images; needs a real path that trains.
        contrastive_chunk_size: Encode the batch in chunks of this many rows, with the exact gradients of one batch.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.

    Raises:
        ValueError: If no term has a weight, or a text term meets an encoder without text tower or a frozen real path.
    """

    batch_contrastive = True
    encoder: ModalityEncoder

    def __init__(
        self,
        encoder: ImageEncoder,
        rank: int = 4,
        alpha: float = 8.0,
        targets: Sequence[str] = ("q", "v"),
        real_path: Literal["frozen", "projected", "adapted"] = "frozen",
        projection: bool = False,
        loss: Literal["info_nce", "sigmoid"] = "info_nce",
        temperature: float = 0.07,
        learnable_temperature: bool = False,
        symmetric: bool = False,
        alignment_weight: float = 1.0,
        cosine_weight: float = 0.0,
        generated_text_weight: float = 0.0,
        real_text_weight: float = 0.0,
        contrastive_chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
    ) -> None:
        super().__init__(optimizer, scheduler, warmup_steps, allow_small_negatives)
        self.record_hyperparameters()
        weights = {"alignment": alignment_weight, "cosine": cosine_weight, "generated_text": generated_text_weight}
        self.weights = {**weights, "real_text": real_text_weight}
        if min(self.weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(
                f"No weight may be negative, and one of {', '.join(weights)} must be above 0: {self.weights}."
            )
        if (generated_text_weight or real_text_weight) and not isinstance(encoder, DualEncoder):
            raise ValueError(f"{type(encoder).__name__} has no text tower: set the text weights to 0.")
        if real_text_weight and real_path == "frozen":
            raise ValueError("real_text_weight needs real_path: projected or adapted; a frozen real path cannot train.")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} must be positive.")
        if symmetric and loss != "info_nce":
            raise ValueError("symmetric=True belongs to loss: info_nce; the sigmoid form is symmetric as it is.")
        self.encoder = ModalityEncoder(
            encoder, rank=rank, alpha=alpha, targets=tuple(targets), real_path=real_path, projection=projection
        )
        self.loss, self.symmetric = loss, symmetric
        self.contrastive_chunk_size = contrastive_chunk_size
        learnable = learnable_temperature and alignment_weight > 0
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learnable)
        self.bias = nn.Parameter(torch.tensor(-10.0), requires_grad=learnable and loss == "sigmoid")

    @property
    def pretrained(self) -> bool:
        """An aligner without a checkpoint is untrained, whatever its base knows."""
        return False

    @property
    def input_spec(self) -> InputSpec:
        """Pixels, and the captions where the encoder has a text tower."""
        texts = {"text": self.encoder.text_spec} if self.encoder.has_text else {}
        return InputSpec(image=self.encoder.image_spec, texts=texts)

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Alignment of the batch's pairs, and the text terms that have a weight."""
        features = self.encode_images(batch, self.contrastive_chunk_size)
        is_generated, is_real = paired_rows(batch)
        generated, real, ids = features[is_generated], features[is_real], batch["image_id"][is_real]
        if self.encoder.real_path == "frozen":
            real = real.detach()  # no gradient, hence no collective in the backward

        terms: dict[str, Callable[[], Tensor]] = {
            "alignment": lambda: self._alignment(generated, real, ids),
            "cosine": lambda: 1.0 - F.cosine_similarity(generated.float(), real.float()).mean(),
            "generated_text": lambda: self._text_term(generated, batch["text"][is_generated], ids),
            "real_text": lambda: self._text_term(real, batch["text"][is_real], ids),
        }
        losses = {name: terms[name]() for name, weight in self.weights.items() if weight}
        total = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return {"loss": total, **losses}

    def _alignment(self, generated: Tensor, real: Tensor, ids: Tensor) -> Tensor:
        temperature = self.log_temperature.exp().clamp(min=0.01)  # logits of at most 100, as CLIP caps its scale
        if self.loss == "sigmoid":
            return sigmoid_loss(generated, real, 1.0 / temperature, self.bias, ids=ids)
        return alignment_loss(generated, real, temperature=temperature, ids=ids, symmetric=self.symmetric)

    def _text_term(self, image_features: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            text_features = self.encoder.encode_text(text)
            scale, bias = self.encoder.logit_scale, self.encoder.logit_bias
        if bias is None:
            return clip_loss(image_features, text_features, scale, ids=ids)
        return sigmoid_loss(image_features, text_features, scale, bias, ids=ids)

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """The gap, and with a text tower the image-text recall of both branches."""
        recall = {name: ImageTextRecall(prefix=f"{name}_") for name in ("real", "generated")}
        return {"gap": ModalityGap(), **(recall if self.encoder.has_text else {})}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Real rows go through the real path, generated rows through the adapted branch."""
        features = self.encode_images(batch)
        metrics["gap"].update(features, batch["modality"], batch["image_id"])
        if not self.encoder.has_text:
            return
        update_recall(metrics, features, self.encoder.encode_text(batch["text"]), batch)
