"""The schedule against its closed form, and what takes weight decay."""

import math

import pytest
import torch
from torch import nn

from gmail_lightning.optim import WarmupCosine, parameter_groups


def rates(steps: int, **kwargs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, **kwargs)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


def test_warmup_then_cosine() -> None:
    got = rates(11, max_steps=10, warmup_steps=4)
    expected = [2 * (i + 1) / 5 for i in range(4)] + [1 + math.cos(math.pi * i / 6) for i in range(7)]
    assert got == pytest.approx(expected)
    assert got[-1] == pytest.approx(0)


def test_cycles_restart_at_the_full_rate() -> None:
    got = rates(9, max_steps=8, cycles=2)
    one = [1 + math.cos(math.pi * i / 4) for i in range(4)]
    assert got == pytest.approx([*one, *one, 0], abs=1e-9)


@pytest.mark.parametrize(
    "kwargs", [{"max_steps": -1}, {"max_steps": 4, "warmup_steps": -1}, {"max_steps": 4, "cycles": 0}]
)
def test_impossible_schedules_are_refused(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        rates(1, **kwargs)


def test_vectors_take_no_weight_decay_and_frozen_parameters_no_group() -> None:
    layer = nn.Linear(2, 3)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    groups = parameter_groups([*layer.parameters(), *frozen.parameters()])
    assert [g["params"] for g in groups] == [[layer.weight], [layer.bias]]
    assert groups[1]["weight_decay"] == 0.0
    assert parameter_groups(frozen.parameters()) == []
