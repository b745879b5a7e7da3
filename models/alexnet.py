"""AlexNet with torchvision's ``state_dict``.

Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", NIPS 2012, in the
widths of Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014: 64 filters of 11×11.
"""

from __future__ import annotations

import torch
from torch import nn

from models.blocks import initialize


class AlexNet(nn.Module):
    """[N, channels, 224, 224] (or any other image size) → logits [N, classes].

    5 convolutions, 61,100,840 parameters, 0.71 G multiply-adds for an image of 3×224×224.

    Parameters
    ----------
    dropout:
        probability of a zero before each of the hidden linear layers.
    width:
        filters of the first convolution, 64 as published; all other widths are multiples of it.
    small_images:
        for images of about 32×32: the first convolution has stride 2 instead of 4, and the hidden linear layers have a
        quarter of the width.
    """

    def __init__(
        self,
        classes: int = 1000,
        dropout: float = 0.5,
        width: int = 64,
        channels: int = 3,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        stride, padding, pooled, hidden = (2, 5, 1, 16 * width) if small_images else (4, 2, 6, 64 * width)
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 11, stride, padding),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(width, 3 * width, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(3 * width, 6 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6 * width, 4 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((pooled, pooled))
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(4 * width * pooled * pooled, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )
        # The linear layers too: with the published standard deviation of 0.01 a narrow one would start with no signal.
        initialize(self, "fan_in", linear=lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
