"""Counts where a training step would wait for its device, on a machine that has none."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

#: What reads a value, or needs one to know a shape.
READS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "argwhere", "equal",
    "allclose", "is_nonzero", "masked_select", "masked_scatter", "masked_scatter_", "unique", "unique_consecutive",
    "__contains__", "bincount", "repeat_interleave",
}  # fmt: skip


class HostSyncs(TorchFunctionMode):
    """Follows tensors that would be on a device and notes what would wait for them.

    Only calls from Python are seen, so not what a kernel does by itself; what is made on the host (a random generator's
    draws, token ids) counts as on the device once it is moved to one.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self.kept = list(on_device)  # kept alive, so that an identity means one tensor
        self.ids = {id(tensor) for tensor in self.kept}
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in given if id(tensor) in self.ids]
        name = getattr(func, "__name__", "")
        if self._copies(name, given, on_device, args, kwargs):
            self._note(f"blocking {name}")
        if on_device and (name in READS or self._selects_by_mask(name, args) or self._leaves(name, args, kwargs)):
            self._note(name)
        result = func(*args, **kwargs)
        if on_device or (name in ("to", "cuda") and given):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.kept.append(leaf)
                    self.ids.add(id(leaf))
        return result

    @staticmethod
    def _selects_by_mask(name: str, args: Any) -> bool:
        """Boolean indexing; putting a scalar where a mask is set needs no shape."""
        if name not in ("__getitem__", "__setitem__") or len(args) < 2:
            return False
        masks = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor) and leaf.dtype in (torch.bool,)]
        return bool(masks) and (name == "__getitem__" or (isinstance(args[2], Tensor) and args[2].ndim > 0))

    @staticmethod
    def _copies(name: str, given: list[Tensor], on_device: list[Tensor], args: Any, kwargs: Any) -> bool:
        """Moving what is on the host, where the host waits for it; a value that Python writes is moved, too."""
        if name in ("tensor", "as_tensor"):
            return isinstance(
                kwargs.get("device"), torch.device
            )  # torch's optimisers write "cpu" where the host is meant
        to_device = any(isinstance(leaf, torch.device) for leaf in tree_leaves((args[1:], kwargs)))
        moves = name == "cuda" or (name == "to" and (to_device or len(given) > 1))
        return moves and bool(given) and not any(given[0] is t for t in on_device) and not kwargs.get("non_blocking")

    @staticmethod
    def _leaves(name: str, args: Any, kwargs: Any) -> bool:
        return name == "to" and any(
            str(leaf) == "cpu" and isinstance(leaf, str) for leaf in tree_leaves((args, kwargs))
        )

    def _note(self, name: str) -> None:
        own = [f for f in traceback.extract_stack() if "gmail_lightning" in f.filename and "tests" not in f.filename]
        where = own[-1] if own else traceback.extract_stack()[-3]
        self.found.append(f"{name} in {Path(where.filename).name}:{where.lineno}: {where.line}")


class CountSyncs(pl.Callback):
    """Runs every training step under ``HostSyncs``, from the batch to the optimiser's step."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._mode: HostSyncs | None = None

    def is_on_host(self, tensor: Tensor) -> bool:
        """What ``reads_are_free`` would say, were there a device."""
        return self._mode is None or id(tensor) not in self._mode.ids

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        moved = [value for value in batch.values() if isinstance(value, Tensor)]
        self._mode = HostSyncs([*moved, *pl_module.parameters(), *pl_module.buffers()])
        self._mode.__enter__()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self._mode is not None
        self._mode.__exit__(None, None, None)
        self.found += self._mode.found
