"""Group norm with a residual and an activation, and its backward, any order.

The C channels of an image form groups of neighbours. With mean and variance over the ``n`` values of a group of an
image, ``x̂ = (x − mean) / σ`` and ``σ = √(variance + eps)``:

    y = act(z),   z = x̂ · weight + bias + residual,   g = ∂L/∂z = ∂L/∂y · act′
    ∂L/∂residual = g      ∂L/∂bias = Σ g      ∂L/∂weight = Σ g·x̂      over all images, for each channel
    ∂L/∂x = (weight · g − Σ weight·g / n − x̂ · Σ weight·g·x̂ / n) / σ      sums over the group

See Wu and He, "Group Normalization", 2018; with a channel to a group it is instance norm (Ulyanov et al., 2016).
Without a residual the backward needs only x: the activation's input is recomputed on the way. Gradients of gradients
are taken from these formulas in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._activation.reference import in_torch
from gpukern.ops._group_norm import reference
from gpukern.ops.activation import needs_input, through_activation
from gpukern.ops.batch_norm import check_numbers, kept_for_backward
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, backward_of
from gpukern.runtime.tensors import check_alike, memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.ops._group_norm")

_EPILOGUE = "str activation, float negative_slope"


def check(input, weight, bias, residual, groups: int) -> None:
    """Raise RuntimeError for sizes, dtypes and devices that do not fit."""
    check_alike("group_norm", input, residual)
    shape = input.shape
    if input.dim() < 2:
        raise RuntimeError(f"Expected at least 2 dimensions for input tensor but received {input.dim()}")
    if groups <= 0:
        raise RuntimeError(f"Expected num groups to be greater than 0, got {groups}")
    if shape[1] % groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, "
            f"but got input of shape {list(shape)} and num_groups={groups}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dim() != 1 or tensor.numel() != shape[1]):
            raise RuntimeError(
                f"Expected {name} to be a vector of size equal to the number of channels in input, "
                f"but got {name} of shape {list(tensor.shape)} and input of shape {list(shape)}"
            )
    if residual is not None and residual.shape != shape:
        raise RuntimeError(f"expected residual to have the input's shape {list(shape)}, but got {list(residual.shape)}")
    check_numbers(input, shape[1], "group_norm", weight=weight, bias=bias)


def _empty_like(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty(input.shape).to(memory_format=memory_format_of(input))


def _group_norm(input, weight, bias, residual, groups, eps, activation, negative_slope) -> tuple[torch.Tensor, ...]:
    check(input, weight, bias, residual, groups)
    implementation = _implementations.of(input)
    return implementation.group_norm(input, weight, bias, residual, groups, eps, activation, negative_slope)


def _group_norm_fake(
    input, weight, bias, residual, groups, eps, activation, negative_slope
) -> tuple[torch.Tensor, ...]:
    check(input, weight, bias, residual, groups)
    dtype = torch.promote_types(input.dtype, torch.float32)
    return _empty_like(input), *(input.new_empty((input.shape[0], groups), dtype=dtype) for _ in range(2))


def _group_norm_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    input, weight, bias, residual, groups, eps, activation, negative_slope = arguments
    output, mean, var = outputs
    ctx.save_for_backward(input, weight, bias, kept_for_backward(residual, output, activation), mean, var)
    ctx.state = groups, eps, activation, negative_slope
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _group_norm_backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple:
    needs_x, needs_weight, needs_bias, needs_residual, *rest = ctx.needs_input_grad
    nothing = (None,) * len(rest)
    if grad is None:
        return (None,) * 4 + nothing
    activation = ctx.state[2]
    parameters, inner = needs_weight or needs_bias, needs_residual and activation != "none"
    grad_input = grad_weight = grad_bias = None
    if needs_x or parameters or inner:
        grad_input, grad_weight, grad_bias, grad_inner = group_norm_backward(
            grad, *ctx.saved_tensors, *ctx.state, needs_x, parameters, inner
        )
    return (
        grad_input if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        (grad_inner if inner else grad) if needs_residual else None,
        *nothing,
    )


def _group_norm_jvp(operator: Operator, arguments: tuple, tangents: tuple, outputs: tuple) -> tuple:
    input, weight, bias, residual, groups, eps, activation, negative_slope = arguments
    output, mean, var = outputs
    tangent = reference.tangent_of(input, weight, mean, var, groups, eps, *tangents)
    before = None
    if needs_input(activation):
        before = reference.normalize(input, weight, bias, residual, mean, var, eps)[0].to(output.dtype)
    tangent = None if tangent is None else tangent.to(output.dtype)
    return through_activation(tangent, before, output, activation, negative_slope), None, None


def _in_torch(input, weight, bias, residual, groups, eps, activation, negative_slope) -> tuple[torch.Tensor, ...]:
    """In fp32 at least and rounded once: sums over a group overflow in halves."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True)
    centered = grouped - mean
    variance = centered.square().mean(2, keepdim=True)
    z = (centered * torch.rsqrt(variance + eps)).reshape(x.shape)
    shape = [1, -1, *(1 for _ in range(x.dim() - 2))]
    for factor, combine in ((weight, torch.mul), (bias, torch.add)):
        z = z if factor is None else combine(z, factor.to(x.dtype).reshape(shape))
    z = z if residual is None else z + residual.to(x.dtype)
    return in_torch(z, activation, negative_slope).to(input.dtype), mean.squeeze(2), variance.squeeze(2)


#: y, and the mean and biased variance of each group [N, groups], which have no gradients of their own.
group_norm = Operator(
    "group_norm",
    f"(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, int groups, float eps, {_EPILOGUE})"
    " -> (Tensor, Tensor, Tensor)",
    forward=_group_norm,
    fake=_group_norm_fake,
    save=_group_norm_save,
    backward=_group_norm_backward,
    jvp=_group_norm_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
)


# ---- backward ------------------------------------------------------------------------------------------------------


def _gradients(grad, input, *others) -> tuple[torch.Tensor, ...]:
    return _implementations.of(grad).group_norm_backward(grad, input, *others)


def _gradients_fake(grad, input, weight, bias, *others) -> tuple[torch.Tensor, ...]:
    wants_x, wants_parameters, wants_inner = others[-3:]

    def parameter() -> torch.Tensor:
        if not wants_parameters:
            return input.new_empty(0)
        return input.new_empty(input.shape[1], dtype=(bias if weight is None else weight).dtype)

    image, inner = (_empty_like(input) if wanted else input.new_empty(0) for wanted in (wants_x, wants_inner))
    return image, parameter(), parameter(), inner


def _gradients_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:7])
    ctx.state = arguments[7:]
    ctx.set_materialize_grads(False)


def _gradients_plainly(
    grad, input, weight, bias, other, mean, var, groups, eps, activation, negative_slope, *wants
) -> tuple[torch.Tensor, ...]:
    """:data:`group_norm_backward` in plain torch, through the statistics too."""
    numbers = *reference.statistics(input, groups), groups, eps, activation, negative_slope
    gradients = reference.gradients_of(grad, input, weight, bias, other, *numbers)
    wants_x, wants_parameters, wants_inner = wants
    wanted = wants_x, wants_parameters, wants_parameters, wants_inner
    return tuple(each if wants else input.new_empty(0) for each, wants in zip(gradients, wanted, strict=True))


#: ∂L/∂x, ∂L/∂weight, ∂L/∂bias and ∂L/∂residual, each empty unless wanted; see ``reference.group_norm_backward``.
group_norm_backward = Operator(
    "group_norm_backward",
    "(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? other, Tensor mean, Tensor var, int groups, "
    f"float eps, {_EPILOGUE}, bool wants_input, bool wants_parameters, bool wants_inner)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_gradients,
    fake=_gradients_fake,
    save=_gradients_save,
    backward=backward_of(_gradients_plainly, 5),
    plain=_gradients_plainly,
)
