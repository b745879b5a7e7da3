"""EfficientNet-B0 with torchvision's ``state_dict``.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", ICML 2019.
"""

from __future__ import annotations

import torch
from torch import nn

from models.blocks import ConvNormActivation, StochasticDepth, initialize


class SqueezeExcitation(nn.Module):
    """Scales each channel by a number in (0, 1) that a small network makes of the means of all channels.

    Hu et al., "Squeeze-and-excitation networks", CVPR 2018. [N, C, H, W] → [N, C, H, W]
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return self.scale_activation(scale) * x


class MBConv(nn.Module):
    """MobileNet-V2's inverted residual with squeeze-and-excitation in the wide middle and stochastic depth."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int, stochastic_depth: float
    ) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormActivation(inputs, hidden, 1, activation=nn.SiLU))
        layers += [
            ConvNormActivation(hidden, hidden, kernel, stride, groups=hidden, activation=nn.SiLU),
            SqueezeExcitation(hidden, squeezed=inputs // 4),
            ConvNormActivation(hidden, outputs, 1, activation=None),
        ]
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(stochastic_depth)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stochastic_depth(self.block(x)) + x if self.residual else self.block(x)


class EfficientNetB0(nn.Module):
    """[N, 3, 224, 224] (or any other image size) → logits [N, classes].

    81 convolutions, 16 of them depthwise and 32 of 1×1 images; 5,288,548 parameters, 0.39 G multiply-adds for an image
    of 3×224×224.

    Parameters
    ----------
    dropout:
        probability of a zero before the linear layer.
    stochastic_depth:
        probability that a sample skips a block: this times the blocks before it over the number of blocks.
    """

    #: The paper's table 1: expansion, kernel, channels, number of blocks, stride of the first.
    STAGES = (
        (1, 3, 16, 1, 1),
        (6, 3, 24, 2, 2),
        (6, 5, 40, 2, 2),
        (6, 3, 80, 3, 2),
        (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    )
    STEM, FEATURES = 32, 1280

    def __init__(self, classes: int = 1000, dropout: float = 0.2, stochastic_depth: float = 0.2) -> None:
        super().__init__()
        stages: list[nn.Module] = [ConvNormActivation(3, self.STEM, 3, stride=2, activation=nn.SiLU)]
        total = sum(depth for _, _, _, depth, _ in self.STAGES)
        skips = (stochastic_depth * before / total for before in range(total))
        inputs = self.STEM
        for expansion, kernel, outputs, depth, stride in self.STAGES:
            blocks = []
            for index in range(depth):
                blocks.append(MBConv(inputs, outputs, kernel, stride if index == 0 else 1, expansion, next(skips)))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        stages.append(ConvNormActivation(inputs, self.FEATURES, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(self.FEATURES, classes))
        bound = classes**-0.5
        initialize(self, linear=lambda weight: nn.init.uniform_(weight, -bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
