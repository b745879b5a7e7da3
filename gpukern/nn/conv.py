from __future__ import annotations

import torch

from gpukern import functional as F


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on gpukern's kernels. See :func:`gpukern.functional.conv2d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose2d`."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )
