"""``EncoderTask``: a task around an image encoder, with its branches, cached features and the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from gmail_lightning.models.adapter_keys import is_adapter_key
from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.tasks.base import BaseTask, in_chunks
from gmail_lightning.tasks.feature_record import refuse_other_features
from gmail_lightning.types import ImageTextBatch


def reaching(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The same loss, with gradients of zero for parameters that it does not depend on: DDP waits for every gradient."""
    return cast(Tensor, _Reaching.apply(loss, *parameters))


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (*gradients, *map(torch.zeros_like, ctx.saved_tensors))


class EncoderTask(BaseTask):
    """What tasks around an image encoder share; a subclass sets ``encoder``, a router or a plain one.

    Checkpoints hold, beside what ``BaseTask`` keeps, the fingerprint of the frozen encoder that it leans on, and which
    alignment its branches are from.
    """

    #: Block whose patch tokens the task reads where features are cached; None for pooled features.
    feature_layer: int | None = None
    encoder: ImageEncoder
    _base: tuple[frozenset[str], dict[str, Any]] | None = None  # what trained, and the fingerprint of the rest

    @property
    def pretrained(self) -> bool:
        """False where evaluating without a checkpoint would evaluate random weights."""
        return self.encoder.pretrained

    def setup(self, stage: str) -> None:
        """Says which way each modality goes, and forgets the fingerprint of an earlier run."""
        self._base = None
        super().setup(stage)
        if isinstance(self.encoder, ModalityEncoder):
            rank_zero_info(self.encoder.describe())
        adapted = any(is_adapter_key(key) for key in self.state_dict())
        if adapted and self.trainer.precision in (
            "bf16-true",
            "16-true",
            "transformer-engine",
            "transformer-engine-float16",
        ):
            raise MisconfigurationException(
                f"precision={self.trainer.precision!r}: adapted weights are held in fp32; use bf16-mixed."
            )

    def check_feature_stores(self, stores: list[dict[str, Any]], trains: bool) -> None:
        """Compares cached features with the encoder, whose weights are restored by now."""
        refuse_other_features(self.encoder, stores, self.feature_layer, trains)

    def predict_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Features of a batch: ``image_features`` (B, D), ``modality`` (B,) and ``sample_key``."""
        features = self.encode_images(batch)
        return {"image_features": features, "modality": batch["modality"], "sample_key": batch["sample_key"]}

    def encode_images(self, batch: ImageTextBatch, chunk_size: int | None = None) -> Tensor:
        """Image features of a batch, cached ones in their rows and pixels through the branch of their modality.

        Args:
            batch: Rows of pixels, of cached features, or of both.
            chunk_size: See ``in_chunks``.

        Returns:
            Features of shape (B, D); in fp32 where some are cached.
        """
        cached, modality = batch.get("image_features"), batch["modality"]
        if cached is None:
            return in_chunks(self.encode_pixels, batch["image"], modality, chunk_size=chunk_size)
        if "image" not in batch:
            return cached.float()[batch["feature_row"].argsort()]
        live = in_chunks(self.encode_pixels, batch["image"], modality[batch["image_row"]], chunk_size=chunk_size)
        rows = torch.cat([batch["image_row"], batch["feature_row"]])
        return torch.cat([live.float(), cached.float()])[rows.argsort()]

    def encode_pixels(self, image: Tensor, modality: Tensor) -> Tensor:
        """Features of shape (n, D) for pixels (n, 3, H, W), every modality (n,) through its branch."""
        if isinstance(self.encoder, ModalityEncoder):
            return self.encoder.encode_image(image, modality)
        return self.encoder.encode_image(image)

    def _frozen_base(self, kept: set[str]) -> dict[str, Any] | None:
        """Fingerprint of what the encoder has frozen and the checkpoint leans on; computed once, it does not change."""
        own = frozenset(key.removeprefix("encoder.") for key in kept if key.startswith("encoder."))
        if self._base is None or self._base[0] != own:
            self._base = own, fingerprint(self.encoder, ("image", "text"), own)
        base = self._base[1]
        return base if base["weights"] else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the fingerprint of the frozen encoder, and the alignment."""
        super().on_save_checkpoint(checkpoint)
        settings = checkpoint.get("hyper_parameters", {})
        if isinstance(self.encoder, ModalityEncoder):
            if isinstance(settings.get("aligned"), str):
                settings["aligned"] = self.encoder.settings  # the adapters themselves are in the state
            if self.encoder.alignment is not None:
                checkpoint["alignment"] = self.encoder.alignment
        base = self._frozen_base(self._kept_keys())
        if base is not None:
            checkpoint["base_fingerprint"] = base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits: the same frozen base, too.

        Raises:
            MisconfigurationException: As ``BaseTask``, or with both fingerprints and their difference.
        """
        super().on_load_checkpoint(checkpoint)
        self._refuse_other_settings(checkpoint.get("hyper_parameters", {}))
        if isinstance(self.encoder, ModalityEncoder):  # its adapters are those of the checkpoint now
            self.encoder.alignment = checkpoint.get("alignment")
        recorded = checkpoint.get("base_fingerprint")
        if recorded is None:
            return
        found = fingerprint(self.encoder, recorded["towers"])
        difference = fingerprint_difference(recorded, found)
        if difference is not None:
            raise MisconfigurationException(
                f"The checkpoint was trained on another frozen encoder: it has fingerprint "
                f"{fingerprint_digest(recorded)}, this one {fingerprint_digest(found)}; they differ in {difference}."
            )

    def _refuse_other_settings(self, hyperparameters: dict[str, Any]) -> None:
        """Refuses settings of the branches that no tensor shows, such as ``alpha``: the features would be others."""
        if not isinstance(self.encoder, ModalityEncoder):
            return
        aligned = hyperparameters.get("aligned")
        recorded = {**hyperparameters, **(aligned if isinstance(aligned, dict) else {})}
        for name, value in self.encoder.settings.items():
            given = recorded.get(name, value)
            if (list(given) if isinstance(given, tuple) else given) != value:
                raise MisconfigurationException(
                    f"The checkpoint was trained with {name}={given!r} of its branches, and here it is {value!r}. Give "
                    "the settings, or the alignment, that it was trained with."
                )
