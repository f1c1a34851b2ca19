"""Callbacks: everything that draws, prints or writes files."""

from gmail_lightning.callbacks.modality_gap import ModalityGapReport
from gmail_lightning.callbacks.predictions import PredictionWriter
from gmail_lightning.callbacks.progress import SparseProgress

__all__ = ["ModalityGapReport", "PredictionWriter", "SparseProgress"]
