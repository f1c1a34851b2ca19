"""``LongRetrievalTask``: retrieval by long captions, trained as Long-CLIP is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from gmail_lightning.losses import clip_loss, principal_components
from gmail_lightning.metrics import TruncatedTexts
from gmail_lightning.models import DualEncoder
from gmail_lightning.models.encoders.logit_scale import CAP
from gmail_lightning.models.encoders.long_text import is_cut
from gmail_lightning.tasks.retrieval import RetrievalTask, update_recall
from gmail_lightning.types import ImageTextBatch, InputSpec, Modality, TextSpec


@dataclass(frozen=True)
class FirstSentence:
    """Encodes the first sentence of each text, as Long-CLIP cuts it: up to the first full stop and space."""

    encode: Callable[[list[str]], Tensor]

    def __call__(self, texts: list[str]) -> Tensor:
        """Maps n texts to token ids (n, L)."""
        return self.encode([text.split(". ")[0] for text in texts])


class LongRetrievalTask(RetrievalTask):
    """Image-text contrast with long captions (Long-CLIP, arXiv 2403.15378), after an alignment or without one.

    Two terms, both with smoothed labels: images against their long captions, and images reduced to the principal
    components of the batch, which is coarse, against the first sentences of the captions, which are coarse too. Rows
    of the same image are never negatives of one another. Give the encoder a context that holds the captions: where it
    does not, they are cut, and evaluation says how many (``truncated``, ``num_truncated``; with ``generated_`` those of
    generated images). Evaluation is that of ``RetrievalTask`` on the long captions.

    Args:
        encoder: As ``RetrievalTask``; without logit bias.
        short_weight: Weight of the second term.
        num_components: Principal components of the images in the second term.
        label_smoothing: Of both terms.
        max_logit_scale: As ``RetrievalTask``.
        contrastive_chunk_size: As ``RetrievalTask``.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.

    Raises:
        ValueError: As ``RetrievalTask``, if the encoder has a logit bias, or a setting is out of range.
    """

    def __init__(
        self,
        encoder: DualEncoder,
        short_weight: float = 1.0,
        num_components: int = 32,
        label_smoothing: float = 0.1,
        max_logit_scale: float = CAP,
        contrastive_chunk_size: int | None = None,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
    ) -> None:
        super().__init__(
            encoder,
            max_logit_scale=max_logit_scale,
            contrastive_chunk_size=contrastive_chunk_size,
            optimizer=optimizer,
            scheduler=scheduler,
            warmup_steps=warmup_steps,
            allow_small_negatives=allow_small_negatives,
        )
        if self.encoder.logit_bias is not None:
            raise ValueError(
                "Long-CLIP's loss is a softmax, but this encoder has the logit bias of a sigmoid loss (SigLIP): take a "
                "CLIP, or RetrievalTask."
            )
        if short_weight < 0 or num_components < 1 or not 0 <= label_smoothing < 1:
            raise ValueError(
                f"short_weight={short_weight} must not be negative, num_components={num_components} at least 1, "
                f"label_smoothing={label_smoothing} in [0, 1)."
            )
        self.short_weight, self.num_components, self.label_smoothing = short_weight, num_components, label_smoothing

    @property
    def input_spec(self) -> InputSpec:
        """Pixels, the captions, and their first sentences."""
        spec = self.encoder.text_spec
        texts = {"long_text": spec, "short_text": TextSpec(FirstSentence(spec.encode), spec.context_length)}
        return InputSpec(image=self.encoder.image_spec, texts=texts)

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Both terms, their weighted sum and the logit scale."""
        image_features = self.encode_images(batch, self.contrastive_chunk_size)
        scale, ids, smoothing = self.scale, batch["image_id"], self.label_smoothing
        long = self.encode_texts(batch["long_text"])
        long_loss = clip_loss(image_features, long, scale, ids=ids, label_smoothing=smoothing)
        if not self.short_weight:
            return {"loss": long_loss, "long": long_loss, "logit_scale": scale}
        coarse = principal_components(F.normalize(image_features.float(), dim=1), self.num_components)
        short = self.encode_texts(batch["short_text"])
        short_loss = clip_loss(coarse, short, scale, ids=ids, label_smoothing=smoothing, normalize_images=False)
        total = long_loss + self.short_weight * short_loss
        return {"loss": total, "long": long_loss, "short": short_loss, "logit_scale": scale}

    def build_metrics(self, eval_set: str) -> dict[str, Metric]:
        """Recall both ways, and the captions that are cut, of each modality."""
        cut = {"truncated": TruncatedTexts(), "generated_truncated": TruncatedTexts(prefix="generated_")}
        return {**super().build_metrics(eval_set), **cut}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        """Adds images and all their long captions."""
        text_features = self.encoder.encode_text(batch["long_text"])
        update_recall(metrics, self.encode_images(batch), text_features, batch, "long_text")
        captions = [caption for captions in batch["references"] for caption in captions]
        generated = batch["modality"][batch["long_text_row"]] == Modality.GENERATED
        cut = is_cut(self.encoder.text_spec, captions).to(generated.device)
        metrics["truncated"].update(cut[~generated])
        metrics["generated_truncated"].update(cut[generated])
