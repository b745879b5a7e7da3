from __future__ import annotations

from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.conv import padded
from gpukern.nn.leaf import Leaf


class Conv3d(Leaf, torch.nn.Conv3d):
    """``torch.nn.Conv3d`` on gpukern's kernels. See :func:`gpukern.functional.conv3d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        input, padding = padded(self, input)
        return F.conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        input, padding = padded(self, input)
        return F.conv3d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, **epilogue)


class ConvTranspose3d(Leaf, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose3d`."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return self._compute(input, output_size)

    def _compute(self, input: torch.Tensor, output_size: list[int] | None = None, **epilogue) -> torch.Tensor:
        own: Any = self  # torch's method is annotated with lists where its layers hold tuples
        output_padding = own._output_padding(
            input, output_size, own.stride, own.padding, own.kernel_size, 3, own.dilation
        )
        return F.conv_transpose3d(
            input,
            self.weight,
            self.bias,
            self.stride,
            own.padding,
            output_padding,
            self.groups,
            self.dilation,
            **epilogue,
        )
