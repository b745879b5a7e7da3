from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class _Convolution(Leaf):
    """A layer whose ``_function`` is the convolution."""

    _function: Callable[..., torch.Tensor]

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        own: Any = self
        input, padding = self._padded(input)
        return self._function(input, weight, bias, own.stride, padding, own.dilation, own.groups)

    def _padded(self, input: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(what the kernel reads, the zeros that it adds)."""
        own: Any = self
        if own.padding_mode == "zeros":
            return input, own.padding
        return torch.nn.functional.pad(input, own._reversed_padding_repeated_twice, mode=own.padding_mode), 0

    def _compute(self, input: torch.Tensor, **epilogue) -> torch.Tensor:
        own: Any = self
        input, padding = self._padded(input)
        return self._function(input, own.weight, own.bias, own.stride, padding, own.dilation, own.groups, **epilogue)


class Conv1d(_Convolution, torch.nn.Conv1d):
    """``torch.nn.Conv1d`` on gpukern's kernels. See :func:`gpukern.functional.conv1d`.

    For a ``padding_mode`` other than ``"zeros"`` the ends are made by ``torch.nn.functional.pad`` first.
    """

    _function = staticmethod(F.conv1d)


class Conv2d(_Convolution, torch.nn.Conv2d):
    """``torch.nn.Conv2d`` on gpukern's kernels. See :func:`gpukern.functional.conv2d`.

    For a ``padding_mode`` other than ``"zeros"`` the border is made by ``torch.nn.functional.pad`` first.
    """

    _function = staticmethod(F.conv2d)


class _Transposed(Leaf):
    """A layer whose ``_function`` is the transposed convolution."""

    _function: Callable[..., torch.Tensor]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return self._compute(input, output_size)

    def _compute(self, input: torch.Tensor, output_size: list[int] | None = None, **epilogue) -> torch.Tensor:
        own: Any = self  # torch's method is annotated with lists where its layers hold tuples
        output_padding = own._output_padding(
            input, output_size, own.stride, own.padding, own.kernel_size, len(own.kernel_size), own.dilation
        )
        return self._function(
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


class ConvTranspose1d(_Transposed, torch.nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose1d`."""

    _function = staticmethod(F.conv_transpose1d)


class ConvTranspose2d(_Transposed, torch.nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` on gpukern's kernels. See :func:`gpukern.functional.conv_transpose2d`."""

    _function = staticmethod(F.conv_transpose2d)
