"""What making data refuses."""

from __future__ import annotations


class FolderError(ValueError):
    """A folder holds what this run may neither continue nor remove; the message says what to do."""
