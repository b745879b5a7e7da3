"""From images as bytes to what a network takes, drawn anew each time for training."""

from __future__ import annotations

import torch
from torch import nn


class Augment(nn.Module):
    """uint8 images [N, H, W, C] → (x − mean)/std, [N, C, H, W] in channels_last.

    In training mode each image is padded by ``padding`` zeros and cropped to its size at a random place, mirrored with
    probability ½ (``flip``), and a random square of ``cutout`` pixels is set to the mean. What is drawn depends on the
    seed, the step and the place of the image in the whole batch, of which ``rows`` are these images.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        padding: int = 0,
        flip: bool = False,
        cutout: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype))
        self.register_buffer("std", torch.tensor(std, dtype=dtype))
        self.padding, self.flip, self.cutout, self.seed, self.dtype = padding, flip, cutout, seed, dtype

    def forward(self, images: torch.Tensor, step: int = 0, rows: slice = slice(None), total: int = 0) -> torch.Tensor:
        changes = self.training and (self.padding or self.flip or self.cutout)
        drawn = self._draw(step, total or len(images), images.shape[1:3])[rows].to(images.device) if changes else None
        if drawn is not None:
            images = self._move(images, drawn)
        pixels = (images.to(self.dtype) - self.mean) / self.std
        if drawn is not None and self.cutout:
            pixels *= self._kept(drawn, images.shape[1:3])
        return pixels.permute(0, 3, 1, 2)

    def _draw(self, step: int, total: int, size: torch.Size) -> torch.Tensor:
        """For each image of the whole batch: top, left, whether it is mirrored, the middle of the square."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        limits = torch.tensor([2 * self.padding + 1, 2 * self.padding + 1, 2, size[0], size[1]])
        return (torch.rand(total, 5, generator=generator) * limits).long()

    def _move(self, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        count, height, width, _ = images.shape
        top, left, mirrored = drawn[:, :1], drawn[:, 1:2], drawn[:, 2:3]
        padded = nn.functional.pad(images, (0, 0, *[self.padding] * 4))
        across = torch.arange(width, device=images.device)
        if self.flip:
            across = torch.where(mirrored.bool(), across.flip(0), across)
        rows = top + torch.arange(height, device=images.device)
        number = torch.arange(count, device=images.device)
        return padded[number[:, None, None], rows[:, :, None], (left + across)[:, None, :]]

    def _kept(self, drawn: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """1 outside the square and 0 in it, [N, H, W, 1]."""
        inside = []
        for middle, length in zip((drawn[:, 3:4], drawn[:, 4:5]), size, strict=True):
            place = torch.arange(length, device=drawn.device)
            first = middle - self.cutout // 2
            inside.append((place >= first) & (place < first + self.cutout))
        return (~(inside[0][:, :, None] & inside[1][:, None, :])).unsqueeze(3)


class Inputs(nn.Module):
    """What is done to a batch before the network: little to images that are normalised already."""

    def __init__(self, augment: Augment | None, image_size: int | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.augment, self.image_size, self.dtype = augment, image_size, dtype

    def forward(self, images: torch.Tensor, step: int = 0, rows: slice = slice(None), total: int = 0) -> torch.Tensor:
        if self.augment is None:
            return images.to(self.dtype)
        images = self.augment(images, step, rows, total)
        if self.image_size and images.shape[2:] != (self.image_size, self.image_size):
            side = (self.image_size, self.image_size)
            images = nn.functional.interpolate(images, side, mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)
