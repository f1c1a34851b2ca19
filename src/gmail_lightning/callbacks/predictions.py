"""What ``gmail-lightning predict`` leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from gmail_lightning.generation.whole_files import whole_file


class PredictionWriter(BasePredictionWriter):
    """Writes the list of a rank's predicted batches to ``predictions-<rank>.pt`` in the run folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Called by Lightning on every rank."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"predictions-{trainer.global_rank}.pt"
        with whole_file(path) as file:
            torch.save(predictions, file)
        rank_zero_info(f"Predictions: {path}")
