"""How many texts a text tower cuts."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TruncatedTexts(Metric):
    """Number and share of texts that are longer than the context of a text tower.

    Args:
        prefix: Put before the name of every value.
    """

    full_state_update = False
    higher_is_better = False
    cut: Tensor
    count: Tensor

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        for name in ("cut", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, cut: Tensor) -> None:
        """Adds texts: whether each is cut, shape (T,)."""
        self.cut += cut.sum()
        self.count += len(cut)

    def compute(self) -> dict[str, Tensor]:
        """``num_truncated`` and the share ``truncated``; nothing where no text came."""
        if self.count == 0:
            return {}
        values = {"num_truncated": self.cut.float(), "truncated": (self.cut.double() / self.count).float()}
        return {self.prefix + name: value for name, value in values.items()}
