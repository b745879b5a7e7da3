"""Checkpoints that are never half written and never loaded half broken."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from gpukern.runtime.files import replacing

#: Changed whenever the meaning of a field changes.
FORMAT = "gpukern models.train checkpoint, version 1"


class CheckpointError(Exception):
    """A checkpoint is missing, broken, or of another training."""


def save(path: Path, state: dict[str, Any], format: str = FORMAT) -> None:
    """Write ``state`` so that ``path`` holds the old or the new checkpoint at every moment, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # An open file, because torch puts the name of a path into the archive.
    with replacing(path) as draft, draft.open("wb") as file:
        torch.save({"format": format, **state}, file)


def load(path: Path, format: str = FORMAT) -> dict[str, Any]:
    """The state that :func:`save` wrote, on the CPU. CheckpointError, naming the file, for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint, nothing to resume")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile, pickle or torch make of foreign bytes
        raise CheckpointError(f"{path}: the checkpoint is corrupt or is none: {error}") from error
    if not isinstance(state, dict) or state.get("format") != format:
        raise CheckpointError(f"{path}: not a {format!r}")
    return state


def _check_archive(path: Path) -> None:
    """``torch.save`` writes a zip archive; torch does not compare its checksums on loading."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {broken}")
