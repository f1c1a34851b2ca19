"""Files of weights, also those that were saved from a wrapped or compiled model."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

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


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Twelve hexadecimal digits that change with the name, the type and every bit of the tensors, not their order."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def plain_files(path: str) -> Iterator[str]:
    """Gives weights with plain names for a loader that reads files by itself: for the while a copy, where they need it.

    Args:
        path: A file of weights, or a folder with some, in several files too. Anything else, such as the name of a hub,
            is given back as it is.
    """
    given = Path(path)
    files = sorted(given.iterdir()) if given.is_dir() else [given] if given.is_file() else []
    if not any(_WRAPPERS.search(name) for file in files for name in _names(file)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            copy = Path(folder) / file.name
            if _names(file):
                _write_plain(file, copy)
            else:
                copy.symlink_to(file.resolve())
        yield folder if given.is_dir() else str(Path(folder) / given.name)


def _names(file: Path) -> list[str]:
    """Names of the tensors in a file, none where it holds none."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as content:
                return list(content.keys())
        if file.name.endswith(".index.json"):  # where each tensor of several files is
            return list(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            state = content.get("state_dict", content) if isinstance(content, dict) else {}
            return list(state) if all(isinstance(name, str) for name in state) else []
    except Exception:  # another format, or damaged: told by the loader
        pass
    return []


def _write_plain(file: Path, copy: Path) -> None:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        save_file(plain_names(load_file(file)), copy, metadata={"format": "pt"})
    elif file.suffix == ".json":
        index = json.loads(file.read_text(encoding="utf-8"))
        copy.write_text(json.dumps({**index, "weight_map": plain_names(index["weight_map"])}), encoding="utf-8")
    else:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        torch.save(plain_names(content.get("state_dict", content)), copy)
