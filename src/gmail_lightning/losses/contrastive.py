"""Contrastive losses over two sets of features: softmax (CLIP) and sigmoid (SigLIP)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmail_lightning.distributed import all_reduce, world_size
from gmail_lightning.losses.info_nce import info_nce
from gmail_lightning.losses.smoothing import as_cosines, mean_margin
from gmail_lightning.losses.tiled import (
    LogitStrip,
    Pairs,
    check_pairs,
    gather_pairs,
    pair_gradients,
    scalar_like,
    unit_rows,
)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize_images: bool = True,
) -> Tensor:
    """Symmetric InfoNCE between images and their texts (CLIP, arXiv 2103.00020, figure 3), over all ranks.

    Exact, in O(N D) memory, at least in single precision whatever autocast says. A side that needs no gradient, such as
    a frozen tower, costs none, and then the whole is a quarter cheaper. Under ``torch.distributed`` every rank gives
    its own N rows and gets the loss of the joined batch; the gradients, averaged over ranks as data parallelism does,
    are those of one process on the joined batch. The backward issues no collective.

    Args:
        image_features: Features, shape (N, D). Normalised inside.
        text_features: Features, shape (N, D); row i belongs to row i of ``image_features``.
        logit_scale: Factor of the cosine similarities, already exponentiated; may be learned.
        ids: Integers, shape (N,). Rows with the same id are not negatives of one another. Default: all differ.
        label_smoothing: Share of the target that is spread evenly over all candidates, the pair's own included, as in
            ``torch.nn.functional.cross_entropy``; rows with the same id are no candidates.
        normalize_images: Whether to normalise ``image_features``. Without, their norms weigh the logits.

    Returns:
        Scalar, the mean over both directions and all pairs.

    Raises:
        ValueError: If the features are not N >= 1 pairs, ``ids`` has another length, ``label_smoothing`` is not in
            [0, 1), or the ranks hold different numbers of rows.

    Example:
        >>> clip_loss(torch.eye(2), torch.eye(2), 1.0)
        tensor(0.3133)
    """
    check_pairs(image_features, text_features, ids, ("image_features", "text_features"))
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1).")
    scale = scalar_like(logit_scale, image_features)
    smoothing: float | Tensor = 0.0
    if label_smoothing:
        image = unit_rows(image_features) if normalize_images else image_features.to(scale.dtype)
        smoothing = label_smoothing * scale * mean_margin(image, unit_rows(text_features), ids)
    if not normalize_images:
        image_features, text_features, scale = as_cosines(image_features, text_features, scale)
    if text_features.requires_grad and not image_features.requires_grad:
        image_features, text_features = text_features, image_features  # the same loss, cheaper: see `gather_pairs`
    return info_nce(image_features, text_features, scale, ids, symmetric=True) + smoothing


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Pairwise sigmoid loss between images and texts (SigLIP, arXiv 2303.15343, section 3.2), over all ranks.

    Precision, memory, frozen sides and ranks as in `clip_loss`.

    Args:
        image_features: Features, shape (N, D). Normalised inside.
        text_features: Features, shape (N, D); row i belongs to row i of ``image_features``.
        logit_scale: Factor of the cosine similarities, already exponentiated; may be learned.
        logit_bias: Added to the scaled similarities; may be learned.
        ids: Integers, shape (N,). Two rows with the same id are not a negative pair. Default: all differ.

    Returns:
        Scalar, the sum over all pairs of rows divided by the number of rows.

    Raises:
        ValueError: As `clip_loss`.

    Example:
        >>> sigmoid_loss(torch.eye(2), torch.eye(2), 10.0, -10.0)
        tensor(0.6932)
    """
    check_pairs(image_features, text_features, ids, ("image_features", "text_features"))
    if text_features.requires_grad and not image_features.requires_grad:
        image_features, text_features = text_features, image_features  # as in clip_loss
    scale, bias = scalar_like(logit_scale, image_features), scalar_like(logit_bias, image_features)
    loss: Tensor = _Sigmoid.apply(image_features, text_features, scale, bias, ids)
    return loss


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """``clip_loss``, or ``sigmoid_loss`` where there is a logit bias; arguments as theirs."""
    if logit_bias is None:
        return clip_loss(image_features, text_features, logit_scale, ids=ids)
    return sigmoid_loss(image_features, text_features, logit_scale, logit_bias, ids=ids)


class _Sigmoid(torch.autograd.Function):
    """L = 1/N sum_ij softplus(-z_ij l_ij) with l_ij = S_ij + bias and z_ij = 1 for pairs, -1 for all others.

    dL/dl_ij = -z_ij/N sigmoid(-z_ij l_ij).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, ids: Tensor | None) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            pairs = gather_pairs(rows, columns, ids, ctx.needs_input_grad)
            strip = pairs.strip(scale)
            total = strip.columns.new_zeros(())
            for i, unit in strip.row_blocks():
                for j, tile in strip.tiles(i, unit):
                    strip.positives(i, j, tile.add_(bias))[1].neg_()
                    total += F.softplus(tile, threshold=40).sum()  # the default, 20, shows in float64
            total = all_reduce(total, "sum")
        ctx.save_for_backward(*pairs, scale, bias)
        return total / len(pairs.all_columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, scale, bias = ctx.saved_tensors
        pairs = Pairs(*saved)
        grad_bias = pairs.all_columns.new_zeros(())

        def transposed(strip: LogitStrip, i: slice, j: slice, tile: Tensor) -> None:
            strip.positives(i, j, tile.add_(bias))[1].neg_()
            strip.positives(i, j, tile.sigmoid_())[1].neg_()

        def derivative(strip: LogitStrip, i: slice, j: slice, tile: Tensor) -> None:
            transposed(strip, i, j, tile)
            grad_bias.add_(tile.sum())

        factor = grad * world_size() / len(pairs.all_columns)  # times the ranks as in InfoNCE
        with torch.autocast(grad.device.type, enabled=False):
            grads = pair_gradients(pairs, scale, derivative, transposed, factor, ctx.needs_input_grad[1])
        return *grads, grad_bias.mul_(factor), None
