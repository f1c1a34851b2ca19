"""Losses over all pairs of two sets of features, visited tile by tile: O(N D) memory, never an N x N matrix.

The logits are ``S_ij = scale * <a_i, b_j>`` of unit rows a_i, b_j. The forward walks over the tiles of S for the loss;
the backward makes every tile again, overwrites it by ``dL/dS`` and multiplies it into the gradients. Under data
parallelism a rank owns the strip of S of its own n rows, against the gathered columns of all N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gmail_lightning.distributed import gather_rows, rank, reads_are_free, require_equal_rows, world_size

#: Rows and columns of a tile. A CPU tile stays in the cache; a GPU needs large ones to keep its launches few.
CPU_TILE = (512, 1024)
GPU_TILE = (4096, 8192)

#: Smallest norm that is divided by, that of ``torch.nn.functional.normalize``.
EPS = 1e-12


def check_pairs(first: Tensor, second: Tensor, ids: Tensor | None, names: tuple[str, str]) -> None:
    """Refuses features that are not N pairs of rows.

    Raises:
        ValueError: If a tensor is not 2-D, the shapes differ, there is no row, ``ids`` has another length, or the
            ranks hold different numbers of rows.
    """
    for name, features in zip(names, (first, second), strict=True):
        if features.ndim != 2:
            raise ValueError(f"{name} must have shape (N, D), got {tuple(features.shape)}.")
    if first.shape != second.shape:
        raise ValueError(
            f"Row i of {names[0]} and row i of {names[1]} form a pair, so both need one shape (N, D); "
            f"got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    if ids is not None and ids.shape != first.shape[:1]:
        raise ValueError(f"ids must have shape ({len(first)},), one per row of {names[0]}, got {tuple(ids.shape)}.")
    require_equal_rows(first)
    if len(first) == 0:
        raise ValueError(f"{names[0]} and {names[1]} have no rows: a contrastive loss needs at least one pair.")


def unit_rows(features: Tensor) -> Tensor:
    """Rows of norm 1, at least in single precision."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def scalar_like(value: float | Tensor, features: Tensor) -> Tensor:
    """A number as a 0-d tensor, at least in the single precision of the features; differentiable.

    A tensor stays where it is, and what Python knows stays with the host, which can then look at it without waiting.
    """
    return torch.as_tensor(value, dtype=torch.promote_types(features.dtype, torch.float32)).reshape(())


def gather_groups(ids: Tensor | None) -> Tensor | None:
    """Joins the ids of all ranks and numbers them from 0 up, shape (N,) int32.

    None where no two rows share an id, as far as looking costs nothing.
    """
    if ids is None:
        return None
    ids = gather_rows(ids)
    if reads_are_free(ids):
        distinct, groups = ids.unique(return_inverse=True)
        return None if len(distinct) == len(groups) else groups.to(torch.int32)
    return numbered(ids)


def numbered(ids: Tensor) -> Tensor:
    """Numbers equal ids alike, from 0 up, shape (N,) int32; without waiting for a device."""
    ascending, order = ids.sort()
    is_new = ascending[1:] != ascending[:-1]
    return torch.zeros_like(ids, dtype=torch.int32).scatter_(0, order[1:], is_new.cumsum(0, dtype=torch.int32))


class LogitStrip:
    """The logits of this rank's rows against the columns of all ranks; row i and column ``first + i`` are a pair.

    Args:
        rows: Features as given, shape (n, D).
        columns: Unit rows of the other side of all ranks, shape (N, D).
        scale: Factor of the cosine similarities.
        groups: Numbers, shape (N,); rows and columns of one group that are not a pair get a logit of minus infinity.
    """

    def __init__(self, rows: Tensor, columns: Tensor, scale: float | Tensor, groups: Tensor | None) -> None:
        self.rows, self.columns, self.scale, self.groups = rows, columns, scale, groups
        self.first = rank() * len(rows)
        self.tile_shape = CPU_TILE if rows.device.type == "cpu" else GPU_TILE
        height, width = min(self.tile_shape[0], len(rows)), min(self.tile_shape[1], len(columns))
        self._buffer = columns.new_empty(height * width)  # every tile in turn

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields the rows of each row of tiles, and their unit features."""
        for i in _slices(len(self.rows), self.tile_shape[0]):
            yield i, unit_rows(self.rows[i]).to(self.columns.dtype)

    def tiles(self, i: slice, unit: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields the columns and the logits of the tiles in rows ``i``. A tile may be overwritten, and not kept."""
        block = unit * self.scale
        for j in _slices(len(self.columns), self.tile_shape[1]):
            shape = len(block), j.stop - j.start
            tile = torch.mm(block, self.columns[j].T, out=self._buffer[: shape[0] * shape[1]].view(shape))
            if self.groups is not None:
                same = self.groups[self.first + i.start : self.first + i.stop, None] == self.groups[j]
                self.positives(i, j, same)[1].fill_(False)
                tile.masked_fill_(same, -torch.inf)
            yield j, tile

    def positives(self, i: slice, j: slice, tile: Tensor) -> tuple[slice, Tensor]:
        """The entries of a tile that belong to pairs, as a view, and the rows that they are in (both may be empty)."""
        offset = self.first + i.start - j.start
        diagonal = tile.diagonal(offset)
        start = i.start + max(0, -offset)
        return slice(start, start + len(diagonal)), diagonal

    def gradients(
        self, derivative: Derivative, factor: Tensor, other: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of a loss with respect to the features as given.

        Args:
            derivative: Overwrites the tile of rows i and columns j by the derivative of the loss by its logits.
            factor: Scalar that multiplies every gradient.
            other: The features behind ``columns`` if their gradient is wanted too, shape (N, D).

        Returns:
            Gradient of the rows (n, D), of ``other`` (N, D) or None, and of the scale.
        """
        grad_rows = torch.empty_like(self.rows)
        grad_other = torch.zeros_like(self.columns) if other is not None else None
        grad_scale = factor.new_zeros(())
        for i, unit in self.row_blocks():
            total = torch.zeros_like(unit)
            scaled = unit * self.scale
            for j, tile in self.tiles(i, unit):
                derivative(self, i, j, tile)
                total.addmm_(tile, self.columns[j])
                if grad_other is not None:
                    grad_other[j].addmm_(tile.T, scaled)
            radial = _backward_unit_rows(total.mul_(factor), self.rows[i], unit)
            grad_rows[i] = total.mul_(self.scale)
            grad_scale += radial.sum()
        if other is None or grad_other is None:
            return grad_rows, None, grad_scale
        for j in _slices(len(other), self.tile_shape[0]):
            _backward_unit_rows(grad_other[j].mul_(factor), other[j], self.columns[j])
        return grad_rows, grad_other.to(other.dtype), grad_scale


class Pairs(NamedTuple):
    """N pairs over all ranks, n of them on this rank.

    Where both sides are trained, a rank makes the gradient of its own n columns from a second strip, against the
    gathered rows, rather than to reduce-scatter the column gradients of all ranks. That costs 10 instead of 8 n N D
    FLOP, small beside the towers, but like the frozen form it needs no collective in the backward, which would queue
    with the gradient buckets of data parallelism.
    """

    rows: Tensor  # (n, D) as given
    columns: Tensor  # (n, D) as given
    all_columns: Tensor  # (N, D) unit rows
    all_rows: Tensor | None  # (N, D) unit rows, if the gradient of the columns takes a second strip
    groups: Tensor | None  # (N,)

    def strip(self, scale: float | Tensor) -> LogitStrip:
        """This rank's rows against all columns."""
        return LogitStrip(self.rows, self.all_columns, scale, self.groups)


def gather_pairs(rows: Tensor, columns: Tensor, ids: Tensor | None, needs_input_grad: Sequence[bool]) -> Pairs:
    """Gathers what forward and backward need of the other ranks. A frozen side belongs in the columns.

    Then only that side is gathered, and the backward multiplies every tile once instead of twice.
    """
    second_strip = needs_input_grad[1] and world_size() > 1
    return Pairs(
        rows,
        columns,
        unit_rows(gather_rows(columns)),
        unit_rows(gather_rows(rows)) if second_strip else None,
        gather_groups(ids),
    )


def pair_gradients(
    pairs: Pairs,
    scale: float | Tensor,
    derivative: Derivative,
    transposed: Derivative,
    factor: Tensor,
    need_columns: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients by this rank's rows and columns, and its part of the one by the scale.

    Args:
        pairs: What `gather_pairs` returned in the forward.
        scale: Factor of the cosine similarities.
        derivative: Overwrites a tile of logits by the derivatives of the loss of all ranks.
        transposed: The same for a strip whose rows are the columns of the loss.
        factor: Scalar that multiplies every gradient.
        need_columns: Whether the columns want a gradient.
    """
    one_walk = need_columns and pairs.all_rows is None
    grad_rows, grad_columns, grad_scale = pairs.strip(scale).gradients(
        derivative, factor, pairs.columns if one_walk else None
    )
    if pairs.all_rows is not None:
        strip = LogitStrip(pairs.columns, pairs.all_rows, scale, pairs.groups)
        grad_columns = strip.gradients(transposed, factor, None)[0]
    return grad_rows, grad_columns, grad_scale


#: Overwrites the logits of rows i and columns j of a strip by the derivatives of the loss.
Derivative: TypeAlias = "Callable[[LogitStrip, slice, slice, Tensor], None]"


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _backward_unit_rows(grad: Tensor, features: Tensor, unit: Tensor) -> Tensor:
    """Overwrites a gradient by unit rows by the one by the features behind them; returns <unit, grad>, shape (n, 1)."""
    radial = (grad * unit).sum(1, keepdim=True)
    norm = features.to(unit.dtype).norm(dim=1, keepdim=True).clamp_min(EPS)
    grad.addcmul_(unit, radial, value=-1).div_(norm)
    return radial
