"""Atomic file writes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a draft file that replaces ``path`` atomically at the end.

    A failure before that leaves ``path`` unchanged and no draft behind. The draft lies beside ``path``, since a rename
    across file systems is not atomic, and has its suffix, which some writers inspect. It is synced to disk before the
    rename: even after a power cut, the file is either the old or the new one. OSError if it cannot be written.
    """
    path = Path(path)
    # Unique to this thread: two that write the same file at once must not share a draft.
    draft = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.draft{path.suffix}")
    try:
        _create(draft, path)  # an OSError here, whatever the writer would raise
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _create(draft: Path, path: Path) -> None:
    """Make an empty file, with the mode that umask gives a new one; OSError about ``path``, which the caller knows."""
    try:
        draft.touch()
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from problem


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Make ``data`` the contents of ``path``; OSError, with the old file left, where it cannot be written."""
    with replacing(path) as draft:
        draft.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Make ``text``, as UTF-8, the contents of ``path``; OSError as :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))
