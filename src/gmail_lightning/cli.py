"""LightningCLI as this project runs it: run folders, refusals, and errors that name what is known."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import gmail_lightning.models  # noqa: F401  short class names resolve once their module is imported
from gmail_lightning.callbacks import (
    CocoResultWriter,
    DatasetWriter,
    FeatureWriter,
    PredictionWriter,
    ResultsWriter,
    SparseProgress,
)
from gmail_lightning.callbacks.generation_plan import Mode
from gmail_lightning.datamodules import MixedModalityDataModule  # noqa: F401
from gmail_lightning.datasets import DataError
from gmail_lightning.hints import as_json, hint, import_class
from gmail_lightning.main import EPILOG
from gmail_lightning.models.branches import newest_checkpoint
from gmail_lightning.tasks import BaseTask, CaptioningTask

RUN_DIR = "GMAIL_LIGHTNING_RUN_DIR"  # the launcher's child processes write where their parent does
CHECKPOINT = "GMAIL_LIGHTNING_CHECKPOINT"  # and resume from what their parent found
WRITER_FLAGS: dict[str, tuple[Any, str]] = {
    "worker": (str, "i/n makes one of n shares of the images, as an independent process."),
    "mode": (Mode, "make what is missing, begin anew, or add another recipe's images."),
    "dry_run": (bool, "make the images of the first 8 prompts only, beside the folder."),
}


class Parser(LightningArgumentParser):
    """Adds to an error what would have been accepted, and keeps null what is null."""

    def parse_args(self, args: Any = None, *further: Any, **settings: Any) -> Any:
        """As jsonargparse, which hands an option of a class within a class on as the text of a Python value.

        ``--model.init_args.encoder.init_args.model_name null`` would be the word None.
        """
        return super().parse_args(None if args is None else [as_json(arg) for arg in args], *further, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exits with status 2; without the hundred lines of usage that would hide the message."""
        if not self.exit_on_error:
            super().error(message, ex)
        self.exit(2, f"error: {message}{hint(message)}\n")


class GmailCLI(LightningCLI):
    """Lightning's verbs over ``BaseTask`` and a data module, both by ``class_path``."""

    @classmethod
    def run(cls, args: Sequence[str] | None) -> int:
        """Parses and runs; returns the exit status: 4 where images of a generated data set failed, else 0."""
        for noise in (
            r"`isinstance\(treespec, LeafSpec\)`",
            r"Found \d+ module\(s\) in eval mode",
            "The number of training",
            r"It is recommended to use `self\.log",  # metrics are reduced over ranks before they are logged
        ):
            warnings.filterwarnings("ignore", message=noise)  # true of every run here: towers stay in eval
        cli = cls(
            BaseTask,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": "Learning from generated images.", "epilog": EPILOG},
            parser_class=Parser,
            args=None if args is None else list(args),
        )
        writers = [callback for callback in cast(Any, cli.trainer).callbacks if isinstance(callback, DatasetWriter)]
        return 4 if any(writer.failed for writer in writers) else 0

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Settings of our own."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Runs go to runs/NAME; default: the recipe's."
        )
        parser.add_argument(
            "--allow_untrained", type=bool, default=False, help="Evaluate random weights on purpose, as a baseline."
        )
        for name, (kind, text) in WRITER_FLAGS.items():
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=f"Of DatasetWriter: {text}")

    def _parse_ckpt_path(self) -> None:
        """Lightning merges the checkpoint's hyperparameters over what the user wrote. Here the user's values win."""

    def instantiate_classes(self) -> None:
        """Builds everything; what a constructor refuses is told in its own words, without the parser's wrapping."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            causes: list[BaseException] = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            data = next((cause for cause in causes if isinstance(cause, DataError)), None)
            raise data or MisconfigurationException(str(causes[-1])) from error

    # Run folders

    def before_instantiate_classes(self) -> None:
        """Chooses the run folder and fills in loggers, checkpoints and progress where the user said nothing."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        _set_writer(config)
        folder = self._run_folder(config)
        config.trainer.default_root_dir = str(folder)
        _drop_files_in_checkpoint(config)
        if config.trainer.logger in (None, True):
            config.trainer.logger = [
                {
                    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                    "init_args": {"save_dir": str(folder), "name": "", "version": "", "default_hp_metric": False},
                },
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(folder), "name": "csv"},
                },
            ]

    def _run_folder(self, config: Any) -> Path:
        if os.environ.get(RUN_DIR) and "LOCAL_RANK" in os.environ:
            if config.get("ckpt_path") == "last":  # the file that the parent found
                config.ckpt_path = os.environ[CHECKPOINT]
            return Path(os.environ[RUN_DIR])
        if config.trainer.default_root_dir:
            folder, runs = Path(config.trainer.default_root_dir), Path(config.trainer.default_root_dir)
        else:
            runs = Path("runs") / (config.name or _recipe_name(config))
            folder = runs / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
        evaluation = "" if self.subcommand == "fit" else f"{self.subcommand}-{datetime.now():%Y%m%d-%H%M%S}"
        if config.get("ckpt_path") == "last":
            found = newest_checkpoint(runs)
            if found is None:
                raise MisconfigurationException(f"--ckpt_path last: no checkpoints/last.ckpt below {runs}.")
            config.ckpt_path = os.environ[CHECKPOINT] = str(found)
            folder = found.parents[1] / evaluation  # a resumed fit goes on in its folder
        elif config.get("ckpt_path") and _is_missing_file(config.ckpt_path):
            raise MisconfigurationException(f"--ckpt_path {config.ckpt_path}: no such file.")
        os.environ[RUN_DIR] = str(folder)
        return folder

    def _instantiate_trainer(self, config: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
        configured = config.get("callbacks") or []
        given = [*callbacks, *(configured if isinstance(configured, list) else [configured])]
        writers = (CocoResultWriter, DatasetWriter, FeatureWriter, PredictionWriter)
        if self.subcommand == "predict" and not any(_has(given, writer) for writer in writers):
            callbacks.append(CocoResultWriter() if isinstance(self.model, CaptioningTask) else PredictionWriter())
        if self.subcommand in ("fit", "validate", "test") and not _has(given, ResultsWriter):
            callbacks.append(ResultsWriter())
        if config.get("enable_progress_bar") is not False and not _has(given, ProgressBar):
            callbacks.append(RichProgressBar() if sys.stdout.isatty() else SparseProgress())
        if config.get("enable_checkpointing") is not False and not _has(given, ModelCheckpoint):
            callbacks.append(ModelCheckpoint(save_last=True, filename="{step}"))
        return super()._instantiate_trainer(config, callbacks)

    # Refusals

    def before_validate(self) -> None:
        """Refuses to evaluate random weights."""
        self._refuse_untrained()

    def before_test(self) -> None:
        """Refuses to evaluate random weights."""
        self._refuse_untrained()

    def before_predict(self) -> None:
        """Refuses to predict with random weights."""
        self._refuse_untrained()

    def _refuse_untrained(self) -> None:
        config = self.config[self.subcommand]
        if config.get("ckpt_path") or config.allow_untrained or self.model.pretrained:
            return
        raise MisconfigurationException(
            f"{self.subcommand} of an untrained model: there is no --ckpt_path, and what {type(self.model).__name__} "
            "trains (the adapters of an aligner, the weights of an encoder) is as it was initialised. Give "
            "--ckpt_path, or --allow_untrained true for that baseline; of an aligner it is the frozen encoder."
        )


def _is_missing_file(checkpoint: str) -> bool:
    """Whether it names a local file that is not there; Lightning knows some words and addresses besides."""
    words = ("best", "hpc", "registry")
    return "://" not in checkpoint and not checkpoint.startswith(words) and not Path(checkpoint).exists()


def _drop_files_in_checkpoint(config: Any) -> None:
    """What a task is loaded with is in its own checkpoint: no file of an earlier stage is needed again."""
    settings = config.model.get("init_args") or {}
    captioner = (settings.get("captioner") or {}).get("init_args") or {}
    if not (isinstance(settings.get("aligned"), str) or captioner) or not config.get("ckpt_path"):
        return
    if Path(config.ckpt_path).is_file():
        content = torch.load(config.ckpt_path, map_location="cpu", mmap=True, weights_only=True)
        recorded = content.get("hyper_parameters", {})
        aligned = settings.get("aligned")
        if isinstance(aligned, str) and not isinstance(recorded.get("aligned", aligned), str):
            settings["aligned"] = recorded["aligned"]
        for name in content.get("captioner", {}).get("initial_files", ()):
            captioner.pop(name, None)


def _set_writer(config: Any) -> None:
    """Gives the flags that are of ``DatasetWriter`` to the one of the run.

    Raises:
        MisconfigurationException: If there is none.
    """
    given = {name: config[name] for name in WRITER_FLAGS if config.get(name) is not None}
    configured = config.trainer.callbacks or []
    configured = configured if isinstance(configured, list) else [configured]
    writers = [c for c in configured if issubclass(import_class(c.class_path) or object, DatasetWriter)]
    if given and not writers:
        raise MisconfigurationException(
            f"--{next(iter(given))} is for the callback DatasetWriter, and trainer.callbacks has none."
        )
    for writer in writers:
        for name, value in given.items():
            writer.init_args[name] = value


def _has(callbacks: list[pl.Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _recipe_name(config: Any) -> str:
    """``emoji/align.yaml`` gives ``emoji-align``; without a recipe, the task's name."""
    if config.get("config"):
        path = Path(str(config.config[0]))
        return f"{path.absolute().parent.name}-{path.stem}"
    return str(config.model.class_path).rpartition(".")[2]
