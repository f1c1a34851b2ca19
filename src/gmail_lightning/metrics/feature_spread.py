"""Whether features spread over their space or collapse, and how far they have moved from those of before."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


def feature_spread(features: Tensor) -> dict[str, Tensor]:
    """Effective rank and mean pairwise cosine of features: of a collapsed set 1 and 1.

    The effective rank (Roy and Vetterli, EUSIPCO 2007) is the exponential of the entropy of the singular values, here
    of the unit rows, divided by their sum. They are not centred: features that all lean one way have collapsed, too.

    Args:
        features: Shape (N, D), normalised inside.

    Returns:
        ``effective_rank``, from 1 to min(N, D), and ``mean_cosine`` over all pairs of different rows; float64.

    Raises:
        ValueError: If there are fewer than two rows, or one is not finite.

    Example:
        >>> feature_spread(torch.eye(3))
        {'effective_rank': tensor(3.0000, dtype=torch.float64), 'mean_cosine': tensor(0., dtype=torch.float64)}
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"Expected features (N, D) of at least 2 rows, got {tuple(features.shape)}.")
    unit = _unit(features, "features")
    return _spread(unit.T @ unit, unit.sum(dim=0), torch.tensor(len(unit), device=unit.device))


def _unit(features: Tensor, name: str) -> Tensor:
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: {int((~torch.isfinite(features)).any(dim=1).sum())} rows are not finite.")
    return F.normalize(features.double(), dim=1)


def _spread(moment: Tensor, total: Tensor, count: Tensor) -> dict[str, Tensor]:
    squares = torch.linalg.eigvalsh(moment)
    # What rounding leaves of a zero, 1e-16 of the largest, would be 1e-8 as a root, and D of them would add up
    floor = squares.amax() * len(squares) * torch.finfo(squares.dtype).eps
    singular = squares.where(squares > floor, 0).sqrt()
    share = singular / singular.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    pairs = (count * (count - 1)).double()
    return {"effective_rank": entropy.exp(), "mean_cosine": (total.square().sum() - moment.diagonal().sum()) / pairs}


class FeatureSpread(Metric):
    """``feature_spread`` over batches and ranks, and with earlier features of the same rows the ``drift`` from these.

    It keeps sums alone, O(D^2). ``drift`` is the mean of 1 - cosine.

    Args:
        width: D.
        prefix: Put before the name of every value.
    """

    full_state_update = False
    count: Tensor
    moved: Tensor
    moment: Tensor
    total: Tensor

    def __init__(self, width: int, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("moved", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")  # sum and number of rows
        self.add_state("moment", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, earlier_features: Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            features: Shape (N, D); N may be 0.
            earlier_features: Those of the same rows before training, shape (N, D).

        Raises:
            ValueError: If a width is not D, the two shapes differ, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.total):
            raise ValueError(f"features: expected shape (N, {len(self.total)}), got {tuple(features.shape)}.")
        if earlier_features is not None and earlier_features.shape != features.shape:
            raise ValueError(
                f"earlier_features: expected shape {tuple(features.shape)}, got {tuple(earlier_features.shape)}."
            )
        unit = _unit(features.detach(), "features")
        if earlier_features is not None:
            cosine = (unit * _unit(earlier_features.detach(), "earlier_features")).sum(dim=1)
            self.moved = self.moved + torch.stack([(1 - cosine).sum(), cosine.new_tensor(float(len(cosine)))])
        self.moment = self.moment + unit.T @ unit
        self.total = self.total + unit.sum(dim=0)
        self.count = self.count + len(unit)

    def compute(self) -> dict[str, Tensor]:
        """See ``feature_spread``; nothing of fewer than two rows."""
        if self.count < 2:
            return {}
        values = _spread(self.moment, self.total, self.count)
        if self.moved[1] > 0:
            values["drift"] = (self.moved[0] / self.moved[1]).clamp(min=0)  # rounding would show as -0.000
        return {f"{self.prefix}{name}": value for name, value in values.items()}
