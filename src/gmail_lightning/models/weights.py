"""Files of weights, also those that were saved from a wrapped or compiled model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

# torch.compile's wrapper may stand anywhere, those of DDP and FSDP stand in front.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|_fsdp_wrapped_module\.)+|(?<=\.)(_orig_mod\.|_fsdp_wrapped_module\.)+")


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """Takes what wrappers put into the names of tensors away: ``module.``, ``_orig_mod.``, ``_fsdp_wrapped_module.``.

    Raises:
        ValueError: If two names are one without it.
    """
    names = {key: _WRAPPERS.sub("", key) for key in state}
    plain = {names[key]: value for key, value in state.items()}
    if len(plain) < len(state):
        twice = next(name for name in plain if list(names.values()).count(name) > 1)
        raise ValueError(f"Weights hold {twice} twice, of a wrapped model and of the model itself: keep one of them.")
    return plain


@contextmanager
def plain_file(path: str) -> Iterator[str]:
    """Gives a file of weights with plain names for a loader that asks for a file: itself where its names are plain."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception:  # another format, or damaged: told by the loader
            content = {}
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if all(isinstance(key, str) for key in state) and (plain := plain_names(state)).keys() != state.keys():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "weights.pt"
            torch.save(plain, file)
            yield str(file)
    else:
        yield path
