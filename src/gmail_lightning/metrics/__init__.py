"""Metrics: functions first, thin ``torchmetrics`` classes around them."""

from gmail_lightning.metrics.modality_gap import ModalityGap, linear_probe_accuracy, modality_gap
from gmail_lightning.metrics.retrieval import ImageTextRecall, image_text_recall

__all__ = ["ImageTextRecall", "ModalityGap", "image_text_recall", "linear_probe_accuracy", "modality_gap"]
