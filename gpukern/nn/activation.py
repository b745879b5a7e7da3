"""Activations. ``_epilogue``: the arguments that make the kernel of the layer before compute one."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from gpukern import functional as F
from gpukern.nn.leaf import Leaf


class ReLU(Leaf, torch.nn.ReLU):
    """``torch.nn.ReLU`` on gpukern's kernels. See :func:`gpukern.functional.relu`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "relu"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(input, inplace=self.inplace)


class ReLU6(Leaf, torch.nn.ReLU6):
    """``torch.nn.ReLU6`` on gpukern's kernels. See :func:`gpukern.functional.relu6`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "relu6"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu6(input, inplace=self.inplace)


class LeakyReLU(Leaf, torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU`` on gpukern's kernels; ``negative_slope`` must not be negative."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(input, self.negative_slope, inplace=self.inplace)

    @property
    def _epilogue(self) -> dict[str, Any]:
        return {"activation": "leaky_relu", "negative_slope": self.negative_slope}


class Sigmoid(Leaf, torch.nn.Sigmoid):
    """``torch.nn.Sigmoid`` on gpukern's kernels. See :func:`gpukern.functional.sigmoid`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "sigmoid"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.sigmoid(input)


class Hardsigmoid(Leaf, torch.nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid`` on gpukern's kernels. See :func:`gpukern.functional.hardsigmoid`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "hardsigmoid"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardsigmoid(input, inplace=self.inplace)


class Tanh(Leaf, torch.nn.Tanh):
    """``torch.nn.Tanh`` on gpukern's kernels. See :func:`gpukern.functional.tanh`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "tanh"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.tanh(input)


class SiLU(Leaf, torch.nn.SiLU):
    """``torch.nn.SiLU`` on gpukern's kernels. See :func:`gpukern.functional.silu`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "silu"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.silu(input, inplace=self.inplace)


class GELU(Leaf, torch.nn.GELU):
    """``torch.nn.GELU`` on gpukern's kernels, in both its forms."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate=self.approximate)

    @property
    def _epilogue(self) -> dict[str, Any] | None:
        # None for what F.gelu refuses.
        return {"none": {"activation": "gelu"}, "tanh": {"activation": "gelu_tanh"}}.get(self.approximate)


class Hardswish(Leaf, torch.nn.Hardswish):
    """``torch.nn.Hardswish`` on gpukern's kernels. See :func:`gpukern.functional.hardswish`."""

    _epilogue: ClassVar[dict[str, Any]] = {"activation": "hardswish"}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.hardswish(input, inplace=self.inplace)


class Softmax(Leaf, torch.nn.Softmax):
    """``torch.nn.Softmax`` on gpukern's kernels. See :func:`gpukern.functional.softmax`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class Softmax2d(Leaf, torch.nn.Softmax2d):
    """``torch.nn.Softmax2d`` on gpukern's kernels: over the channels of [N, C, H, W] or [C, H, W]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead")
        return F.softmax(input, -3)


class LogSoftmax(Leaf, torch.nn.LogSoftmax):
    """``torch.nn.LogSoftmax`` on gpukern's kernels. See :func:`gpukern.functional.log_softmax`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)
