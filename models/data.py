"""Handwritten digits: scikit-learn's small set, which needs no network, or MNIST-like IDX files from a directory."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.lenet import LeNet5

#: Share of scikit-learn's digits that is never trained on, and the seed that chooses it.
HELD_OUT, SPLIT_SEED = 0.2, 0

# IDX, as published with MNIST: two zero bytes, the element type (8: unsigned byte), the number of dimensions, then
# each dimension as a big-endian uint32, then the elements in C order.
_UNSIGNED_BYTE = 8


@dataclass(frozen=True)
class Samples:
    """``images`` [N, 1, 28, 28] float32, normalised; ``labels`` [N] int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Samples:
        return Samples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A training and a held-out set. By ``fingerprint`` a resumed training knows the samples it began with."""

    #: Of the IDX files; None for scikit-learn's digits.
    directory: Path | None
    train: Samples
    held_out: Samples
    fingerprint: str

    @property
    def name(self) -> str:
        return "scikit-learn's digits" if self.directory is None else str(self.directory)


def load(directory: Path | None = None) -> Data:
    """The IDX files in ``directory``, or scikit-learn's digits where there is none.

    Images are normalised to zero mean and unit variance with the mean and the deviation of the training set.
    FileNotFoundError for missing files, ValueError for broken ones, both naming the file; RuntimeError where
    scikit-learn is not installed.
    """
    arrays = _digits() if directory is None else _idx_directory(directory)
    train, train_labels, held_out, held_out_labels = arrays
    mean, deviation = train.mean(dtype=np.float64), train.std(dtype=np.float64)
    if not deviation > 0:
        raise ValueError(f"{directory}: cannot normalise the training images, all their pixels are the same")

    def samples(images: np.ndarray, labels: np.ndarray) -> Samples:
        normalised = ((images - np.float32(mean)) / np.float32(deviation))[:, np.newaxis]
        return Samples(torch.from_numpy(normalised), torch.from_numpy(labels.astype(np.int64)))

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]
    return Data(directory, samples(train, train_labels), samples(held_out, held_out_labels), digest.hexdigest())


def _digits() -> tuple[np.ndarray, ...]:
    """1,797 digits of 8 × 8, resized bilinearly; each class is divided in the same proportion."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise RuntimeError("scikit-learn is missing, of the extra demo: pip install -e '.[demo]'") from error

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32)).unsqueeze(1)
    images = torch.nn.functional.interpolate(small, LeNet5.INPUT_SIZE[1:], mode="bilinear").squeeze(1).numpy()
    train, held_out, train_labels, held_out_labels = train_test_split(
        images, digits.target, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=digits.target
    )
    return train, train_labels, held_out, held_out_labels


def _idx_directory(directory: Path) -> tuple[np.ndarray, ...]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    return *_idx_pair(directory, "train"), *_idx_pair(directory, "t10k")


def _idx_pair(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] as float32 and labels [N] of ``part``."""
    images_path = _find(directory, f"{part}-images", dimensions=3)
    labels_path = _find(directory, f"{part}-labels", dimensions=1)
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if images.shape[1:] != LeNet5.INPUT_SIZE[1:]:
        raise ValueError(f"{images_path}: expected images of 28 × 28, got {images.shape[1]} × {images.shape[2]}")
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}")
    if len(labels) == 0:
        raise ValueError(f"{labels_path}: holds no samples")
    if labels.max() >= LeNet5.CLASSES:
        raise ValueError(f"{labels_path}: expected labels 0 to {LeNet5.CLASSES - 1}, got {labels.max()}")
    return images.astype(np.float32), labels


def _find(directory: Path, stem: str, dimensions: int) -> Path:
    """Mirrors differ in a dot: ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, either with ``.gz``."""
    names = [f"{stem}{mark}idx{dimensions}-ubyte{packed}" for mark in "-." for packed in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"{directory / names[0]}: no such file (nor {', '.join(names[1:])})")


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
