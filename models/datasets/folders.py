"""A folder of pictures for each class, on the disk or in a zip archive."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from models.datasets.source import Part, Source, divide

_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".gif", ".tif", ".tiff", ".webp"}
_TRAIN, _HELD_OUT = ("train",), ("val", "valid", "validation", "test")


def load(path: Path, image_size: int | None = None) -> Source:
    """``path/train/CLASS/…`` and ``path/val/CLASS/…``, or ``path/CLASS/…``, of which a fifth is held out.

    With ``image_size`` the shorter side becomes this long, and the middle square is taken. FileNotFoundError or
    ValueError naming what is missing, broken or of another size.
    """
    names = [entry.relative_to(path).as_posix() for entry in sorted(path.rglob("*")) if entry.is_file()]
    return _source(path, path.name, names, lambda name: (path / name).read_bytes(), image_size)


def load_archive(path: Path, name: str, image_size: int | None = None) -> Source:
    """The same of a zip archive."""
    try:
        archive = zipfile.ZipFile(path)
        members = sorted(member for member in archive.namelist() if not member.endswith("/"))
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: truncated or no zip archive: {error}") from error

    def read(member: str) -> bytes:
        try:
            return archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise ValueError(f"{path}: {member} in it is damaged: {error}") from error

    return _source(path, name, members, read, image_size)


def _source(path: Path, name: str, files: list[str], read: Callable[[str], bytes], image_size: int | None) -> Source:
    pictures = [
        PurePosixPath(file)
        for file in files
        if PurePosixPath(file).suffix.lower() in _ENDINGS
        and not any(p.startswith((".", "__")) for p in file.split("/"))
    ]
    parts = {part: [p for p in pictures if len(p.parts) > 2 and p.parts[0] == part] for part in (*_TRAIN, *_HELD_OUT)}
    train = parts["train"]
    held_out = next((parts[part] for part in _HELD_OUT if parts[part]), [])
    if bool(train) != bool(held_out):
        missing = "/".join(_HELD_OUT) if train else "train"
        raise FileNotFoundError(f"{path}: no pictures in {missing}/CLASS/")
    whole = [] if train else [p for p in pictures if len(p.parts) > 1]
    classes = sorted({p.parts[0 if whole else 1] for p in whole or train})
    if len(classes) < 2:
        raise FileNotFoundError(f"{path}: no folder of pictures for each of several classes, nor train/ and val/")
    if unknown := sorted({p.parts[1] for p in held_out} - set(classes)):
        raise ValueError(f"{path}: nothing to train on of the held-out class {unknown[0]!r}")
    decode = _Decoder(path, read, image_size)
    if whole:
        labels = np.array([classes.index(p.parts[0]) for p in whole])
        if alone := [each for each, number in zip(classes, np.bincount(labels), strict=True) if number < 2]:
            raise ValueError(f"{path}: class {alone[0]!r} has one picture, and needs one to learn and one to hold out")
        train, held_out = ([whole[i] for i in indices] for indices in divide(labels))
    depth = 0 if whole else 1
    of = [
        Part(np.array([classes.index(p.parts[depth]) for p in part]), decode.part(part)) for part in (train, held_out)
    ]
    return Source(name, of[0], of[1], tuple(classes), path)


class _Decoder:
    """Pictures as [n, H, W, 3] bytes, all of one size."""

    def __init__(self, path: Path, read: Callable[[str], bytes], image_size: int | None) -> None:
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise RuntimeError("pillow is missing, of the extra train: pip install -e '.[train]'") from error
        self._open, self._path, self._read, self._image_size = Image.open, path, read, image_size
        self._first: tuple[str, tuple[int, int]] | None = None

    def part(self, pictures: list[PurePosixPath]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda indices: np.stack([self._decode(str(pictures[index])) for index in indices])

    def _decode(self, name: str) -> np.ndarray:
        try:
            picture = self._open(io.BytesIO(self._read(name))).convert("RGB")
        except (OSError, SyntaxError) as error:  # what PIL makes of broken files
            raise ValueError(f"{self._path}: {name} is damaged or no picture: {error}") from error
        if self._image_size:
            picture = _middle(picture, self._image_size)
        first, size = self._first or (name, picture.size)
        self._first = first, size
        if picture.size != size:
            sizes = f"{first} {size[0]} × {size[1]}, {name} {picture.size[0]} × {picture.size[1]}"
            raise ValueError(f"{self._path}: the pictures differ in size ({sizes}): give --image-size")
        return np.asarray(picture)


def _middle(picture: Any, side: int) -> Any:
    """The middle square of ``picture``, whose shorter side is made ``side`` pixels long."""
    if picture.size == (side, side):
        return picture
    scale = side / min(picture.size)
    width, height = (max(side, round(scale * length)) for length in picture.size)
    left, top = (width - side) // 2, (height - side) // 2
    return picture.resize((width, height), resample=2).crop((left, top, left + side, top + side))
