"""Sample images while a generator trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torchvision.utils import make_grid, save_image

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.tasks.text_to_image import TextToImageTask


class SampleGrid(Callback):
    """Draws the same prompts with the same seeds at every validation, into ``samples/`` of the run folder.

    Args:
        prompts: One image each.
        columns: Images in a row of the grid.
        seed: Of the first image; the others count up.
    """

    def __init__(self, prompts: list[str], columns: int = 8, seed: int = 0) -> None:
        self.prompts, self.columns, self.seed = list(prompts), columns, seed

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``samples/step-<n>.png`` with the averaged weights, on the first rank."""
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        if not trainer.sanity_checking and isinstance(pl_module, TextToImageTask):
            on_first_rank(partial(self._draw, pl_module, folder, trainer.global_step), trainer)

    def _draw(self, task: TextToImageTask, folder: Path, step: int) -> None:
        seeds = [self.seed + i for i in range(len(self.prompts))]
        with task.averaged_weights():
            images = task.generator.generate(self.prompts, seeds).image
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        save_image(make_grid(images, nrow=self.columns, pad_value=1.0), path)
        rank_zero_info(f"Samples: {path}")
