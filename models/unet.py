"""U-Net, which labels every pixel.

Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from models.blocks import ConvNormActivation, initialize


class DoubleConv(nn.Sequential):
    """Twice 3×3, batch norm, ReLU: [N, inputs, H, W] → [N, outputs, H, W]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(ConvNormActivation(inputs, outputs, 3), ConvNormActivation(outputs, outputs, 3))


class UNet(nn.Module):
    """[N, inputs, 256, 256] (or any other image size in multiples of 16) → logits [N, classes, 256, 256].

    19 convolutions and 4 transposed ones; 31,037,698 parameters, 48.17 G multiply-adds for an image of 3×256×256.

    It differs from the paper's as today's implementations do: padded convolutions, so that the output has the size of
    the input and nothing is cropped; batch norm after each 3×3, which then needs no bias; no dropout.

    Parameters
    ----------
    width:
        channels at full size, 64 as published; each halving of the image doubles them.
    """

    #: How often the image is halved.
    DEPTH = 4

    def __init__(self, inputs: int = 3, classes: int = 2, width: int = 64) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(self.DEPTH + 1)]
        steps = list(pairwise(widths))
        self.encoder = nn.ModuleList([DoubleConv(inputs, width), *[DoubleConv(a, b) for a, b in steps]])
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(steps)])
        self.decoder = nn.ModuleList([DoubleConv(b, a) for a, b in reversed(steps)])
        self.head = nn.Conv2d(width, classes, 1)
        initialize(self, mode="fan_in")  # as in the paper

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = [self.encoder[0](x)]
        for level in self.encoder[1:]:
            skips.append(level(self.pool(skips[-1])))
        x = skips.pop()
        for up, level in zip(self.up, self.decoder, strict=True):
            x = level(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)
