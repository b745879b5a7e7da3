"""Layer and RMS norm in plain torch: the path of CPU tensors, and the oracle of the tests when fed float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpukern.ops._activation import reference as activations
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._layer_norm.problem import Norm
from gpukern.runtime.transforms import total


def normalize(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: Norm,
) -> torch.Tensor:
    """``act(x̂ · weight + bias + residual)``, in fp32 at least and rounded once.

    Uses torch's own kernels, and so gives the same bits as its layers.
    """
    dtype = _computed_in(input, weight)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    shape = list(norm.normalized_shape)
    if norm.centered:
        z = F.layer_norm(input.to(dtype), shape, weight, bias, norm.eps)
    else:
        z = F.rms_norm(input.to(dtype), shape, weight, norm.eps)
    z = z if residual is None else z + residual.to(dtype)
    return activations.activation(z, norm.activation, norm.negative_slope).to(norm.dtype or input.dtype).contiguous()


def normalize_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    norm: Norm,
    wants_input: bool,
    wants_parameters: bool,
    wants_inner: bool,
) -> tuple[torch.Tensor, ...]:
    """(∂L/∂x, ∂L/∂weight, ∂L/∂bias, ∂L/∂z = ∂L/∂residual), empty where not wanted, with g = ∂L/∂z = ∂L/∂y · act′:

        ∂L/∂bias = Σ g    ∂L/∂weight = Σ g·x̂    ∂L/∂x = (g·weight − mean(g·weight) − x̂ · mean(g·weight·x̂)) / σ

    The first mean is a layer norm's. ``other`` is the residual if the activation's derivative needs its input, else y,
    or None if there was no residual or no activation: then x suffices.
    """
    normal, inverse = normal_of(input, weight, norm)
    g = inner_gradient(grad, normal, weight, bias, other, norm)
    rows = tuple(range(input.dim() - norm.dims))
    grad_input, grad_weight, grad_bias, inner = (input.new_empty(0) for _ in range(4))
    if wants_input:
        slope = without_changes(g if weight is None else g * weight, normal, norm) * inverse
        grad_input = slope.to(input.dtype).contiguous()
    if wants_parameters and weight is not None:
        grad_weight = (g * normal).sum(rows).to(weight.dtype)
    if wants_parameters and bias is not None:
        grad_bias = g.sum(rows).to(bias.dtype)
    if wants_inner:
        inner = g.to(grad.dtype).clone(memory_format=torch.contiguous_format)
    return grad_input, grad_weight, grad_bias, inner


def inner_gradient(grad, normal, weight, bias, other, norm: Norm) -> torch.Tensor:
    """∂L/∂z, at least fp32; see :func:`normalize_backward`."""
    g = grad.to(normal.dtype)
    if norm.activation == "none":
        return g
    needs_input = PROPERTIES[norm.activation].needs_input
    z = affine(normal, weight, bias)
    if other is None:
        saved = z if needs_input else activations.activation(z, norm.activation, norm.negative_slope)
    else:
        saved = z + other if needs_input else other.to(z.dtype)
    return activations.activation_grad(g, saved, norm.activation, norm.negative_slope)


def tangent_of(input, weight, bias, norm: Norm, dinput, dweight, dbias, dresidual) -> torch.Tensor | None:
    """The tangent of ``z = x̂ · weight + bias + residual``, at least fp32, from those that are not None.

    ``∂x̂ = (∂x − mean(∂x) − x̂ · mean(x̂ · ∂x)) / σ``, the first mean a layer norm's.
    """
    normal, inverse = normal_of(input, weight, norm)
    parts = []
    if dinput is not None:
        d = without_changes(dinput.to(normal.dtype), normal, norm) * inverse
        parts.append(d if weight is None else d * weight)
    if dweight is not None:
        parts.append(normal * dweight)
    if dbias is not None:
        parts.append(dbias.to(normal.dtype).expand(normal.shape))
    if dresidual is not None:
        parts.append(dresidual.to(normal.dtype))
    return total(*parts)


def without_changes(d: torch.Tensor, normal: torch.Tensor, norm: Norm) -> torch.Tensor:
    """``d`` without what changes a row's mean (a layer norm's) and deviation: d − mean(d) − x̂ · mean(d · x̂)."""
    columns = tuple(range(-norm.dims, 0))
    along = normal * (d * normal).mean(columns, keepdim=True)
    return d - d.mean(columns, keepdim=True) - along if norm.centered else d - along


def normal_of(input, weight, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """(x̂, 1/σ), at least fp32."""
    x = input.to(_computed_in(input, weight))
    columns = tuple(range(-norm.dims, 0))
    apart = x - x.mean(columns, keepdim=True) if norm.centered else x
    inverse = torch.rsqrt(apart.square().mean(columns, keepdim=True) + norm.eps)
    return apart * inverse, inverse


def affine(normal: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    z = normal if weight is None else normal * weight
    return z if bias is None else z + bias


def _computed_in(input: torch.Tensor, weight: torch.Tensor | None) -> torch.dtype:
    """At least fp32; an RMS norm's weight may be of a wider dtype than its input."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    return dtype if weight is None else torch.promote_types(dtype, weight.dtype)
