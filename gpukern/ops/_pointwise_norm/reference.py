"""A 1×1 convolution between two batch norms, in plain torch: the path of CPU tensors, and the tests' oracle."""

from __future__ import annotations

import torch

from gpukern.ops._activation import reference as activations
from gpukern.ops._batch_norm.problem import Norm, Running
from gpukern.ops._batch_norm.reference import inner_gradient, normalize, update
from gpukern.ops._pointwise_norm.problem import Added, Gradients, Inner, Moments, Outer
from gpukern.runtime.tensors import laid_out


def forward(
    inner: Inner, weight: torch.Tensor, outer: Outer, added: Added | None, running: Running | None
) -> tuple[torch.Tensor, Moments]:
    """(y, its moments); updates ``running``."""
    d, pivot = _deviation(inner)
    w = weight.flatten(1).to(d.dtype)
    count = len(d)
    mean = d.mean(0)
    covariance = d.T @ d / count - torch.outer(mean, mean)
    projected = w @ covariance
    variance = (projected * w).sum(1).clamp(min=0)
    if running is not None:
        update(running, w @ (mean + pivot), variance, count)
    center = w @ mean
    u = (d @ w.T - center) * _scale(outer, variance)[1]
    u = u if outer.bias is None else u + outer.bias
    if added is not None and added.norm is not None:
        u = u + _rows(_normalized(added.tensor, added.norm))
    elif added is not None:
        u = u + _rows(added.tensor)
    y = activations.activation(u, outer.activation, outer.negative_slope)
    N, _, H, W = inner.z.shape
    y = y.to(weight.dtype).reshape(N, H, W, -1).permute(0, 3, 1, 2)
    return laid_out(y, torch.channels_last), Moments(d.sum(0), center, projected, variance)


def backward(
    grad: torch.Tensor, inner: Inner, weight: torch.Tensor, outer: Outer, moments: Moments, needs: tuple[bool, ...]
) -> Gradients:
    """The gradients, ``grad`` being that of the outer activation's input; see the module of the operation."""
    needs_weight, needs_scale, needs_shift, needs_inner = needs
    d, _ = _deviation(inner)
    w, g = weight.flatten(1).to(d.dtype), _rows(grad).to(d.dtype)
    count = len(d)
    centered = g.T @ d - torch.outer(g.sum(0), moments.total / count)
    inverse, scale = _scale(outer, moments.variance)
    total_g, total_gx = g.sum(0), (w * centered).sum(1) * inverse
    found = Gradients(None, None, None, None, None)
    if needs_weight:
        by_weight = scale[:, None] * (centered - (total_gx * inverse)[:, None] * moments.projected)
        found = found._replace(weight=torch.empty_like(weight).copy_(by_weight.reshape(weight.shape)))
    if needs_scale:
        found = found._replace(norm_weight=total_gx.to(outer.weight.dtype))
    if needs_shift:
        found = found._replace(norm_bias=total_g.to(outer.bias.dtype))
    if needs_inner:
        normal = (d @ w.T - moments.center) * inverse
        by_z = (g - total_g / count - normal * (total_gx / count)) * scale
        z, norm = inner.z, inner.norm
        N, C, H, W = z.shape
        by_y = (by_z @ w).reshape(N, H, W, C).permute(0, 3, 1, 2)
        g, x_hat, _ = inner_gradient(
            by_y, z, norm.weight, norm.bias, None, norm.mean, norm.variance, norm.eps, inner.activation,
            inner.negative_slope,
        )  # fmt: skip
        g = laid_out(g.to(z.dtype), torch.channels_last)
        stored = g.to(x_hat.dtype)
        sums = torch.stack([stored.sum((0, 2, 3)), (stored * x_hat).sum((0, 2, 3))])
        found = found._replace(inner=g, sums=sums)
    return found


def _rows(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def _normalized(z: torch.Tensor, norm: Norm) -> torch.Tensor:
    return normalize(z, norm.weight, norm.bias, None, norm.mean, norm.variance, norm.eps)[0]


def _deviation(inner: Inner) -> tuple[torch.Tensor, torch.Tensor]:
    """(d [pixels, C] of z's dtype, but in fp32 at least, act(β) [C])."""
    normal = _rows(_normalized(inner.z, inner.norm))
    bias = normal.new_zeros(normal.shape[1]) if inner.norm.bias is None else inner.norm.bias.to(normal.dtype)
    y, pivot = (activations.activation(each, inner.activation, inner.negative_slope) for each in (normal, bias))
    return (y - pivot).to(inner.z.dtype).to(normal.dtype), pivot


def _scale(outer: Outer, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = (variance + outer.eps).rsqrt()
    return inverse, inverse if outer.weight is None else inverse * outer.weight
