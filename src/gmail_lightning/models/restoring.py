"""While a checkpoint is loaded, files of earlier stages are not read: it brings what they brought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_content: ContextVar[Mapping[str, Any] | None] = ContextVar("content", default=None)


@contextmanager
def restoring(content: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, what is built is to be loaded from a checkpoint.

    Args:
        content: Of the checkpoint; None: of no one, and nothing changes.
    """
    token = _content.set(content)
    try:
        yield
    finally:
        _content.reset(token)


def restored() -> Mapping[str, Any] | None:
    """The content of the checkpoint that what is built now is loaded from; None where there is no one."""
    return _content.get()
