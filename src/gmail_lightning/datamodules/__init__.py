"""The data modules, from data sets to batches."""

from gmail_lightning.datamodules.base import ImageTextDataModule
from gmail_lightning.datamodules.mixed_modality import MixedModalityDataModule
from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datamodules.streaming import StreamingDataModule
from gmail_lightning.leakage import AllowedOverlap

__all__ = [
    "AllowedOverlap",
    "ImageTextDataModule",
    "MixedModalityDataModule",
    "PromptDataModule",
    "StreamingDataModule",
]
