"""The folder of a run: who makes it, what lies in it, and what is left of it when the run ends."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from gmail_lightning.command.run_record import BEAT, RECORD, fits_below, is_running
from gmail_lightning.distributed import on_first_rank


class Decision(NamedTuple):
    """What all processes of a run must agree on."""

    folder: Path
    checkpoint: str | None
    seed: int | bool
    keeps: bool  # a record and the configuration in the folder


def new_folder(parent: Path, prefix: str = "") -> Path:
    """Makes a folder named after the time; two processes that begin in the same moment get one each."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / f"{prefix}{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
        try:
            folder.mkdir()
        except FileExistsError:
            time.sleep(0.001)
        else:
            return folder


def refuse_running(folder: Path) -> None:
    """Raises a MisconfigurationException if a fit is at work in the folder."""
    for path, record in fits_below(folder):
        if path.parent == folder and is_running(path, record):
            raise MisconfigurationException(
                f"{folder} is the folder of a run on {record['host']}, process {record['process']}: choose another one."
            )


class Run:
    """The folder of a run; the process that decided on it begins it and says how it ended.

    Args:
        folder: Where it writes.
        record: See ``make_record``.
        is_new: Whether nothing but this run is in the folder, so that all in it goes where no step was made.
        was_there: Whether the folder was there before, and stays.
    """

    def __init__(self, folder: Path, record: dict[str, Any], is_new: bool, was_there: bool = False) -> None:
        self.folder, self.record, self.is_new, self.was_there = folder, record, is_new, was_there
        #: Whether there is something to keep.
        self.has_stepped = False
        self._over = threading.Event()

    def begin(self) -> None:
        """Writes the record, and gives signs of life from now on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._beat, daemon=True).start()

    def end(self, state: str) -> None:
        """Records how it ended: ``done``, ``failed`` or ``interrupted``; removes what did not get to its first step."""
        self._over.set()
        if state != "done" and self.is_new and not self.has_stepped:
            for path in list(self.folder.iterdir()) if self.was_there else [self.folder]:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            for parent in list(self.folder.parents)[:2]:  # runs/NAME and runs, if nothing else is in them
                if parent.parts[:1] == ("runs",) and parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        elif self.folder.exists():
            self.record["state"] = state
            self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                os.utime(self.folder / RECORD)
            except OSError:  # the disk is away for a while
                continue

    def _write(self) -> None:
        part = self.folder / f"{RECORD}.{os.getpid()}"
        part.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
        part.replace(self.folder / RECORD)


class RunFiles(Callback):
    """Keeps the configuration in the run folder, and notes that there is something to keep.

    Args:
        run: In the process that began it.
        config: The configuration as text.
    """

    def __init__(self, run: Run | None, config: str) -> None:
        self.run, self.config = run, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes ``config.yaml``."""
        path = Path(trainer.default_root_dir) / "config.yaml"
        on_first_rank(partial(path.write_text, self.config, encoding="utf-8"), trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step was made."""
        self._keep()

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There are values."""
        self._keep()

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There may be a file."""
        self._keep()

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """There are values, where validation is all that is done."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._keep()

    def _keep(self) -> None:
        if self.run is not None:
            self.run.has_stepped = True
