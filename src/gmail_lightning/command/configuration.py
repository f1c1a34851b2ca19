"""What the command fills into a configuration before anything is built, and what it takes out."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from gmail_lightning.callbacks import DatasetWriter
from gmail_lightning.command.hints import import_class
from gmail_lightning.datamodules import ImageTextDataModule
from gmail_lightning.generation.images.assignment import Mode

WRITER_FLAGS: dict[str, tuple[Any, str]] = {
    "out": (str, "the folder to write."),
    "worker": (str, "i/n makes one of n shares of the images, as an independent process."),
    "mode": (Mode, "make what is missing, begin anew, or add another recipe's images."),
    "dry_run": (bool, "make the images of the first 8 prompts only, beside the folder."),
}


def without_folders(config: Any) -> Any:
    """The configuration as it can be run anew: no folder of a run in it, which goes by its name."""
    kept = deepcopy(config)
    kept.ckpt_path = kept.trainer.default_root_dir = None
    return kept


def drop_unread_data(config: Any, verb: str) -> None:
    """Empties what holds data sets that another verb reads, so that they are not built; the names of sets stay."""
    kind, settings = import_class(config.data.class_path), config.data.get("init_args")
    if kind is None or not issubclass(kind, ImageTextDataModule) or settings is None:
        return
    for name in kind.unread(verb, {name for name, value in settings.items() if value is not None}):
        sets = settings.get(name)
        if sets:
            settings[name] = {key: [] for key in sets} if isinstance(sets, dict) else []


def set_writer(config: Any) -> None:
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


def recipe_name(config: Any) -> str:
    """``emoji/align.yaml`` gives ``emoji-align``; without a recipe, the task's name."""
    if config.get("config"):
        path = Path(str(config.config[0]))
        return f"{path.absolute().parent.name}-{path.stem}"
    return str(config.model.class_path).rpartition(".")[2]
