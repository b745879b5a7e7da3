"""Two batch norms that are added, in plain torch: the path of CPU tensors, and the oracle of the tests in float64."""

from __future__ import annotations

import torch

from gpukern.ops._activation import reference as activations
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.problem import Norm
from gpukern.ops._batch_norm.reference import normalize
from gpukern.runtime.tensors import format_kept_by, laid_out


def normalize_pair(
    z_a: torch.Tensor, norm_a: Norm, z_b: torch.Tensor, norm_b: Norm, activation: str, negative_slope: float
) -> torch.Tensor:
    """Return ``act(norm_a(z_a) + norm_b(z_b))``, in fp32 at least and rounded once."""
    u = _normalized(z_a, norm_a)[0] + _normalized(z_b, norm_b)[0]
    y = activations.activation(u, activation, negative_slope)
    return laid_out(y.to(z_a.dtype), format_kept_by(z_a))


def normalize_pair_sums(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    """Return [3, C]: Σ g, Σ g·x̂_a, Σ g·x̂_b, in fp32 at least."""
    g, a, b = _gradient(grad, y, z_a, norm_a, z_b, norm_b, activation, negative_slope)
    pixels = (0, *range(2, z_a.dim()))
    return torch.stack([g.sum(pixels), (g * a[1]).sum(pixels), (g * b[1]).sum(pixels)])


def normalize_pair_gradients(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    sums: torch.Tensor,
    of_b: torch.Tensor,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor | None, ...]:
    """Return (∂L/∂z_a, ∂L/∂z_b) from the sums, through the batch's statistics, and the parameters' gradients."""
    g, a, b = _gradient(grad, y, z_a, norm_a, z_b, norm_b, activation, negative_slope)
    count = max(z_a.numel() // max(z_a.shape[1], 1), 1)
    means = (torch.stack((*sums, of_b)) / count).view(3, 1, -1, *(1,) * (z_a.dim() - 2))
    results = []
    for z, norm, (_, normal, inverse), mean in ((z_a, norm_a, a, means[1]), (z_b, norm_b, b, means[2])):
        scale = inverse if norm.weight is None else inverse * norm.weight.view(inverse.shape)
        dz = (g - means[0] - normal * mean) * scale
        results.append(laid_out(dz.to(z.dtype), format_kept_by(z)))
    pairs = (norm_a.weight, sums[1]), (norm_a.bias, sums[0]), (norm_b.weight, of_b), (norm_b.bias, sums[0])
    return *results, *(None if p is None else s.to(p.dtype, copy=p is norm_b.bias) for p, s in pairs)


def _normalized(z: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normalize(z, norm.weight, norm.bias, None, norm.mean, norm.variance, norm.eps)


def _gradient(grad, y, z_a, norm_a: Norm, z_b, norm_b: Norm, activation: str, negative_slope: float):
    """(g, (norm of z_a, x̂_a, 1/σ_a), the same of z_b)."""
    a, b = _normalized(z_a, norm_a), _normalized(z_b, norm_b)
    g = grad.to(a[0].dtype)
    if activation != "none":
        saved = a[0] + b[0]
        if not PROPERTIES[activation].needs_input:
            saved = activations.activation(saved, activation, negative_slope) if y is None else y.to(g.dtype)
        g = activations.activation_grad(g, saved, activation, negative_slope)
    return g, a, b
