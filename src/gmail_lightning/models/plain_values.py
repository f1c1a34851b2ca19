"""Values as a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What ``torch.load(weights_only=True)`` reads back, by exact type: a subclass goes by the name of its class.
PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device, torch.Size, Tensor)
#: In place of what no checkpoint can hold: modules, data sets, functions.
LIVE = object()


def plain_value(value: Any) -> Any:
    """The value as a checkpoint holds it: numbers, texts, tensors, and collections of them; else ``LIVE``."""
    if type(value) in PLAIN:
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, np.generic):
        return plain_value(value.item())
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return plain_value(value.value)
    if isinstance(value, (list, tuple)):
        parts = [plain_value(part) for part in value]
        whole = all(part is not LIVE for part in parts)
        return (parts if isinstance(value, list) else tuple(parts)) if whole else LIVE
    if isinstance(value, Mapping):
        items = [(plain_value(key), plain_value(part)) for key, part in value.items()]
        return dict(items) if all(part is not LIVE for item in items for part in item) else LIVE
    return LIVE
