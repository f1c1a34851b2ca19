"""The data module, from data sets to batches."""

from gmail_lightning.datamodules.leakage import AllowedOverlap
from gmail_lightning.datamodules.mixed_modality import MixedModalityDataModule
from gmail_lightning.datamodules.prompts import PromptDataModule
from gmail_lightning.datamodules.streaming import StreamingDataModule

__all__ = ["AllowedOverlap", "MixedModalityDataModule", "PromptDataModule", "StreamingDataModule"]
