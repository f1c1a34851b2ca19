"""A tiny alignment on the embedded data, for the tasks that follow one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from tiny_encoders import routed
from tiny_tasks import emoji_data, quiet_trainer, tiny_encoder

from gmail_lightning.datamodules import MixedModalityDataModule
from gmail_lightning.tasks import AlignmentTask


class Aligned(NamedTuple):
    path: Path
    task: AlignmentTask


@pytest.fixture(scope="session")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    """The checkpoint of an aligner after one step, all its adapters away from the start."""
    folder = tmp_path_factory.mktemp("alignment")
    task = AlignmentTask(routed(tiny_encoder(), 3, 5.0, ("q", "fc1"), projection=True))
    torch.manual_seed(1)
    for name, p in task.named_parameters():
        if p.requires_grad and name.endswith((".B", "projection.weight")):
            torch.nn.init.normal_(p, std=0.3)
    trainer = quiet_trainer(folder, max_steps=1, limit_val_batches=0)
    trainer.fit(task, emoji_data(mode="paired"))
    path = folder / "run" / "checkpoints" / "last.ckpt"
    trainer.save_checkpoint(path)
    return Aligned(path, task.eval())


@pytest.fixture
def fitted(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """``fitted(task, data, steps)`` trains and gives the trainer."""

    def fit(task: pl.LightningModule, data: MixedModalityDataModule, steps: int = 2, **settings: Any) -> pl.Trainer:
        trainer = quiet_trainer(tmp_path, **{"max_steps": steps, "limit_val_batches": 0, **settings})
        trainer.fit(task, data)
        return trainer

    return fit
