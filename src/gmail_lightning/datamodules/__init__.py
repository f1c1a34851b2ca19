"""The data module, from data sets to batches."""

from gmail_lightning.datamodules.mixed_modality import MixedModalityDataModule

__all__ = ["MixedModalityDataModule"]
