"""Where gpukern keeps what it need not make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """In the user's cache directory, of the XDG base directory specification. It may not be there yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "gpukern"
