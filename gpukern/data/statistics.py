"""What normalization subtracts and divides by, of images of bytes: exact, in whole numbers."""

from __future__ import annotations

import math

import torch

#: Images at a time, so that their squares need little memory.
_CHUNK = 1024


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 ``images`` [N, H, W, C], of pixels between 0 and 1.

    What VGG subtracts, and what :class:`gpukern.data.Augment` takes as ``mean`` and ``std``. Sums are whole numbers:
    the same on every device. RuntimeError for other shapes, and for no pixels; NotImplementedError for other dtypes.
    """
    _check("channel_statistics", images)
    total, squares = torch.zeros(2, images.shape[3], dtype=torch.int64, device=images.device)
    for chunk in images.split(_CHUNK):
        wide = chunk.int()
        total += wide.sum((0, 1, 2), dtype=torch.int64)
        squares += wide.square().sum((0, 1, 2), dtype=torch.int64)
    count = images.shape[:3].numel()
    pairs = list(zip(total.tolist(), squares.tolist(), strict=True))
    means = tuple(sum_ / (255 * count) for sum_, _ in pairs)
    return means, tuple(math.sqrt(count * square - sum_**2) / (255 * count) for sum_, square in pairs)


def mean_image(images: torch.Tensor) -> torch.Tensor:
    """The mean of uint8 ``images`` [N, H, W, C], of pixels between 0 and 1: float32 [H, W, C], what AlexNet subtracts.

    RuntimeError and NotImplementedError as :func:`channel_statistics`.
    """
    _check("mean_image", images)
    total = torch.zeros(images.shape[1:], dtype=torch.int64, device=images.device)
    for chunk in images.split(_CHUNK):
        total += chunk.sum(0, dtype=torch.int64)
    return (total.double() / (255 * len(images))).float()


def _check(function: str, images: torch.Tensor) -> None:
    if images.dtype is not torch.uint8:
        raise NotImplementedError(f"{function} is not implemented for {images.dtype}: expected images of torch.uint8")
    if images.dim() != 4 or not images.numel():
        raise RuntimeError(f"{function}: expected images [N, H, W, C] with pixels, but got {list(images.shape)}")
