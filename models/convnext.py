"""ConvNeXt-T with torchvision's ``state_dict``.

Liu et al., "A ConvNet for the 2020s", CVPR 2022.
"""

from __future__ import annotations

import torch
from torch import nn

from models.blocks import StochasticDepth

EPS = 1e-6


class Permute(nn.Module):
    """``torch.permute`` as a layer."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of each pixel: [N, C, H, W] → [N, C, H, W], in channels_last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CNBlock(nn.Module):
    """7×7 depthwise, then each pixel through two linear layers, scaled for each channel, plus x."""

    def __init__(self, channels: int, layer_scale: float, stochastic_depth: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.stochastic_depth = StochasticDepth(stochastic_depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stochastic_depth(self.layer_scale * self.block(x)) + x


class ConvNeXtTiny(nn.Module):
    """[N, 3, 224, 224] (or any other image size from 32×32) → logits [N, classes].

    22 convolutions, 18 of them depthwise; 28,589,128 parameters, 4.46 G multiply-adds for an image of 3×224×224.

    Parameters
    ----------
    stochastic_depth:
        probability that a sample skips the last block; it grows linearly from 0 in the first.
    layer_scale:
        what every branch is multiplied by at first.
    """

    CHANNELS, DEPTHS = (96, 192, 384, 768), (3, 3, 9, 3)

    def __init__(self, classes: int = 1000, stochastic_depth: float = 0.1, layer_scale: float = 1e-6) -> None:
        super().__init__()
        first, last = self.CHANNELS[0], self.CHANNELS[-1]
        layers = [nn.Sequential(nn.Conv2d(3, first, 4, stride=4), LayerNorm2d(first, eps=EPS))]
        last_block = sum(self.DEPTHS) - 1
        skips = (stochastic_depth * before / last_block for before in range(last_block + 1))
        inputs = first
        for channels, depth in zip(self.CHANNELS, self.DEPTHS, strict=True):
            if channels != inputs:
                layers.append(nn.Sequential(LayerNorm2d(inputs, eps=EPS), nn.Conv2d(inputs, channels, 2, stride=2)))
            layers.append(nn.Sequential(*[CNBlock(channels, layer_scale, next(skips)) for _ in range(depth)]))
            inputs = channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(last, eps=EPS), nn.Flatten(1), nn.Linear(last, classes))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.avgpool(self.features(x)))
