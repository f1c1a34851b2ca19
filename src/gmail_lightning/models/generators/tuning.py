"""A pipeline whose UNet is trained: what opens it, what a checkpoint says of it, and how it is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from gmail_lightning.models.generators.diffusion import DiffusersGenerator

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def require_tunable(generator: DiffusersGenerator, who: str) -> None:
    """Refuses a pipeline that cannot be trained here.

    Raises:
        ValueError: If it has no UNet, more than one text encoder, or weights in half precision.
    """
    generator.part("unet", f"{who} trains")
    if generator.dtype != "float32":
        raise ValueError(
            f"dtype={generator.dtype!r}: small updates vanish in half precision. Train with the generator in "
            "dtype='float32' and trainer.precision='bf16-mixed'."
        )
    if "text_encoder_2" in generator.parts:
        raise ValueError(
            f"{type(generator.pipeline).__name__} has several text encoders; {who} trains pipelines with one: Stable "
            "Diffusion 1.x and 2.x, and IF."
        )


def open_unet(generator: DiffusersGenerator, lora_rank: int | None) -> None:
    """Freezes a pipeline but for its UNet: all of it, or adapters of the given rank on its attention (PEFT)."""
    generator.requires_grad_(False)
    unet = generator.part("unet")
    if lora_rank is None:
        unet.requires_grad_(True)
        return
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=list(LORA_TARGETS)))


def refuse_frozen_random(generator: DiffusersGenerator) -> None:
    """Refuses ``fresh`` components that are not trained whole: a checkpoint does not hold what is frozen.

    Raises:
        ValueError: Naming the component.
    """
    for name in generator.parts.keys() & set(generator.fresh):  # a text encoder may have given way to that of a CLIP
        if not all(parameter.requires_grad for parameter in generator.part(name).parameters()):
            raise ValueError(
                f"fresh: {name} has random weights that would stay as they are, and that no checkpoint would hold: "
                "train the whole of it, or take it out of fresh."
            )


def save_tuned(generator: DiffusersGenerator, folder: str | Path, text_encoder: nn.Module | None = None) -> None:
    """Writes the pipeline in diffusers' layout, adapters merged, ready for any loader.

    Args:
        generator: The pipeline, as it is now.
        folder: Where to.
        text_encoder: Of transformers, in the place of the pipeline's own.
    """
    pipeline, unet = generator.pipeline, generator.part("unet")
    own = pipeline.text_encoder
    if hasattr(unet, "peft_config"):  # merging changes the weights, so a copy is merged
        pipeline.unet = copy.deepcopy(unet)
        pipeline.unet.fuse_lora()
        pipeline.unet.unload_lora()
    if text_encoder is not None:
        pipeline.text_encoder = text_encoder
    try:
        pipeline.save_pretrained(folder)
    finally:
        pipeline.unet, pipeline.text_encoder = unet, own


def pipeline_record(generator: DiffusersGenerator) -> dict[str, Any]:
    """Which pipeline the frozen tensors come from."""
    described = generator.describe()
    return {key: described[key] for key in ("generator", "revision")}


def check_pipeline(generator: DiffusersGenerator, recorded: dict[str, Any]) -> None:
    """Refuses a checkpoint that leans on another pipeline.

    Raises:
        MisconfigurationException: Naming both.
    """
    own = pipeline_record(generator)
    if recorded.get("revision") != own["revision"]:
        raise MisconfigurationException(
            f"The checkpoint was trained on {recorded.get('generator')} at {recorded.get('revision')}, but the "
            f"generator is {own['generator']} at {own['revision']}. Give the pipeline it started from."
        )
