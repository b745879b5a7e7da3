"""Reading of files of weights: .safetensors, or those of ``torch.save``, distinguished by their contents."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from gpukern.fusion.archive import check_archive
from gpukern.fusion.errors import WeightsError
from gpukern.fusion.weights import foreign

#: The usual endings. ``.pth.tar`` is not a tar archive: PyTorch's own training examples call their checkpoints so.
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".pth.tar", ".pyth", ".th", ".pkl")
#: Magic number of ``torch.save`` before PyTorch 1.6.
_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read(path: Path) -> Any:
    """The tensors by name of a .safetensors file, or whatever ``torch.save`` was given, on the CPU.

    Nothing but tensors and plain values is unpickled. WeightsError, which names the file and what it is, for others.
    """
    if re.match(r"[a-z-]{2,}:/", str(path)):  # of "https://", a Path keeps one
        raise WeightsError(f"{path} is an address, and nothing is downloaded: name a file")
    if path.is_dir():
        raise WeightsError(f"{path} is {foreign.of_folder(path)}")
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as problem:
        raise WeightsError(f"{path} cannot be read: {problem.strerror}") from problem
    zipped = head[:2] == b"PK" and zipfile.is_zipfile(path)
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not zipped and head[:1] != b"\x80"):
        return _safetensors(path, head)
    if zipped or head[:1] == b"\x80":
        return _pickled(path, head)
    if head[:2] == b"PK":
        raise WeightsError(f"{path} cannot be loaded as weights: it is cut off")
    what = foreign.of_beginning(path, head)
    if path.suffix not in SUFFIXES and path.suffix != ".json":
        raise WeightsError(f"{path}: weights come from {', '.join(SUFFIXES)} files{what and f', and this is {what}'}")
    raise WeightsError(f"{path} cannot be loaded as weights: it is {what or 'no file of torch.save'}")


def _safetensors(path: Path, head: bytes) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as problem:
        raise WeightsError(f"{path} is read by safetensors, which is not there: pip install safetensors") from problem
    try:
        return load_file(path)
    except Exception as problem:  # SafetensorError, and what torch makes of unknown dtypes
        what = foreign.of_beginning(path, head)
        why = f"it is {what}" if what else str(problem)
        raise WeightsError(f"{path} is no .safetensors file, or is cut off: {why}") from problem


def _pickled(path: Path, head: bytes) -> Any:
    if head[:2] == b"PK":
        check_archive(path, "file of torch.save", WeightsError)
        if what := foreign.of_archive(path):
            raise WeightsError(f"{path} cannot be loaded as weights: it is {what}")
    elif head[:1] == b"\x80" and not head.startswith(_OLD):
        raise WeightsError(f"{path} cannot be loaded as weights: it was written by pickle, and not by torch.save")
    try:
        with path.open("rb") as file:  # of a path torch looks at the ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # whatever pickle or torch make of foreign bytes
        raise WeightsError(f"{path} cannot be loaded as weights: {foreign.of_pickle(path, problem)}") from problem
