"""The average against diffusers' ``EMAModel``, bit by bit, and what a state of either means to the other."""

import copy
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from gmail_lightning.models.averaging import WeightAverage


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def peer(model: nn.Module, decay: float) -> EMAModel:
    return EMAModel(model.parameters(), decay=decay, use_ema_warmup=True, power=0.75)


def step(model: nn.Module, draws: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.1)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9999])
def test_every_step_is_that_of_diffusers(decay: float) -> None:
    model, draws = network(), torch.Generator().manual_seed(1)
    average, expected, values = WeightAverage(model.parameters(), decay), peer(model, decay), []
    for _ in range(30):
        step(model, draws)
        average.update()
        expected.step(model.parameters())
        assert average.kept() == expected.cur_decay_value
        assert same(average.average, expected.shadow_params)
        values.append(average.kept())
    assert average.steps == expected.optimization_step == 30
    assert values[0] == 0.0
    assert values[-1] == min(decay, 1 - 30**-0.75)


@pytest.mark.parametrize("first", ["ours", "diffusers"])
def test_a_resumed_average_goes_on_as_an_undisturbed_one(first: str) -> None:
    model, draws = network(), torch.Generator().manual_seed(1)
    straight = WeightAverage(model.parameters(), 0.9)
    before: Any = WeightAverage(model.parameters(), 0.9) if first == "ours" else peer(model, 0.9)
    for number in range(25):
        step(model, draws)
        straight.update()
        if number < 12:
            before.update() if first == "ours" else before.step(model.parameters())
        elif number == 12:
            stored = copy.deepcopy(before.state_dict())
            resumed = WeightAverage(network(5).parameters(), 0.9)  # of other weights, until it is loaded
            resumed.load_state_dict(stored)
            resumed.parameters = list(model.parameters())
            resumed.update()
        else:
            resumed.update()
    assert resumed.steps == 25
    assert same(resumed.average, straight.average)


def test_diffusers_reads_the_state_and_the_decay_given_here_wins() -> None:
    model, draws = network(), torch.Generator().manual_seed(1)
    average = WeightAverage(model.parameters(), 0.5)
    for _ in range(5):
        step(model, draws)
        average.update()
    read, other = peer(model, 0.9), WeightAverage(model.parameters(), 0.9)
    assert average.state_dict().keys() == read.state_dict().keys()
    read.load_state_dict(average.state_dict())
    assert (read.decay, read.optimization_step) == (0.5, 5)
    assert same(average.average, read.shadow_params)
    other.load_state_dict(average.state_dict())
    assert (other.decay, other.steps) == (0.9, 5)
    for _ in range(5):
        step(model, draws)
        other.update()
    assert other.kept() == 1 - 10**-0.75 > 0.5
    assert not same(average.average, other.average)  # it was copied, not shared


def test_the_average_is_swapped_in_and_out_again() -> None:
    model = network()
    average, start = WeightAverage(model.parameters(), 0.5), [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model[0].weight.add_(1)
    with average.swapped_in():  # nothing has been averaged
        assert torch.equal(model[0].weight, start[0] + 1)
    average.update()
    with torch.no_grad():
        model[0].weight.add_(1)
    average.update()  # keeps 1 - 2 ** -0.75 of itself
    trained = [p.detach().clone() for p in model.parameters()]

    def evaluate() -> None:
        with average.swapped_in():
            torch.testing.assert_close(model[0].weight.detach(), start[0] + 1 + 2**-0.75)
            raise KeyError

    with pytest.raises(KeyError):  # also what ends in an error puts the weights back
        evaluate()
    assert same(list(model.parameters()), trained)
    assert not same(average.average, trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_it_moves() -> None:
    model = network()
    average = WeightAverage(model.parameters(), 0.5)
    model.cuda()
    average.to("cuda")
    step_size = torch.ones((), device="cuda")
    with torch.no_grad():
        model[0].weight.add_(step_size)
    average.update()
    assert torch.equal(average.average[0], model[0].weight)
    average.to("cpu")
    with average.swapped_in():
        assert model[0].weight.is_cuda


def test_a_move_keeps_values_and_type() -> None:
    average = WeightAverage(network().double().parameters(), 0.5)
    before = average.average
    average.to("meta")
    assert all(value.device.type == "meta" and value.dtype == torch.float64 for value in average.average)
    assert [value.shape for value in average.average] == [value.shape for value in before]


def test_what_does_not_fit_is_refused() -> None:
    average = WeightAverage(network().parameters(), 0.5)
    with pytest.raises(ValueError, match="has 2 tensors, this one 6, and not of the same shapes"):
        average.load_state_dict(WeightAverage(nn.Linear(7, 5).parameters()).state_dict())
    with pytest.raises(ValueError, match=r"made with \{'power': 0.66\}"):
        average.load_state_dict({**average.state_dict(), "power": 0.66})
    with pytest.raises(ValueError, match=r"decay=1.5 is a share"):
        WeightAverage(network().parameters(), 1.5)
