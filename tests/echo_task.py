"""A task that captions without a captioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gmail_lightning.tasks import BaseTask
from gmail_lightning.types import ImageSpec, ImageTextBatch, InputSpec


class EchoTask(BaseTask):
    """Writes the key of every image, and after how many steps; trains one number."""

    writes_captions = True
    input_spec = InputSpec(ImageSpec((24, 24)))

    def __init__(self, write: Callable[[str, int], str] = lambda key, step: f"{key} at {step}") -> None:
        super().__init__()
        self.write, self.weight = write, nn.Parameter(torch.ones(()))

    def written(self, batch: ImageTextBatch) -> list[str]:
        return [self.write(key, self.trainer.global_step) for key in batch["sample_key"]]

    def compute_losses(self, batch: ImageTextBatch) -> dict[str, Tensor]:
        return {"loss": self.weight.square()}

    def update_metrics(self, metrics: Mapping[str, Any], batch: ImageTextBatch) -> None:
        self.result_of(batch["eval_set"]).captions = self.written(batch)

    def predict_step(self, batch: ImageTextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"caption": self.written(batch), "image_id": batch["image_id"], "sample_key": batch["sample_key"]}
