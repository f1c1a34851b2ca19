"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], learning_rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices, and vectors and scalars, which take no weight decay.

    Args:
        named_parameters: As a checkpoint names them.
        learning_rates: Rates of their own for parts of the model, by how the names of their parameters begin:
            ``{"encoder": 1e-5, "encoder.model.visual": 1e-6}``. The longest beginning that fits wins; what none fits
            takes the optimizer's own rate.

    Returns:
        At most two groups for the rest of the model, then at most two for every rate, in the order given.

    Raises:
        ValueError: If a rate is not above 0, or fits no trainable parameter; names those that would.
    """
    trainable = {name: p for name, p in named_parameters if p.requires_grad}
    rates = dict(learning_rates or {})
    _check_rates(rates, list(trainable))
    parts: dict[str | None, list[nn.Parameter]] = {None: [], **{prefix: [] for prefix in rates}}
    for name, parameter in trainable.items():
        fitting = [prefix for prefix in rates if _begins(name, prefix)]
        parts[max(fitting, key=len) if fitting else None].append(parameter)
    groups: list[dict[str, Any]] = []
    for prefix, parameters in parts.items():
        rate = {} if prefix is None else {"lr": rates[prefix]}
        matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups += [{"params": matrices, **rate}] if matrices else []
        groups += [{"params": vectors, "weight_decay": 0.0, **rate}] if vectors else []
    return groups


def _begins(name: str, prefix: str) -> bool:
    """Whether a name is, or lies below, another: ``a.b`` begins ``a.b.weight``, not ``a.bias``."""
    return f"{name}.".startswith(f"{prefix}.")


def _check_rates(rates: Mapping[str, float], names: Sequence[str]) -> None:
    for prefix, rate in rates.items():
        if not rate > 0:
            raise ValueError(f"learning_rates: {prefix}: {rate} is not above 0. To keep a part as it is, freeze it.")
        if not any(_begins(name, prefix) for name in names):
            known = ", ".join(_parts(names)) or "none"
            raise ValueError(
                f"learning_rates: nothing that trains has a name below {prefix!r}. Parts that train: {known}."
            )


def _parts(names: Sequence[str]) -> list[str]:
    """Names of the parts that hold parameters: from what all have in common two levels down."""
    modules = [name.split(".")[:-1] for name in names]
    in_common = takewhile(lambda level: len(set(level)) == 1, zip(*modules, strict=False))
    shared = len(list(in_common))
    found = {".".join(module[:depth]) for module in modules for depth in range(shared, shared + 3)}
    return sorted(found - {""})


class WarmupCosine(LambdaLR):
    """Linear warm-up, then cosine decay to zero, optionally in several equal cycles; stepped every batch.

    Args:
        optimizer: The optimizer whose rates are scaled, each group's from its own.
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
