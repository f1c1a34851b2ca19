"""Arguments of a router that contradict one another, or would do nothing."""

from __future__ import annotations

from typing import Any, Literal, get_args

from gmail_lightning.models.branches.branch import Branch

RealPath = Literal["frozen", "projected", "adapted"]
TextSide = Literal["frozen", "lora", "projection", "full"]


def refuse_unknown(real_path: RealPath | None, text_side: TextSide) -> None:
    """Raises a ``ValueError`` that says what is known."""
    for argument, value, kind in (("real_path", real_path or "frozen", RealPath), ("text_side", text_side, TextSide)):
        if value not in get_args(kind):
            raise ValueError(f"{argument}={value!r}: give one of {', '.join(get_args(kind))}.")


def refuse_contradictions(
    branch: Branch | None,
    aligned: str | None,
    real_path: RealPath | None,
    projection: bool | None,
    train_adapters: bool | None,
    text_side: TextSide,
    train_tower: bool,
) -> None:
    """Raises a ``ValueError`` where one argument already says what another one says too."""
    routed: list[Any] = [branch, aligned, real_path, projection, train_adapters]
    if train_tower and (text_side != "frozen" or any(value is not None for value in routed)):
        raise ValueError("train_tower trains the encoder itself, and nothing is routed: leave the rest out.")
    if aligned is not None and (branch, real_path, projection) != (None, None, None):
        raise ValueError("aligned brings its own branch, real_path and projection: leave these out.")


def refuse_idle(
    branch: Branch | None, real_path: RealPath | None, projection: bool | None, train_adapters: bool | None
) -> bool:
    """Whether anything routes images.

    Raises:
        ValueError: If nothing does, and an argument needs it.
    """
    routes = branch is not None or bool(projection) or real_path not in (None, "frozen")
    if train_adapters and not routes:
        raise ValueError("train_adapters needs something to train: give a branch, an alignment or a projection.")
    if real_path == "adapted" and branch is None:
        raise ValueError("real_path: adapted sends real images through the branch, and there is none: give one.")
    return routes
