"""What several of the networks are made of, with the names that torchvision's children have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn


class ConvNormActivation(nn.Sequential):
    """Convolution without bias, batch norm and, unless it is None, an activation; stride 1 keeps the image size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[..., nn.Module] | None = nn.ReLU,
    ) -> None:
        layers = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        if activation is not None:
            layers.append(activation(inplace=True))
        super().__init__(*layers)


class StochasticDepth(nn.Module):
    """In training, zeroes each sample with probability ``p`` and divides the others by 1 − p: the mean stays.

    At the end of a residual branch it leaves the sample with the shortcut. Huang et al., "Deep networks with stochastic
    depth", ECCV 2016. [N, ...] → [N, ...]
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def initialize(
    model: nn.Module,
    mode: Literal["fan_in", "fan_out"] = "fan_out",
    linear: Callable[[torch.Tensor], object] | None = None,
) -> None:
    """Draw the weights of all convolutions, and with ``linear`` those of all linear layers; zero their biases.

    Convolutions: normal with std = √(2/fan). The ``mode`` "fan_in", C_in/groups·K², keeps the scale of what goes
    forward through a ReLU; "fan_out", C_out·K², that of the gradients. He et al., "Delving deep into rectifiers",
    ICCV 2015.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
        elif isinstance(layer, nn.Linear) and linear is not None:
            linear(layer.weight)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
