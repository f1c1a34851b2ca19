"""Takes a fine-tuned text-to-image pipeline away: a folder that plain diffusers loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from gmail_lightning.models.branches.record import import_recorded
from gmail_lightning.tasks.base import BaseTask
from gmail_lightning.tasks.image_generation import TunesPipeline


def write_pipeline(checkpoint: str | Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes what ``diffusers.DiffusionPipeline.from_pretrained(folder)`` loads, as the task evaluates it.

    Args:
        checkpoint: Lightning checkpoint that the command line wrote: it records the models that its task started from.
        folder: New, or empty.
        dtype: Precision of the written weights.

    Raises:
        ValueError: If it records no task, or one that trains no pipeline.
    """
    content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    recorded = content.get("hyper_parameters", {}).get("_class_path")
    if recorded is None:
        raise ValueError(
            f"{checkpoint}: it does not record its task (which was built in Python). Build it again, call "
            "load_from_checkpoint with its models, and then save_pipeline(folder)."
        )
    kind = import_recorded({"class_path": recorded}, checkpoint, "task", BaseTask)
    if not issubclass(kind, TunesPipeline):
        raise ValueError(f"{checkpoint}: a {recorded} trains no pipeline, so to='diffusers' has nothing to write.")
    unused = {"score": None} if "score" in content["hyper_parameters"] else {}  # it may need files of another machine
    task = kind.load_from_checkpoint(checkpoint, map_location="cpu", **unused)
    if dtype == torch.float32:
        task.save_pipeline(folder)
        return
    from diffusers import DiffusionPipeline

    with tempfile.TemporaryDirectory() as whole:
        task.save_pipeline(whole)
        DiffusionPipeline.from_pretrained(whole, torch_dtype=dtype).save_pretrained(folder)
