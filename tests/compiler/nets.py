"""Small networks, each of one pattern that the compiler knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """``forward(self, x)`` is a function, of layers with names."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    options = {"padding": kernel // 2, "bias": False} | options
    return nn.Conv2d(inputs, outputs, kernel, **options)


def conv_norm(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> list[nn.Module]:
    return [conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """The basic block of a ResNet, with a projection if ``outputs`` are not the inputs."""

    def __init__(self, inputs: int = 4, outputs: int = 4, act: Callable[..., torch.Tensor] = F.silu) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(inputs, outputs)
        self.conv2, self.bn2 = conv_norm(outputs, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*conv_norm(inputs, outputs, 1))
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """Norms and activations before the convolutions: He et al., "Identity mappings", 2016."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)
        self.shortcut = conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(self.bn1(x))
        shortcut = self.shortcut(y)
        y = self.conv2(F.silu(self.bn2(self.conv1(y))))
        y += shortcut
        return y


def dense() -> Net:
    """A block of a DenseNet: what was computed before is concatenated."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in ((net.norm1, net.conv1), (net.norm2, net.conv2)):
            x = torch.cat([x, layer(torch.tanh(norm(x)))], 1)
        return x

    norms = {"norm1": nn.BatchNorm2d(4), "norm2": nn.BatchNorm2d(6)}
    return Net(forward, **norms, conv1=conv(4, 2), conv2=conv(6, 2))


def squeeze_excite() -> Net:
    """An inverted residual with a gate, as EfficientNet has it."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.silu(net.bn1(net.expand(x)))
        y = F.silu(net.bn2(net.depthwise(y)))
        gate = F.silu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))
        y = y * torch.sigmoid(net.excite(gate))
        return net.bn3(net.project(y)) + x

    expand, bn1 = conv_norm(4, 8, 1)
    depthwise, bn2 = conv_norm(8, 8, groups=8)
    project, bn3 = conv_norm(8, 4, 1)
    layers = {"expand": expand, "bn1": bn1, "depthwise": depthwise, "bn2": bn2, "project": project, "bn3": bn3}
    return Net(forward, **layers, squeeze=nn.Conv2d(8, 2, 1), excite=nn.Conv2d(2, 8, 1))


def residual_twice() -> Net:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(net.bn1(net.conv1(x)))
        return torch.tanh(net.bn2(net.conv2(y)) + y + y)

    (conv1, bn1), (conv2, bn2) = conv_norm(4, 4), conv_norm(4, 4)
    return Net(forward, conv1=conv1, bn1=bn1, conv2=conv2, bn2=bn2)


def read_by_three(*taken: int) -> Net:
    """One result, read by two convolutions and as a residual; of the three that follow those ``taken`` are returned."""

    def forward(net: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.silu(net.bn1(net.conv1(x)))
        inner = F.silu(net.bn2(net.conv2(y)))
        results = torch.tanh(net.bn3(net.conv3(inner)) + y), net.bn4(net.conv4(y)), net.plain(inner)
        return tuple(results[i] for i in taken)

    layers = {}
    for i in range(1, 5):
        layers[f"conv{i}"], layers[f"bn{i}"] = conv_norm(4, 4)
    return Net(forward, **layers, plain=nn.Conv2d(4, 3, 1))


def sequential(*layers: nn.Module | list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(each for group in layers for each in (group if isinstance(group, list) else [group])))


def frozen(model: nn.Module) -> nn.Module:
    """``model`` in training, its norms not."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def classifier() -> nn.Sequential:
    """Every kind of group in one network: [N, 3, H, W] → [N, 3]."""
    return sequential(
        conv_norm(3, 4), nn.Tanh(), Block(), Block(4, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
