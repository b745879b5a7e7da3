"""Random patch classifiers: layers and functions of all kinds that fit, in random order."""

from __future__ import annotations

import random

import torch
from torch import nn
from torch.nn import functional as F


class RandomClassifier(nn.Module):
    """A classifier of patches [N, ``channels``, *``patch``] whose layers ``seed`` determines."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.patch = self.rng.randint(9, 22), self.rng.randint(9, 22)
        self.channels = self.rng.randint(1, 3)
        self.layers = nn.ModuleDict()
        self.calls: list[tuple[str, tuple]] = []
        self._grow()
        del self.rng
        self._randomize()

    def _grow(self) -> None:
        width, size = self.channels, self.patch
        for number in range(self.rng.randint(3, 6)):
            makers = [self._conv, self._conv, self._pool, self._function, self._residual, self._norm, self._crop]
            width, size = self.rng.choice(makers)(f"l{number}", width, size)
        self._end(width, size)

    def _put(self, name: str, layer: nn.Module) -> None:
        self.layers[name] = layer
        self.calls.append(("layer", (name,)))

    def _conv(self, name, width, size):
        kernel = self.rng.randint(1, 4), self.rng.randint(1, 4)
        stride, dilation = self.rng.choice(((1, 1), (2, 2), (2, 1), (3, 2))), self.rng.choice((1, 1, 2))
        after = self._after(size, kernel, stride, dilation)
        if after is None:
            return width, size
        groups = self.rng.choice([g for g in (1, 2, 3, width) if width % g == 0])
        out = groups * self.rng.randint(1, 4)
        self._put(name, nn.Conv2d(width, out, kernel, stride, 0, dilation, groups, self.rng.random() < 0.7))
        if self.rng.random() < 0.6:
            return self._function(f"{name}a", out, after)
        return out, after

    def _pool(self, name, width, size):
        kernel, stride = self.rng.choice((2, 3)), self.rng.choice((1, 2, 3))
        maximum, dilation = self.rng.random() < 0.5, self.rng.choice((1, 1, 2))
        after = self._after(size, (kernel, kernel), (stride, stride), dilation if maximum else 1)
        if after is None:
            return width, size
        if self.rng.random() < 0.5:
            self._put(name, nn.MaxPool2d(kernel, stride, 0, dilation) if maximum else nn.AvgPool2d(kernel, stride))
        elif maximum:
            self.calls.append(("max", (kernel, stride, dilation)))
        else:
            self.calls.append(("avg", (kernel, stride)))
        return width, after

    def _function(self, name, width, size):
        kind = self.rng.choice(("relu", "module", "tanh", "inplace", "gelu", "cat", "constant", "prelu"))
        if kind in ("module", "prelu"):
            layer = nn.PReLU(width) if kind == "prelu" else self.rng.choice((nn.ELU(), nn.SiLU(), nn.LeakyReLU(0.1)))
            self._put(name, layer)
        else:
            self.calls.append((kind, ()))
        return (2 * width if kind == "cat" else width), size

    def _norm(self, name, width, size):
        self._put(name, nn.BatchNorm2d(width))
        return width, size

    def _residual(self, name, width, size):
        """A branch of two convolutions beside a crop, or a strided one beside a strided shortcut."""
        if min(size) < 6:
            return width, size
        stride = self.rng.choice((1, 2))
        self.layers[f"{name}b"] = nn.Conv2d(width, width, 3, stride)
        self.layers[f"{name}s"] = nn.Conv2d(width, width, 1, stride)
        self.calls.append(("residual", (f"{name}b", f"{name}s", stride)))
        return width, self._after(size, (3, 3), (stride, stride), 1)

    def _crop(self, name, width, size):
        if min(size) < 5:
            return width, size
        self.calls.append(("crop", ()))
        return width, (size[0] - 2, size[1] - 3)

    def _after(self, size, kernel, stride, dilation):
        after = tuple((n - dilation * (k - 1) - 1) // s + 1 for n, k, s in zip(size, kernel, stride, strict=True))
        return after if min(after) >= 1 else None

    def _end(self, width, size) -> None:
        kind = self.rng.choice(("conv", "flatten", "view", "adaptive", "mean", "amax"))
        if kind == "conv":
            self._put("end", nn.Conv2d(width, 3, size))
            return
        self.calls.append((kind, ()))
        features = width * size[0] * size[1] if kind in ("flatten", "view") else width
        for number in range(self.rng.randint(1, 3)):
            self._put(f"fc{number}", nn.Linear(features, 3 + number))
            features = 3 + number
            if self.rng.random() < 0.5:
                self._put(f"bn{number}", nn.BatchNorm1d(features))
            self.calls.append((self.rng.choice(("relu", "softmax", "dropout")), ()))

    def _randomize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)

    def forward(self, x):
        for kind, given in self.calls:
            x = getattr(self, f"call_{kind}")(x, *given)
        return x

    def call_layer(self, x, name):
        return self.layers[name](x)

    def call_max(self, x, kernel, stride, dilation):
        return F.max_pool2d(x, kernel, stride, 0, dilation)

    def call_avg(self, x, kernel, stride):
        return F.avg_pool2d(x, kernel, stride)

    def call_relu(self, x):
        return torch.relu(x)

    def call_tanh(self, x):
        return x.tanh()

    def call_inplace(self, x):
        y = x * 1.5
        return F.relu_(y) - x

    def call_gelu(self, x):
        return F.gelu(x, approximate="tanh")

    def call_cat(self, x):
        return torch.cat([x, -x], dim=1)

    def call_constant(self, x):
        return 2 - (x + 0.5) / 3

    def call_residual(self, x, branch, shortcut, stride):
        y = self.layers[branch](x)
        s = self.layers[shortcut](x)
        y += s[:, :, : y.shape[2], : y.shape[3]] if stride == 2 else s[:, :, 1:-1, 1:-1]
        return y

    def call_crop(self, x):
        return x[..., 1:-1, 2:-1]

    def call_flatten(self, x):
        return torch.flatten(x, 1)

    def call_view(self, x):
        return x.view(x.size(0), -1)

    def call_adaptive(self, x):
        return F.adaptive_avg_pool2d(x, 1).reshape(len(x), -1)

    def call_mean(self, x):
        return x.mean((-2, -1))

    def call_amax(self, x):
        return x.amax(dim=(2, 3))

    def call_softmax(self, x):
        return F.softmax(x, dim=-1)

    def call_dropout(self, x):
        return F.dropout(x, 0.3, self.training)
