"""Losses: functions of tensors, exact over all ranks; they normalise the features themselves."""

from gmail_lightning.losses.alignment import alignment_loss
from gmail_lightning.losses.captioning import caption_loss, counted_tokens
from gmail_lightning.losses.conflict import gradient_cosines
from gmail_lightning.losses.consistency import prediction_contrast_loss, reciprocal_consistency_loss
from gmail_lightning.losses.contrastive import clip_loss, contrastive_loss, sigmoid_loss
from gmail_lightning.losses.diffusion import denoising_loss, min_snr_weight
from gmail_lightning.losses.principal_components import principal_components

__all__ = [
    "alignment_loss",
    "caption_loss",
    "clip_loss",
    "contrastive_loss",
    "counted_tokens",
    "denoising_loss",
    "gradient_cosines",
    "min_snr_weight",
    "prediction_contrast_loss",
    "principal_components",
    "reciprocal_consistency_loss",
    "sigmoid_loss",
]
