"""Batch norm in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpukern.conv import ConvProblem, reference
from gpukern.ops._activation import reference as activations
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.problem import Running
from gpukern.runtime.tensors import format_kept_by, laid_out
from gpukern.runtime.transforms import overwrite, total


def batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """``act((x − mean) · weight / √(variance + eps) + bias + residual)``, in fp32 at least and rounded once.

    Uses torch's own kernel, and so gives the same bits as its layer.
    """
    dtype = torch.promote_types(input.dtype, torch.float32)
    x = input.to(dtype)
    means, variances, weights, biases = (None if t is None else t.to(dtype) for t in (mean, variance, weight, bias))
    # Of nothing, a copy: a view of the input could not be changed in place.
    z = F.batch_norm(x, means, variances, weights, biases, eps=eps) if x.numel() else x.clone()
    return _finish(z if residual is None else z + residual.to(dtype), input, activation, negative_slope)


def _finish(z: torch.Tensor, input: torch.Tensor, activation: str, negative_slope: float) -> torch.Tensor:
    y = activations.activation(z, activation, negative_slope)
    return laid_out(y.to(input.dtype), format_kept_by(input))


def batch_norm_training(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, variance): :func:`batch_norm` with the batch's mean and biased variance, at least fp32 [C]."""
    mean, variance = statistics(input)
    if running is not None and input.numel():
        update(running, mean, variance, input.numel() // input.shape[1])
    y = apply_statistics(input, weight, bias, residual, mean, variance, eps, activation, negative_slope)
    return y, mean, variance


def conv2d_batch_norm(
    problem: ConvProblem,
    input: torch.Tensor,
    filters: torch.Tensor,
    filters_bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    running: Running | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, z, mean, variance) with ``z = x ∗ filters + filters_bias`` and y as :func:`batch_norm_training` of z."""
    z, mean, variance = conv2d_with_statistics(problem, input, filters, filters_bias, running)
    y = apply_statistics(z, weight, bias, residual, mean, variance, eps, activation, negative_slope)
    return y, z, mean, variance


def conv2d_with_statistics(
    problem: ConvProblem,
    input: torch.Tensor,
    filters: torch.Tensor,
    filters_bias: torch.Tensor | None,
    running: Running | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(z, mean, biased variance) of ``z = x ∗ filters + filters_bias``; updates the running statistics."""
    z = reference.conv2d(problem, input, filters, filters_bias, None, "none", 0.0)
    mean, variance = statistics(z)
    if running is not None and z.numel():
        update(running, mean, variance, z.numel() // z.shape[1])
    return z, mean, variance


def apply_statistics(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """:func:`batch_norm` with the input's own statistics."""
    # The difference first: with a large mean, torch's kernel for given statistics would lose it to cancellation.
    z, _, _ = normalize(input, weight, bias, residual, mean, variance, eps)
    return _finish(z, input, activation, negative_slope)


def statistics(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, biased variance) of each channel, at least fp32; zeros of no values."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if not input.numel():
        return x.new_zeros(input.shape[1]), x.new_zeros(input.shape[1])
    variance, mean = torch.var_mean(x, pixels_of(input), correction=0)
    return mean, variance


def update(running: Running, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """``old ← (1 − momentum) · old + momentum · new`` in place; the variance unbiased, from ``count`` values."""
    with torch.no_grad():
        for old, new in ((running.mean, mean), (running.variance, variance * (count / (count - 1)))):
            overwrite(old, (1 - running.momentum) * old.to(new.dtype) + running.momentum * new)


def batch_norm_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    training: bool,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    """(∂L/∂x, ∂L/∂weight, ∂L/∂bias, ∂L/∂z = ∂L/∂residual), empty where not wanted, with g = ∂L/∂z = ∂L/∂y · act′:

        ∂L/∂bias = Σ g        ∂L/∂weight = Σ g·x̂        ∂L/∂x = weight / σ · (g − mean(g) − x̂ · mean(g·x̂))

    The means are omitted if the statistics were frozen, not ``training``. ``other`` is the residual if the activation's
    derivative needs its input, else y, or None if there was no residual or no activation: then x suffices.
    """
    layout = format_kept_by(input)
    wants = wants_input, wants_parameters, wants_parameters, wants_inner
    gradients = gradients_of(
        grad, input, weight, bias, other, mean, variance, training, eps, activation, negative_slope
    )
    kept = [each if wanted else input.new_empty(0) for each, wanted in zip(gradients, wants, strict=True)]
    if wants_input:
        kept[0] = laid_out(kept[0], layout)
    if wants_inner:
        kept[3] = kept[3].clone(memory_format=layout)
    return tuple(kept)


def gradients_of(
    grad, input, weight, bias, other, mean, variance, training: bool, eps: float, activation: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the formulas of :func:`batch_norm_backward`, in any layout."""
    g, normal, inverse = inner_gradient(
        grad, input, weight, bias, other, mean, variance, eps, activation, negative_slope
    )
    pixels = pixels_of(input)
    grad_bias, grad_weight = g.sum(pixels), (g * normal).sum(pixels)
    grad_input = g
    if training and input.numel():
        count = input.numel() // input.shape[1]
        grad_input = g - _channels(grad_bias / count, input) - normal * _channels(grad_weight / count, input)
    scale = inverse if weight is None else inverse * _channels(weight, input)
    parameters = next((t for t in (weight, bias) if t is not None), mean)
    return (
        (grad_input * scale).to(input.dtype),
        grad_weight.to(parameters.dtype),
        grad_bias.to(parameters.dtype),
        g.to(input.dtype),
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
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(∂L/∂x, ∂L/∂weight, ∂L/∂bias) from ``inner``, g = ∂L/∂z, and its ``sums`` [2, C], Σ g and Σ g·x̂.

    ``count`` [1]: the values of a channel, where the sums and statistics are of more than ``input``.
    """
    _, normal, inverse = normalize(input, None, None, None, mean, variance, eps)
    g = inner.to(normal.dtype)
    if training and input.numel():
        means = sums / (input.numel() // input.shape[1] if count is None else count)
        mean_g, mean_gx = (_channels(each, input) for each in means)
        g = g - mean_g - normal * mean_gx
    grad_input = g * (inverse if weight is None else inverse * _channels(weight, input))
    grad_input = laid_out(grad_input.to(input.dtype), format_kept_by(input))
    grad_weight, grad_bias = (None if p is None else s.to(p.dtype) for p, s in ((weight, sums[1]), (bias, sums[0])))
    return grad_input, grad_weight, grad_bias


def sums_of(
    inner: torch.Tensor, input: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float
) -> torch.Tensor:
    """Σ g and Σ g·x̂ of ``inner``, g = ∂L/∂z: [2, C], in fp32 at least."""
    _, normal, _ = normalize(input, None, None, None, mean, variance, eps)
    g, pixels = inner.to(normal.dtype), pixels_of(input)
    return torch.stack([g.sum(pixels), (g * normal).sum(pixels)])


def inner_gradient(
    grad, input, weight, bias, other, mean, variance, eps: float, activation: str, negative_slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(∂L/∂z, x̂, 1/σ), at least fp32; see :func:`batch_norm_backward`."""
    z, normal, inverse = normalize(input, weight, bias, None, mean, variance, eps)
    g = grad.to(z.dtype)
    if activation != "none":
        needs_input = PROPERTIES[activation].needs_input
        if other is None:
            saved = z if needs_input else activations.activation(z, activation, negative_slope)
        else:
            saved = z + other if needs_input else other.to(z.dtype)
        g = activations.activation_grad(g, saved, activation, negative_slope)
    return g, normal, inverse


def tangent_of(
    input, weight, mean, variance, training: bool, eps: float, dinput, dweight, dbias, dresidual
) -> torch.Tensor | None:
    """The tangent of ``z = x̂ · weight + bias + residual``, at least fp32, from those that are not None.

    ``∂x̂ = (∂x − mean(∂x) − x̂ · mean(x̂ · ∂x)) / σ`` with the batch's statistics, else ``∂x / σ``.
    """
    _, normal, inverse = normalize(input, None, None, None, mean, variance, eps)
    parts = []
    if dinput is not None:
        d = dinput.to(normal.dtype)
        if training and input.numel():
            pixels = pixels_of(input)
            d = d - d.mean(pixels, keepdim=True) - normal * (normal * d).mean(pixels, keepdim=True)
        parts.append(d * (inverse if weight is None else inverse * _channels(weight, input)))
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
    inverse = _channels(torch.rsqrt(variance.to(dtype) + eps), input)
    normal = (input.to(dtype) - _channels(mean.to(dtype), input)) * inverse
    z = normal
    if weight is not None:
        z = z * _channels(weight, input)
    if bias is not None:
        z = z + _channels(bias, input)
    return z if residual is None else z + residual, normal, inverse


def _channels(numbers: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """View [C] as [1, C, 1, ...]."""
    return numbers.view(1, -1, *(1,) * (input.dim() - 2))


def pixels_of(input: torch.Tensor) -> tuple[int, ...]:
    return 0, *range(2, input.dim())
