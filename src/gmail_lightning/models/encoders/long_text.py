"""Longer contexts for text towers, as Long-CLIP makes them (Zhang et al., arXiv 2403.15378, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gmail_lightning.models.base import DualEncoder
from gmail_lightning.models.weights import plain_names
from gmail_lightning.types import TextSpec

KEEP = 20  # positions that Long-CLIP found well trained
LONG = 248  # 20 + 4 * (77 - 20)


def stretch_positional_embedding(weight: Tensor, length: int = LONG, keep: int = KEEP) -> Tensor:
    """Keeps the first positions and interpolates the rest to a whole multiple, as Long-CLIP's code does.

    With the factor f, row ``keep + f * i + j`` lies j/f of the way from position ``keep + i`` to the next; behind the
    last position the line through the last two goes on.

    Args:
        weight: Positional table, shape (L, W).
        length: Rows of the result.
        keep: Rows that stay as they are.

    Returns:
        Shape (length, W).

    Raises:
        ValueError: If fewer than two rows are left to interpolate, or they do not fit a whole number of times.

    Example:
        >>> stretch_positional_embedding(torch.tensor([[9.0], [0.0], [4.0], [6.0]]), length=7, keep=1).flatten()
        tensor([9., 0., 2., 4., 5., 6., 7.])
    """
    rest = weight[keep:]
    if keep < 0 or len(rest) < 2:
        raise ValueError(f"keep={keep} of {len(weight)} positions: at least two must be left to interpolate.")
    factor, remainder = divmod(length - keep, len(rest))
    if remainder or factor < 1:
        lengths = ", ".join(str(keep + f * len(rest)) for f in (max(factor, 1), max(factor, 1) + 1))
        raise ValueError(
            f"length={length}: the {len(rest)} positions behind the first {keep} must fit a whole number of times. "
            f"Give {lengths} or the like."
        )
    step = torch.arange(factor, device=weight.device).to(weight.dtype)[:, None] / factor  # (f, 1)
    following = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])
    stretched = (1 - step) * rest[:, None] + step * following[:, None]  # (L - keep, f, W)
    return torch.cat([weight[:keep], stretched.flatten(0, 1)])


def stretch_context(encoder: DualEncoder, length: int = LONG, keep: int = KEEP) -> None:
    """Gives a text tower a longer context, in place: positional table, causal mask, tokenizer and configuration.

    The first ``keep`` positions are no parameters any more: whatever trains, and with any weight decay, they stay bit
    for bit. The keys of the state dict remain those of the plain encoder. A tower that has ``length`` positions already
    only has its first ones kept.

    Args:
        encoder: ``OpenCLIPEncoder``, ``HFCLIPEncoder``, or one with a ``stretch_context`` of its own.
        length: New context length.
        keep: Positions that stay as they are.

    Raises:
        TypeError: If the encoder cannot.
        ValueError: As ``stretch_positional_embedding``, or if the tower has no positional table of its context length.
    """
    encoder.stretch_context(length, keep)


def stretch_table(encoder: DualEncoder, host: nn.Module, name: str, length: int, keep: int) -> None:
    """Puts a table of ``length`` positions in the place of an encoder's, whose first ``keep`` rows do not train.

    Args:
        encoder: The encoder, whose ``text_spec`` says how many there are.
        host: The module that has the table.
        name: Of the parameter.
        length: Rows of the new table.
        keep: Rows that stay as they are.

    Raises:
        ValueError: As ``stretch_context``.
    """
    weight, before = getattr(host, name, None), encoder.text_spec.context_length
    if weight is None or len(weight) != before:
        raise ValueError(
            f"The text tower of this {type(encoder).__name__} has no positional table of its context length {before}."
        )
    if length != before:
        _keep_rows(host, name, stretch_positional_embedding(weight.detach(), length, keep), keep, weight.requires_grad)
    elif not parametrize.is_parametrized(host, name):
        _keep_rows(host, name, weight.detach(), keep, weight.requires_grad)


class KeptRows(nn.Module):
    """Parametrization of a table whose first rows are constant; the parameter is the rest."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept.clone(), persistent=False)

    def forward(self, rest: Tensor) -> Tensor:
        """Puts the table together, shape (L, W)."""
        return torch.cat([self.kept, rest])

    def right_inverse(self, table: Tensor) -> Tensor:
        """The rows that are a parameter."""
        return table[len(self.kept) :].clone()


def _keep_rows(host: nn.Module, name: str, table: Tensor, keep: int, trained: bool) -> None:
    """Puts ``table`` in the place of a parameter and its first rows out of reach of training."""
    if parametrize.is_parametrized(host, name):
        parametrize.remove_parametrizations(host, name)
    setattr(host, name, nn.Parameter(table.clone(), requires_grad=trained))
    parametrize.register_parametrization(host, name, KeptRows(table[:keep]))
    if not getattr(host, "_keeps_rows", False):
        host._keeps_rows = True  # type: ignore[assignment]
        host.register_state_dict_post_hook(partial(_to_table, name))
        host.register_load_state_dict_pre_hook(partial(_from_table, name))


def _to_table(name: str, host: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook after ``state_dict``: the whole table under its plain key."""
    key = f"{prefix}parametrizations.{name}.original"
    if key in state_dict:
        state_dict[f"{prefix}{name}"] = _kept_rows(host, name)(state_dict.pop(key))


def _from_table(name: str, host: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before ``load_state_dict``: the way back, from the plain key or the one that LoRA's own hook makes of it."""
    key, rows = f"{prefix}parametrizations.{name}.original", _kept_rows(host, name)
    table = state_dict.pop(f"{prefix}{name}", state_dict.pop(key, None))
    if table is not None:
        with torch.no_grad():
            rows.kept.copy_(table[: len(rows.kept)])
        state_dict[key] = table[len(rows.kept) :]


def _kept_rows(host: nn.Module, name: str) -> KeptRows:
    return cast(KeptRows, cast(Any, host).parametrizations[name][0])


def is_cut(spec: TextSpec, texts: list[str]) -> Tensor:
    """Says of each text whether it is longer than the context, exactly; shape (N,) bool.

    With a context of one token more, a text that fits keeps its first ids, and one that is cut has another word where
    its end was.

    Args:
        spec: Of a tower whose tokenizer keeps the end token and takes ``context_length``, as those of this library.
        texts: N strings.
    """
    if not texts:
        return torch.zeros(0, dtype=torch.bool)
    longer = cast(Any, spec.encode)(texts, context_length=spec.context_length + 1)
    return cast(Tensor, longer[:, :-1] != spec.encode(texts)).any(dim=1)


def is_long_clip(state: Mapping[str, Any]) -> bool:
    """Whether a state dict is in the layout of the published Long-CLIP weights, with two positional tables."""
    return "positional_embedding_res" in state


def long_clip_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maps the published Long-CLIP weights to the keys of open_clip's CLIP with a context of 248.

    They hold two tables of 248 rows: the first 20 count in ``positional_embedding``, the others in
    ``positional_embedding_res``, and a mask each says so.

    Raises:
        ValueError: If the layout is another one.
    """
    if not is_long_clip(state):
        raise ValueError("No Long-CLIP weights: there is no key positional_embedding_res.")
    kept, rest = state["positional_embedding"], state["positional_embedding_res"]
    if kept.shape != rest.shape:
        raise ValueError(f"Long-CLIP weights with positional tables {tuple(kept.shape)} and {tuple(rest.shape)}.")
    left_out = ("positional_embedding_res", "mask1", "mask2", "input_resolution", "context_length", "vocab_size")
    plain = {key: value for key, value in state.items() if key not in left_out}
    return {**plain, "positional_embedding": torch.cat([kept[:KEEP], rest[KEEP:]])}


def read_long_clip(path: str | Path) -> dict[str, Tensor] | None:
    """Reads a file of published Long-CLIP weights, see ``long_clip_state_dict``; None if it is of another layout.

    The tensors stay on disk until they are copied, so that asking costs little. Load them into a stretched tower.
    """
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError):  # no plain torch file: safetensors, TorchScript, the old format
        return None
    state = plain_names(state.get("state_dict", state)) if isinstance(state, dict) else {}
    return long_clip_state_dict(state) if is_long_clip(state) else None
