"""File cache for results that are expensive to compute again."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from gpukern.runtime.files import write_bytes


def cache_folder() -> Path:
    """Folder in the user's cache directory, by the XDG base directory specification. It may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "gpukern"


def kept(folder: Path | None, parts: tuple[str, ...], make: Callable[[], bytes]) -> bytes:
    """Return the result of ``make``, cached by ``parts`` in a file of ``folder`` with its checksum.

    An unfinished file is never read, and a damaged one is replaced. Nothing is cached if the folder is None or not
    writable.
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
