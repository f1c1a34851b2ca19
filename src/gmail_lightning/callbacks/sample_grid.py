"""Sample images of a generator that trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torchvision.utils import make_grid, save_image

from gmail_lightning.distributed import on_first_rank
from gmail_lightning.models.generative import ImageGenerator


class SampleGrid(Callback):
    """Draws the same prompts with the same seeds at every validation and test, into ``samples/`` of the run folder.

    Args:
        prompts: One image each.
        columns: Images in a row of the grid.
        seed: Of the first image; the others count up.
    """

    def __init__(self, prompts: list[str], columns: int = 8, seed: int = 0) -> None:
        self.prompts, self.columns, self.seed = list(prompts), columns, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a task that has no generator.

        Raises:
            MisconfigurationException: Naming the task.
        """
        if not isinstance(getattr(pl_module, "generator", None), ImageGenerator):
            raise MisconfigurationException(
                f"SampleGrid draws what a task's generator makes, and {type(pl_module).__name__} has none: leave it "
                "out of trainer.callbacks."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``step-<n>.png`` with the averaged weights, on the first rank; step 0 is before training.

        The verb ``validate`` writes ``validate.png``.
        """
        if not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf"):
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``test.png``."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, task: LightningModule) -> None:
        verb = cast(TrainerFn, trainer.state.fn)
        name = f"step-{trainer.global_step:06d}" if verb == TrainerFn.FITTING else verb.value
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"  # a collective: on every rank
        on_first_rank(partial(self._draw, task, folder / f"{name}.png"), trainer)

    @torch.no_grad()
    def _draw(self, task: Any, path: Path) -> None:
        seeds = [self.seed + i for i in range(len(self.prompts))]
        with task.averaged_weights():
            images = cast(ImageGenerator, task.generator).generate(self.prompts, seeds).image
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(make_grid(images, nrow=self.columns, pad_value=1.0), path)
        rank_zero_info(f"Samples: {path}")
