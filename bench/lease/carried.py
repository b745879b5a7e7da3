"""Compiled kernels brought to a rented machine: their folder, and the code and rows they are for.

Triton's cache finds an entry by a hash of its own sources, the kernel's text and first line, and what is compiled in;
its group files hold absolute paths, so the folder has one name on all machines.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bench import results
from bench.environment import ROOT, source_hash
from gpukern.runtime.records import build, plain

#: The same folder on every machine.
FOLDER = Path("/tmp/gpukern-lease")
#: In the checkout, not in git.
ARCHIVE = ROOT / ".cache" / "lease" / "kernels.tar.xz"
_MANIFEST = "carried.json"
#: What Triton leaves of each kernel for people to read, and needs for nothing: it takes what is there of a group.
_TO_READ = (".source", ".ttir", ".ttgir", ".llir")


@dataclass(frozen=True)
class Carried:
    """Target of an archive: gpukern's code, Triton, the compute capability; and the keys of the rows whose kernels
    are in it."""

    source: str
    triton: str
    capability: str
    kernels: int
    rows: list[str]


def triton_key() -> str:
    """A hash of Triton's sources and libraries, as its cache has it: equal means that entries are found."""
    from triton.runtime.cache import triton_key

    return hashlib.sha256(triton_key().encode()).hexdigest()[:16]


def pack(folder: Path, carried: Carried, archive: Path) -> int:
    """Write ``archive`` of ``folder``; its size. What only people read of a kernel stays behind."""
    results.write_text(folder / _MANIFEST, json.dumps(plain(carried), indent=1) + "\n")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as made:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix not in (*_TO_READ, ".lock"):
                made.add(path, arcname=str(path.relative_to(folder)))
    return archive.stat().st_size


def unpack(archive: Path = ARCHIVE, folder: Path = FOLDER) -> str:
    """Put the kernels where Triton finds them and report their use; an empty archive has none."""
    if not archive.exists():
        return "no kernels were brought along: each is compiled when it is needed first"
    if not (folder / _MANIFEST).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    found = read(folder)
    if found is None:
        return "the archive has no list of what is in it: each kernel may be compiled again"
    if found.triton != triton_key():
        return "KEY DIFFERS: other versions of Triton here, EVERY KERNEL IS COMPILED AGAIN"
    if found.source != source_hash():
        return "CODE DIFFERS: kernels that changed, or moved in their file, ARE COMPILED AGAIN"
    return f"{found.kernels} kernels brought along, for {len(found.rows)} rows"


def forget(folder: Path) -> None:
    """Delete the record of the target of the kernels in ``folder``; the kernels stay."""
    (folder / _MANIFEST).unlink(missing_ok=True)


def read(folder: Path) -> Carried | None:
    try:
        return build(Carried, json.loads((folder / _MANIFEST).read_text()), _MANIFEST)
    except (OSError, ValueError):
        return None


@functools.cache
def rows() -> frozenset[str]:
    """The rows whose kernels lie in Triton's cache of this process, ready for this code."""
    place = os.environ.get("TRITON_CACHE_DIR")
    found = read(Path(place)) if place else None
    if found is None or found.source != source_hash() or found.triton != triton_key():
        return frozenset()
    return frozenset(found.rows)
