"""Layer norm with a residual and an activation, and the backward of it and of RMS norm.

Each row, all elements of the normalized dimensions, ``n`` of them, is normalized by itself. With
``x̂ = (x − mean) / σ``, ``σ = √(variance + eps)``, or for an RMS norm ``x̂ = x / √(mean(x²) + eps)``:

    y = act(z),   z = x̂ · weight + bias + residual,   g = ∂L/∂z = ∂L/∂y · act′
    ∂L/∂residual = g      ∂L/∂bias = Σ_rows g      ∂L/∂weight = Σ_rows g·x̂
    ∂L/∂x = (g·weight − mean(g·weight) − x̂ · mean(g·weight·x̂)) / σ,   an RMS norm's without the first mean

See Ba, Kiros and Hinton, "Layer Normalization", 2016, and Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019. The backward needs only x, whose statistics are made again: a row that fits registers is read anyway. Gradients
of gradients are taken from these formulas in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._activation.reference import in_torch
from gpukern.ops._layer_norm import reference
from gpukern.ops._layer_norm.problem import Norm, check_shapes
from gpukern.ops.activation import needs_input, through_activation
from gpukern.ops.batch_norm import kept_for_backward
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, backward_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.ops._layer_norm")

_aten = torch.ops.aten
_EPILOGUE = "str activation, float negative_slope"


def apply(operator: Operator, name: str, input, parameters: tuple, residual, norm: Norm) -> torch.Tensor:
    """Layer or RMS norm by its ``operator``, whose input has one dimension at least before the normalized ones."""
    arguments = norm.normalized_shape, norm.eps, norm.activation, norm.negative_slope, norm.dtype
    if input.dim() != norm.dims:
        return operator(input, *parameters, residual, *arguments)
    weight, bias = parameters if norm.centered else (*parameters, None)
    check(name, input, weight, bias, residual, norm)
    row = None if residual is None else residual.unsqueeze(0)
    return operator(input.unsqueeze(0), *parameters, row, *arguments).squeeze(0)


def check(name: str, input, weight, bias, residual, norm: Norm) -> None:
    """Raise what torch raises for sizes, dtypes and devices that do not fit: RuntimeError, or ValueError for a rank."""
    others = {"weight": weight, "bias": bias, "residual": residual}
    given = {each: tensor for each, tensor in others.items() if tensor is not None}
    check_shapes(name, input.shape, norm.normalized_shape, {each: tensor.shape for each, tensor in given.items()})
    for each, tensor in given.items():
        if tensor.device != input.device:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but {each} is on {tensor.device} "
                f"and the input on {input.device}"
            )
    if residual is not None and residual.dtype is not (norm.dtype or input.dtype):
        raise RuntimeError(
            f"{name}: expected residual of {norm.dtype or input.dtype}, the result's dtype, but got {residual.dtype}"
        )
    if norm.centered and norm.dtype is None:
        given.pop("residual", None)
        _check_dtypes(input, given)


def _check_dtypes(input: torch.Tensor, parameters: dict[str, torch.Tensor]) -> None:
    """torch's rule: both parameters have the input's dtype, or both are float32 beside a half."""
    allowed = input.dtype
    if any(t.dtype is torch.float32 for t in parameters.values()) and input.dtype in (torch.float16, torch.bfloat16):
        allowed = torch.float32
    for name, tensor in parameters.items():
        if tensor.dtype is not allowed:
            raise RuntimeError(
                f"layer_norm: mixed dtype: expected {name} of {input.dtype}, or both parameters of float32 beside a "
                f"half, but got {tensor.dtype}"
            )


def declare(name: str, centered: bool, decomposition: Any) -> Operator:
    """Declare the operator of a layer norm or, if not ``centered``, of an RMS norm, which has no bias."""

    def read(arguments: tuple) -> tuple[tuple, Norm]:
        input, weight, *rest = arguments
        bias = rest.pop(0) if centered else None
        residual, shape, eps, activation, negative_slope, dtype = rest
        return (input, weight, bias, residual), Norm(tuple(shape), eps, centered, activation, negative_slope, dtype)

    def forward(*arguments: Any) -> torch.Tensor:
        (input, weight, bias, residual), norm = read(arguments)
        check(name, input, weight, bias, residual, norm)
        return _implementations.of(input).normalize(input, weight, bias, residual, norm)

    def fake(*arguments: Any) -> torch.Tensor:
        (input, weight, bias, residual), norm = read(arguments)
        check(name, input, weight, bias, residual, norm)
        return input.new_empty(input.shape, dtype=norm.dtype or input.dtype)

    def save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
        (input, weight, bias, residual), norm = read(arguments)
        ctx.save_for_backward(input, weight, bias, kept_for_backward(residual, output, norm.activation))
        ctx.norm = norm

    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        needs_x, needs_weight, *rest = ctx.needs_input_grad
        needs_bias = rest.pop(0) if centered else False
        needs_residual, *others = rest
        norm = ctx.norm
        parameters, inner = needs_weight or needs_bias, needs_residual and norm.activation != "none"
        grad_input = grad_weight = grad_bias = None
        if needs_x or parameters or inner:
            grad_input, grad_weight, grad_bias, grad_inner = layer_norm_backward(
                *(grad, *ctx.saved_tensors, norm.normalized_shape, norm.eps, centered),
                *(norm.activation, norm.negative_slope, needs_x, parameters, inner),
            )
        return (
            grad_input if needs_x else None,
            grad_weight if needs_weight else None,
            *([grad_bias if needs_bias else None] if centered else []),
            (grad_inner if inner else grad) if needs_residual else None,
            *(None,) * len(others),
        )

    def jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
        (input, weight, bias, residual), norm = read(arguments)
        changes, _ = read((*tangents, *arguments[len(tangents) :]))
        tangent = reference.tangent_of(input, weight, bias, norm, *changes)
        before = None
        if needs_input(norm.activation):
            before = reference.affine(reference.normal_of(input, weight, norm)[0], weight, bias)
            before = (before if residual is None else before + residual).to(output.dtype)
        tangent = None if tangent is None else tangent.to(output.dtype)
        return through_activation(tangent, before, output, norm.activation, norm.negative_slope)

    return Operator(
        name,
        f"(Tensor input, Tensor? weight, {'Tensor? bias, ' if centered else ''}Tensor? residual, "
        f"SymInt[] normalized_shape, float eps, {_EPILOGUE}, ScalarType? dtype) -> Tensor",
        forward=forward,
        fake=fake,
        save=save,
        backward=backward,
        jvp=jvp,
        batch=Batch(images=(0, 3 if centered else 2)),
        decomposition=decomposition,
    )


def _in_torch(input, weight, bias, residual, normalized_shape, eps, activation, negative_slope, dtype) -> torch.Tensor:
    x = input if dtype is None else _aten.to.dtype(input, dtype)
    z = _aten.layer_norm.default(x, normalized_shape, weight, bias, eps)
    return in_torch(z if residual is None else _aten.add.Tensor(z, residual), activation, negative_slope)


#: ``act(x̂ · weight + bias + residual)``, contiguous, in ``dtype`` or the input's; one pass and one rounding. With a
#: ``dtype``, that of autocast, parameters may have any.
layer_norm = declare("layer_norm", True, _in_torch)


# ---- backward ------------------------------------------------------------------------------------------------------


def _gradients(grad, input, weight, bias, other, *rest) -> tuple[torch.Tensor, ...]:
    *norm, wants_input, wants_parameters, wants_inner = rest
    return _implementations.of(grad).normalize_backward(
        grad, input, weight, bias, other, Norm(tuple(norm[0]), *norm[1:]), wants_input, wants_parameters, wants_inner
    )


def _gradients_fake(grad, input, weight, bias, other, *rest) -> tuple[torch.Tensor, ...]:
    wants_input, wants_parameters, wants_inner = rest[-3:]

    def like(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        return tensor.new_empty(tensor.shape) if wanted and tensor is not None else input.new_empty(0)

    inner = grad.new_empty(input.shape) if wants_inner else input.new_empty(0)
    return like(input, wants_input), like(weight, wants_parameters), like(bias, wants_parameters), inner


def _gradients_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    ctx.save_for_backward(*arguments[:5])
    ctx.state = arguments[5:]
    ctx.set_materialize_grads(False)


def _gradients_plainly(grad, input, weight, bias, other, *rest) -> tuple[torch.Tensor, ...]:
    """:data:`layer_norm_backward` in plain torch."""
    *norm, wants_input, wants_parameters, wants_inner = rest
    return reference.normalize_backward(
        grad, input, weight, bias, other, Norm(tuple(norm[0]), *norm[1:]), wants_input, wants_parameters, wants_inner
    )


#: ∂L/∂x, ∂L/∂weight, ∂L/∂bias and ∂L/∂residual, each empty unless wanted; see ``reference.normalize_backward``.
layer_norm_backward = Operator(
    "layer_norm_backward",
    "(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? other, SymInt[] normalized_shape, float eps, "
    f"bool centered, {_EPILOGUE}, bool wants_input, bool wants_parameters, bool wants_inner)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_gradients,
    fake=_gradients_fake,
    save=_gradients_save,
    backward=backward_of(_gradients_plainly, 5),
    plain=_gradients_plainly,
)
