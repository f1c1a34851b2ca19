"""The logit scale of a dual encoder, with CLIP's cap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gmail_lightning.models import DualEncoder

CAP = 100.0  # CLIP, arXiv 2103.00020, section 2.5


def check_cap(encoder: DualEncoder, cap: float) -> None:
    """Refuses a cap that would not be held.

    Raises:
        ValueError: If ``cap`` is not positive, or one is asked for of an encoder with a logit bias (SigLIP).
    """
    if not cap > 0:
        raise ValueError(f"max_logit_scale={cap} must be positive.")
    if cap != CAP and encoder.logit_bias is not None:
        raise ValueError(
            f"max_logit_scale={cap}: the scale of a {type(encoder).__name__} with a logit bias (SigLIP) has no cap. "
            "Leave it out."
        )


def capped_scale(encoder: DualEncoder, cap: float) -> Tensor:
    """The logit scale as the losses take it: CLIP's at most ``cap``, SigLIP's as it is.

    The gradient passes at the cap and beyond: that of a clamp is zero there, and the scale would never come back.
    """
    scale = encoder.logit_scale
    if encoder.logit_bias is not None:
        return scale
    return scale + (scale.clamp(max=cap) - scale).detach()


@torch.no_grad()
def hold_cap(encoder: DualEncoder, cap: float) -> None:
    """Brings a trained parameter of the scale back to ``cap`` after a step that led beyond; never SigLIP's."""
    parameter = encoder.log_scale
    if encoder.logit_bias is None and parameter is not None and parameter.requires_grad:
        parameter.clamp_(max=math.log(cap))
