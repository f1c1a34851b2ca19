"""``RetrievalTask``: trains and evaluates a dual encoder by image-text contrast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from gmail_lightning.losses import clip_loss, contrastive_loss
from gmail_lightning.metrics import ImageTextRecall
from gmail_lightning.models import DualEncoder
from gmail_lightning.models.chunks import in_chunks
from gmail_lightning.models.encoders.logit_scale import CAP, capped_scale, check_cap, hold_cap
from gmail_lightning.tasks.base import paired_rows
from gmail_lightning.tasks.encoder_task import EncoderTask, require_text
from gmail_lightning.types import ImageTextBatch, InputSpec, Modality


class RetrievalTask(EncoderTask):
    """Image-text contrast of a dual encoder: CLIP's loss, or SigLIP's where the encoder has a logit bias.

    With a router around the encoder it is the step of GMAIL (arXiv 2602.15368) that follows the alignment: the image
    tower stays as it is, and a text side is trained on images of either modality, each seen through its branch. Real
    images are then retrieved through the frozen branch. A plain encoder is trained whole, or what of it requires a
    gradient, and all images are taken alike.

    Rows of the same image are never negatives of one another. Evaluation reports R@1/5/10 and median ranks both ways,
    all captions of an image counting as its positives, of real images and (as ``generated_...``) of generated ones
    apart, and the sizes of the sets.

    Args:
        encoder: A ``ModalityEncoder`` with ``aligned`` and a ``text_side``, or the plain dual encoder.
        max_logit_scale: Cap of a trained logit scale (CLIP, section 2.5), held after every step. That of an encoder
            with a logit bias (SigLIP) has none.
        image_weight: Weight of the contrast between the two images of a pair, in both directions at the same scale
            (as SLIP, arXiv 2112.12750, contrasts two views); needs ``mode: paired``.
        contrastive_chunk_size: Encode the batch in chunks of this many rows, with the exact gradients of one batch.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.
        learning_rates: See ``BaseTask``.

    Raises:
        ValueError: If the encoder has no text tower, or if a cap is not positive or meets an encoder with a logit bias.
    """

    batch_contrastive = True

    def __init__(
        self,
        encoder: DualEncoder,
        max_logit_scale: float = CAP,
        image_weight: float = 0.0,
        contrastive_chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(encoder, optimizer, scheduler, warmup_steps, allow_small_negatives, learning_rates)
        require_text(self.encoder, "RetrievalTask contrasts images and captions")
        check_cap(self.encoder, max_logit_scale)
        self.max_logit_scale, self.image_weight = max_logit_scale, image_weight
        self.contrastive_chunk_size = contrastive_chunk_size

    @property
    def input_spec(self) -> InputSpec:
        """Pixels and captions."""
        return InputSpec(image=self.encoder.image_spec, texts={"text": self.encoder.text_spec})

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """The contrastive terms and the logit scale."""
        image_features = self.encode_images(batch, self.contrastive_chunk_size)
        text_features = self.encode_texts(batch["text"])
        losses = {"text": self.contrast(image_features, text_features, batch["image_id"]), "logit_scale": self.scale}
        if not self.image_weight:
            return {"loss": losses["text"], **losses}
        generated, real = paired_rows(batch)
        ids = batch["image_id"][real]
        losses["image"] = clip_loss(image_features[generated], image_features[real], self.scale, ids=ids)
        return {"loss": losses["text"] + self.image_weight * losses["image"], **losses}

    @property
    def scale(self) -> Tensor:
        """The encoder's logit scale; that of a CLIP capped."""
        return capped_scale(self.encoder, self.max_logit_scale)

    def after_step(self) -> None:
        """Holds the cap of the logit scale."""
        super().after_step()
        hold_cap(self.encoder, self.max_logit_scale)

    def encode_texts(self, text: Tensor) -> Tensor:
        """Features of shape (T, D) for token ids (T, L)."""
        return in_chunks(self.encoder.encode_text, text, chunk_size=self.contrastive_chunk_size)

    def contrast(self, image_features: Tensor, text_features: Tensor, ids: Tensor) -> Tensor:
        """``contrastive_loss`` of N pairs."""
        return contrastive_loss(image_features, text_features, self.scale, self.encoder.logit_bias, ids=ids)

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Recall both ways, of each modality."""
        return {"real": ImageTextRecall(), "generated": ImageTextRecall(prefix="generated_")}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds images and all their captions."""
        update_recall(metrics, self.encode_images(batch), self.encoder.encode_text(batch["text"]), batch)


def update_recall(
    metrics: Mapping[str, Any],
    image_features: Tensor,
    text_features: Tensor,
    batch: ImageTextBatch,
    name: Literal["text", "long_text"] = "text",
    same_texts: bool = False,
) -> None:
    """Adds a batch to the ``ImageTextRecall`` of each modality, ``metrics["real"]`` and ``metrics["generated"]``.

    Args:
        metrics: One ``ImageTextRecall`` per modality.
        image_features: Shape (B, D).
        text_features: Shape (T, D), of ``batch[name]``.
        batch: An evaluation batch.
        name: Of the texts.
        same_texts: Also count images of captions that read the same as hits, under names of their own.
    """
    owner, ids, modality = batch[f"{name}_row"], batch["row_id"], batch["modality"]  # type: ignore[literal-required]
    for which in Modality:
        rows, texts = modality == which, modality[owner] == which
        # Also without a row: every rank must hold tensors of one shape and type when they are gathered.
        read = (number_of_ids(batch[name][texts]),) if same_texts else ()  # type: ignore[literal-required]
        metrics[which.name.lower()].update(
            image_features[rows], ids[rows], text_features[texts], ids[owner[texts]], *read
        )


def number_of_ids(token_ids: Tensor) -> Tensor:
    """One number for every row of token ids (T, L), the same for equal rows; shape (T,) int64."""
    powers = torch.full((token_ids.shape[1],), 6364136223846793005, device=token_ids.device).cumprod(dim=0)
    return ((token_ids + 1) * powers).sum(dim=1)  # modulo 2^64, as a hash
