"""VGG-11 to VGG-19, with and without batch norm, with torchvision's ``state_dict``.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from models.blocks import initialize

#: Layers with weights → convolutions of each stage.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """[N, channels, 224, 224] (or any other image size) → logits [N, classes].

    Parameters
    ----------
    depth:
        layers with weights: 11, 13, 16 or 19. ValueError for any other.
    dropout:
        probability of a zero after each of the hidden linear layers.
    width:
        channels of the first convolution, 64 as published; all other widths are multiples of it.
    batch_norm:
        one after every convolution.
    small_images:
        for images of about 32×32: the mean over the last image goes to hidden linear layers of 8 widths.
    """

    #: Channels of each stage in widths; a pooling by 2 ends it.
    MULTIPLES = (1, 2, 4, 8, 8)

    def __init__(
        self,
        depth: int = 16,
        classes: int = 1000,
        dropout: float = 0.5,
        width: int = 64,
        batch_norm: bool = False,
        channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        layers: list[nn.Module] = []
        inputs = channels
        for convolutions, multiple in zip(DEPTHS[depth], self.MULTIPLES, strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(inputs, multiple * width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(multiple * width))
                layers.append(nn.ReLU(inplace=True))
                inputs = multiple * width
            layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        pooled, hidden = (1, 8 * width) if small_images else (7, 64 * width)
        self.avgpool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.classifier = nn.Sequential(
            nn.Linear(inputs * pooled * pooled, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        if small_images:  # far narrower than those for which 0.01 was found
            initialize(self, linear=lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))
        else:
            initialize(self, linear=partial(nn.init.normal_, std=0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class VGG16(VGG):
    """13 convolutions of 3×3, 138,357,544 parameters, 15.47 G multiply-adds for an image of 3×224×224."""

    def __init__(self, classes: int = 1000, dropout: float = 0.5, width: int = 64) -> None:
        super().__init__(16, classes, dropout, width)
