"""Callbacks: everything that draws, prints or writes files."""

from gmail_lightning.callbacks.caption_gallery import CaptionGallery
from gmail_lightning.callbacks.caption_results import CocoResultWriter
from gmail_lightning.callbacks.dataset_writer import DatasetWriter
from gmail_lightning.callbacks.feature_writer import FeatureWriter
from gmail_lightning.callbacks.last_checkpoint import LastCheckpoint
from gmail_lightning.callbacks.modality_gap import ModalityGapReport
from gmail_lightning.callbacks.predictions import PredictionWriter
from gmail_lightning.callbacks.progress import SparseProgress
from gmail_lightning.callbacks.results import CollapseError, CollapseGuard, ResultsWriter
from gmail_lightning.callbacks.sample_grid import SampleGrid

__all__ = [
    "CaptionGallery",
    "CocoResultWriter",
    "CollapseError",
    "CollapseGuard",
    "DatasetWriter",
    "FeatureWriter",
    "LastCheckpoint",
    "ModalityGapReport",
    "PredictionWriter",
    "ResultsWriter",
    "SampleGrid",
    "SparseProgress",
]
