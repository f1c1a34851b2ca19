"""``EncoderTask``: a task around an image encoder, with its branches, cached features and the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from gmail_lightning.models.base import ImageEncoder, ImageReader
from gmail_lightning.models.branches.adapters import adapter_ids
from gmail_lightning.models.branches.feature_record import refuse_other_features
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.models.branches.record import IMAGE_SETTINGS, KEY
from gmail_lightning.models.branches.routing import ModalityIndex
from gmail_lightning.models.encoders.readers import PooledFeatures
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.types import ImageTextBatch, modality_rows


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


def frozen_router(encoder: ImageEncoder) -> ModalityEncoder:
    """The router of a plain encoder of which nothing trains; ``EncoderTask.route_plain`` of tasks on features."""
    return ModalityEncoder(encoder)


class EncoderTask(BaseTask):
    """What tasks around an image encoder share.

    Checkpoints hold, beside what ``BaseTask`` keeps, the record of the router (``branches``) and the fingerprint of the
    frozen encoder that it leans on.

    Args:
        encoder: The router; a plain encoder becomes one that routes nothing.
        optimizer: See ``BaseTask``.
        scheduler: See ``BaseTask``.
        warmup_steps: See ``BaseTask``.
        allow_small_negatives: See ``BaseTask``.
        learning_rates: See ``BaseTask``.
    """

    _base: tuple[frozenset[str], dict[str, Any]] | None = None  # what trained, and the fingerprint of the rest

    def __init__(
        self,
        encoder: ImageEncoder,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        allow_small_negatives: bool = False,
        learning_rates: dict[str, float] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, warmup_steps, allow_small_negatives, learning_rates)
        self.encoder = ModalityEncoder.around(encoder, self.route_plain)
        #: How images are looked at.
        self.reader: ImageReader = PooledFeatures()

    @staticmethod
    def route_plain(encoder: ImageEncoder) -> ModalityEncoder:
        """The router of a plain encoder: none of its branches, and what of it requires a gradient trains."""
        return ModalityEncoder(encoder, train_tower=True)

    @property
    def pretrained(self) -> bool:
        """False where evaluating without a checkpoint would evaluate random weights."""
        return self.encoder.pretrained

    def setup(self, stage: str) -> None:
        """Says which way each modality goes, and forgets the fingerprint of an earlier run."""
        self._base = None
        super().setup(stage)
        rank_zero_info(self.encoder.describe())
        if adapter_ids(self) and self.trainer.precision in (
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
        refuse_other_features(self.encoder, stores, self.reader, trains)

    def predict_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Features of a batch: ``image_features`` (B, D), ``modality`` (B,) and ``sample_key``."""
        features = self.encode_images(batch)
        return {"image_features": features, "modality": batch["modality"], "sample_key": batch["sample_key"]}

    def encode_images(self, batch: ImageTextBatch, chunk_size: int | None = None) -> Tensor:
        """What ``reader`` sees of the images of a batch: pixels through their branch, all else as it is, in its row.

        Args:
            batch: Rows of pixels, of cached features, of token ids, or of several.
            chunk_size: See ``in_chunks``; rows that no gradient reaches run once all the same.

        Returns:
            Features of shape (B, D) or tokens (B, T, W); in fp32 where some are cached.
        """
        parts, rows = [], []
        if "image" in batch:
            parts.append(self.encode_pixels(batch["image"], image_index(batch), chunk_size))
            if "image_features" not in batch and "image_token_ids" not in batch:
                return parts[0]
            rows.append(batch["image_row"])
        if "image_features" in batch:
            parts.append(batch["image_features"])
            rows.append(batch["feature_row"])
        if "image_token_ids" in batch:
            parts.append(self.reader.read_ids(batch["image_token_ids"]))
            rows.append(batch["token_row"])
        return torch.cat([part.float() for part in parts])[torch.cat(rows).argsort()]

    def encode_pixels(self, image: Tensor, modality: Tensor | ModalityIndex, chunk_size: int | None = None) -> Tensor:
        """What ``reader`` sees of pixels (n, 3, H, W), every modality through its branch."""
        return self.encoder.route(self.reader.read, image, modality, chunk_size)

    def _frozen_base(self, kept: set[str]) -> dict[str, Any] | None:
        """Fingerprint of what the encoder has frozen and the checkpoint leans on; computed once, it does not change."""
        own = frozenset(key.removeprefix("encoder.") for key in kept if key.startswith("encoder."))
        if self._base is None or self._base[0] != own:
            self._base = own, fingerprint(self.encoder, ("image", "text"), own)
        base = self._base[1]
        return base if base["weights"] else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the router's record and the fingerprint of the frozen encoder."""
        super().on_save_checkpoint(checkpoint)
        record = self.encoder.record()
        if record is not None:
            checkpoint[KEY] = record
        base = self._frozen_base(self._kept_keys())
        if base is not None:
            checkpoint["base_fingerprint"] = base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits: the same branches, and the same frozen base, too.

        Raises:
            MisconfigurationException: As ``BaseTask``, or with both fingerprints and their difference.
        """
        super().on_load_checkpoint(checkpoint)
        self._take_record(checkpoint.get(KEY))
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

    def _take_record(self, recorded: dict[str, Any] | None) -> None:
        """Refuses settings of the branches that no tensor shows, such as ``alpha``: the features would be others."""
        own = self.encoder.record()
        if recorded is None or own is None:
            return
        there, here = _flat(recorded), _flat(own)
        for name, given in there.items():
            if here.get(name) != given:
                raise MisconfigurationException(
                    f"The checkpoint was trained with {name}={given!r} of its branches, and here it is "
                    f"{here.get(name)!r}. Give the settings, or the alignment, that it was trained with."
                )
        self.encoder.alignment = recorded["alignment"]  # its adapters are those of the checkpoint now


def require_text(encoder: ModalityEncoder, why: str) -> None:
    """Refuses an encoder without text tower, or whose text side was trained elsewhere and left behind.

    Raises:
        ValueError: With the reason, and what to give.
    """
    if encoder.left_behind is not None:
        raise ValueError(
            f"{encoder.left_behind}: the text side that was trained there would be dropped. Give the checkpoint of the "
            "alignment; to go on with that run, its own recipe and --ckpt_path."
        )
    if encoder.text_spec is None:
        raise ValueError(f"{type(encoder.plain).__name__} has no text tower, but {why}: give a DualEncoder.")


def image_index(batch: ImageTextBatch) -> ModalityIndex:
    """Which of the images of a batch are real and which generated; worked out here of a batch made by hand."""
    rows = batch if "image_real_row" in batch else modality_rows(batch)
    return ModalityIndex(rows["image_real_row"], rows["image_generated_row"])


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """How images are routed, by the names of the settings."""
    settings = {name: record[name] for name in IMAGE_SETTINGS if name != "branch"}
    branch = record["branch"] or {"class_path": None, "init_args": {}}
    return {"branch": branch["class_path"], **branch["init_args"], **settings}
