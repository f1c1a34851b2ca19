"""``EmbeddingTask``: the features of a frozen encoder, to be written once and read by other runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gmail_lightning.models import ImageEncoder
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.models.second_stage import second_stage
from gmail_lightning.tasks.encoder_task import EncoderTask
from gmail_lightning.tasks.feature_record import feature_record
from gmail_lightning.types import InputSpec, Modality


class EmbeddingTask(EncoderTask):
    """Predicts image features: pooled ones of shape (B, D), or the patch tokens (B, T, W) of one block.

    With the callback ``FeatureWriter``, ``predict`` writes a store that ``datasets.FeatureStore`` reads.

    Args:
        encoder: The plain encoder; it stays as it is.
        aligned: Checkpoint of an ``AlignmentTask``, or a folder with one, that says which branch each modality takes;
            None: all images take the plain tower.
        layer: Block whose patch tokens to take, such as -2 (as LLaVA); None for pooled features.
    """

    encoder: ModalityEncoder

    def __init__(self, encoder: ImageEncoder, aligned: str | None = None, layer: int | None = None) -> None:
        super().__init__()
        self.record_hyperparameters()
        self.encoder = second_stage(encoder, aligned)
        self.feature_layer = layer

    @property
    def input_spec(self) -> InputSpec:
        """Pixels alone."""
        return InputSpec(image=self.encoder.image_spec)

    def encode_pixels(self, image: Tensor, modality: Tensor) -> Tensor:
        """Pooled features (n, D) or patch tokens (n, T, W) for pixels (n, 3, H, W)."""
        if self.feature_layer is None:
            return super().encode_pixels(image, modality)
        return self.encoder.image_tokens(image, modality, layer=self.feature_layer)

    def record(self, modalities: list[Modality]) -> dict[str, Any]:
        """What the features of such images depend on, see ``feature_record``."""
        return {
            "encoder": type(self.encoder.encoder).__name__,
            **feature_record(self.encoder, modalities, self.feature_layer),
        }
