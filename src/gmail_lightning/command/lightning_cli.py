"""LightningCLI as this project runs it: run folders, refusals, and errors that name what is known."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import gmail_lightning.models  # noqa: F401  short class names resolve once their module is imported
from gmail_lightning.callbacks import (
    CocoResultWriter,
    DatasetWriter,
    FeatureWriter,
    LastCheckpoint,
    PredictionWriter,
    ResultsWriter,
    SparseProgress,
)
from gmail_lightning.command.configuration import (
    WRITER_FLAGS,
    drop_unread_data,
    recipe_name,
    set_writer,
    without_folders,
)
from gmail_lightning.command.hints import EPILOG, as_json, hint, import_class
from gmail_lightning.command.resume import run_of_job, run_to_resume
from gmail_lightning.command.run_folder import Decision, Run, RunFiles, new_folder, refuse_running
from gmail_lightning.command.run_record import RECORD, make_record, settings_of
from gmail_lightning.datasets import DataError
from gmail_lightning.distributed import decided_once
from gmail_lightning.models.branches.first_edition import converted
from gmail_lightning.models.restoring import restoring
from gmail_lightning.tasks import BaseTask, CaptioningTask


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
            save_config_callback=None,  # RunFiles
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

    def _set_seed(self) -> None:
        self._seed_is_given = self._get(self.config, "seed_everything") is not True
        super()._set_seed()

    # Run folders

    def before_instantiate_classes(self) -> None:
        """Decides on the run folder, and fills in what the user left open."""
        self._run: Run | None = None  # of the process that decides for all
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        set_writer(config)
        config.name = config.name or recipe_name(config)
        decision = decided_once(lambda: self._decide(config), config.trainer.num_nodes)
        with self._recorded():
            self._fill_in(config, decision)

    def _fill_in(self, config: Any, decision: Decision) -> None:
        folder, seed = decision.folder, decision.seed
        if seed is not False and seed != config.seed_everything:  # of the run that goes on
            config.seed_everything = pl.seed_everything(seed, workers=True)
        #: What the run folder keeps, so that it can be run anew; None where nothing is kept.
        self._kept_config = self._dump(without_folders(config)) if decision.keeps else None
        config.ckpt_path = decision.checkpoint
        config.trainer.default_root_dir = str(folder)
        self._dump_config()  # what a checkpoint records, before the data that this verb does not read are left out
        drop_unread_data(config, str(self.subcommand))
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

    def _dump(self, config: Any, form: str = "yaml") -> str:
        return str(self._parser(self.subcommand).dump(config, format=form, skip_validation=True, skip_unset=False))

    def _decide(self, config: Any) -> Decision:
        """Folder, checkpoint and seed of this run, which begins."""
        root, verb, checkpoint = config.trainer.default_root_dir, str(self.subcommand), config.get("ckpt_path")
        runs, is_trial = Path(root) if root else Path("runs") / config.name, bool(config.trainer.fast_dev_run)
        task = import_class(config.model.class_path)
        settings = settings_of(json.loads(self._dump(config, "json")), getattr(task, "evaluation_only", frozenset()))
        wanted = make_record(config.name, verb, settings, config.seed_everything, checkpoint)
        sought = wanted if self._seed_is_given else {**wanted, "seed": None}
        found = run_of_job(runs, sought) if verb == "fit" and not is_trial else None
        if found is None and checkpoint == "last":
            found = run_to_resume(runs, sought, takes=verb == "fit" and not is_trial)
        elif found is None and checkpoint and _is_missing_file(checkpoint):
            raise MisconfigurationException(f"--ckpt_path {checkpoint}: no such file.")
        if found is not None:
            wanted["seed"] = found.record["seed"]
            wanted["checkpoint"] = found.checkpoint or (None if checkpoint == "last" else checkpoint)
        if found is not None and verb == "fit":
            folder, is_new, was_there = found.folder, False, True  # it goes on there
        elif root and found is None:
            folder, was_there = Path(root), Path(root).exists()
            is_new = verb == "fit" and not (was_there and any(folder.iterdir()))
            refuse_running(folder)
        else:
            parent, prefix = (runs, "") if found is None else (found.folder, f"{verb}-")
            folder, is_new, was_there = (parent / "trial" if is_trial else new_folder(parent, prefix)), True, False
        keeps = not is_trial and not (root and verb != "fit" and (folder / RECORD).exists())
        if keeps:
            self._run = Run(folder, wanted, is_new, was_there)
            self._run.begin()
        return Decision(folder, wanted["checkpoint"], wanted["seed"], keeps)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Says in the record of the run how it ended, where it ends by an error."""
        try:
            yield
        except BaseException as error:
            if self._run is not None:
                self._run.end("failed" if isinstance(error, Exception) else "interrupted")
            raise

    def instantiate_classes(self) -> None:
        """Builds everything; what a constructor refuses is told in its own words, without the parser's wrapping."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        with self._recorded(), restoring(_read_checkpoint(config.get("ckpt_path"))):
            try:
                super().instantiate_classes()
            except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
                causes: list[BaseException] = [error]
                while causes[-1].__cause__ is not None:
                    causes.append(causes[-1].__cause__)
                data = next((cause for cause in causes if isinstance(cause, DataError)), None)
                raise data or MisconfigurationException(str(causes[-1])) from error

    def _run_subcommand(self, subcommand: str) -> None:
        with self._recorded():
            super()._run_subcommand(subcommand)
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # a process whose peer has gone may be aborted on its way out
        if self._run is not None:
            self._run.end("done")

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
        if config.get("enable_checkpointing") is not False and not _has(given, LastCheckpoint):
            callbacks.append(LastCheckpoint())
            for one in given:
                if isinstance(one, ModelCheckpoint) and one.dirpath is None:
                    one.save_last = None  # it would be the same file, and lag where the monitored value got worse
        if self._kept_config is not None:
            callbacks.append(RunFiles(self._run, self._kept_config))
        return super()._instantiate_trainer(config, callbacks)

    # Refusals

    def before_validate(self) -> None:
        """Refuses to evaluate random weights."""
        self._refuse_untrained()

    def before_test(self) -> None:
        """Refuses to evaluate random weights."""
        self._refuse_untrained()

    def before_predict(self) -> None:
        """Refuses to predict with random weights, and keeps no predictions that nobody is handed at the end."""
        self._refuse_untrained()
        settings = self.config_init[self.subcommand]
        if settings.return_predictions is None and not _has(cast(Any, self.trainer).callbacks, BasePredictionWriter):
            settings.return_predictions = False

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


def _read_checkpoint(path: str | None) -> dict[str, Any] | None:
    """What a task is to be loaded with; None where nothing is, or Lightning knows the address and we do not."""
    if not path or not Path(path).is_file():
        return None
    return converted(torch.load(path, map_location="cpu", mmap=True, weights_only=True))


def _has(callbacks: list[pl.Callback], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
