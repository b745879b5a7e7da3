"""The zip archives that ``torch.save`` and ``torch.export.save`` write."""

from __future__ import annotations

import zipfile
from pathlib import Path

from gpukern.fusion.errors import FusionError, SourceError


def check_archive(path: Path, kind: str, error: type[SourceError] | type[FusionError] = SourceError) -> None:
    """``error`` unless it is there and intact; torch does not compare checksums on loading."""
    if not path.is_file():
        raise error(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as problem:
        raise error(f"{path} is no {kind}, or is cut off: {problem}") from problem
    except (RuntimeError, NotImplementedError) as problem:  # a password, or another compression
        raise error(f"{path} is no {kind}: {problem}") from problem
    if broken is not None:
        raise error(f"{path} is damaged: wrong checksum of {broken}")
