"""What the checks share: every fault is one sentence, and all of them are raised together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

CAPTIONS = ["a red mug on a table", "two dogs", "a sign that says stop"]


def report(checked: Any, faults: Iterator[str]) -> None:
    """Raises an AssertionError that lists the faults, where there are any; what a check runs into is one, the last."""
    found: list[str] = []
    try:
        for fault in faults:
            found.append(fault)
    except Exception as error:
        found.append(f"the check ends here, for {type(error).__name__} is raised: {error}. Mend this first.")
    if found:
        raise AssertionError("\n".join([f"{type(checked).__name__}: {len(found)} faults.", *(f"- {f}" for f in found)]))


def require(checked: Any, base: type) -> None:
    """Raises an AssertionError unless an object is of the class whose surface is checked."""
    if not isinstance(checked, base):
        raise AssertionError(
            f"{type(checked).__name__} is no {base.__name__}: make it a subclass of {base.__module__}.{base.__name__}."
        )


def outcome(what: str, call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, or the fault that it raises."""
    try:
        return call(), []
    except Exception as error:
        return None, [f"{what} raises {type(error).__name__}: {error}"]


def plain_faults(described: dict[str, Any]) -> Iterator[str]:
    """Whether a description is plain values that JSON holds."""
    _, faults = outcome("describe as JSON", lambda: json.dumps(described, allow_nan=False))
    yield from faults


def reload_faults(module: nn.Module, answer: Callable[[], Tensor]) -> Iterator[str]:
    """Whether a state dict holds all that the answer depends on."""
    before = answer()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.05)
    module.load_state_dict(state)
    if not torch.equal(before, answer()):
        yield "after load_state_dict of its own state it answers otherwise: keep every parameter in the state dict."
