"""Small networks whose inner layers can have eight bits, and batches for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.fusion.networks import Gate, Net, lively


def block(inputs: int, outputs: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def chain() -> nn.Module:
    """Convolutions, a depthwise one, a fused max pool and one alone, and a linear layer."""
    layers = (block(3, 8), block(8, 16, 2), block(16, 16, groups=16), nn.MaxPool2d(2), block(16, 12, kernel=1))
    return lively(nn.Sequential(*layers, nn.MaxPool2d(3, 1, 1), block(12, 12), nn.Flatten(), nn.Linear(192, 5)))


def residual() -> nn.Module:
    """Two blocks of a ResNet, the second with another shape, and its global average."""

    def function(m, x):
        y = F.relu(m.b(F.relu(m.a(m.stem(x)))) + m.stem(x))
        y = F.relu(m.d(F.relu(m.c(y))) + m.down(y))
        return m.head(F.adaptive_avg_pool2d(y, 1).flatten(1))

    convs = {name: nn.Conv2d(8, 8, 3, padding=1) for name in "ab"}
    convs |= {"c": nn.Conv2d(8, 16, 3, 2, 1), "d": nn.Conv2d(16, 16, 3, 1, 1), "down": nn.Conv2d(8, 16, 1, 2)}
    return lively(Net(function, stem=block(3, 8), head=nn.Linear(16, 5), **convs))


def inverted() -> nn.Module:
    """Inverted residuals of a MobileNet, one with a gate, and a mean over the pixels."""

    def function(m, x):
        y = m.stem(x)
        y = y + m.narrow(F.relu6(m.deep(F.relu6(m.wide(y)))))
        y = m.last(m.gate(F.hardswish(m.more(y))))
        return m.head(F.relu6(y).mean((2, 3)))

    layers = {"stem": nn.Conv2d(3, 4, 3, 2, 1), "wide": nn.Conv2d(4, 16, 1), "narrow": nn.Conv2d(16, 4, 1)}
    layers |= {
        "deep": nn.Conv2d(16, 16, 3, padding=1, groups=16),
        "more": nn.Conv2d(4, 4, 1),
        "gate": Gate(torch.sigmoid),
    }
    return lively(Net(function, **layers, last=nn.Conv2d(4, 12, 1), head=nn.Linear(12, 5)))


def u_net() -> nn.Module:
    """Concatenated skips, a transposed convolution, nearest upsampling and an average pool."""

    def function(m, x):
        first = m.a(x)
        second = m.b(F.max_pool2d(first, 2))
        third = F.interpolate(m.c(F.avg_pool2d(second, 2)), scale_factor=2)
        up = m.up(m.d(torch.cat([second, third], 1)))
        return m.head(m.e(torch.cat([first, F.relu(up)], 1)))

    layers = {"a": block(3, 8), "b": block(8, 8), "c": block(8, 8), "d": block(16, 8), "e": block(16, 8)}
    return lively(Net(function, **layers, up=nn.ConvTranspose2d(8, 8, 2, 2), head=nn.Conv2d(8, 4, 1)))


NETS = {"chain": chain, "residual": residual, "inverted": inverted, "u-net": u_net}


class Around(nn.Module):
    """``inner`` between two layers more, so that its own are neither the first nor the last."""

    def __init__(self, inner: nn.Module, example: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.inner, self.stem, self.head = inner, nn.Conv2d(4, 4, 3, padding=1), None
        out = self.inner(*map(self._before, example))
        if isinstance(out, torch.Tensor):
            self.head = nn.Conv2d(out.shape[1], 5, 1) if out.dim() == 4 else nn.Linear(out.shape[-1], 5)

    def _before(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.stem(x)) if x.dim() == 4 else x

    def forward(self, *inputs: torch.Tensor):
        out = self.inner(*map(self._before, inputs))
        return out if self.head is None else self.head(out)


def batches(count: int = 4, rows: int = 6, *, size: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, size, size, generator=generator) for _ in range(count)]
