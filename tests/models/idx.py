"""Small generated data sets in MNIST's file format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def digits_like(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images [count, 28, 28] whose bright row tells their label [count]."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, 10, count)
    images = random.randint(0, 60, (count, 28, 28))
    images[np.arange(count), 2 * labels + 4] += 150
    return images, labels


def write_dataset(directory: Path, train: int, held_out: int, mark: str = "-", packed: bool = False) -> Path:
    """The four files of a data set; ``mark`` and ``packed`` choose the naming."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", held_out))):
        for kind, array in zip(("images", "labels"), digits_like(count, seed), strict=True):
            name = f"{part}-{kind}{mark}idx{array.ndim}-ubyte"
            content = idx_bytes(array)
            (directory / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return directory
