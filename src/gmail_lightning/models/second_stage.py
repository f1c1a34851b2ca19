"""The encoder of a task that follows an alignment: its branches as aligned, and what of them is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from gmail_lightning.models.base import ROLES, ImageEncoder
from gmail_lightning.models.branches.record import newest_checkpoint, read_branches
from gmail_lightning.models.branches.modality import ModalityEncoder, TextSide


def second_stage(
    encoder: ImageEncoder,
    aligned: str | dict[str, Any] | None,
    text_side: TextSide | None = None,
    text_rank: int = 4,
    text_targets: Collection[str] = ("q", "v"),
    train_adapters: bool = False,
) -> ModalityEncoder:
    """Builds the encoder of a task that follows the alignment: its branches as aligned, frozen, and a text side.

    Args:
        encoder: The plain encoder that the alignment started from.
        aligned: Checkpoint of an ``AlignmentTask``, or a folder: the newest ``checkpoints/last.ckpt`` below it. None:
            no branch of their own for generated images, which are taken as real. Settings (``rank``, ``alpha``,
            ``targets``, ...) in place of a file: adapters that are new, or to be loaded.
        text_side: As ``ModalityEncoder``; None where the task has no texts.
        text_rank: As ``ModalityEncoder``.
        text_targets: As ``ModalityEncoder``.
        train_adapters: Train the adapters of the generated branch, too.

    Raises:
        ValueError: If there is no such checkpoint, it was trained on another encoder, it has no branch for generated
            images or a text side that would be dropped, or nothing is to be trained.
    """
    text = {"text_side": text_side or "frozen", "text_rank": text_rank, "text_targets": text_targets}
    if train_adapters and aligned is None:
        raise ValueError("train_adapters needs aligned: without it there are no adapters.")
    if aligned is None or isinstance(aligned, dict):
        model = ModalityEncoder(encoder, **(aligned or {"rank": 0}), **cast(Any, text))
    else:
        model = _as_aligned(encoder, aligned, text, has_texts=text_side is not None)
    for name, parameter in model.image_adapters():
        parameter.requires_grad_(train_adapters and not name.startswith("real_projection."))
    return model


def _as_aligned(encoder: ImageEncoder, aligned: str, text: dict[str, Any], has_texts: bool) -> ModalityEncoder:
    if not isinstance(aligned, str):
        raise ValueError(f"aligned={aligned!r}: give a string, which a checkpoint can record.")
    path = newest_checkpoint(aligned) if Path(aligned).is_dir() else Path(aligned)
    if path is None or not path.exists():
        raise ValueError(
            f"aligned={aligned!r}: no such checkpoint, and no checkpoints/last.ckpt below it. Run the alignment first, "
            "as the header of the recipe says, or give its checkpoint."
        )
    recorded = read_branches(path)
    recorded.check(encoder)
    model = ModalityEncoder(encoder, **recorded.image_settings, **text)
    names = {name.removeprefix("encoder."): name for name, _ in model.image_adapters()}
    if not names:
        raise ValueError(f"{path}: no branch for generated images in it. Give the checkpoint of an alignment.")
    if has_texts and recorded.text_settings.get("text_side") not in (None, "frozen"):
        raise ValueError(
            f"{path}: the text side that was trained there would be dropped. Give the checkpoint of the alignment; to "
            "go on with that run, its own recipe and --ckpt_path."
        )
    absent = sorted(names.keys() - recorded.state.keys())
    if absent:
        raise ValueError(f"{path}: lacks the adapters {absent[:4]}.")
    model.load_state_dict({name: recorded.state[name] for name in names}, strict=False)
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + recorded.state[name].float().numpy().tobytes())
    model.alignment = {"path": str(path), "step": recorded.step, "digest": digest.hexdigest()[:12]}
    return model


def block_number(encoder: ImageEncoder, layer: int, name: str = "layer") -> int:
    """Number of a block of the image tower, counted from the front.

    Raises:
        ValueError: If there is no such block; ``name`` is what the layer is called where it was given.
    """
    num_blocks = 1 + max(target.block for target in encoder.lora_targets(ROLES))
    if not -num_blocks <= layer < num_blocks:
        raise ValueError(f"{name}={layer}: this tower has {num_blocks} blocks, and -1 is the last.")
    return layer % num_blocks
