"""U-Net, which labels every pixel.

Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from models.blocks import initialize

#: What a 3×3 convolution does at an image's border.
PADDINGS = ("same", "valid")


class DoubleConv(nn.Sequential):
    """Twice 3×3, batch norm, ReLU: [N, inputs, H, W] → [N, outputs, H, W], of valid convolutions [.., H − 4, W − 4].

    Without batch norm the convolutions have biases. ``dropout`` is the probability of a zero at the end.
    """

    def __init__(
        self, inputs: int, outputs: int, padding: str = "same", batch_norm: bool = True, dropout: float = 0.0
    ) -> None:
        blocks = [_convolution(first, outputs, padding, batch_norm) for first in (inputs, outputs)]
        super().__init__(*blocks, *([nn.Dropout(dropout)] if dropout else []))


def _convolution(inputs: int, outputs: int, padding: str, batch_norm: bool) -> nn.Sequential:
    """In its first layers a :class:`models.blocks.ConvNormActivation`, as state_dicts know it."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=int(padding == "same"), bias=not batch_norm)
    return nn.Sequential(convolution, *([nn.BatchNorm2d(outputs)] if batch_norm else []), nn.ReLU(inplace=True))


class UNet(nn.Module):
    """[N, inputs, 256, 256] (or any other image size in multiples of 2^depth) → logits [N, classes, 256, 256].

    19 convolutions and 4 transposed ones; 31,037,698 parameters, 48.17 G multiply-adds for an image of 3×256×256.

    By default it differs from the paper's as today's implementations do: padded convolutions, so that the output has
    the size of the input and nothing is cropped; batch norm after each 3×3, which then needs no bias; no dropout. The
    paper's own is ``UNet(1, padding="valid", batch_norm=False, dropout=0.5)``: [N, 1, 572, 572] → [N, 2, 388, 388].

    Parameters
    ----------
    width:
        channels at full size, 64 as published; each halving of the image doubles them.
    depth:
        how often the image is halved.
    padding:
        "same", or "valid": only pixels whose whole surroundings are in the image get an output, and what comes across
        is cropped to its size. :attr:`margin` pixels are lost at each side.
    batch_norm:
        after each 3×3.
    dropout:
        probability of a zero at the end of the way down: in the two deepest levels.
    """

    def __init__(
        self,
        inputs: int = 3,
        classes: int = 2,
        width: int = 64,
        depth: int = 4,
        padding: str = "same",
        batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.depth, self.padding = depth, padding
        widths = [width * 2**level for level in range(depth + 1)]
        steps = list(pairwise(widths))
        # The deepest way down and the bottom, as in the paper.
        zeros = [dropout if level >= depth - 1 else 0.0 for level in range(depth + 1)]
        options = padding, batch_norm
        self.encoder = nn.ModuleList(
            [
                DoubleConv(inputs, width, *options, zeros[0]),
                *[DoubleConv(a, b, *options, p) for (a, b), p in zip(steps, zeros[1:], strict=True)],
            ]
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in reversed(steps)])
        self.decoder = nn.ModuleList([DoubleConv(b, a, *options) for a, b in reversed(steps)])
        self.head = nn.Conv2d(width, classes, 1)
        initialize(self, mode="fan_in")  # as in the paper

    @property
    def multiple(self) -> int:
        """By how many pixels an image is shifted for the output to be shifted as much: 2^depth."""
        return 2**self.depth

    @property
    def margin(self) -> int:
        """Pixels that are lost at each side: 0, or 6·2^depth − 4 of valid convolutions (92 as published).

        Two 3×3 lose 2 pixels at each side, of 2^level pixels of the image: on the way down and at the bottom
        2·(2^(depth+1) − 1), on the way up 2·(2^depth − 1).
        """
        return 6 * self.multiple - 4 if self.padding == "valid" else 0

    def fitting(self, size: int) -> int:
        """The smallest side of an output that is at least ``size``; that of the input is 2·margin longer."""
        if self.padding == "same":
            return -(-size // self.multiple) * self.multiple
        # The way up doubles the bottom's side of at least 1 and takes 4 each time: 2^depth·side − 4·(2^depth − 1).
        lost = 4 * (self.multiple - 1)
        return -(-(size + lost) // self.multiple) * self.multiple - lost

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.padding == "valid":
            self._check_size(*x.shape[2:])
        skips = [self.encoder[0](x)]
        for level in self.encoder[1:]:
            skips.append(level(self.pool(skips[-1])))
        x = skips.pop()
        for up, level in zip(self.up, self.decoder, strict=True):
            x, skip = up(x), skips.pop()
            x = level(torch.cat([_middle(skip, x) if self.padding == "valid" else skip, x], dim=1))
        return self.head(x)

    def _check_size(self, height: int, width: int) -> None:
        """A side that a pool does not halve evenly would shift what comes across by half a pixel."""
        for side in (height, width):
            output = side - 2 * self.margin
            if output < 1 or self.fitting(output) != output:
                fitting = self.fitting(max(output, 1)) + 2 * self.margin
                raise ValueError(
                    f"a U-Net of valid convolutions and depth {self.depth} takes no images of {height} × {width}: "
                    f"the next larger side than {side} is {fitting}"
                )


def _middle(skip: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """The middle of ``skip`` in the size of ``of``."""
    top, left = ((large - small) // 2 for large, small in zip(skip.shape[2:], of.shape[2:], strict=True))
    return skip[:, :, top : top + of.shape[2], left : left + of.shape[3]]
