"""Takes what was trained away: a folder that plain open_clip, transformers or diffusers loads, without this library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gmail_lightning.export.forms import FORMS, CLIPEncoder, Form
from gmail_lightning.export.pipeline import write_pipeline
from gmail_lightning.models.averaging import stored_average
from gmail_lightning.models.base import ImageEncoder, Tower
from gmail_lightning.models.branches.branch import Branch
from gmail_lightning.models.branches.fingerprint import fingerprint, fingerprint_difference
from gmail_lightning.models.branches.first_edition import converted
from gmail_lightning.models.branches.lora import add_lora, lora_blocks, merged_state
from gmail_lightning.models.branches.modality import ModalityEncoder
from gmail_lightning.models.branches.record import KEY, build_encoder, find_checkpoint
from gmail_lightning.models.encoders.hf_clip import HFCLIPEncoder
from gmail_lightning.models.encoders.open_clip import OpenCLIPEncoder
from gmail_lightning.models.weights import plain_names


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    to: Form | Literal["diffusers"] = "open_clip",
    branch: Literal["generated", "real"] = "generated",
    encoder: ImageEncoder | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> None:
    """Merges one branch of a checkpoint, and its text side, into one model and writes it as a folder.

    ``open_clip.create_model("local-dir:<out>")``, or ``transformers.CLIPModel.from_pretrained(out)`` with its
    ``AutoProcessor``, then gives the features of that branch. After an alignment it is the generated one; those of the
    real branch are the plain encoder's, which needs no export. After a task that trained a text side it is rather the
    real one. A checkpoint without branches, such as that of a pre-training, is written as it is, LoRA merged. Where a
    checkpoint holds an average of the weights that a step has gone into, the average is written, which is what the task
    evaluates. An encoder of either library goes to either form, where the other has such a model.

    ``to="diffusers"`` writes the pipeline that ``TextToImageTask`` or ``UniDiffTask`` trained instead, see
    ``write_pipeline``.

    Args:
        checkpoint: Lightning checkpoint of a task, or a folder: the newest ``checkpoints/last.ckpt`` below it.
        out: Folder to write; it must be new or empty.
        to: Form of the export: ``open_clip``, ``hf_clip``, which is a CLIP of transformers, or ``diffusers``.
        branch: Branch of the image tower.
        encoder: The plain encoder that the task was trained on, where the checkpoint does not record it. It is changed.
        dtype: Precision of the written weights.

    Raises:
        FileExistsError: If ``out`` exists and holds something.
        ValueError: If the encoder is none of the two, has no such form (the message says by what), a projection cannot
            be folded into it, or the checkpoint does not load.
    """
    folder = Path(out)
    if to not in (*FORMS, "diffusers"):
        raise ValueError(f"to={to!r}: only {', '.join(FORMS)} and diffusers are known.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: give a new folder.")
    if branch not in ("generated", "real"):
        raise ValueError(f"branch={branch!r}: give generated or real.")
    path = find_checkpoint(checkpoint) or checkpoint
    if to == "diffusers":
        write_pipeline(path, folder, getattr(torch, dtype))
        return
    plain, state = _merged(path, encoder, branch)
    FORMS[to](plain, state, folder, getattr(torch, dtype))


def _merged(path: str | Path, encoder: ImageEncoder | None, branch: str) -> tuple[CLIPEncoder, dict[str, Tensor]]:
    """Returns the encoder of a checkpoint and the state dict of the model in it, adapters merged."""
    content = converted(torch.load(path, map_location="cpu", weights_only=True))
    average = _of_encoder(stored_average(content))
    if KEY in content:
        branches = ModalityEncoder.from_checkpoint(path, encoder)
        if unknown := branches.load_state_dict(average, strict=False).unexpected_keys:
            raise ValueError(f"{path}: ema averages {unknown[:4]}, which its encoder has not.")
        plain = _clip(branches.plain, path)
        adapted = branches.branch is not None and (branch == "generated" or branches.real_path == "adapted")
        state = cast(Branch, branches.branch).merged() if adapted else _without_branch(plain)
        projection = branches.real_projection if branch == "real" else branches.generated_projection
        if projection is not None:
            _fold(state, projection.weight.detach())
        if branches.text_side_projection is not None:
            _fold_text(state, branches.text_side_projection.weight.detach())
        return plain, state
    recorded = content.get("hyper_parameters", {}).get("encoder")
    plain = _clip(build_encoder(recorded, path, ModalityEncoder) if encoder is None else encoder, path)
    trained = _of_encoder(plain_names(content.get("state_dict", {}))) | average
    _open_lora(plain, trained, content.get("hyper_parameters", {}).get("train"))
    missing, unknown = plain.load_state_dict(trained, strict=False)
    if unknown or not trained:
        raise ValueError(f"{path}: not a checkpoint of this encoder (unknown: {unknown[:4]}, loaded: {len(trained)}).")
    base = content.get("base_fingerprint")
    parameters = {name for name, _ in plain.named_parameters()}
    if base is None and (absent := [key for key in missing if key in parameters]):
        raise ValueError(f"{path}: lacks {absent[:4]} of its encoder, and says nothing of where they come from.")
    if base is not None:
        difference = fingerprint_difference(base, fingerprint(plain, base["towers"]))
        if difference is not None:
            raise ValueError(f"{path}: trained on another base than this encoder: {difference}.")
    return plain, merged_state(plain)


def _of_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}


def _open_lora(plain: CLIPEncoder, trained: Mapping[str, Tensor], how: Mapping[str, Any] | None) -> None:
    """Adds the LoRA that ``UniDiffTask`` trains by its argument ``train``: a rank for each tower, and alpha as much."""
    towers: tuple[tuple[str, Tower], ...] = (("vision", "image"), ("text", "text"))
    for part, tower in towers:
        rank = (how or {}).get(part)
        adapted = any(key.startswith(f"lora.{tower}.") for key in trained)
        if isinstance(rank, int) and adapted and not lora_blocks(plain, tower):
            add_lora(plain, rank=rank, alpha=float(rank), tower=tower)


def _without_branch(plain: CLIPEncoder) -> dict[str, Tensor]:
    """The plain image tower, beside the text tower as it was trained."""
    for roles in lora_blocks(plain).values():
        for factors in roles.values():
            factors.B.data.zero_()
    return merged_state(plain)


def _clip(encoder: ImageEncoder, path: str | Path) -> CLIPEncoder:
    if not isinstance(encoder, (OpenCLIPEncoder, HFCLIPEncoder)):
        raise ValueError(f"{path} holds a {type(encoder).__name__}; export needs an OpenCLIPEncoder or HFCLIPEncoder.")
    return encoder


def _fold(state: dict[str, Tensor], projection: Tensor) -> None:
    """Multiplies the projection D to D, features @ projection.T, into the image tower's own last matrix."""
    # open_clip: pooled @ proj. timm and transformers: a Linear.
    if not _folded(state, projection, ("visual.proj",), ("visual.head.proj", "visual_projection")):
        raise ValueError(
            "The projection of the images cannot be folded: this tower does not end in a matrix without bias. "
            "Export a run with projection: false and real_path: frozen."
        )


def _fold_text(state: dict[str, Tensor], projection: Tensor) -> None:
    """As ``_fold``, for the text tower."""
    names = ("text_projection", "text.text_projection")
    if not _folded(state, projection, names, names):
        raise ValueError(
            "The projection of the texts cannot be folded: this text tower does not end in a matrix without bias. "
            "Export a run with text_side: lora or full."
        )


def _folded(state: dict[str, Tensor], projection: Tensor, matrices: tuple[str, ...], linears: tuple[str, ...]) -> bool:
    """Folds into the first of the matrices (pooled @ matrix) or linear layers that there is; False: there is none."""
    for name in matrices:
        if name in state:
            state[name] = state[name] @ projection.T
            return True
    for name in linears:
        if f"{name}.weight" in state and f"{name}.bias" not in state:
            state[f"{name}.weight"] = projection @ state[f"{name}.weight"]
            return True
    return False
