"""Progress for log files: one line now and then instead of a bar."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


class SparseProgress(ProgressBar):
    """Prints a line every ``seconds``: what a cluster log can hold.

    Args:
        seconds: Least time between two lines.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._start = self._last = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on the first rank."""
        if self._enabled:
            print(*args, **kwargs, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints step, speed, remaining time and the logged metrics."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return
        self._last = now
        step, rate = trainer.global_step, (trainer.global_step - self._first_step) / (now - self._start)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        line = f"step {step}{f'/{total}' if total else ''}  {rate:.2f} steps/s"
        if total and rate > 0:
            minutes, seconds = divmod(round((total - step) / rate), 60)
            line += f"  {minutes}:{seconds:02d} left"
        metrics = {k: float(v) for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        self.print("  ".join([line, *(f"{k} {v:.4g}" for k, v in metrics.items())]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that a validation is over."""
        when = "before training" if trainer.sanity_checking else f"step {trainer.global_step}"
        self.print(f"validated ({when})")
