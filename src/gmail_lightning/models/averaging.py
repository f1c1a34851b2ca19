"""Weights that stand in for the trained ones: their average over the steps, and those of before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

#: Exponent of the warm-up; 3/4 is meant for trainings of less than a million steps.
POWER = 0.75
#: What diffusers' ``EMAModel`` could have set otherwise; it stands in the state for those who read it there.
FIXED = {"min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": True, "inv_gamma": 1.0, "power": POWER}


@contextmanager
def holding(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Within it, the parameters hold other values, which may be on another device."""
    trained = [p.detach().clone() for p in parameters]
    _fill(parameters, values)
    try:
        yield
    finally:
        _fill(parameters, trained)


@torch.no_grad()
def _fill(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    if parameters:
        torch._foreach_copy_(
            [p.detach() for p in parameters],
            [value.to(p.device) for value, p in zip(values, parameters, strict=True)],
        )
    torch.clear_autocast_cache()  # which holds casts of the values that stood there


class EarlierWeights:
    """A copy of parameters as they are now, to compare with what they become; on the CPU, until ``to`` is called.

    Args:
        parameters: What is copied, always in this order.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().to("cpu", copy=True) for p in self.parameters]

    def to(self, device: torch.device | str) -> None:
        """Moves the copy, so that it need not be moved each time that it is asked for."""
        self.values = [value.to(device) for value in self.values]

    def swapped_in(self) -> AbstractContextManager[None]:
        """Within it, the parameters hold what they were."""
        return holding(self.parameters, self.values)

    def interpolated(self, share: float = 0.5) -> AbstractContextManager[None]:
        """Within it, they hold ``share`` of what they are, and else what they were (WiSE-FT, arXiv 2109.01903)."""
        pairs = zip(self.values, self.parameters, strict=True)
        return holding(self.parameters, [value.to(p.device).lerp(p.detach(), share) for value, p in pairs])


class WeightAverage:
    """Exponential moving average of parameters, with the warm-up of diffusers' ``EMAModel``, and the same numbers.

    After step n the average keeps ``min(decay, 1 - n ** -0.75)`` of itself, so that the first step takes the weights as
    they are, and an average over few steps forgets where they began.

    Args:
        parameters: What is averaged, always in this order.
        decay: Share that the average keeps of itself at a step, once warm.

    Raises:
        ValueError: If ``decay`` is no share.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float = 0.9999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay} is a share from 0 to 1.")
        self.parameters, self.decay = list(parameters), decay
        self.average = [p.detach().clone() for p in self.parameters]
        #: Steps that have been averaged.
        self.steps = 0

    def kept(self) -> float:
        """Share that the average keeps of itself at the step that has just been counted."""
        warm: float = 1 - float(max(1, self.steps)) ** -POWER
        return min(self.decay, warm)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step of the optimizer."""
        self.steps += 1
        weights: list[Tensor] = [p.detach() for p in self.parameters]
        change = torch._foreach_sub(self.average, weights)
        torch._foreach_mul_(change, 1 - self.kept())
        torch._foreach_sub_(self.average, change)

    def swapped_in(self) -> AbstractContextManager[None]:
        """Within it, the parameters hold their average; before the first step they stay as they are."""
        return holding(self.parameters, self.average) if self.steps else nullcontext()

    def to(self, device: torch.device | str) -> None:
        """Moves the average, which ``update`` needs on the device of the parameters."""
        self.average = [value.to(device) for value in self.average]

    def state_dict(self) -> dict[str, Any]:
        """The average and its steps, with the keys of ``EMAModel.state_dict()``; the tensors themselves, no copies."""
        return {"decay": self.decay, "optimization_step": self.steps, **FIXED, "shadow_params": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Reads what ``state_dict``, or that of diffusers' ``EMAModel``, gave; ``decay`` stays what it is here.

        Raises:
            ValueError: If the average is of other parameters, or was made with another warm-up.
        """
        other = {key: state[key] for key, value in FIXED.items() if state.get(key, value) != value}
        if other:
            raise ValueError(f"The stored average was made with {other}; this one has {FIXED}. Start a new average.")
        stored = state["shadow_params"]
        there, here = [tuple(value.shape) for value in stored], [tuple(value.shape) for value in self.average]
        if there != here:
            raise ValueError(
                f"The stored average has {len(there)} tensors, this one {len(here)}, and not of the same shapes. Train "
                "the same parts of the model, with the same rank of adapters."
            )
        for value, kept in zip(stored, self.average, strict=True):
            kept.copy_(value)
        self.steps = int(state["optimization_step"])


def stored_average(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The averaged tensors of a task's checkpoint, by their names in the task's state; none before the first step.

    Args:
        checkpoint: Content of the file; under ``ema`` it has what ``state_dict`` gave, and ``names``.

    Raises:
        ValueError: If the average has not one tensor for each name.
    """
    average = checkpoint.get("ema", {})
    if "names" not in average or int(average["optimization_step"]) < 1:
        return {}
    names, values = average["names"], average["shadow_params"]
    if len(names) != len(values):
        raise ValueError(f"ema: {len(names)} names for {len(values)} averaged tensors: give a whole checkpoint.")
    return dict(zip(names, values, strict=True))
