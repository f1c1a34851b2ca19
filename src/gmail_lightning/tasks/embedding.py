"""``EmbeddingTask``: the features of a frozen encoder, to be written once and read by other runs."""

from __future__ import annotations

from typing import Any

from gmail_lightning.models import ImageEncoder, ImageReader
from gmail_lightning.models.branches.feature_record import feature_record
from gmail_lightning.tasks.encoder_task import EncoderTask, frozen_router
from gmail_lightning.types import InputSpec, Modality


class EmbeddingTask(EncoderTask):
    """Predicts image features: pooled ones of shape (B, D), or the patch tokens (B, T, W) of one block.

    With the callback ``FeatureWriter``, ``predict`` writes a store that ``datasets.FeatureStore`` reads.

    Args:
        encoder: A ``ModalityEncoder``, which says which branch each modality takes, or the plain encoder. Nothing of it
            trains.
        reader: What is read of an image; None: pooled features.
    """

    route_plain = staticmethod(frozen_router)

    def __init__(self, encoder: ImageEncoder, reader: ImageReader | None = None) -> None:
        super().__init__(encoder)
        self.reader = reader or self.reader

    @property
    def input_spec(self) -> InputSpec:
        """Pixels alone."""
        return InputSpec(image=self.encoder.image_spec)

    def record(self, modalities: list[Modality]) -> dict[str, Any]:
        """What the features of such images depend on, see ``feature_record``."""
        return {
            "encoder": type(self.encoder.plain).__name__,
            **feature_record(self.encoder, modalities, self.reader),
        }
