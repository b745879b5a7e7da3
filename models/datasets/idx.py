"""IDX files, as published with MNIST, Fashion-MNIST and EMNIST."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from models.datasets.source import Part, Source

# Two zero bytes, the element type (8: unsigned byte), the number of dimensions, then each dimension as a big-endian
# uint32, then the elements in C order.
_UNSIGNED_BYTE = 8
_DIGITS = 10


def is_idx(path: Path) -> bool:
    """Whether a folder, the folder ``raw`` in it, or one with files of this beginning holds IDX files."""
    return any(any(folder.glob(f"{prefix}*idx[13]-ubyte*")) for folder, prefix in _places(path))


def _places(path: Path) -> list[tuple[Path, str]]:
    """Folders and the beginning of the names in them. torchvision puts EMNIST's six sets into one folder."""
    return [(path, "train"), (path, "t10k"), (path / "raw", "train"), (path.parent, f"{path.name}-train")]


def load(path: Path) -> Source:
    """The files in ``path`` or in its folder ``raw``; for ``raw/emnist-letters``, those of that name.

    FileNotFoundError for missing files, ValueError for broken ones, both naming the file.
    """
    folder, prefix = path, ""
    if not any(path.glob("t*-ubyte*")) and is_idx(path / "raw"):
        folder = path / "raw"
    elif not path.is_dir() and is_idx(path):
        folder, prefix = path.parent, f"{path.name}-"
    elif not path.is_dir():
        told = "a file, expected a folder or a .zip of pictures" if path.exists() else "no such directory"
        raise FileNotFoundError(f"{path}: {told}")
    train, train_labels, _ = _pair(folder, f"{prefix}train")
    held_out, held_out_labels, labels_path = _pair(folder, f"{prefix}{'test' if prefix else 't10k'}")
    if held_out.shape[1:] != train.shape[1:]:
        sizes = " and ".join(f"{images.shape[1]} × {images.shape[2]}" for images in (train, held_out))
        raise ValueError(f"{folder}: images to train on and held-out ones differ in size: {sizes}")
    classes = int(train_labels.max()) + 1
    if held_out_labels.max() >= max(classes, _DIGITS):
        highest = held_out_labels.max()
        raise ValueError(f"{labels_path}: expected labels 0 to {max(classes, _DIGITS) - 1}, got {highest}")
    if min(train_labels.min(), held_out_labels.min()) == 1 and (classes > _DIGITS or prefix.startswith("emnist")):
        train_labels, held_out_labels, classes = train_labels - 1, held_out_labels - 1, classes - 1  # EMNIST's letters
    elif not prefix:
        classes = max(classes, _DIGITS)
    names = tuple(map(str, range(classes)))
    return Source(str(path), Part.of(train, train_labels), Part.of(held_out, held_out_labels), names, path)


def _pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray, Path]:
    """Images [N, H, W] and labels [N] of ``part``, and the file of these."""
    images_path = _find(folder, f"{part}-images", dimensions=3)
    labels_path = _find(folder, f"{part}-labels", dimensions=1)
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if len(labels) == 0:
        raise ValueError(f"{labels_path}: holds no samples")
    return images, labels, labels_path


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    """Mirrors differ in a dot: ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, either with ``.gz``."""
    names = [f"{stem}{mark}idx{dimensions}-ubyte{packed}" for mark in "-." for packed in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]}: no such file (nor {', '.join(names[1:])})")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an IDX file, gzipped if its name ends in ``.gz``. ValueError naming any other."""
    content = _read(path)
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise ValueError(f"{path}: truncated: {len(content)} bytes are less than the header of an IDX file")
    if content[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        expected = f"{_UNSIGNED_BYTE << 8 | dimensions:#010x}"
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes with {dimensions} dimension(s): "
            f"expected the magic number {expected}, got 0x{content[:4].hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    expected_size = header_size + int(np.prod(shape, dtype=object))
    if len(content) != expected_size:
        problem = "truncated" if len(content) < expected_size else "too long"
        raise ValueError(f"{path}: {problem}: {len(content)} bytes, the header announces {expected_size}")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or not gzip: {error}") from error
