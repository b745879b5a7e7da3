"""Descriptions of files without readable weights, for error messages."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

#: Names listed in a message, at most.
_LISTED = 5
#: How files begin that are taken for weights by mistake.
_BEGINNINGS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself: git lfs pull fetches that"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"BZh", "compressed by bzip2: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed by xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it first"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them: no weights of PyTorch"),
    (b"\x93NUMPY", "an array of NumPy: no tensors by name"),
    (b"GGUF", "a GGUF file: no weights of PyTorch"),
    (b"\x7fELF", "a program or library"),
)
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml|<!--)", re.IGNORECASE)
#: What to do about a file that holds more than weights.
_REMEDY = (
    "Nothing but tensors and plain values is read from a file. Write the weights alone, with the program that made it: "
    'torch.save(model.state_dict(), "weights.pth")'
)


def listed(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def of_beginning(path: Path, head: bytes) -> str:
    """Describe a file that begins with ``head``, "" if it is not recognized."""
    if not head:
        return "empty"
    for beginning, words in _BEGINNINGS:
        if head.startswith(beginning):
            return words
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")):
        return "a page of HTML or XML, not what was to be downloaded"
    if path.suffix == ".json" or head.lstrip()[:1] in (b"{", b"["):
        return _of_json(path)
    text = head.decode("utf-8", errors="replace").strip()
    # A letter may be cut at the end of ``head``.
    if "�" not in text[:-1] and all(letter.isprintable() or letter.isspace() for letter in text[:-1]):
        return f"a text file that begins with {text[:40]!r}"
    return ""


def _of_json(path: Path) -> str:
    try:
        held = json.loads(path.read_text("utf-8"))
    except ValueError:
        return "a text file"
    parts = held.get("weight_map") if isinstance(held, dict) else None
    if isinstance(parts, dict):
        files = sorted({str(name) for name in parts.values()})
        return f"the index of weights in {len(files)} files ({listed(files)}): write them into one file first"
    return "a JSON file, without weights"


def of_folder(path: Path) -> str:
    """Describe a folder that was given in place of a file."""
    names = sorted(each.name for each in path.iterdir())
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "a folder of torch.distributed.checkpoint, not a file: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pth makes one of it"
        )
    files = [name for name in names if name.endswith((".safetensors", ".pt", ".pth", ".bin", ".ckpt"))]
    return f"a folder, not a file; in it there is {listed(files)}" if files else "a folder, not a file"


def of_archive(path: Path) -> str:
    """Describe an intact zip archive that is not one of ``torch.save``, "" for one that may be."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside:
        return 'a TorchScript program: torch.save(torch.jit.load(FILE).state_dict(), "weights.pth") writes its weights'
    if "archive_format" in inside or any(name.startswith("models/") for name in inside):
        return "an exported program, which holds its weights: name it as the model, with the ending .pt2"
    if "data.pkl" in inside:
        return ""
    if all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (.npz)"
    return f"a zip archive that torch.save did not write; in it there is {listed(names)}"


def of_pickle(path: Path, problem: Exception) -> str:
    """Describe what prevents reading a file of ``torch.save``: ``problem`` is torch's message."""
    names = _globals(path, problem)
    if not names:
        return f"it is damaged, or torch.save did not write it ({type(problem).__name__})"
    kinds: dict[str, list[str]] = {}
    whole = any(name.startswith("torch.nn.modules.") for name in names)
    for name in names:
        kinds.setdefault("a whole pickled model" if whole else _kind(name), []).append(name)
    return f"it holds {' and '.join(f'{kind} ({listed(found)})' for kind, found in kinds.items())}. {_REMEDY}"


def _globals(path: Path, problem: Exception) -> list[str]:
    """The classes and functions a file refers to that are not allowed. Nothing is imported or called."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the format before 1.6: the first of them is in torch's message
        return re.findall(r"GLOBAL ([\w.]+)", str(problem))[:1]


def _kind(name: str) -> str:
    package = name.partition(".")[0]
    if package in ("numpy", "_codecs"):
        return "NumPy numbers or arrays"
    if package in ("argparse", "omegaconf", "pathlib", "types", "yacs", "easydict", "addict", "ml_collections"):
        return "settings of the training program"
    if package in ("builtins", "__builtin__", "os", "posix", "nt", "subprocess", "sys"):
        return "a call that no weights need"
    if name.startswith("torch.distributed"):
        return "a part of weights that are spread over processes"
    return "Python objects besides weights"
