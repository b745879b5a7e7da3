"""VGG-16 without batch norm, with torchvision's ``state_dict``.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from models.blocks import initialize


class VGG16(nn.Module):
    """[N, 3, 224, 224] (or any other image size) → logits [N, classes].

    13 convolutions of 3×3, 138,357,544 parameters, 15.47 G multiply-adds for an image of 3×224×224.

    Parameters
    ----------
    dropout:
        probability of a zero after each of the hidden linear layers.
    width:
        channels of the first convolution, 64 as published; all other widths are multiples of it.
    """

    #: For each stage, the number of its convolutions and their channels in widths; a pooling by 2 ends it.
    STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))

    def __init__(self, classes: int = 1000, dropout: float = 0.5, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for depth, multiple in self.STAGES:
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, multiple * width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = multiple * width
            layers.append(nn.MaxPool2d(2, stride=2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 7 * 7, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        initialize(self, linear=partial(nn.init.normal_, std=0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
