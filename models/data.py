"""Images with labels, to train on and held out, from packages or from files of several formats."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.datasets import cifar10, folders, idx
from models.datasets.digits import digits, mnist5k
from models.datasets.source import HELD_OUT, SPLIT_SEED, Source, share

__all__ = ["HELD_OUT", "NAMES", "SPLIT_SEED", "Data", "Samples", "load"]

#: Data sets that have a name; any other is a path.
NAMES = ("digits", "mnist5k", "cifar10")
#: The largest value of scikit-learn's digits.
_WHITE = 16


@dataclass(frozen=True)
class Samples:
    """``images`` and ``labels`` [N] int64.

    Images are normalised already, [N, 1, H, W] float32, or bytes that are normalised batch by batch, [N, H, W, C]
    uint8.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Samples:
        return Samples(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A training and a held-out set. By ``fingerprint`` a resumed training knows the samples it began with."""

    #: Of the files; None for data sets of packages.
    directory: Path | None
    #: What :func:`load` is given to load it again, from any folder.
    source: str | None
    train: Samples
    held_out: Samples
    fingerprint: str
    name: str
    class_names: tuple[str, ...]
    #: Of the training images, for each channel, in the units of the pixels.
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def as_bytes(self) -> bool:
        return self.train.images.dtype is torch.uint8

    @property
    def image_size(self) -> tuple[int, int, int]:
        """[C, H, W]"""
        first, second, third = self.train.images.shape[1:]
        return (third, first, second) if self.as_bytes else (first, second, third)


def load(
    source: Path | str | None = None,
    fraction: float = 1.0,
    held_out_fraction: float = 1.0,
    as_bytes: bool = False,
    image_size: int | None = None,
    train_images: int | None = None,
) -> Data:
    """The data set of a name of :data:`NAMES` or at a path; scikit-learn's digits where there is none.

    ==============================  ===============================================================================
    path                            what is read
    ==============================  ===============================================================================
    folder of IDX files             MNIST, Fashion-MNIST, EMNIST; they may be in its folder ``raw``
    folder of CIFAR-10's batches    the version for Python or the binary one; they may be in ``cifar-10-batches-*``
    folder or .zip of pictures      ``train/CLASS/…`` and ``val/CLASS/…``, or ``CLASS/…``, of which a fifth is held out
    ==============================  ===============================================================================

    ``fraction`` and ``held_out_fraction`` take a share of each class; ``train_images`` in place of a fraction is a
    number. Grey images are normalised to zero mean and unit
    variance with the mean and the deviation of the training set, unless ``as_bytes``; colours stay bytes.
    ``image_size`` is for pictures that differ in size. FileNotFoundError for missing files, ValueError for broken ones,
    both naming the file; RuntimeError where a package is not installed.
    """
    found = _source(source, image_size)
    if train_images is not None:
        fraction = min(1.0, train_images / len(found.train.labels))
    arrays = []
    for part, portion in ((found.train, fraction), (found.held_out, held_out_fraction)):
        chosen = share(part.labels, portion)
        images = part.read(chosen)
        as_bytes = as_bytes or images.ndim == 4
        arrays += [_bytes(images) if as_bytes else images.astype(np.float32), part.labels[chosen]]
    train, train_labels, held_out, held_out_labels = arrays
    axes = (0, 1, 2)
    mean, std = train.mean(axes, dtype=np.float64), train.std(axes, dtype=np.float64)
    if not np.all(std > 0):
        raise ValueError(f"{source}: cannot normalise the training images, all their pixels are the same")

    def samples(images: np.ndarray, labels: np.ndarray) -> Samples:
        if not as_bytes:
            images = ((images - np.float32(mean)) / np.float32(std))[:, np.newaxis]
        return Samples(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))  # type: ignore[arg-type]
    where = found.path.absolute() if found.path else source
    return Data(
        found.path,
        None if where is None else str(where),
        samples(train, train_labels),
        samples(held_out, held_out_labels),
        digest.hexdigest(),
        found.name,
        found.class_names,
        tuple(np.atleast_1d(mean).tolist()),
        tuple(np.atleast_1d(std).tolist()),
    )


def _source(source: Path | str | None, image_size: int | None) -> Source:
    if source is None or str(source) == "digits":
        return digits()
    if str(source) == "mnist5k":
        return mnist5k()
    path = cifar10.find() if str(source) == "cifar10" else Path(source)
    if path.suffix == ".zip":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return folders.load_archive(path, path.stem, image_size)
    if cifar10.is_cifar10(path):
        return cifar10.load(path)
    if path.is_dir() and not idx.is_idx(path) and any(entry.is_dir() for entry in path.iterdir()):
        return folders.load(path, image_size)
    return idx.load(path)


def _bytes(images: np.ndarray) -> np.ndarray:
    """[N, H, W, C], grey ones of one channel."""
    if images.dtype != np.uint8:
        images = np.round(images * (255 / _WHITE)).astype(np.uint8)
    return images if images.ndim == 4 else images[..., np.newaxis]
