"""CIFAR-10: the official batches for Python and as bytes, or an archive with a folder of pictures for each class."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from models.datasets import folders, places
from models.datasets.source import Part, Source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
#: Names a folder or an archive; before the usual places.
VARIABLE = "GPUKERN_CIFAR10"
ARCHIVE = "cifar10-jpeg.zip"
_TRAIN, _TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
_SIDE, _PIXELS = 32, 3 * 32 * 32
_INSIDE = ("cifar-10-batches-py", "cifar-10-batches-bin")


def find() -> Path:
    """Where the data set is: the variable's place, ``data/cifar10`` or ``../shared/data/cifar10``.

    FileNotFoundError that says where it was looked for.
    """
    return places.find("cifar10", VARIABLE, "CIFAR-10 is", "its folder or archive")


def is_cifar10(path: Path) -> bool:
    """Whether a folder holds the official batches or the archive."""
    return any((folder / name).is_file() for folder in _folders(path) for name in _names(_TRAIN[0])) or (
        (path / ARCHIVE).is_file()
    )


def _folders(path: Path) -> list[Path]:
    return [path, *(path / inside for inside in _INSIDE)]


def _names(batch: str) -> tuple[str, str]:
    return batch, f"{batch}.bin"


def load(path: Path) -> Source:
    """FileNotFoundError for a missing batch, ValueError for a damaged one, both naming the file."""
    for folder in _folders(path):
        if any((folder / name).is_file() for name in _names(_TRAIN[0])):
            return Source("CIFAR-10", _batches(folder, _TRAIN), _batches(folder, _TEST), CLASSES, path)
    return folders.load_archive(path / ARCHIVE, "CIFAR-10")


def _batches(folder: Path, batches: tuple[str, ...]) -> Part:
    parts = []
    for batch in batches:
        paths = [folder / name for name in _names(batch) if (folder / name).is_file()]
        if not paths:
            raise FileNotFoundError(f"{folder / batch}: no such file (nor {batch}.bin)")
        parts.append(read_binary(paths[0]) if paths[0].suffix == ".bin" else read_python(paths[0]))
    return Part.of(np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] of rows of three colour planes."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise ValueError(f"{path}: expected labels 0 to 9, got {labels.min()} to {labels.max()}")
    planes = images.reshape(-1, 3, _SIDE, _SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), labels.astype(np.int64)


def read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the binary version: for each image its label and 3,072 bytes."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    if not len(content) or len(content) % (_PIXELS + 1):
        raise ValueError(f"{path}: {len(content)} bytes are no whole number of images of {_PIXELS + 1} bytes")
    rows = content.reshape(-1, _PIXELS + 1)
    return _checked(path, rows[:, 1:], rows[:, 0])


class _Arrays(pickle.Unpickler):
    """Makes arrays and plain values, and runs no other code that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the version for Python: a pickled dictionary of ``data`` and ``labels``."""
    try:
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # whatever pickle makes of foreign bytes
        raise ValueError(f"{path}: damaged, or no batch of CIFAR-10: {error!r}") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _PIXELS or labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: expected N rows of {_PIXELS} bytes and N labels, got {images.shape} {labels.shape}")
    return _checked(path, images, labels)
