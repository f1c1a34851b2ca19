"""What Long-CLIP adds to the contrast of `clip_loss`: smoothed labels, and images that are not of norm 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmail_lightning.distributed import all_reduce, rank, world_size
from gmail_lightning.losses.tiled import gather_groups

#: Square of the common norm in `as_cosines`, by the largest square: 1 leaves no room, much more needs larger scales.
ROOM = 1.25


def mean_margin(rows: Tensor, columns: Tensor, ids: Tensor | None) -> Tensor:
    """How much higher pairs score than the mean of all candidates; the mean of both directions and all ranks, scalar.

    Cross-entropy with smoothed labels is that with hard ones plus ``label_smoothing`` times this of the logits: it is
    linear in them, so that sums of rows stand for the N x N matrix. The backward issues no collective.

    Args:
        rows: Features as they enter the products, shape (n, D), float32 or float64.
        columns: The other side, shape (n, D).
        ids: Integers, shape (n,); rows that share one are not candidates of one another.
    """
    margin: Tensor = _MeanMargin.apply(rows, columns, gather_groups(ids))
    return margin


class _MeanMargin(torch.autograd.Function):
    """1/2N sum_ij w_ij <a_i, b_j>, where w_ij = 2 delta_ij - u_ij (1/C_i + 1/C_j).

    u_ij says whether i and j are candidates of one another, and C_i counts those of i: all, less the others of its
    group. Hence the derivative by a_i is 1/2N of the sum of w_ij b_j, which takes b_i and the sums of b in each group.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, groups: Tensor | None) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            by_rows, by_columns = _weighted_sums(columns, groups), _weighted_sums(rows, groups)
            ctx.factor = 1 / (2 * len(rows) * world_size())
            margin: Tensor = all_reduce((rows * by_rows).sum(), "sum") * ctx.factor
        ctx.save_for_backward(by_rows, by_columns)
        return margin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # Data parallelism averages the gradients of the ranks, and the global gradient is their sum.
        by_rows, by_columns = (tensor * (grad * ctx.factor * world_size()) for tensor in ctx.saved_tensors)
        return by_rows, by_columns, None


def _weighted_sums(features: Tensor, groups: Tensor | None) -> Tensor:
    """The sum over all ranks of w_ij b_j, for the i of this rank, shape (n, D)."""
    pairs = len(features) * world_size()
    if groups is None:
        return 2 * (features - all_reduce(features.sum(0), "sum") / pairs)
    own = groups[rank() * len(features) : (rank() + 1) * len(features)]
    size = torch.zeros_like(groups, dtype=torch.long).index_add_(0, groups, torch.ones_like(groups, dtype=torch.long))
    candidates = (pairs + 1 - size).to(features.dtype)[:, None]  # (N, 1), by the number of a group
    sums = all_reduce(features.new_zeros(len(size), features.shape[1]).index_add_(0, own, features), "sum")
    by_group = sums.sum(0) / candidates + (sums / candidates).sum(0) - 2 * sums / candidates
    return 2 * (features - features / candidates[own]) - by_group[own]


def as_cosines(features: Tensor, others: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Writes ``scale * <a_i, b_j>``, with a_i of any norm and b_j of norm 1, as cosines times another scale.

    One column more makes all a_i of one norm, over all ranks, and changes no product.

    Args:
        features: The a_i, shape (n, D).
        others: The b_j, shape (n, D), of any norm, as the cosines will see them.
        scale: Factor of the products.

    Returns:
        Features and others of width D + 1, and the scale of their cosines.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    square = features.square().sum(1, keepdim=True)
    norm_square = ROOM * all_reduce(square.detach().max(), "max").clamp_min(1e-12)
    rest = (norm_square - square).sqrt()
    return torch.cat([features, rest], dim=1), F.pad(others, (0, 1)), scale * norm_square.sqrt()
