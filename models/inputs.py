"""From images as bytes to what a network takes, drawn anew every epoch for training."""

from __future__ import annotations

import torch
from torch import nn

from gpukern.data import Augment
from models.config import Config
from models.data import Data


class Inputs(nn.Module):
    """Batches [N, C, H, W] of images: of bytes by ``augment``, then of ``image_size`` pixels a side.

    Images that are normalised already, for which ``augment`` is None, only become ``dtype``.
    """

    def __init__(self, augment: Augment | None, image_size: int | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.augment, self.image_size, self.dtype = augment, image_size, dtype

    def forward(self, images: torch.Tensor, index: torch.Tensor | None = None, epoch: int = 0) -> torch.Tensor:
        """Those of ``images`` that ``index`` names, or all.

        What is drawn in training depends on the seed, ``epoch`` and the number of the image, not on the batch.
        """
        if self.augment is None:
            return (images if index is None else images[index]).to(self.dtype)
        batch = self.augment(images, index, step=epoch)
        if self.image_size and batch.shape[2:] != (self.image_size, self.image_size):
            side = (self.image_size, self.image_size)
            batch = nn.functional.interpolate(batch, side, mode="bilinear", antialias=True)
            batch = batch.contiguous(memory_format=torch.channels_last)
        return batch


def make(config: Config, data: Data) -> Inputs:
    """As ``config`` says; normalised with the training set's mean and deviation, or with those of its weights."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    if not data.as_bytes:
        return Inputs(None, None, dtype)
    published = config.architecture.pixels if config.weights else None
    mean, std = published or (data.mean, data.std)
    augment = Augment(
        data.image_size[1:],
        config.crop,
        config.flip,
        config.cutout,
        [value / 255 for value in mean],
        [value / 255 for value in std],
        dtype,
        seed=config.seed,
    )
    return Inputs(augment, config.image_size, dtype)
