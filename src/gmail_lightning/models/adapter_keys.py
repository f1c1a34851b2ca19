"""What the adapters of an encoder, and the encoder that a router wraps, are called in a state dict."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from gmail_lightning.models.base import ROLES

_PROJECTIONS = ("generated_projection", "real_projection", "text_side_projection")
_ADAPTER_KEY = re.compile(
    rf"(^|\.)(lora\.(image|text)\.\d+\.({'|'.join(ROLES)})\.[AB]|({'|'.join(_PROJECTIONS)})\.weight)$"
)


def is_adapter_key(key: str) -> bool:
    """Whether a key of a state dict belongs to an adapter: factors of LoRA, or a projection."""
    return _ADAPTER_KEY.search(key) is not None


def drop_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Hook after ``state_dict``: the wrapped encoder's keys stand beside the projections."""
    inner = f"{prefix}encoder."
    moved = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(inner)}
    state_dict.update({prefix + key.removeprefix(inner): value for key, value in moved.items()})


def add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before ``load_state_dict``: the way back."""
    own = tuple(f"{prefix}{name}." for name in _PROJECTIONS)
    moved = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix) and not key.startswith(own)}
    state_dict.update({f"{prefix}encoder.{key.removeprefix(prefix)}": value for key, value in moved.items()})
