from __future__ import annotations

import torch

from gpukern import functional as F


class ReLU(torch.nn.ReLU):
    """``torch.nn.ReLU`` on gpukern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, inplace=self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` on gpukern's kernels; ``negative_slope`` must not be negative."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, self.negative_slope, inplace=self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    """``torch.nn.Sigmoid`` on gpukern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """``torch.nn.Tanh`` on gpukern's kernels."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanh(input)
