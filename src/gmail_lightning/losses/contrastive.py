"""Contrastive losses over two sets of features: softmax (CLIP) and sigmoid (SigLIP)."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmail_lightning.distributed import all_reduce, gather_rows, rank, reads_are_free, world_size
from gmail_lightning.losses.smoothing import as_cosines, mean_margin
from gmail_lightning.losses.tiled import (
    Derivative,
    LogitStrip,
    Pairs,
    check_pairs,
    gather_pairs,
    pair_gradients,
    unit_rows,
)

#: Powers are taken of exponents up to this one, which leaves a factor of 2^27 to the number of rows in fp32.
MAX_EXPONENT = 100.0
#: A smaller sum of powers may miss terms that matter, because they underflow in fp32.
MIN_EXPONENT = -86.0
MIN_SUM = 2.0**MIN_EXPONENT

Sums: TypeAlias = tuple[Tensor, Tensor | None, Tensor]  # over rows, over columns if symmetric; logits of the pairs


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


def info_nce(
    anchors: Tensor, candidates: Tensor, scale: float | Tensor, ids: Tensor | None, *, symmetric: bool
) -> Tensor:
    """InfoNCE from anchors to candidates, and with ``symmetric`` the mean of both directions; inputs as `clip_loss`."""
    bits: Tensor = _InfoNCE.apply(anchors, candidates, scalar_like(scale, anchors) / math.log(2), ids, symmetric)
    return bits * math.log(2)


def scalar_like(value: float | Tensor, features: Tensor) -> Tensor:
    """A number as a 0-d tensor, at least in the single precision of the features; differentiable.

    A tensor stays where it is, and what Python knows stays with the host, which can then look at it without waiting.
    """
    return torch.as_tensor(value, dtype=torch.promote_types(features.dtype, torch.float32)).reshape(())


class _InfoNCE(torch.autograd.Function):
    """L = 1/N sum_i (r_i - S_ii), r_i = log2 sum_j 2^S_ij; symmetric: the mean of L of S and L of S transposed.

    dL/dS_ij = 1/N (2^(S_ij - r_i) - delta_ij), likewise for the columns. Base 2: exp2 takes a third of exp's time.

    One power per logit serves both directions: all are taken of S - shift, one shift for all, which cannot overflow
    because |S| <= scale. Should a whole row or column underflow, each direction takes powers of its own. Whether one
    does is looked up where the scale allows it and looking costs nothing; on a device that would have to be waited for,
    each direction then takes its own powers anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, scale: Tensor, ids: Tensor | None, symmetric: bool
    ) -> Tensor:
        with torch.autocast(anchors.device.type, enabled=False):
            pairs = gather_pairs(anchors, candidates, ids, ctx.needs_input_grad)
            ctx.scale = scale.item() if reads_are_free(scale) else scale.detach()
            ctx.shift = _common_shift(ctx.scale, reads_are_free(anchors))
            strip = pairs.strip(ctx.scale)
            if ctx.shift is not None:
                row, column, positive = _sums(strip, ctx.shift, symmetric)
                if not _never_underflows(ctx.scale) and _underflows(row, column):  # all ranks decide alike
                    ctx.shift = None
            if ctx.shift is None:
                log_row, log_column, positive = row, column, _ = _log_sums(strip, symmetric)
            else:
                log_row, log_column = row.log2() + ctx.shift, None if column is None else column.log2() + ctx.shift
            loss: Tensor = (log_row - positive).mean()
            if log_column is not None:
                loss = (loss + (log_column - positive).mean()) / 2
        ctx.save_for_backward(*pairs, row, column)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, row, column = ctx.saved_tensors
        pairs = Pairs(*saved)
        mine = slice(rank() * len(pairs.rows), (rank() + 1) * len(pairs.rows))
        derivative = _softmax_derivative(row[mine], column, ctx.shift)
        transposed = _softmax_derivative(None if column is None else column[mine], row, ctx.shift)
        # Data parallelism averages the gradients of the ranks, and the global gradient is their sum.
        factor = grad * world_size() / (len(row) if column is None else 2 * len(row))
        with torch.autocast(grad.device.type, enabled=False):
            grads = pair_gradients(pairs, ctx.scale, derivative, transposed, factor, ctx.needs_input_grad[1])
        return *grads, None, None


def _common_shift(scale: float | Tensor, may_look: bool) -> float | None:
    """One shift for all powers; None where each direction takes its own, since nobody could look whether it fits."""
    if isinstance(scale, Tensor) or not (may_look or _never_underflows(scale)):
        return None
    return max(0.0, abs(scale) - MAX_EXPONENT)


def _never_underflows(scale: float) -> bool:
    """Whether even a pair at a cosine of -1 is a power that counts."""
    return -abs(scale) > MIN_EXPONENT


def _underflows(row: Tensor, column: Tensor | None) -> bool:
    lowest = row.min() if column is None else torch.minimum(row.min(), column.min())
    return not bool(lowest > MIN_SUM)  # NaN too


def _sums(strip: LogitStrip, shift: float, symmetric: bool) -> Sums:
    """Sums of 2^(S - shift) over all ranks, and the logits of the pairs."""
    row, positive = strip.columns.new_zeros(2, len(strip.rows))
    column = torch.zeros_like(strip.columns[:, 0]) if symmetric else None
    for i, unit in strip.row_blocks():
        for j, tile in strip.tiles(i, unit):
            where, logits = strip.positives(i, j, tile)
            positive[where] = logits
            if shift > 0:
                tile.sub_(shift)
            tile.exp2_()
            row[i] += tile.sum(1)
            if column is not None:
                column[j] += tile.sum(0)
    row, positive = gather_rows(torch.stack([row, positive], dim=1)).unbind(1)
    return row, None if column is None else all_reduce(column, "sum"), positive


def _log_sums(strip: LogitStrip, symmetric: bool) -> Sums:
    """Logarithms of the sums of 2^S over all ranks, for logits of any range, and the logits of the pairs."""
    row, positive = strip.columns.new_full((2, len(strip.rows)), -torch.inf)
    column = torch.full_like(strip.columns[:, 0], -torch.inf) if symmetric else None
    for i, unit in strip.row_blocks():
        for j, tile in strip.tiles(i, unit):
            where, logits = strip.positives(i, j, tile)
            positive[where] = logits
            row[i] = torch.logaddexp2(row[i], _log2_sum(tile, 1))
            if column is not None:
                column[j] = torch.logaddexp2(column[j], _log2_sum(tile, 0))
    row, positive = gather_rows(torch.stack([row, positive], dim=1)).unbind(1)
    if column is not None and world_size() > 1:
        highest = all_reduce(column.clone(), "max")
        column = all_reduce((column - highest).exp2_(), "sum").log2_().add_(highest)
    return row, column, positive


def _log2_sum(tile: Tensor, dim: int) -> Tensor:
    highest = tile.amax(dim, keepdim=True).clamp_min(torch.finfo(tile.dtype).min)  # finite where all is masked
    return (tile - highest).exp2_().sum(dim).log2_() + highest.squeeze(dim)


def _softmax_derivative(row: Tensor | None, column: Tensor | None, shift: float | None) -> Derivative:
    """Derivative by S of the sums over i of r_i - S_ii and over j of c_j - S_jj; a direction that is None is left out.

    With a shift, ``row`` and ``column`` are sums of 2^(S - shift), and 2^(S - r_i) + 2^(S - c_j) = 2^(S - shift) *
    (1 / row_i + 1 / column_j). Without, they are r and c.
    """

    def derivative(strip: LogitStrip, i: slice, j: slice, tile: Tensor) -> None:
        sums = ([] if row is None else [row[i, None]]) + ([] if column is None else [column[None, j]])
        if shift is None:
            softmax = [(tile - each).exp2_() for each in sums]
            tile.copy_(softmax[0] + softmax[1] if len(sums) == 2 else softmax[0])
        else:
            if shift > 0:
                tile.sub_(shift)
            weights = [each.reciprocal() for each in sums]
            tile.exp2_().mul_(weights[0] + weights[1] if len(sums) == 2 else weights[0])
        strip.positives(i, j, tile)[1].sub_(len(sums))

    return derivative


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
