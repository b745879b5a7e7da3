from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


def padded(layer: Any, input: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(what the kernel of a convolution ``layer`` reads, the zeros that it adds)."""
    if layer.padding_mode == "zeros":
        return input, layer.padding
    return torch.nn.functional.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0


class Convolution(Leaf):
    """A layer of ``torch.nn`` that ``function`` computes."""

    function: Callable[..., torch.Tensor]

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        own: Any = self
        input, padding = padded(self, input)
        return self.function(input, weight, bias, own.stride, padding, own.dilation, own.groups)

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        own: Any = self
        input, padding = padded(self, input)
        return self.function(input, own.weight, own.bias, own.stride, padding, own.dilation, own.groups, **epilogue)


class Transposed(Leaf):
    """A transposed convolution of ``torch.nn`` that ``function`` computes."""

    function: Callable[..., torch.Tensor]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return self._compute(input, output_size)

    def _compute(self, input: torch.Tensor, output_size: list[int] | None = None, **epilogue) -> torch.Tensor:
        own: Any = self  # torch's method is annotated with lists where its layers hold tuples
        output_padding = own._output_padding(
            input, output_size, own.stride, own.padding, own.kernel_size, len(own.kernel_size), own.dilation
        )
        return self.function(
            input,
            own.weight,
            own.bias,
            own.stride,
            own.padding,
            output_padding,
            own.groups,
            own.dilation,
            **epilogue,
        )


class Conv1d(Convolution, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on gpukern's kernels. See :func:`gpukern.functional.conv1d`.

    For a ``padding_mode`` other than ``"zeros"`` the ends are made by ``torch.nn.functional.pad`` first.
    """

    function = staticmethod(F.conv1d)


class Conv2d(Convolution, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on gpukern's kernels. See :func:`gpukern.functional.conv2d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    function = staticmethod(F.conv2d)


class Conv3d(Convolution, torch.nn.Conv3d):
    """``torch.nn.Conv3d`` on gpukern's kernels. See :func:`gpukern.functional.conv3d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    function = staticmethod(F.conv3d)


class ConvTranspose1d(Transposed, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose1d`."""

    function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(Transposed, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose2d`."""

    function = staticmethod(F.conv_transpose2d)


class ConvTranspose3d(Transposed, torch.nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose3d`."""

    function = staticmethod(F.conv_transpose3d)
