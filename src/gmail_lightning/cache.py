"""Where this package keeps what it can make anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that ``GMAIL_LIGHTNING_CACHE`` names, by default ``gmail_lightning`` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("GMAIL_LIGHTNING_CACHE") or Path(user) / "gmail_lightning")
