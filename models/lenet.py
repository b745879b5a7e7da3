"""LeNet-5 as in the lecture's table.

After LeCun et al., "Gradient-based learning applied to document recognition", 1998.
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType

import torch

import gpukern


class LeNet5(torch.nn.Sequential):
    """[N, 1, 28, 28] → logits [N, 10].

    ==================================  ============  ===============
    layer                               output size   weight size
    ==================================  ============  ===============
    Conv (C_out=20, K=5, P=2, S=1)      20 × 28 × 28  20 × 1 × 5 × 5
    ReLU                                20 × 28 × 28
    MaxPool(K=2, S=2)                   20 × 14 × 14
    Conv (C_out=50, K=5, P=2, S=1)      50 × 14 × 14  50 × 20 × 5 × 5
    ReLU                                50 × 14 × 14
    MaxPool(K=2, S=2)                   50 × 7 × 7
    Flatten                             2450
    Linear (2450 -> 500)                500           2450 × 500
    ReLU                                500
    Linear (500 -> 10)                  10            500 × 10
    ==================================  ============  ===============

    ``layers`` is where the layers come from: ``gpukern.nn``, or ``torch.nn`` for the same network on torch's own.
    ``batch_norm`` puts a batch norm before every ReLU (Ioffe and Szegedy, "Batch Normalization", ICML 2015), which
    takes the place of the biases before it; ``dropout`` is the probability of a zero after the last ReLU. There
    are as many logits as ``classes``.
    Weights are drawn from torch's global generator.
    """

    #: One image, [C, H, W].
    INPUT_SIZE = (1, 28, 28)
    CLASSES = 10

    conv1: torch.nn.Conv2d
    conv2: torch.nn.Conv2d
    fc1: torch.nn.Linear
    fc2: torch.nn.Linear

    def __init__(self, layers: ModuleType = gpukern.nn, batch_norm: bool = False, dropout: float = 0.0,
                 classes: int = CLASSES) -> None:  # fmt: skip
        named = OrderedDict(
            conv1=layers.Conv2d(1, 20, kernel_size=5, padding=2, bias=not batch_norm),
            bn1=layers.BatchNorm2d(20) if batch_norm else None,
            relu1=layers.ReLU(),
            pool1=layers.MaxPool2d(kernel_size=2, stride=2),
            conv2=layers.Conv2d(20, 50, kernel_size=5, padding=2, bias=not batch_norm),
            bn2=layers.BatchNorm2d(50) if batch_norm else None,
            relu2=layers.ReLU(),
            pool2=layers.MaxPool2d(kernel_size=2, stride=2),
            flatten=torch.nn.Flatten(),
            fc1=layers.Linear(50 * 7 * 7, 500, bias=not batch_norm),
            bn3=layers.BatchNorm1d(500) if batch_norm else None,
            relu3=layers.ReLU(),
            dropout=layers.Dropout(dropout) if dropout else None,
            fc2=layers.Linear(500, classes),
        )
        super().__init__(OrderedDict((name, layer) for name, layer in named.items() if layer is not None))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero biases and normal weights: std = √(2/D_in) before a ReLU, 1/√D_in where none follows.

        The first is Kaiming/MSRA (He et al., "Delving Deep into Rectifiers", ICCV 2015): a ReLU drops half of the
        variance, the 2 restores it. The second is the lecture's Xavier, for outputs that stay as they are.
        """
        layer: torch.nn.Conv2d | torch.nn.Linear
        for layer in (self.conv1, self.conv2, self.fc1):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        torch.nn.init.kaiming_normal_(self.fc2.weight, nonlinearity="linear")
        torch.nn.init.zeros_(self.fc2.bias)
