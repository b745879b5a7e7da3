from __future__ import annotations

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class MaxPool3d(Leaf, torch.nn.MaxPool3d):
    """``torch.nn.MaxPool3d`` on gpukern's kernels. See :func:`gpukern.functional.max_pool3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return F.max_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class AvgPool3d(Leaf, torch.nn.AvgPool3d):
    """``torch.nn.AvgPool3d`` on gpukern's kernels. See :func:`gpukern.functional.avg_pool3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.avg_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool3d(Leaf, torch.nn.AdaptiveAvgPool3d):
    """``torch.nn.AdaptiveAvgPool3d`` on gpukern's kernels. See :func:`gpukern.functional.adaptive_avg_pool3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool3d(input, self.output_size)  # type: ignore[arg-type]  # a None gets our error


class AdaptiveMaxPool3d(Leaf, torch.nn.AdaptiveMaxPool3d):
    """``torch.nn.AdaptiveMaxPool3d`` on gpukern's kernels. See :func:`gpukern.functional.adaptive_max_pool3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)  # type: ignore[arg-type]
