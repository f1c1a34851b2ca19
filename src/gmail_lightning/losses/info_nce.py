"""InfoNCE over all pairs of two sets of features, in powers of two."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmail_lightning.distributed import all_reduce, gather_rows, rank, reads_are_free, world_size
from gmail_lightning.losses.tiled import Derivative, LogitStrip, Pairs, gather_pairs, pair_gradients, scalar_like

#: Powers are taken of exponents up to this one, which leaves a factor of 2^27 to the number of rows in fp32.
MAX_EXPONENT = 100.0
#: A smaller sum of powers may miss terms that matter, because they underflow in fp32.
MIN_EXPONENT = -86.0
MIN_SUM = 2.0**MIN_EXPONENT

Sums: TypeAlias = tuple[Tensor, Tensor | None, Tensor]  # over rows, over columns if symmetric; logits of the pairs


def info_nce(
    anchors: Tensor, candidates: Tensor, scale: float | Tensor, ids: Tensor | None, *, symmetric: bool
) -> Tensor:
    """InfoNCE from anchors to candidates, and with ``symmetric`` the mean of both directions; inputs as `clip_loss`."""
    bits: Tensor = _InfoNCE.apply(anchors, candidates, scalar_like(scale, anchors) / math.log(2), ids, symmetric)
    return bits * math.log(2)


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
