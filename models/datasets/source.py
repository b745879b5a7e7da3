"""What every data set is read into, whatever its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

#: Share of a data set without a division that is never trained on, and the seed that chooses it.
HELD_OUT, SPLIT_SEED = 0.2, 0


@dataclass(frozen=True)
class Part:
    """``labels`` [N] and ``read(indices)``, which gives these images: [n, H, W] or [n, H, W, 3], float32 or uint8.

    Images are decoded when they are read, so that a share of a large data set costs only its share.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    @staticmethod
    def of(images: np.ndarray, labels: np.ndarray) -> Part:
        return Part(labels, lambda indices: images[indices])


@dataclass(frozen=True)
class Source:
    """The training and the held-out part, and the names of the classes."""

    name: str
    train: Part
    held_out: Part
    class_names: tuple[str, ...]
    #: Of the files; None for a data set that came with a package.
    path: Path | None = None


def share(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Indices, in order, of ``fraction`` of the samples of each class, at least one; the same ones every time.

    ValueError where the fraction is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a share of the data must be in (0, 1], got {fraction}")
    if fraction == 1:
        return np.arange(len(labels))
    order = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    chosen = []
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        chosen.append(of_class[: max(1, round(fraction * len(of_class)))])
    return np.sort(np.concatenate(chosen))


def divide(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a training and a held-out part with the same share of each class."""
    held_out = share(labels, HELD_OUT)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
