"""What a checkpoint records of the router of its encoder, and how a router is built again from it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gmail_lightning.models.base import ImageEncoder
from gmail_lightning.models.branches.adapters import adapter_keys
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference, fingerprint_digest
from gmail_lightning.models.branches.first_edition import converted
from gmail_lightning.models.plain_values import plain_value
from gmail_lightning.models.restoring import restored
from gmail_lightning.models.weights import plain_names

#: Where a checkpoint of a task keeps the record of its router.
KEY = "branches"
#: What of a record says how images are routed; the rest is of the text side.
IMAGE_SETTINGS = ("branch", "real_path", "projection")
#: Packages whose classes a checkpoint may name before they are imported.
PACKAGES = ("gmail_lightning", "lightning", "torch", "torchvision", "transformers")


class BranchRecord(NamedTuple):
    """What a checkpoint records of its ``ModalityEncoder``."""

    path: Path
    settings: dict[str, Any]  # ``ModalityEncoder.record``
    encoder: dict[str, Any] | None  # the plain encoder or the router, as the command line recorded it
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

    def alignment(self, names: Sequence[str]) -> dict[str, Any]:
        """Says what adapters are from: ``path``, ``step``, and a ``digest`` of the tensors of these names."""
        digest = hashlib.sha256()
        for name in sorted(names):
            digest.update(name.encode() + self.state[name].float().numpy().tobytes())
        return {"path": str(self.path), "step": self.step, "digest": digest.hexdigest()[:12]}


def read_branches(path: str | Path) -> BranchRecord:
    """Reads the adapters of a checkpoint, or of the newest below a folder: of an alignment, or of what followed one.

    Raises:
        ValueError: If there is no such file, or it holds no branches of a ``ModalityEncoder``.
    """
    file = find_checkpoint(path)
    if file is None:
        raise ValueError(f"{path}: no such checkpoint, and no checkpoints/last.ckpt below it.")
    content = converted(torch.load(file, map_location="cpu", weights_only=True))
    base = content.get("base_fingerprint")
    if base is None or KEY not in content:
        raise ValueError(f"{file}: no branches of an encoder in it. Give a checkpoint of an alignment task.")
    prefix = "encoder."
    held = plain_names(content["state_dict"])
    state = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
    recorded = content.get("hyper_parameters", {}).get("encoder")
    return BranchRecord(file, content[KEY], recorded, state, base, content.get("global_step"))


def find_alignment(aligned: str) -> BranchRecord:
    """Reads the alignment that a recipe names: a checkpoint, or a folder with the newest one below it.

    Raises:
        ValueError: If there is none, or it has no branch for generated images.
    """
    if not isinstance(aligned, str):
        raise ValueError(f"aligned={aligned!r}: give a string, which a checkpoint can record.")
    path = find_checkpoint(aligned)
    if path is None:
        raise ValueError(
            f"aligned={aligned!r}: no such checkpoint, and no checkpoints/last.ckpt below it. Run the alignment first, "
            "as the header of the recipe says, or give its checkpoint."
        )
    found = read_branches(path)
    if found.settings["branch"] is None and not found.settings["projection"]:
        raise ValueError(f"{path}: no branch for generated images in it. Give the checkpoint of an alignment.")
    return found


def find_checkpoint(path: str | Path) -> Path | None:
    """A checkpoint itself, or the newest ``checkpoints/last*.ckpt`` below a folder; None where there is none."""
    if not Path(path).is_dir():
        return Path(path) if Path(path).is_file() else None
    return max(Path(path).rglob("checkpoints/last*.ckpt"), key=lambda found: found.stat().st_mtime, default=None)


def restored_branches() -> dict[str, Any] | None:
    """The router's record in the checkpoint that is about to be loaded; None where there is none."""
    content = restored()
    return None if content is None else content.get(KEY)


def build_encoder(recorded: Any, path: str | Path, router: type[ImageEncoder]) -> ImageEncoder:
    """Builds the plain encoder that a checkpoint records, as the command line wrote it down.

    Args:
        recorded: ``class_path`` and ``init_args``, of the encoder or of a router around it.
        path: Of the checkpoint, for messages.
        router: The class of routers, which are looked into.

    Raises:
        ValueError: If nothing is recorded, or a class that is no encoder.
    """
    if not isinstance(recorded, dict) or "class_path" not in recorded:
        raise ValueError(f"{path}: it does not record its encoder (the task was built in Python). Pass encoder=.")
    found = import_recorded(recorded, path, "encoder", ImageEncoder)
    settings = recorded.get("init_args", {})
    return build_encoder(settings.get("encoder"), path, router) if issubclass(found, router) else found(**settings)


def load_router(router: type[Any], path: str | Path, encoder: ImageEncoder | None) -> Any:
    """Loads a router out of the checkpoint of a task, in eval mode; see ``ModalityEncoder.from_checkpoint``."""
    recorded = read_branches(path)
    encoder = build_encoder(recorded.encoder, path, router) if encoder is None else encoder
    recorded.check(encoder)
    model = router.from_record(encoder, recorded.settings)
    known = model.state_dict(keep_vars=True)
    needed = adapter_keys(model) | {key for key, value in known.items() if value.requires_grad}
    missing, unknown = needed - recorded.state.keys(), recorded.state.keys() - known.keys()
    if missing or unknown:
        raise ValueError(f"{path}: lacks {sorted(missing)[:4]} and has unknown {sorted(unknown)[:4]}.")
    model.load_state_dict(recorded.state, strict=False)
    return model.eval()


def build_branch(recorded: dict[str, Any] | None, path: str | Path) -> Branch | None:
    """Builds the branch that a router's record names, without its tensors.

    Raises:
        ValueError: If it names a class that is no branch.
    """
    if recorded is None:
        return None
    found: type[Branch] = import_recorded(recorded, path, "branch", Branch)
    return found(**recorded["init_args"])


def plain_settings(branch: Branch) -> dict[str, Any]:
    """The settings of a branch as a checkpoint holds them.

    Raises:
        ValueError: If one cannot be held.
    """
    settings = {}
    for name, value in branch.settings.items():
        try:
            settings[name] = plain_value(value)
        except TypeError as error:
            raise ValueError(
                f"{type(branch).__name__}.settings[{name!r}]: {error}. Give numbers, strings, and lists or "
                "dictionaries of them."
            ) from error
    return settings


def public_path(kind: type[Any]) -> str:
    """Where a class is imported from; one of ours from where users import it, whatever file it is in."""
    package = "gmail_lightning.models"
    return f"{package if kind.__module__.startswith(package) else kind.__module__}.{kind.__qualname__}"


def import_recorded(recorded: dict[str, Any], path: str | Path, what: str, base: type[Any]) -> Any:
    """The class that a checkpoint names as ``class_path``.

    Raises:
        ValueError: If it is no subclass of ``base``, or of a package that a checkpoint may not have imported.
    """
    check_classes(recorded, path)
    module, _, name = recorded["class_path"].rpartition(".")
    found = getattr(importlib.import_module(module or "gmail_lightning.models"), name, None)
    if found is None and not module:
        found = {known.__name__: known for known in _subclasses(base)}.get(name)
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"{path}: {what} {recorded['class_path']!r} is no {base.__name__}. Import its module first.")
    return found


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
