"""A module that trains one number and records what the data module gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gmail_lightning.types import ImageSpec, InputSpec, TextSpec


def encode(texts: list[str]) -> Tensor:
    return torch.tensor([[ord(c) for c in text[:12].ljust(12)] for text in texts])


SPEC = InputSpec(ImageSpec((6, 6)), {"text": TextSpec(encode, 12)})


class Recorder(LightningModule):
    input_spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[dict[str, Any]] = []
        self.evaluated: list[dict[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(dict(batch))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated.append(dict(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if "callbacks" not in arguments:
        quiet["enable_checkpointing"] = False
    return Trainer(**{"default_root_dir": folder, **quiet, **arguments})
