"""Element-wise activations, alone or as the epilogue of a convolution or linear layer, and their derivatives.

==============  =======================================  ==========================
name            y = act(x)                               act′, in terms of y
==============  =======================================  ==========================
``relu``        max(x, 0)                                [y > 0]
``leaky_relu``  x where x > 0, else negative_slope · x   1 where y > 0, else slope
``sigmoid``     1 / (1 + exp(−x))                        y (1 − y)
``tanh``        tanh(x)                                  1 − y²
==============  =======================================  ==========================

Every derivative needs the output only, so a fused epilogue keeps no pre-activation.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, needs_operator

ACTIVATIONS = ("none", "relu", "leaky_relu", "sigmoid", "tanh")

_implementations = Implementations("gpukern.ops._activation")


def check_activation(name: str | None, negative_slope: float) -> str:
    """The checked name of an epilogue (``None`` means ``"none"``). Raises ValueError for what gpukern cannot fuse."""
    if name is None:
        return "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if name == "leaky_relu" and negative_slope < 0:
        raise ValueError(
            f"leaky_relu needs negative_slope >= 0: its derivative is taken from the output; got {negative_slope}"
        )
    return name


def _activation(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return _implementations.of(input).activation(input, name, negative_slope)


def _activation_fake(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return torch.empty_like(input)


def _activation_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.epilogue = arguments[1:]


def _activation_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (output,) = ctx.saved_tensors
    return activation_grad(grad, output, *ctx.epilogue), None, None


activation = Operator(
    "activation",
    "(Tensor input, str name, float negative_slope) -> Tensor",
    forward=_activation,
    fake=_activation_fake,
    save=_activation_save,
    backward=_activation_backward,
)


class _Inplace(torch.autograd.Function):
    """``x ← act(x)``: the derivatives are taken from the output, so the input may go."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
        _implementations.of(input).activation_(input, name, negative_slope)
        ctx.mark_dirty(input)
        ctx.save_for_backward(input)
        ctx.epilogue = name, negative_slope
        return input

    backward = staticmethod(_activation_backward)


def activation_(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """Overwrite ``input`` with ``act(input)`` and return it. RuntimeError for a leaf that requires a gradient."""
    if needs_operator((input,)):
        return input.copy_(activation(input, name, negative_slope))
    if input.requires_grad and torch.is_grad_enabled():
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        return _Inplace.apply(input, name, negative_slope)
    _implementations.of(input).activation_(input, name, negative_slope)
    return input


def _activation_grad(grad: torch.Tensor, output: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return _implementations.of(grad).activation_grad(grad, output, name, negative_slope)


def _activation_grad_fake(grad: torch.Tensor, output: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return torch.empty_like(output)


def _activation_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*arguments[:2])
    ctx.epilogue = arguments[2:]


def _activation_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, output = ctx.saved_tensors
    by_grad = activation_grad(grad_grad, output, *ctx.epilogue) if ctx.needs_input_grad[0] else None
    by_output = activation_grad_grad(grad, grad_grad, output, ctx.epilogue[0]) if ctx.needs_input_grad[1] else None
    return by_grad, by_output, None, None


activation_grad = Operator(
    "activation_grad",
    "(Tensor grad, Tensor output, str name, float negative_slope) -> Tensor",
    forward=_activation_grad,
    fake=_activation_grad_fake,
    save=_activation_grad_save,
    backward=_activation_grad_backward,
)


def _activation_grad_grad(grad: torch.Tensor, grad_grad: torch.Tensor, output: torch.Tensor, name: str) -> torch.Tensor:
    return _implementations.of(grad).activation_grad_grad(grad, grad_grad, output, name)


def _activation_grad_grad_fake(
    grad: torch.Tensor, grad_grad: torch.Tensor, output: torch.Tensor, name: str
) -> torch.Tensor:
    return torch.empty_like(output)


#: Second order; third derivatives of sigmoid and tanh are not offered.
activation_grad_grad = Operator(
    "activation_grad_grad",
    "(Tensor grad, Tensor grad_grad, Tensor output, str name) -> Tensor",
    forward=_activation_grad_grad,
    fake=_activation_grad_grad_fake,
)
