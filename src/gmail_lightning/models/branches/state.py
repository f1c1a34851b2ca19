"""Names in a state dict that are not those of the modules: one pair of hooks, whoever renames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def rename_state(
    module: nn.Module,
    to_state: Callable[[nn.Module, str], str],
    from_state: Callable[[nn.Module, str], str],
) -> None:
    """Gives the tensors of a module other names in its state dict, and takes these when one is loaded.

    Args:
        module: The module, whose own names (without the prefix of what it is a part of) are handed to the functions.
        to_state: Maps the module and the name that torch gives a tensor to the name in the state dict.
        from_state: The way back.
    """

    def after(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        _rename(state_dict, prefix, lambda name: to_state(module, name))

    def before(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        _rename(state_dict, prefix, lambda name: from_state(module, name))

    module.register_state_dict_post_hook(after)
    module.register_load_state_dict_pre_hook(before)


def _rename(state_dict: dict[str, Any], prefix: str, name_of: Callable[[str], str]) -> None:
    renamed = {
        prefix + name_of(key.removeprefix(prefix)) if key.startswith(prefix) else key: value
        for key, value in state_dict.items()
    }
    state_dict.clear()  # torch hands over the very dictionary that it reads on
    state_dict.update(renamed)
