"""``RetrievalTask``: trains and evaluates a dual encoder by image-text contrast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from gmail_lightning.losses import clip_loss, sigmoid_loss
from gmail_lightning.metrics import ImageTextRecall
from gmail_lightning.models import DualEncoder
from gmail_lightning.tasks.base import BaseTask, in_chunks, paired_rows
from gmail_lightning.types import ImageTextBatch, InputSpec


class RetrievalTask(BaseTask):
    """Image-text contrast of a dual encoder: CLIP's loss, or SigLIP's where the encoder has a logit bias.

    Rows of the same image are never negatives of one another. Evaluation reports R@1/5/10 both ways, all captions of
    an image counting as its positives.

    Args:
        encoder: Dual encoder; what requires a gradient is trained.
        max_logit_scale: Cap of the logit scale in the loss (CLIP, section 2.5).
        image_weight: Weight of the contrast between the two images of a pair, in both directions at the same scale
            (as SLIP, arXiv 2112.12750, contrasts two views); needs ``mode: paired``.
        contrastive_chunk_size: Encode the batch in chunks of this many rows, with the exact gradients of one batch.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.
    """

    batch_contrastive = True
    encoder: DualEncoder

    def __init__(
        self,
        encoder: DualEncoder,
        max_logit_scale: float = 100.0,
        image_weight: float = 0.0,
        contrastive_chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
    ) -> None:
        super().__init__(optimizer, scheduler, warmup_steps, allow_small_negatives)
        self.record_hyperparameters()
        self.encoder, self.max_logit_scale, self.image_weight = encoder, max_logit_scale, image_weight
        self.contrastive_chunk_size = contrastive_chunk_size

    @property
    def input_spec(self) -> InputSpec:
        """Pixels and captions."""
        return InputSpec(image=self.encoder.image_spec, texts={"text": self.encoder.text_spec})

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """The contrastive terms and the logit scale."""
        chunk = self.contrastive_chunk_size
        image_features = in_chunks(self.encoder.encode_image, batch["image"], chunk_size=chunk)
        text_features = in_chunks(self.encoder.encode_text, batch["text"], chunk_size=chunk)
        scale, bias = self.encoder.logit_scale.clamp(max=self.max_logit_scale), self.encoder.logit_bias
        ids = batch["image_id"]
        if bias is None:
            text_loss = clip_loss(image_features, text_features, scale, ids=ids)
        else:
            text_loss = sigmoid_loss(image_features, text_features, scale, bias, ids=ids)
        losses = {"text": text_loss, "logit_scale": scale}
        if not self.image_weight:
            return {"loss": text_loss, **losses}
        generated, real = paired_rows(batch)
        losses["image"] = clip_loss(image_features[generated], image_features[real], scale, ids=ids[real])
        return {"loss": text_loss + self.image_weight * losses["image"], **losses}

    def build_metrics(self) -> dict[str, Metric]:
        """Recall both ways."""
        return {"recall": ImageTextRecall()}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds images and all their captions."""
        ids, owner = batch["row_id"], batch["text_row"]
        image_features = self.encode_images(batch)
        metrics["recall"].update(image_features, ids, self.encoder.encode_text(batch["text"]), ids[owner])
