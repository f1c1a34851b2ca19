"""Ids of rows that belong together for more than one reason."""

from __future__ import annotations

import torch
from torch import Tensor

from gmail_lightning.distributed import gather_rows, rank
from gmail_lightning.losses.tiled import numbered

ROUNDS = 8  # of passing the least number on: groups of rows that up to twice as many others chain together


def joined_ids(*keys: Tensor) -> Tensor:
    """One id for the rows of all ranks that share a key, or are chained by rows that do; without waiting for a device.

    Args:
        *keys: Integers, each of shape (n,): of this rank's rows, such as the image and the text of each.

    Returns:
        Shape (n,) int64, of this rank's rows; comparable between ranks.

    Example:
        >>> joined_ids(torch.tensor([5, 5, 6, 7]), torch.tensor([1, 2, 2, 3]))
        tensor([0, 0, 0, 3])
    """
    groups = [numbered(gather_rows(key)).long() for key in keys]
    label = torch.arange(len(groups[0]), device=groups[0].device)
    for _ in range(ROUNDS):
        for group in groups:
            label = torch.empty_like(label).scatter_reduce(0, group, label, "amin", include_self=False)[group]
    return label[rank() * len(keys[0]) :][: len(keys[0])]
