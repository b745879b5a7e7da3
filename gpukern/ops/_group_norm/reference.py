"""Group norm in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64."""

from __future__ import annotations

import torch

from gpukern.ops._activation import reference as activations
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.runtime.tensors import laid_out, memory_format_of
from gpukern.runtime.transforms import overwrite, total


def group_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, biased variance [N, groups]): ``y = act(x̂ · weight + bias + residual)``, rounded once."""
    mean, variance = statistics(input, groups)
    z, _, _ = normalize(input, weight, bias, residual, mean, variance, eps)
    y = activations.activation(z, activation, negative_slope)
    return _laid_out_as(input, y), mean, variance


def statistics(input: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, biased variance) of each group of each image, at least fp32 [N, groups]; zeros of no values."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if not input.numel():
        return x.new_zeros(x.shape[0], groups), x.new_zeros(x.shape[0], groups)
    variance, mean = torch.var_mean(x.reshape(x.shape[0], groups, -1), 2, correction=0)
    return mean, variance


def group_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    """(∂L/∂x, ∂L/∂weight, ∂L/∂bias, ∂L/∂z = ∂L/∂residual), empty where not wanted; see :func:`gradients_of`.

    ``other`` is the residual if the activation's derivative needs its input, else y, or None if there was no residual
    or no activation: then x suffices.
    """
    wants = wants_input, wants_parameters, wants_parameters, wants_inner
    gradients = gradients_of(grad, input, weight, bias, other, mean, variance, groups, eps, activation, negative_slope)
    kept = [each if wanted else input.new_empty(0) for each, wanted in zip(gradients, wants, strict=True)]
    if wants_input:
        kept[0] = _laid_out_as(input, kept[0])
    if wants_inner:
        kept[3] = _laid_out_as(input, kept[3].clone())
    return tuple(kept)


def gradients_of(
    grad, input, weight, bias, other, mean, variance, groups: int, eps: float, activation: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients, in any layout, with g = ∂L/∂z = ∂L/∂y · act′, and means over a group:

    ∂L/∂bias = Σ g      ∂L/∂weight = Σ g·x̂      ∂L/∂x = (weight·g − mean(weight·g) − x̂ · mean(weight·g·x̂)) / σ
    """
    z, normal, inverse = normalize(input, weight, bias, None, mean, variance, eps)
    g = grad.to(z.dtype)
    if activation != "none":
        needs_input = PROPERTIES[activation].needs_input
        if other is None:
            saved = z if needs_input else activations.activation(z, activation, negative_slope)
        else:
            saved = z + other if needs_input else other.to(z.dtype)
        g = activations.activation_grad(g, saved, activation, negative_slope)
    pixels = (0, *range(2, input.dim()))
    grad_bias, grad_weight = g.sum(pixels), (g * normal).sum(pixels)
    weighted = g if weight is None else g * _channels(weight, input)
    grad_input = through_statistics(weighted, normal, groups) * inverse
    parameters = next((t for t in (weight, bias) if t is not None), mean)
    return (
        grad_input.to(input.dtype),
        grad_weight.to(parameters.dtype),
        grad_bias.to(parameters.dtype),
        g.to(input.dtype),
    )


def through_statistics(d: torch.Tensor, normal: torch.Tensor, groups: int) -> torch.Tensor:
    """``d − mean(d) − x̂ · mean(d · x̂)`` with means over a group: σ times the tangent of x̂ if ``d`` is that of x."""
    if not d.numel():
        return d
    return d - _group_means(d, groups) - normal * _group_means(d * normal, groups)


def tangent_of(
    input, weight, mean, variance, groups: int, eps: float, dinput, dweight, dbias, dresidual
) -> torch.Tensor | None:
    """The tangent of ``z = x̂ · weight + bias + residual``, at least fp32, from those that are not None."""
    _, normal, inverse = normalize(input, None, None, None, mean, variance, eps)
    parts = []
    if dinput is not None:
        d = through_statistics(dinput.to(normal.dtype), normal, groups) * inverse
        parts.append(d if weight is None else d * _channels(weight, input))
    if dweight is not None:
        parts.append(normal * _channels(dweight, input))
    if dbias is not None:
        parts.append(_channels(dbias.to(normal.dtype), input).expand(normal.shape))
    if dresidual is not None:
        parts.append(dresidual.to(normal.dtype))
    return total(*parts)


def normalize(input, weight, bias, residual, mean, variance, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, x̂, 1/σ), at least fp32; z = x̂ · weight + bias + residual."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    inverse = _of_groups(torch.rsqrt(variance.to(dtype) + eps), input)
    # The difference first: with a large mean, x / σ and mean / σ would cancel.
    normal = (input.to(dtype) - _of_groups(mean.to(dtype), input)) * inverse
    z = normal
    if weight is not None:
        z = z * _channels(weight, input)
    if bias is not None:
        z = z + _channels(bias, input)
    return z if residual is None else z + residual, normal, inverse


def update_running(
    mean: torch.Tensor,
    variance: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    momentum: float,
    pixels: int,
) -> None:
    """``r ← (1 − momentum) · r + momentum · new`` in place: the images' mean of their means and unbiased variances."""
    with torch.no_grad():
        for old, new in ((running_mean, mean.mean(0)), (running_var, variance.mean(0) * (pixels / (pixels - 1)))):
            overwrite(old, (1 - momentum) * old.to(new.dtype) + momentum * new)


def _laid_out_as(input: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in ``input``'s dtype and torch's layout of the result; nothing lies as if contiguous."""
    if not tensor.numel():
        return input.new_empty(input.shape)
    return laid_out(tensor.to(input.dtype), memory_format_of(input))


def _group_means(values: torch.Tensor, groups: int) -> torch.Tensor:
    return _of_groups(values.reshape(values.shape[0], groups, -1).mean(2), values)


def _of_groups(numbers: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """[N, groups] as [N, C, 1, ...]."""
    channels = numbers.repeat_interleave(input.shape[1] // numbers.shape[1], 1) if numbers.shape[1] else numbers
    return channels.reshape(*input.shape[:2], *(1,) * (input.dim() - 2))


def _channels(numbers: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """View [C] as [1, C, 1, ...]."""
    return numbers.view(1, -1, *(1,) * (input.dim() - 2))
