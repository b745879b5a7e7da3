"""What networks are trained to make small: the cross entropy of pixels, weighted or balanced."""

from __future__ import annotations

from typing import NamedTuple

import torch

import gpukern
from models.ciresan import CiresanN4
from models.membranes.networks import Network, full


class Batch(NamedTuple):
    """``images`` [N, 1, H + 2·context, W + 2·context]; of the pixels of its middle, [N, H, W], ``labels`` (int64: 1 for
    the inside of a cell) and ``weights``."""

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


def weighted(network: Network, batch: Batch) -> torch.Tensor:
    """``Σ w · −log p[label] / Σ w`` over all pixels."""
    losses = gpukern.functional.cross_entropy(full(network.dense(batch.images)), batch.labels, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


def of_pixels(network: Network, batch: Batch, pixels: int) -> torch.Tensor:
    """The mean of ``−log p[label]`` over :func:`balanced` pixels, each class with one half, by the dense network."""
    chosen = balanced(batch.labels, pixels)
    logits = full(network.dense(batch.images)).movedim(1, -1).reshape(-1, 2)
    return _mean_of_classes(logits[chosen], batch.labels.reshape(-1)[chosen])


def of_patches(network: Network, batch: Batch, pixels: int) -> torch.Tensor:
    """The same, by the network of patches, each pixel from its own: as published, and hundreds of times the work."""
    chosen = balanced(batch.labels, pixels)
    height, width = batch.labels.shape[1:]
    images = chosen // (height * width)
    rows, columns = chosen // width % height, chosen % width
    offsets = torch.arange(CiresanN4.PATCH, device=chosen.device)
    patches = batch.images[
        images[:, None, None],
        0,
        rows[:, None, None] + offsets[:, None],
        columns[:, None, None] + offsets,
    ]
    return _mean_of_classes(full(network.model(patches[:, None])), batch.labels.reshape(-1)[chosen])


def _mean_of_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """½ of the mean over each class; 0 for one that is not there."""
    losses = gpukern.functional.cross_entropy(logits, labels, reduction="none")
    parts = [losses * (labels == label) for label in (0, 1)]
    counts = [(labels == label).sum().clamp(min=1) for label in (0, 1)]
    return sum(part.sum() / count for part, count in zip(parts, counts, strict=True)) / 2  # type: ignore[return-value]


def balanced(labels: torch.Tensor, pixels: int) -> torch.Tensor:
    """Flat indices of half as many random ``pixels`` of each class, or of all of a class that has fewer."""
    flat = labels.reshape(-1)
    keys = torch.rand(flat.shape, device=flat.device)
    chosen = []
    for label in (0, 1):
        of_class = flat == label
        count = min(int(of_class.sum()), max(1, pixels // 2))
        chosen.append(torch.where(of_class, keys, -1).topk(count).indices)
    return torch.cat(chosen)
