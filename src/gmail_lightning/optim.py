"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, and vectors and scalars, which take no weight decay."""
    trainable = [p for p in parameters if p.requires_grad]
    matrices, vectors = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
    return [*groups, {"params": vectors, "weight_decay": 0.0}] if vectors else groups


class WarmupCosine(LambdaLR):
    """Linear warm-up, then cosine decay to zero, optionally in several equal cycles; stepped every batch.

    Args:
        optimizer: The optimizer whose rates are scaled.
        max_steps: Steps of the whole run. Explicit, never estimated: asking Lightning for an estimate loses the
            position of the data on resume (Lightning issue 20550).
        warmup_steps: Steps of the linear warm-up; a run that is shorter (a trial run) ends within it.
        cycles: Cosine cycles after the warm-up; more than one restarts at the full rate (SGDR).
    """

    def __init__(self, optimizer: Optimizer, max_steps: int, warmup_steps: int = 0, cycles: int = 1) -> None:
        for name, value, least in (
            ("max_steps", max_steps, 1),
            ("warmup_steps", warmup_steps, 0),
            ("cycles", cycles, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
            within = 1.0 if progress == 1.0 else progress * cycles % 1.0
            return 0.5 * (1.0 + math.cos(math.pi * within))

        self.max_steps = max_steps
        super().__init__(optimizer, factor)
