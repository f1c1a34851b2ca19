"""The few collectives that the losses need. On one process every one of them is the identity."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 where ``torch.distributed`` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 where ``torch.distributed`` is not initialised."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(tensor: Tensor) -> Tensor:
    """Joins the rows of all ranks, in the order of the ranks, without gradient.

    Args:
        tensor: This rank's rows, shape (n, ...), the same shape and dtype on every rank.

    Returns:
        The rows of all W ranks, shape (W * n, ...); on one process ``tensor`` itself.
    """
    if world_size() == 1:
        return tensor
    gathered = tensor.new_empty((world_size() * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def all_reduce(tensor: Tensor, op: Literal["sum", "max"]) -> Tensor:
    """Overwrites ``tensor`` by its sum or maximum over the ranks, without gradient, and returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return tensor


def require_equal_rows(tensor: Tensor) -> None:
    """Raises on every rank alike unless all ranks hold as many rows as this one; a gather would hang or mix up rows.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    if world_size() == 1:
        return
    counts = gather_rows(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"Every rank needs the same number of rows, got {counts} on ranks 0 to {world_size() - 1}. "
            "Drop the incomplete last batch (drop_last=True) or let the sampler make the shares equal."
        )
