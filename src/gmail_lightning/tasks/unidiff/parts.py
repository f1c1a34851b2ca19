"""Which parts of a CLIP and of a diffusion model a joint fine-tuning trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from gmail_lightning.models import ModalityEncoder, add_lora
from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.generators.diffusion import DiffusersGenerator
from gmail_lightning.models.generators.tuning import open_unet, refuse_frozen_random

Part = Literal["vision", "text", "unet"]
How = Literal["full", "frozen"] | int  # a number is the rank of LoRA


def open_parts(
    encoder: ModalityEncoder,
    generator: DiffusersGenerator,
    train: Mapping[Part, How] | None,
    contrast: bool,
    synthesis: bool,
    shared: bool,
) -> None:
    """Sets what requires a gradient: what ``train`` asks for, as far as a term reaches it.

    Args:
        encoder: Of a plain encoder the parts are opened here; a router that routes says itself what of it trains.
        generator: The pipeline.
        train: ``full``, ``frozen`` or the rank of LoRA, by part; what is not named trains in full.
        contrast: Whether the contrastive term has a weight; without, the image tower, the projections and the logit
            scale are frozen, which no other term reaches.
        synthesis: The same of the synthesis term and the UNet.
        shared: Whether the synthesis term reads its prompts through the encoder's text tower.

    Raises:
        ValueError: If a part or a word is unknown, the router that is given has been told already, or a component that
            does not train has random weights.
    """
    wanted = dict(train or {})
    for part, how in wanted.items():
        if part not in get_args(Part) or not (how in ("full", "frozen") or (type(how) is int and how > 0)):
            raise ValueError(
                f"train: {part}: {how}: the parts are {', '.join(get_args(Part))}, each full, frozen or a rank of LoRA."
            )
    unet = wanted.get("unet", "full")
    open_unet(generator, unet if isinstance(unet, int) else None)
    if unet == "frozen" or not synthesis:
        generator.requires_grad_(False)
    refuse_frozen_random(generator)
    if encoder.train_tower:
        _open_encoder(cast(DualEncoder, encoder.plain), wanted)
    elif told := sorted({"vision", "text"} & wanted.keys()):
        raise ValueError(f"train: {', '.join(told)}: the router says what of the encoder trains (branch, text_side).")
    if not contrast:
        reached = _read_by_prompts(encoder) if shared and synthesis else set()
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)


def _open_encoder(encoder: DualEncoder, wanted: Mapping[Part, How]) -> None:
    vision, text = wanted.get("vision", "full"), wanted.get("text", "full")
    opened = {id(p) for p in encoder.parameters() if p.requires_grad}  # a frozen tensor of the recipe stays so
    of_text = {id(p) for p in encoder.text_parameters()}
    for tower, how in (("image", vision), ("text", text)):
        if isinstance(how, int):
            add_lora(encoder, rank=how, alpha=float(how), tower=tower)  # type: ignore[arg-type]
    for parameter in encoder.parameters():
        if id(parameter) in opened:
            parameter.requires_grad_((text if id(parameter) in of_text else vision) == "full")


def _read_by_prompts(encoder: ModalityEncoder) -> set[int]:
    """Identities of the parameters that the hidden states of a text depend on."""
    training = [p for p in encoder.parameters() if p.requires_grad]
    if not training:
        return set()
    with torch.enable_grad():
        tokens = encoder.text_tokens(encoder.text_spec.encode([""]))
    if not tokens.requires_grad:
        return set()
    gradients = torch.autograd.grad(tokens.sum(), training, allow_unused=True)
    return {id(p) for p, gradient in zip(training, gradients, strict=True) if gradient is not None}
