"""Where gpukern keeps what it need not make again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from gpukern.runtime.files import write_bytes


def cache_folder() -> Path:
    """In the user's cache directory, of the XDG base directory specification. It may not be there yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "gpukern"


def kept(folder: Path | None, parts: tuple[str, ...], make: Callable[[], bytes]) -> bytes:
    """What ``make`` makes, or made before from the same ``parts``: kept in a file of ``folder``, with its checksum.

    Nobody reads a file that is not finished, and one that was damaged is made anew. A folder that cannot be written
    keeps nothing; nor does None.
    """
    if folder is None:
        return make()
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    path = folder / name
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        checksum, found = stored[:32], stored[32:]
        if checksum == hashlib.sha256(found).digest():
            return found
    made = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, hashlib.sha256(made).digest() + made)
    return made
