"""Checkpoints of the first edition, whose tasks took the settings of the branches themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Key that says of a checkpoint that this edition, or a later one, wrote it.
EDITION = "edition"
#: Arguments of the first edition's tasks that are the router's now.
IMAGE_ARGUMENTS = ("rank", "alpha", "targets", "real_path", "projection", "aligned", "train_adapters")
TEXT_ARGUMENTS = ("text_side", "text_rank", "text_targets")
FIRST = {"rank": 4, "alpha": 8.0, "targets": ["q", "v"], "real_path": "frozen", "projection": False}


def converted(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint as this edition writes it; what is of this edition stays as it is.

    The names of the tensors are the same in both.

    Args:
        content: Of a checkpoint; of Lightning's, with ``hyper_parameters`` and ``state_dict``.
    """
    given = content.get("hyper_parameters", {})
    moved = {name: given[name] for name in (*IMAGE_ARGUMENTS, *TEXT_ARGUMENTS) if name in given}
    if EDITION in content or not moved:
        return dict(content)
    kept = {name: value for name, value in given.items() if name not in moved}
    content = {**_with_reader(content), EDITION: 2}
    record = _record(moved, content)
    if record is None:
        return {**content, "hyper_parameters": kept}
    if isinstance(kept.get("encoder"), dict):
        settings = {name: record[name] for name in record if name != "alignment"}
        kept["encoder"] = {
            "class_path": "gmail_lightning.models.ModalityEncoder",
            "init_args": {"encoder": kept["encoder"], **settings},
        }
    return {**content, "hyper_parameters": kept, "branches": record}


def _with_reader(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block that a LLaVA read was a number, and is a reader."""
    captioner = content.get("captioner", {})
    settings = dict(captioner.get("settings", {}))
    if "feature_layer" not in settings:
        return content
    settings["reader"] = f"PatchTokens(layer={settings.pop('feature_layer')})"
    return {**content, "captioner": {**captioner, "settings": settings}}


def _record(moved: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any] | None:
    """As ``ModalityEncoder.record``; None of a task whose encoder was plain."""
    aligned = moved.get("aligned")
    if "rank" in moved:
        images = {**FIRST, **{name: moved[name] for name in FIRST if name in moved}}
    elif isinstance(aligned, Mapping):
        images = {**FIRST, **{name: aligned[name] for name in FIRST if name in aligned}}
    elif "base_fingerprint" in content and moved.get("text_side", "frozen") is not None:
        images = {**FIRST, "rank": 0}
    else:
        return None
    lora = {"rank": images["rank"], "alpha": images["alpha"], "targets": list(images["targets"])}
    return {
        "branch": {"class_path": "gmail_lightning.models.LoRA", "init_args": lora} if images["rank"] else None,
        "real_path": images["real_path"],
        "projection": images["projection"] or images["real_path"] != "frozen",
        "text_side": moved.get("text_side") or "frozen",
        "text_rank": moved.get("text_rank", 4),
        "text_targets": list(moved.get("text_targets", ("q", "v"))),
        "train_adapters": bool(moved["train_adapters"]) if "train_adapters" in moved else "aligned" not in moved,
        "alignment": content.get("alignment"),
    }
