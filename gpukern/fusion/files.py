"""Files that are never half written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write in place of ``path``, which it becomes at the end; what fails before leaves ``path`` as it was.

    Beside it, because no file system is crossed in one step, and with its ending, which some writers look at.
    """
    path = Path(path)
    draft = path.with_name(f".{path.stem}.{os.getpid()}.draft{path.suffix}")
    draft.touch()  # an OSError here, whatever the writer would raise
    try:
        yield draft
        with draft.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``text`` as the file ``path``; OSError, with the old file left, where it cannot be written."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
