"""Batch norm with a residual and an activation: training, inference, and the backward of both, any order.

With ``x̂ = (x − mean) / σ``, ``σ = √(variance + eps)`` and ``n`` values to a channel:

    y = act(z),   z = x̂ · weight + bias + residual,   g = ∂L/∂z = ∂L/∂y · act′
    ∂L/∂residual = g      ∂L/∂bias = Σ g      ∂L/∂weight = Σ g·x̂
    ∂L/∂x = weight / σ · (g − Σ g / n − x̂ · Σ g·x̂ / n)      the batch's own statistics
    ∂L/∂x = weight / σ · g                                   frozen ones

See Ioffe and Szegedy, "Batch Normalization", 2015. Without a residual the backward needs only x: the activation's
input is recomputed on the way. Gradients of gradients are taken from these formulas in plain torch.
"""

from __future__ import annotations

from typing import Any

import torch

from gpukern.ops._activation.reference import in_torch
from gpukern.ops._batch_norm import reference
from gpukern.ops._batch_norm.problem import Running, check_sizes
from gpukern.ops.activation import needs_input, through_activation
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator, backward_of, needs_operator, resolved
from gpukern.runtime.tensors import check_alike, format_kept_by
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.ops._batch_norm")

_aten = torch.ops.aten
_EPILOGUE = "str activation, float negative_slope"


def apply(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Batch norm with the batch's statistics if ``training``, updating the running ones if there are any."""
    if residual is not None and residual.dtype is not input.dtype:
        input, residual = _promoted(input, residual)
    operands, epilogue = (input, weight, bias, residual), (eps, activation, negative_slope)
    if not training:
        return batch_norm(*operands, running_mean, running_var, *epilogue)
    if running_mean is None:
        return batch_norm_training(*operands, *epilogue)[0]
    check(*operands, running_mean=running_mean, running_var=running_var)
    running = Running(running_mean, running_var, momentum)
    if not needs_operator((*operands, running_mean, running_var)):
        return batch_norm_training(*operands, *epilogue, running)[0]
    # A registered operator changes none of its arguments: traced graphs update beside it.
    output, mean, variance = batch_norm_training(*operands, *epilogue)
    if input.numel():
        reference.update(running, mean, variance, input.numel() // input.shape[1])
    return output


def _promoted(input: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Under autocast, where dtypes mix, both in the dtype that torch's ``+`` would give the result."""
    device = input.device.type
    # Tensors without memory have no autocast, and querying it raises.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return input, residual
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


def check(input, weight, bias, residual, **statistics: torch.Tensor | None) -> None:
    """Raise RuntimeError for sizes, dtypes and devices that do not fit."""
    check_alike("batch_norm", input, residual)
    check_sizes(input.shape, None if residual is None else residual.shape)
    check_numbers(input, input.shape[1], weight=weight, bias=bias, **statistics)


def check_numbers(
    input: torch.Tensor, channels: int, operation: str = "batch_norm", /, **numbers: torch.Tensor | None
) -> None:
    """Raise RuntimeError unless ``numbers`` has one for each of ``channels``, and fits ``input``'s dtype and device."""
    dtype, device = input.dtype, input.device
    # Build messages only when they are needed: most calls of a small layer are all host time.
    for name, tensor in numbers.items():
        if tensor is None:
            continue
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        if tensor.dtype is not dtype and (tensor.dtype is not torch.float32 or dtype is torch.float64):
            raise RuntimeError(
                f"{operation}: expected {name} of {dtype}, or of float32 beside a half, but got {tensor.dtype}"
            )
        if tensor.device != device:
            raise RuntimeError(
                f"{operation}: expected all tensors to be on the same device, but {name} is on {tensor.device} "
                f"and the input on {device}"
            )


def _empty_like(input: torch.Tensor) -> torch.Tensor:
    return input.new_empty(input.shape).to(memory_format=format_kept_by(input))


def kept_for_backward(residual: torch.Tensor | None, output: torch.Tensor, activation: str) -> torch.Tensor | None:
    """Return the tensor that the backward reads besides x."""
    if residual is None or activation == "none":
        return None
    return residual if needs_input(activation) else output


# ---- inference -----------------------------------------------------------------------------------------------------


def _batch_norm(input, weight, bias, residual, mean, var, eps, activation, negative_slope) -> torch.Tensor:
    check(input, weight, bias, residual, running_mean=mean, running_var=var)
    implementation = _implementations.of(input)
    return implementation.batch_norm(input, weight, bias, residual, mean, var, eps, activation, negative_slope)


def _batch_norm_fake(input, weight, bias, residual, mean, var, eps, activation, negative_slope) -> torch.Tensor:
    check(input, weight, bias, residual, running_mean=mean, running_var=var)
    return _empty_like(input)


def _batch_norm_save(ctx: Any, arguments: tuple, output: torch.Tensor) -> None:
    input, weight, bias, residual, mean, var, *epilogue = arguments
    ctx.save_for_backward(input, weight, bias, kept_for_backward(residual, output, epilogue[1]), mean, var)
    ctx.state = False, *epilogue


def _backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> tuple:
    needs_x, needs_weight, needs_bias, needs_residual, *rest = ctx.needs_input_grad
    nothing = (None,) * len(rest)
    if grad is None:
        return (None,) * 4 + nothing
    activation = ctx.state[2]
    parameters, inner = needs_weight or needs_bias, needs_residual and activation != "none"
    grad_input = grad_weight = grad_bias = None
    if needs_x or parameters or inner:
        grad_input, grad_weight, grad_bias, grad_inner = batch_norm_backward(
            grad, *ctx.saved_tensors, *ctx.state, needs_x, parameters, inner
        )
    return (
        grad_input if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        (grad_inner if inner else grad) if needs_residual else None,
        *nothing,
    )


def _batch_norm_jvp(operator: Operator, arguments: tuple, tangents: tuple, output: torch.Tensor) -> torch.Tensor | None:
    input, weight, bias, residual, mean, var, *epilogue = arguments
    if tangents[4] is not None or tangents[5] is not None:
        raise RuntimeError("batch_norm is not differentiable with respect to its running statistics")
    return norm_jvp((input, weight, bias, residual), mean, var, False, epilogue, tangents[:4], output)


def norm_jvp(
    operands: tuple[Any, Any, Any, Any], mean, var, training: bool, epilogue, tangents, output
) -> torch.Tensor | None:
    """The tangent of ``act(z)``, from those of x, weight, bias and residual."""
    (input, weight, _, _), (eps, activation, negative_slope) = operands, epilogue
    tangent = reference.tangent_of(input, weight, mean, var, training, eps, *tangents)
    before = None
    if needs_input(activation):
        before = reference.normalize(*operands, mean, var, eps)[0].to(output.dtype)
    tangent = None if tangent is None else tangent.to(output.dtype)
    return through_activation(tangent, before, output, activation, negative_slope)


def _in_torch(input, weight, bias, residual, mean, var, eps, activation, negative_slope) -> torch.Tensor:
    z = _aten.batch_norm.default(input, weight, bias, mean, var, False, 0.0, eps, False)
    return in_torch(z if residual is None else _aten.add.Tensor(z, residual), activation, negative_slope)


#: The inference operator: ``act((x − mean) · weight / √(var + eps) + bias + residual)``, one pass and one rounding.
batch_norm = Operator(
    "batch_norm",
    f"(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, float eps, {_EPILOGUE})"
    " -> Tensor",
    forward=_batch_norm,
    fake=_batch_norm_fake,
    save=_batch_norm_save,
    backward=_backward,
    jvp=_batch_norm_jvp,
    batch=Batch(images=(0, 3)),
    decomposition=_in_torch,
)


# ---- training ------------------------------------------------------------------------------------------------------


def _training(
    input, weight, bias, residual, eps, activation, negative_slope, running: Running | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # ``running`` is for eager calls only: the schema does not have it.
    if running is None:
        check(input, weight, bias, residual)
    operands = input, weight, bias, residual
    return _implementations.of(input).batch_norm_training(*operands, eps, activation, negative_slope, running)


def _training_fake(
    input, weight, bias, residual, eps, activation, negative_slope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check(input, weight, bias, residual)
    dtype = torch.promote_types(input.dtype, torch.float32)
    return _empty_like(input), *(input.new_empty(input.shape[1], dtype=dtype) for _ in range(2))


def _training_save(ctx: Any, arguments: tuple, outputs: tuple) -> None:
    input, weight, bias, residual, *epilogue = arguments
    output, mean, var = outputs
    ctx.save_for_backward(input, weight, bias, kept_for_backward(residual, output, epilogue[1]), mean, var)
    ctx.state = True, *epilogue[:3]
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _training_jvp(operator: Operator, arguments: tuple, tangents: tuple, outputs: tuple) -> tuple:
    output, mean, var = outputs
    return norm_jvp(arguments[:4], mean, var, True, arguments[4:], tangents, output), None, None


def _training_in_torch(
    input, weight, bias, residual, eps, activation, negative_slope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, biased variance), in fp32 at least and rounded once: sums over a batch overflow in halves."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(others)
    shape = [1, -1, *(1 for _ in others[1:])]
    centered = x - mean.reshape(shape)
    variance = centered.square().mean(others)
    z = centered * torch.rsqrt(variance + eps).reshape(shape)
    for factor, combine in ((weight, torch.mul), (bias, torch.add)):
        z = z if factor is None else combine(z, factor.to(x.dtype).reshape(shape))
    z = z if residual is None else z + residual.to(x.dtype)
    return in_torch(z, activation, negative_slope).to(input.dtype), mean, variance


#: y, and the batch's mean and biased variance, which have no gradients of their own.
batch_norm_training = Operator(
    "batch_norm_training",
    f"(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, {_EPILOGUE})"
    " -> (Tensor, Tensor, Tensor)",
    forward=_training,
    fake=_training_fake,
    save=_training_save,
    backward=_backward,
    jvp=_training_jvp,
    decomposition=_training_in_torch,
)


# ---- backward ------------------------------------------------------------------------------------------------------


def _gradients(grad, input, *others) -> tuple[torch.Tensor, ...]:
    return _implementations.of(grad).batch_norm_backward(grad, input, *others)


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


def _gradients_plainly(grad, input, weight, bias, other, mean, var, training, *others) -> tuple[torch.Tensor, ...]:
    """:data:`batch_norm_backward` in plain torch, through the statistics too if they are the batch's."""
    if training:
        mean, var = reference.statistics(input)
    *epilogue, wants_x, wants_parameters, wants_inner = others
    gradients = reference.gradients_of(grad, input, weight, bias, other, mean, var, training, *epilogue)
    wants = wants_x, wants_parameters, wants_parameters, wants_inner
    return tuple(each if wanted else input.new_empty(0) for each, wanted in zip(gradients, wants, strict=True))


#: ∂L/∂x, ∂L/∂weight, ∂L/∂bias and ∂L/∂residual, each empty unless wanted; see ``reference.batch_norm_backward``.
batch_norm_backward = Operator(
    "batch_norm_backward",
    "(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor? other, Tensor mean, Tensor var, bool training, "
    f"float eps, {_EPILOGUE}, bool wants_input, bool wants_parameters, bool wants_inner)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_gradients,
    fake=_gradients_fake,
    save=_gradients_save,
    backward=backward_of(_gradients_plainly, 5),
    plain=_gradients_plainly,
)


def gradients_from_sums(
    inner: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    sums: torch.Tensor,
    training: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return (∂L/∂x laid out like x, ∂L/∂weight, ∂L/∂bias) where g = ∂L/∂z and its sums are known, in one pass.

    A plain function for the inside of an autograd Function, which records nothing.

    Parameters
    ----------
    inner, input:
        g and x, [N, C, ...], of one dtype.
    weight, bias, mean, variance:
        of each channel [C]; the variance is the biased one; weight and bias may be None.
    sums:
        Σ g and Σ g·x̂, fp32 [2, C].
    training:
        whether mean and variance are the batch's.

    Raises
    ------
    RuntimeError
        for sizes, dtypes and devices that do not fit together, as torch does.
    """
    check(input, weight, bias, inner, mean=mean, variance=variance)
    if tuple(sums.shape) != (2, input.shape[1]):
        raise RuntimeError(f"expected sums to have shape {[2, input.shape[1]]}, but got {list(sums.shape)}")
    return _implementations.of(input).gradients_from_sums(
        resolved(inner), resolved(input), weight, bias, mean, variance, sums.contiguous(), training, eps
    )
