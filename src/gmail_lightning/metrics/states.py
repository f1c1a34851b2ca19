"""States of metrics that hold rows: how ranks exchange them, and how each row counts once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors


def gather_state(state: Tensor, group: Any = None) -> list[Tensor]:
    """A state of every rank: the ``dist_sync_fn`` of every metric here whose states are lists.

    For a rank that had no update torchmetrics sends an empty float32 vector, which cannot be gathered with the integers
    or the features (N, D) of the others: that fails, or hangs. Here a rank without rows takes on the type and the width
    of those that have some.

    Raises:
        ValueError: On every rank alike, if rows differ in type or width.
    """
    if state.ndim:
        kinds: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(kinds, (len(state), state.dtype, tuple(state.shape[1:])), group)
        held = {(dtype, width) for rows, dtype, width in kinds if rows} or {kinds[0][1:]}
        if len(held) > 1:
            raise ValueError(f"Rows of different types or widths cannot be joined; the ranks hold {kinds}.")
        ((dtype, width),) = held
        if len(state) == 0:
            state = torch.empty((0, *width), dtype=dtype, device=state.device)
    gathered: list[Tensor] = gather_all_tensors(state, group)
    return gathered


def joined(state: list[Tensor] | Tensor) -> Tensor:
    """The rows of a state, over all ranks once it is synchronised."""
    return dim_zero_cat(state) if len(state) else torch.empty(0)


class RowMetric(Metric):
    """A metric of some integers per row, which counts every row once.

    Subclasses call ``add_rows`` in ``update`` and ``distinct_rows`` in ``compute``.

    Args:
        prefix: Put before the name of every value.
    """

    full_state_update = False
    rows: list[Tensor]
    ids: list[Tensor]

    def __init__(self, prefix: str = "") -> None:
        super().__init__(dist_sync_fn=gather_state)
        self.prefix = prefix
        for name in ("rows", "ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def add_rows(self, rows: Sequence[tuple[int, int]], ids: Tensor | None) -> None:
        """Adds rows, and ids, shape (B,), by which they are told apart; without ids every row counts."""
        if rows:
            self.rows.append(torch.tensor(rows, dtype=torch.int64, device=self.device))
        if rows and ids is not None:
            self.ids.append(ids.detach().to(self.device, torch.int64))

    def distinct_rows(self) -> Tensor:
        """Rows (N, 2) in the order of their ids, each id once; as they came where there are no ids.

        Raises:
            ValueError: If some rows have no id, or an id came twice with different rows.
        """
        rows, ids = (dim_zero_cat(state) if len(state) else torch.empty(0) for state in (self.rows, self.ids))
        if len(ids) == 0:
            return rows
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids for {len(rows)} rows: give ids in every update or in none.")
        ids, order = ids.sort(stable=True)
        rows = rows[order]
        again = ids[1:] == ids[:-1]
        differ = again & (rows[1:] != rows[:-1]).any(dim=1)
        if differ.any():
            raise ValueError(f"id {int(ids[1:][differ][0])} came twice with different values.")
        return rows[torch.cat([again.new_ones(1), ~again])]
