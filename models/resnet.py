"""ResNet-18 to ResNet-152 with torchvision's ``state_dict``, and the paper's ResNets for images of 32×32.

He et al., "Deep residual learning for image recognition", CVPR 2016.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.blocks import initialize


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """The shortcut where the branch changes the shape; None where x itself will do."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """3×3, 3×3 and the shortcut: [N, inputs, H, W] → [N, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 and the shortcut: [N, inputs, H, W] → [N, 4·width, H/stride, W/stride].

    The stride is the 3×3's, as in today's implementations ("v1.5"); the paper has it in the first 1×1, which then drops
    three quarters of its input unseen.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet(nn.Module):
    """[N, channels, 224, 224] (or any other image size) → logits [N, classes].

    Parameters
    ----------
    block:
        what the stages repeat.
    depths:
        number of blocks in each stage, four of them as published for ImageNet, three for CIFAR-10.
    width:
        channels of the first stage, 64 as published; each later stage has twice those of the one before.
    small_images:
        for images of about 32×32: a first convolution of 3×3 with stride 1, and no pooling after it.
    dropout:
        probability of a zero before the linear layer; the paper has none.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        classes: int = 1000,
        width: int = 64,
        channels: int = 3,
        small_images: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        self._stages = [f"layer{stage + 1}" for stage in range(len(depths))]
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inputs, width * 2**stage, stride))
                inputs = width * 2**stage * block.expansion
            self.add_module(self._stages[stage], nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.fc = nn.Linear(inputs, classes)
        initialize(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x if self.dropout is None else self.dropout(x))


def resnet18(classes: int = 1000, width: int = 64, **options: Any) -> ResNet:
    """20 convolutions, 11,689,512 parameters, 1.81 G multiply-adds for an image of 3×224×224."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, width, **options)


def resnet34(classes: int = 1000, width: int = 64, **options: Any) -> ResNet:
    """36 convolutions, 21,797,672 parameters, 3.66 G multiply-adds for an image of 3×224×224."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes, width, **options)


def resnet50(classes: int = 1000, width: int = 64, **options: Any) -> ResNet:
    """53 convolutions, 25,557,032 parameters, 4.09 G multiply-adds for an image of 3×224×224."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, width, **options)


def resnet101(classes: int = 1000, width: int = 64, **options: Any) -> ResNet:
    """104 convolutions, 44,549,160 parameters, 7.80 G multiply-adds for an image of 3×224×224."""
    return ResNet(Bottleneck, (3, 4, 23, 3), classes, width, **options)


def resnet152(classes: int = 1000, width: int = 64, **options: Any) -> ResNet:
    """155 convolutions, 60,192,808 parameters, 11.51 G multiply-adds for an image of 3×224×224."""
    return ResNet(Bottleneck, (3, 8, 36, 3), classes, width, **options)


def cifar_resnet(depth: int, classes: int = 10, width: int = 16, **options: Any) -> ResNet:
    """The paper's networks for images of 32×32: three stages of (depth − 2)/6 blocks, 16, 32 and 64 channels wide.

    Shortcuts that change the shape are projections (the paper's option B). ValueError for a depth that is not 6n + 2.
    """
    blocks, left = divmod(depth - 2, 6)
    if left or blocks < 1:
        raise ValueError(f"depth must be 6n + 2, as in 8, 14, 20, got {depth}")
    return ResNet(BasicBlock, (blocks,) * 3, classes, width, **{"small_images": True, **options})
