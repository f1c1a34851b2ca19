"""Values as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What ``torch.load(weights_only=True)`` reads back, by exact type: a subclass goes by the name of its class.
PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size, Tensor)


def plain_value(value: Any) -> Any:
    """The value as a checkpoint holds it: numbers, texts, tensors, and collections of them.

    Raises:
        TypeError: If it is, or holds, what no checkpoint can: a module, a data set, a function.
    """
    if type(value) in PLAIN:
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return plain_value(value.value)
    if isinstance(value, list):
        return [plain_value(part) for part in value]
    if isinstance(value, tuple):
        return tuple(plain_value(part) for part in value)
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(part) for key, part in value.items()}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def plain_entries(values: Mapping[str, Any]) -> dict[str, Any]:
    """Named values as a checkpoint holds them; those that it cannot hold are left out."""
    entries = {}
    for name, value in values.items():
        with suppress(TypeError):
            entries[name] = plain_value(value)
    return entries
