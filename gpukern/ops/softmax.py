"""Softmax along a dimension and its logarithm, differentiable to any order.

    y = exp(x − max x) / Σ exp(x − max x)          ∂L/∂x = y · (g − Σ g·y),     g = ∂L/∂y
    y = x − max x − log Σ exp(x − max x)           ∂L/∂x = g − exp(y) · Σ g

A row that fits the registers is read once, forward and backward; of a longer one the maximum and the sum take one pass
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018), the result another. The second and higher
derivatives are taken from these formulas in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._softmax import reference
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, backward_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.ops._softmax")

_aten = torch.ops.aten


def apply(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    """Softmax of ``input`` along ``dim`` ≥ 0, or its logarithm, in ``dtype``. One number has the softmax 1."""
    if dim == 0:
        # The operator's first dimension is a batch.
        rows = input.reshape(1, 1) if input.dim() == 0 else input.unsqueeze(0)
        return softmax(rows, 1, log, dtype).view(input.shape)
    return softmax(input, dim, log, dtype)


def _softmax(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return _implementations.of(input).softmax(input, dim, log, dtype)


def _softmax_fake(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _softmax_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, ctx.dim, ctx.log, _ = arguments
    ctx.dtype = input.dtype
    ctx.save_for_backward(output)


def _softmax_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (output,) = ctx.saved_tensors
    return softmax_backward(grad, output, ctx.dim, ctx.log, ctx.dtype), None, None, None


def _softmax_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor:
    _, dim, log, dtype = arguments
    if log:
        return reference.tangent(tangents[0], output, dim)
    # The Jacobian of a softmax is symmetric.
    return softmax_backward(tangents[0], output, dim, log, dtype)


def _in_torch(input: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return (_aten.log_softmax.int if log else _aten.softmax.int)(input, dim, dtype)


softmax = Operator(
    "softmax",
    "(Tensor input, int dim, bool log, ScalarType dtype) -> Tensor",
    forward=_softmax,
    fake=_softmax_fake,
    save=_softmax_save,
    backward=_softmax_backward,
    jvp=_softmax_jvp,
    batch=Batch(images=(0,)),
    decomposition=_in_torch,
)


def _gradient(grad: torch.Tensor, output: torch.Tensor, *others: Any) -> torch.Tensor:
    return _implementations.of(grad).softmax_backward(grad, output, *others)


def _gradient_fake(grad: torch.Tensor, output: torch.Tensor, dim: int, log: bool, dtype: torch.dtype) -> torch.Tensor:
    return output.new_empty(output.shape, dtype=dtype)


def _gradient_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*arguments[:2])
    ctx.state = arguments[2:]


#: ∂L/∂x in the ``dtype`` of x, from ∂L/∂y and y.
softmax_backward = Operator(
    "softmax_backward",
    "(Tensor grad, Tensor output, int dim, bool log, ScalarType dtype) -> Tensor",
    forward=_gradient,
    fake=_gradient_fake,
    save=_gradient_save,
    backward=backward_of(reference.gradient, 2),
    plain=reference.gradient,
)
