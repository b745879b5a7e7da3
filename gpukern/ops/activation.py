"""Element-wise activations, alone or as the epilogue of a convolution or linear layer, and their derivatives.

===============  =============================================  ===================================================
name             y = act(x)                                     act′
===============  =============================================  ===================================================
``relu``         max(x, 0)                                      [y > 0]
``relu6``        min(max(x, 0), 6)                              [0 < x < 6]
``leaky_relu``   x where x > 0, else negative_slope · x         1 where x > 0, else slope
``sigmoid``      σ(x) = 1 / (1 + exp(−x))                       y (1 − y)
``hardsigmoid``  min(max(x + 3, 0), 6) / 6                      1/6 where −3 < x < 3, else 0
``tanh``         tanh(x)                                        1 − y²
``silu``         x σ(x)                                         σ(x) (1 + x (1 − σ(x)))
``gelu``         x Φ(x), Φ(x) = (1 + erf(x/√2)) / 2             Φ(x) + x exp(−x²/2) / √(2π)
``gelu_tanh``    x σ(u), u = √(8/π) (x + 0.044715 x³)           σ(u) (1 + x u′ (1 − σ(u)))
``hardswish``    x · hardsigmoid(x)                             0 to x = −3, 1 from x = 3, x/3 + 1/2 between
===============  =============================================  ===================================================

Where the derivative is written in terms of the output, a fused epilogue keeps no pre-activation. For the others
(:func:`needs_input`) a backward pass keeps the activation's input: their derivative is not a function of the output, or
torch keeps the input too, so that networks may change the result in place (``out = act(x); out += shortcut``).
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._activation.reference import in_torch
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, is_lazy, needs_operator
from gpukern.runtime.strides import is_dense
from gpukern.runtime.tensors import elementwise_like
from gpukern.runtime.transforms import Batch, sum_jvp, total

ACTIVATIONS = ("none", *PROPERTIES)

_implementations = Implementations("gpukern.ops._activation")


def check_activation(name: str | None, negative_slope: float) -> str:
    """The checked name of an epilogue (``None`` means ``"none"``). Raises ValueError for what gpukern cannot fuse."""
    if name is None:
        return "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    if name == "leaky_relu" and negative_slope < 0:
        raise ValueError(f"leaky_relu: gpukern takes no negative_slope below 0, but got {negative_slope}")
    return name


def needs_input(name: str) -> bool:
    """Whether the derivatives of the activation are taken from its input, not from its output, as torch's are.

    A fused epilogue that stores the output only cannot be differentiated for these.
    """
    return name != "none" and PROPERTIES[name].needs_input


def _activation(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return _implementations.of(input).activation(input, name, negative_slope)


def _activation_fake(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    if name == "relu6" and is_dense(input.shape, input.stride()):
        return input.new_empty_strided(input.shape, input.stride())  # empty_like of a fake changes strides of one row
    return elementwise_like(input)


def _activation_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, name, negative_slope = arguments
    ctx.save_for_backward(input if needs_input(name) else output)
    ctx.epilogue = name, negative_slope


def _activation_backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (saved,) = ctx.saved_tensors
    return activation_grad(grad, saved, *ctx.epilogue), None, None


def _activation_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
    return through_activation(tangents[0], arguments[0], output, *arguments[1:])


def through_activation(
    tangent: torch.Tensor | None, input: torch.Tensor | None, output: torch.Tensor, name: str, negative_slope: float
) -> torch.Tensor | None:
    """The tangent of ``act(input)``. Only an activation that :func:`needs_input` reads ``input``."""
    if tangent is None or name == "none":
        return tangent
    return activation_grad(tangent, input if needs_input(name) else output, name, negative_slope)


def affine_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
    """The tangent of ``operator(x, w, bias[, residual], …, activation, negative_slope)``: linear or a convolution."""
    *inner, name, negative_slope = arguments
    tangent = sum_jvp(operator, (*inner, "none", 0.0), tangents, output)
    before = operator(*inner, "none", 0.0) if needs_input(name) else None
    return through_activation(tangent, before, output, name, negative_slope)


activation = Operator(
    "activation",
    "(Tensor input, str name, float negative_slope) -> Tensor",
    forward=_activation,
    fake=_activation_fake,
    save=_activation_save,
    backward=_activation_backward,
    jvp=_activation_jvp,
    batch=Batch(images=(0,)),
    decomposition=in_torch,
)


class _Inplace(torch.autograd.Function):
    """``x ← act(x)``. ``copy``: x before, where torch's derivatives need it. It is made outside, by an operator that
    autograd sees, or derivatives of the gradient would not pass through it."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, copy: torch.Tensor | None, name: str, negative_slope: float
    ) -> torch.Tensor:
        _implementations.of(input).activation_(input, name, negative_slope)
        ctx.mark_dirty(input)
        ctx.save_for_backward(input if copy is None else copy)
        ctx.epilogue = name, negative_slope
        return input

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        grad_input, *others = _activation_backward(ctx, grad)
        return grad_input, None, *others


def activation_(input: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    """Overwrite ``input`` with ``act(input)`` and return it. RuntimeError for a leaf that requires a gradient."""
    if needs_operator((input,)) or is_lazy(input):
        source = input.clone() if input.requires_grad and needs_input(name) else input
        return input.copy_(activation(source, name, negative_slope))
    if input.requires_grad and torch.is_grad_enabled():
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        kept = needs_input(name) and not PROPERTIES[name].in_place_keeps_result
        return _Inplace.apply(input, input.clone() if kept else None, name, negative_slope)
    _implementations.of(input).activation_(input, name, negative_slope)
    return input


def _activation_grad(grad: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return _implementations.of(grad).activation_grad(grad, saved, name, negative_slope)


def _activation_grad_fake(grad: torch.Tensor, saved: torch.Tensor, name: str, negative_slope: float) -> torch.Tensor:
    return elementwise_like(saved)


def _activation_grad_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*arguments[:2])
    ctx.epilogue = arguments[2:]


def _activation_grad_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad, saved = ctx.saved_tensors
    by_grad = activation_grad(grad_grad, saved, *ctx.epilogue) if ctx.needs_input_grad[0] else None
    by_saved = activation_grad_grad(grad, grad_grad, saved, ctx.epilogue[0]) if ctx.needs_input_grad[1] else None
    return by_grad, by_saved, None, None


def activation_grad_jvp(
    operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor
) -> torch.Tensor | None:
    (grad, saved, *epilogue), (dgrad, dsaved) = arguments, tangents
    return total(
        None if dgrad is None else activation_grad(dgrad, saved, *epilogue),
        None if dsaved is None else activation_grad_grad(grad, dsaved, saved, epilogue[0]),
    )


activation_grad = Operator(
    "activation_grad",
    "(Tensor grad, Tensor saved, str name, float negative_slope) -> Tensor",
    forward=_activation_grad,
    fake=_activation_grad_fake,
    save=_activation_grad_save,
    backward=_activation_grad_backward,
    jvp=activation_grad_jvp,
    batch=Batch(images=(0, 1)),
)


def _activation_grad_grad(grad: torch.Tensor, grad_grad: torch.Tensor, saved: torch.Tensor, name: str) -> torch.Tensor:
    return _implementations.of(grad).activation_grad_grad(grad, grad_grad, saved, name)


def _activation_grad_grad_fake(
    grad: torch.Tensor, grad_grad: torch.Tensor, saved: torch.Tensor, name: str
) -> torch.Tensor:
    return elementwise_like(saved)


#: Second order; third derivatives are not supported.
activation_grad_grad = Operator(
    "activation_grad_grad",
    "(Tensor grad, Tensor grad_grad, Tensor saved, str name) -> Tensor",
    forward=_activation_grad_grad,
    fake=_activation_grad_grad_fake,
    batch=Batch(images=(0, 1, 2)),
)
