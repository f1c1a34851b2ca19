"""Alignment of generated images with the real images of their pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from gmail_lightning.distributed import reads_are_free
from gmail_lightning.losses.info_nce import info_nce
from gmail_lightning.losses.tiled import check_pairs, scalar_like


def alignment_loss(
    generated: Tensor,
    real: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    ids: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """InfoNCE from every generated image to the real image of its pair (GMAIL, arXiv 2602.15368, equation 1).

    The candidates are the real images of the batch, of all ranks. Precision, memory and ranks as in `clip_loss`. The
    real features of a frozen encoder need no gradient; trained ones, as of a projection of their own, get theirs.

    Args:
        generated: Features of the generated images, shape (N, D). Normalised inside.
        real: Features of the real images, shape (N, D); row i belongs to row i of ``generated``.
        temperature: Divides the cosine similarities; may be learned.
        ids: Ids of the real images, integers of shape (N,). A real image is no negative of another row that shows the
            same one. Default: all differ.
        symmetric: Whether to take the mean with InfoNCE from real to generated images; the equation does not.

    Returns:
        Scalar, the mean over all pairs.

    Raises:
        ValueError: If the temperature is not positive, and as `clip_loss`. One on a device is not waited for: where
            it is not positive, the loss is NaN.

    Example:
        >>> import torch
        >>> alignment_loss(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor(0.3133)
    """
    check_pairs(generated, real, ids, ("generated", "real"))
    temperature = scalar_like(temperature, generated)
    if not reads_are_free(temperature):
        temperature = temperature.where(temperature > 0, torch.nan)
    elif not temperature.item() > 0:
        raise ValueError(f"temperature must be positive, got {temperature.item():g}; the paper uses 0.07.")
    return info_nce(generated, real, 1 / temperature, ids, symmetric=symmetric)
