from __future__ import annotations

from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


def padded(layer: Any, input: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(what the kernel of a convolution ``layer`` reads, the zeros that it adds)."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Conv2d(Leaf, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on gpukern's kernels. See :func:`gpukern.functional.conv2d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        input, padding = padded(self, input)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        input, padding = padded(self, input)
        return F.conv2d(input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, **epilogue)


class ConvTranspose2d(Leaf, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose2d`."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return self._compute(input, output_size)

    def _compute(self, input: torch.Tensor, output_size: list[int] | None = None, **epilogue) -> torch.Tensor:
        own: Any = self  # torch's method is annotated with lists where its layers hold tuples
        output_padding = own._output_padding(
            input, output_size, own.stride, own.padding, own.kernel_size, 2, own.dilation
        )
        return F.conv_transpose2d(
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
