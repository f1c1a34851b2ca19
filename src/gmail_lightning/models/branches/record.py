"""What a checkpoint records of its encoder and its branches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.weights import plain_names

#: Arguments of ``ModalityEncoder`` that say how images are routed, and those of the text side.
IMAGE_SETTINGS = ("rank", "alpha", "targets", "real_path", "projection")
TEXT_SETTINGS = ("text_side", "text_rank", "text_targets")


#: Packages whose classes a checkpoint may name before they are imported.
PACKAGES = ("gmail_lightning", "lightning", "torch", "torchvision", "transformers")


class Branches(NamedTuple):
    """What a checkpoint records of its ``ModalityEncoder``."""

    path: Path
    hyperparameters: dict[str, Any]
    image_settings: dict[str, Any]  # of IMAGE_SETTINGS
    text_settings: dict[str, Any]  # of TEXT_SETTINGS
    state: dict[str, Tensor]
    base: dict[str, Any]  # fingerprint of the plain encoder
    step: int | None  # of the run that wrote it

    def check(self, encoder: ImageEncoder) -> None:
        """Refuses an encoder that the checkpoint was not trained on.

        Raises:
            ValueError: With both fingerprints and their difference.
        """
        found = fingerprint(encoder, self.base["towers"])
        difference = fingerprint_difference(self.base, found)
        if difference is not None:
            raise ValueError(
                f"{self.path}: trained on another base. The checkpoint has {fingerprint_digest(self.base)}, this "
                f"{type(encoder).__name__} has {fingerprint_digest(found)}; they differ in {difference}. "
                "Load the encoder that the task was trained with."
            )


def read_branches(path: str | Path) -> Branches:
    """Reads the adapters of a checkpoint: of an alignment, or of a task that went on from one.

    Raises:
        ValueError: If there is no such file, or it holds no branches of a ``ModalityEncoder``.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint.")
    content = torch.load(path, map_location="cpu", weights_only=True)
    settings = content.get("hyper_parameters", {})
    if isinstance(settings.get("aligned"), dict):  # where tasks after the alignment keep its settings
        settings = {**settings, **settings["aligned"]}
    if settings.get("text_side") is not None:  # trained without an alignment
        settings = {"rank": 0, **settings}
    base = content.get("base_fingerprint")
    if base is None or "rank" not in settings:
        raise ValueError(f"{path}: no branches of an encoder in it. Give a checkpoint of an alignment task.")
    prefix = "encoder."
    held = plain_names(content["state_dict"])
    state = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
    of_images, of_texts = (
        {n: settings[n] for n in names if n in settings} for names in (IMAGE_SETTINGS, TEXT_SETTINGS)
    )
    return Branches(Path(path), settings, of_images, of_texts, state, base, content.get("global_step"))


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest ``checkpoints/last*.ckpt`` below a folder, None where there is none."""
    return max(Path(folder).rglob("checkpoints/last*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def build_encoder(settings: dict[str, Any], path: str | Path) -> ImageEncoder:
    """Builds the plain encoder from the hyperparameters in a checkpoint, as the command line recorded them.

    Raises:
        ValueError: If they record none, or name a class that is no encoder.
    """
    recorded = settings.get("encoder")
    if not isinstance(recorded, dict) or "class_path" not in recorded:
        raise ValueError(f"{path}: it does not record its encoder (the task was built in Python). Pass encoder=.")
    check_classes(recorded, path)
    module, _, name = recorded["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module or "gmail_lightning.models"), name, None)
    if found is None and not module:
        found = {known.__name__: known for known in _subclasses(ImageEncoder)}.get(name)
    if not isinstance(found, type) or not issubclass(found, ImageEncoder):
        raise ValueError(
            f"{path}: encoder {recorded['class_path']!r} is no ImageEncoder. Import its module, or pass encoder=."
        )
    return found(**recorded.get("init_args", {}))


def check_classes(recorded: Any, path: str | Path) -> None:
    """Looks at the classes that a checkpoint names, at any depth, before a module is imported for one of them.

    Raises:
        ValueError: If the module of one is neither imported nor of a package that this one is built on.
    """
    if isinstance(recorded, Mapping):
        for key in ("class_path", "_instantiator"):
            name = recorded.get(key)
            module = name.rpartition(".")[0] if isinstance(name, str) else ""
            if module and module not in sys.modules and module.partition(".")[0] not in PACKAGES:
                raise ValueError(
                    f"{path} names {name}, and its module is not imported: a file may not have it imported. Import it "
                    "first where you know it, or build the parts and pass them (encoder=...)."
                )
        recorded = list(recorded.values())
    if isinstance(recorded, Sequence) and not isinstance(recorded, str):
        for part in recorded:
            check_classes(part, path)


def _subclasses(base: type[Any]) -> list[type[Any]]:
    return [found for child in base.__subclasses__() for found in (child, *_subclasses(child))]
