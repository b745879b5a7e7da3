"""MobileNet-V2 with torchvision's ``state_dict``.

Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from models.blocks import ConvNormActivation, initialize


class InvertedResidual(nn.Module):
    """1×1 to ``expansion`` times the channels, 3×3 depthwise, 1×1 back; x is added where the shape stays the same."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(inputs, hidden, 1, activation=nn.ReLU6))
        layers += [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden, activation=nn.ReLU6),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """[N, 3, 224, 224] (or any other image size) → logits [N, classes].

    52 convolutions, 17 of them depthwise; 3,504,872 parameters, 0.30 G multiply-adds for an image of 3×224×224.

    Parameters
    ----------
    dropout:
        probability of a zero before the linear layer.
    """

    #: The paper's table 2: expansion, channels, number of blocks, stride of the first.
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    STEM, FEATURES = 32, 1280

    def __init__(self, classes: int = 1000, dropout: float = 0.2) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormActivation(3, self.STEM, 3, stride=2, activation=nn.ReLU6)]
        inputs = self.STEM
        for expansion, outputs, depth, stride in self.STAGES:
            for index in range(depth):
                layers.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
                inputs = outputs
        layers.append(ConvNormActivation(inputs, self.FEATURES, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        # torchvision calls the function; as a layer gpukern.convert sees it.
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.FEATURES, classes))
        initialize(self, linear=partial(nn.init.normal_, std=0.01))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
