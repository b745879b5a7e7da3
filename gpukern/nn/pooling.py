from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class MaxPool2d(Leaf, torch.nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` on gpukern's kernels. See :func:`gpukern.functional.max_pool2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return F.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool2d(Leaf, torch.nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` on gpukern's kernels. See :func:`gpukern.functional.avg_pool2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(Leaf, torch.nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` on gpukern's kernels. See :func:`gpukern.functional.adaptive_avg_pool2d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)  # type: ignore[arg-type]  # a None gets our error


class MaxPool1d(Leaf, torch.nn.MaxPool1d):
    """``torch.nn.MaxPool1d`` on gpukern's kernels. See :func:`gpukern.functional.max_pool1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return F.max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool1d(Leaf, torch.nn.AvgPool1d):
    """``torch.nn.AvgPool1d`` on gpukern's kernels. See :func:`gpukern.functional.avg_pool1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool1d(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


class AdaptiveAvgPool1d(Leaf, torch.nn.AdaptiveAvgPool1d):
    """``torch.nn.AdaptiveAvgPool1d`` on gpukern's kernels. See :func:`gpukern.functional.adaptive_avg_pool1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveMaxPool1d(Leaf, torch.nn.AdaptiveMaxPool1d):
    """``torch.nn.AdaptiveMaxPool1d`` on gpukern's kernels. See :func:`gpukern.functional.adaptive_max_pool1d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)
