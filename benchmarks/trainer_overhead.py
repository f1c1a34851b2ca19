"""CPU time of a training step: our task against a bare LightningModule of the same model, optimizer and schedule.

    python benchmarks/trainer_overhead.py

The model is one linear layer, so that what is timed is the bookkeeping. Interleaved in one process, one thread, median.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import logging
import statistics
import sys
import tempfile
import time
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gmail_lightning.optim import WarmupCosine, parameter_groups
from gmail_lightning.tasks import BaseTask
from gmail_lightning.types import ImageTextBatch, InputSpec

STEPS, ROUNDS = 1000, 7
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")


class Bare(pl.LightningModule):
    """What a user would write."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(32, 8)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        return self.encoder(batch["image_features"]).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(parameter_groups(self.named_parameters()), lr=1e-4, weight_decay=0.01)
        schedule = WarmupCosine(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Ours(BaseTask):
    """The same through ``BaseTask``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(32, 8)

    @property
    def input_spec(self) -> InputSpec:
        return InputSpec()

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        return {"loss": self.encoder(batch["image_features"]).square().mean()}


def microseconds(task: pl.LightningModule, logged: bool, folder: str) -> float:
    """CPU time of one step."""
    rows = {
        "image_features": torch.randn(8, 32),
        "modality": torch.zeros(8),
        "replaced": torch.zeros(8, dtype=torch.bool),
    }
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, logger=CSVLogger(folder) if logged else False, log_every_n_steps=50,
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(task, DataLoader([rows] * STEPS, batch_size=None))
    return (time.process_time() - start) / STEPS * 1e6


def main() -> int:
    cases = {"bare": (Bare, False), "ours": (Ours, False), "ours, logging every 50 steps": (Ours, True)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        for repetition in range(ROUNDS + 1):
            for name, (task, logged) in cases.items():
                value = microseconds(task(), logged, folder)
                if repetition:  # the first warms up
                    times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, value in median.items():
        print(f"{name}: {value:.0f} us CPU a step")
    goals = {"ours": ("trainer_overhead", 1.2), "ours, logging every 50 steps": ("trainer_overhead_logging", 1.3)}
    missed = False
    for name, (label, goal) in goals.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["bare"], strict=True))
        print(f"{label}: {ratio:.2f} (goal <= {goal})")
        missed |= ratio > goal
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
