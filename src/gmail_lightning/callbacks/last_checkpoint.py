"""The state that a run goes on from."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gmail_lightning.distributed import on_first_rank


class LastCheckpoint(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` in the run folder: always the last state, and always whole.

    It is written after every validation, at SIGTERM, and when training ends; without validation at the end of an epoch,
    in runs that count steps no more often than every ``seconds``. Another name is written first and then renamed, so
    that a kill or a full disk leaves the state before.

    Args:
        seconds: Least time between two states of a run that counts steps and has no validation.
    """

    def __init__(self, seconds: float = 600.0) -> None:
        self.seconds = seconds
        self._step: int | None = None  # of the state that is there
        self._time = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._step, self._time = None, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves at the last step: within the epoch, so that a run that is made longer goes on with its next batch."""
        if 0 < trainer.max_steps <= trainer.global_step:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._step = None  # what was saved at this step does not know of the validation
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where there is no validation."""
        if trainer.enable_validation and any(trainer.num_val_batches):
            return
        due = trainer.check_val_every_n_epoch is not None or time.monotonic() - self._time >= self.seconds
        if trainer.strategy.broadcast(due):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what came after the last validation."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves where the job is to end, which all ranks learn between two batches."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == TrainerFn.FITTING and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self._step == trainer.global_step:  # type: ignore[attr-defined]
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        part = path.with_suffix(".ckpt.part")
        fault: Exception | None = None
        try:
            trainer.save_checkpoint(part)
        except Exception as error:  # of a full disk, on the first rank: the others wait where saving ends
            if not trainer.is_global_zero:
                raise
            fault = error
            trainer.strategy.barrier("LastCheckpoint: nothing was saved")
        on_first_rank(partial(_rename, part, path, fault), trainer)
        self._step, self._time = trainer.global_step, time.monotonic()


def _rename(part: Path, path: Path, fault: Exception | None) -> None:
    if fault is not None:
        _remove(part)
        raise fault
    before = path.with_suffix(".ckpt.before")
    for file in (one for one in (part, *part.rglob("*")) if one.is_file()):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if path.exists() and (part.is_dir() or path.is_dir()):
        # One file per rank, as of FSDP: a folder is not put in the place of another in one step.
        _remove(before)
        path.replace(before)
    part.replace(path)
    _remove(before)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
