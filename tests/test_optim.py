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
    groups = parameter_groups(nn.ModuleList([layer, frozen]).named_parameters())
    assert [g["params"] for g in groups] == [[layer.weight], [layer.bias]]
    assert groups[1]["weight_decay"] == 0.0
    assert parameter_groups(frozen.named_parameters()) == []


def model() -> nn.ModuleDict:
    towers = {name: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)) for name in ("text", "image", "image2")}
    return nn.ModuleDict({"encoder": nn.ModuleDict(towers), "head": nn.Linear(3, 1)})


def test_parts_of_a_model_have_rates_of_their_own() -> None:
    made = model()
    made["encoder"]["text"][0].requires_grad_(False)
    rates = {"encoder": 1e-3, "encoder.image": 1e-4, "encoder.image.1.bias": 1e-5}
    groups = parameter_groups(made.named_parameters(), rates)
    names = {parameter: name for name, parameter in made.named_parameters()}
    found = [([names[p] for p in g["params"]], g.get("lr"), g.get("weight_decay")) for g in groups]
    assert found == [
        (["head.weight"], None, None),
        (["head.bias"], None, 0.0),
        (["encoder.image2.0.weight"], 1e-3, None),
        (
            [
                "encoder.text.1.weight",
                "encoder.text.1.bias",
                "encoder.image2.0.bias",
                "encoder.image2.1.weight",
                "encoder.image2.1.bias",
            ],
            1e-3,
            0.0,
        ),
        (["encoder.image.0.weight"], 1e-4, None),
        (["encoder.image.0.bias", "encoder.image.1.weight"], 1e-4, 0.0),
        (["encoder.image.1.bias"], 1e-5, 0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.1, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5]


def test_without_rates_the_groups_are_two() -> None:
    made = model()
    expected = parameter_groups(made.named_parameters())
    assert len(expected) == 2
    assert parameter_groups(made.named_parameters(), {}) == expected
    assert all("lr" not in group for group in expected)


def test_the_schedule_scales_every_rate() -> None:
    made = model()
    optimizer = torch.optim.AdamW(parameter_groups(made.named_parameters(), {"encoder": 0.02}), lr=1.0)
    schedule = WarmupCosine(optimizer, max_steps=10, warmup_steps=4)
    for factor in rates(11, max_steps=10, warmup_steps=4):  # of a rate of 2
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([x * factor / 2 for x in (1, 1, 0.02, 0.02)])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("learning_rates", "message"),
    [
        (
            {"encoder.imag": 1e-3},
            r"'encoder.imag'. Parts that train: encoder, encoder.image, encoder.image2, enc",
        ),
        ({"head": 1e-3}, r"nothing that trains has a name below 'head'"),  # frozen
        ({"encoder": 0.0}, r"encoder: 0.0 is not above 0"),
        ({"encoder": float("nan")}, r"encoder: nan is not above 0"),
    ],
)
def test_rates_of_nothing_are_refused(learning_rates: dict[str, float], message: str) -> None:
    made = model()
    made["head"].requires_grad_(False)
    made["free"] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        parameter_groups(made.named_parameters(), learning_rates)
