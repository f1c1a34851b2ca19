"""Names in a state dict that are not those of the modules: one pair of hooks, whoever renames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    module.register_state_dict_post_hook(Renaming(to_state))
    module.register_load_state_dict_pre_hook(Renaming(from_state))


@dataclass
class Renaming:
    """A hook around a state dict; a class, for a closure could not go to a process that is spawned."""

    name_of: Callable[[nn.Module, str], str]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Renames the tensors of a module in the very dictionary that torch hands over, and reads on."""
        renamed = {
            prefix + self.name_of(module, key.removeprefix(prefix)) if key.startswith(prefix) else key: value
            for key, value in state_dict.items()
        }
        state_dict.clear()
        state_dict.update(renamed)
