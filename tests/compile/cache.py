"""What was read off compiled kernels, kept on disk: machine code is compiled and read again only when it may differ.

Rows lie in ``.cache/compile/kernels``, named by a hash of all that the row depends on: the kernel's source and that of
the functions it calls, what is compiled in of its arguments, the architecture, Triton's version, and the code that
reads. The rows of a whole selection lie in ``.cache/compile/selections`` with a hash of every source that decides which
launches there are, so that nothing at all is done where nothing changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from gpukern.runtime.compile_only import Launch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "compile"

_READERS = ("gpukern/runtime/sass.py", "gpukern/runtime/control_flow.py", "tests/compile/worker.py")
_SOURCES = (
    "gpukern", "models", "bench/layers.py", "bench/lease/stub.py", "bench/lease/stub.c", "tests/compile",
    "tests/ops/conv_cases.py",
)  # fmt: skip
_KEEP_SECONDS = 30 * 24 * 3600


def digest(*paths: str, root: Path = ROOT) -> str:
    """A hash of the Python files ``paths``, and of those in folders among them."""
    total = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for path in _files(root, paths):
        total.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def _files(root: Path, paths: tuple[str, ...]) -> Iterator[Path]:
    for path in paths:
        yield from sorted((root / path).rglob("*.py")) if (root / path).is_dir() else [root / path]


class Rows:
    """One row for each compiled kernel."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder / "kernels"
        self._readers = digest(*_READERS)

    def get(self, launch: Launch) -> dict | None:
        path = self._path(launch)
        try:
            row = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        os.utime(path)  # still of use
        return row

    def put(self, launch: Launch, row: dict) -> None:
        _write(self._path(launch), row)

    def forget_old(self) -> None:
        """Delete the rows that nobody asked for in a month: most edits of a kernel leave rows behind."""
        for path in self._folder.glob("*.json"):
            if path.stat().st_mtime < time.time() - _KEEP_SECONDS:
                path.unlink(missing_ok=True)

    def _path(self, launch: Launch) -> Path:
        name = hashlib.sha256(f"{launch.fingerprint} {self._readers}".encode()).hexdigest()
        return self._folder / f"{name}.json"


class Selections:
    """All rows of a named selection of launches."""

    def __init__(self, folder: Path = FOLDER, sources: tuple[str, ...] = _SOURCES, root: Path = ROOT) -> None:
        self._folder = folder / "selections"
        self._sources = digest(*sources, root=root)

    def get(self, name: str) -> list[dict] | None:
        try:
            kept = json.loads((self._folder / f"{name}.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return kept["rows"] if kept["sources"] == self._sources else None

    def put(self, name: str, rows: list[dict]) -> None:
        _write(self._folder / f"{name}.json", {"sources": self._sources, "rows": rows})


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)
