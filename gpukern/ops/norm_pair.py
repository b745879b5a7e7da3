"""Two batch norms that are added, with one activation: a residual block whose shortcut is a convolution too.

With the batch's statistics, ``x̂ = (z − mean) / σ``, ``σ = √(variance + eps)`` and ``n`` values to a channel:

    y = act(u),   u = x̂_a · weight_a + bias_a + x̂_b · weight_b + bias_b,   g = ∂L/∂y · act′(u)
    ∂L/∂bias_a = ∂L/∂bias_b = Σ g      ∂L/∂weight_a = Σ g·x̂_a      ∂L/∂weight_b = Σ g·x̂_b
    ∂L/∂z_a = weight_a / σ_a · (g − Σ g / n − x̂_a · Σ g·x̂_a / n),  and so for b

One pass over memory forward, and two backward where the norms apart take two and four. These are plain functions for
the inside of an autograd Function, which record nothing; see :mod:`gpukern.ops.batch_norm` for one norm.
"""

from __future__ import annotations

import torch

from gpukern.ops._batch_norm.problem import Norm, check_sizes
from gpukern.ops.activation import check_activation
from gpukern.ops.batch_norm import check_numbers
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import resolved
from gpukern.runtime.tensors import check_alike

_implementations = Implementations("gpukern.ops._norm_pair")


def normalize_pair(
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> torch.Tensor:
    """Return ``y = act(norm_a(z_a) + norm_b(z_b))``, laid out like ``z_a``.

    Parameters
    ----------
    z_a, z_b:
        [N, C, ...], of one shape, dtype and device, in any layouts.
    norm_a, norm_b:
        mean and biased variance [C] of the batch, weight and bias [C] or None, and eps; in fp32 or the dtype of z.
    activation, negative_slope:
        as everywhere, "none" included.

    Raises
    ------
    RuntimeError
        for sizes, dtypes and devices that do not fit together, as torch does.
    ValueError
        for an unknown activation.
    """
    z_a, z_b = resolved(z_a), resolved(z_b)
    _check((z_a, norm_a, z_b, norm_b), activation, negative_slope)
    return _implementations.of(z_a).normalize_pair(z_a, norm_a, z_b, norm_b, activation, negative_slope)


def normalize_pair_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (∂L/∂z_a, ∂L/∂z_b, sums [3, C]): Σ g, Σ g·x̂_a and Σ g·x̂_b, in fp32 at least.

    ``grad`` is ∂L/∂y. ``y`` is read only for an activation whose derivative is a function of it; without, u is
    recomputed from z_a and z_b, which are read anyway. For errors see :func:`normalize_pair`.
    """
    sums = normalize_pair_sums(grad, y, z_a, norm_a, z_b, norm_b, activation, negative_slope)
    more = sums[:2], sums[2], activation, negative_slope
    grad_a, grad_b, *_ = normalize_pair_gradients(grad, y, z_a, norm_a, z_b, norm_b, *more)
    return grad_a, grad_b, sums  # type: ignore[return-value]


def normalize_pair_sums(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> torch.Tensor:
    """Return the sums of :func:`normalize_pair_backward`."""
    grad, y, z_a, z_b = resolved(grad), resolved(y), resolved(z_a), resolved(z_b)
    _check((z_a, norm_a, z_b, norm_b), activation, negative_slope, grad=grad, y=y)
    arguments = grad, y, z_a, norm_a, z_b, norm_b, activation, negative_slope
    return _implementations.of(grad).normalize_pair_sums(*arguments)


def normalize_pair_gradients(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    z_a: torch.Tensor,
    norm_a: Norm,
    z_b: torch.Tensor,
    norm_b: Norm,
    sums: torch.Tensor,
    of_b: torch.Tensor,
    activation: str = "none",
    negative_slope: float = 0.01,
) -> tuple[torch.Tensor | None, ...]:
    """Return (∂L/∂z_a, ∂L/∂z_b, ∂L/∂weight_a, ∂L/∂bias_a, ∂L/∂weight_b, ∂L/∂bias_b), in the dtypes of the operands.

    ``sums`` [2, C] are Σ g and Σ g·x̂_a, ``of_b`` [C] is Σ g·x̂_b; with "none", ``grad`` is g. A parameter that is None
    has no gradient.
    """
    grad, y, z_a, z_b = resolved(grad), resolved(y), resolved(z_a), resolved(z_b)
    _check((z_a, norm_a, z_b, norm_b), activation, negative_slope, grad=grad, y=y)
    for name, given, shape in (("sums", sums, (2, z_a.shape[1])), ("of_b", of_b, (z_a.shape[1],))):
        if tuple(given.shape) != shape:
            raise RuntimeError(f"expected {name} to have shape {list(shape)}, but got {list(given.shape)}")
    arguments = grad, y, z_a, norm_a, z_b, norm_b, sums, of_b, activation, negative_slope
    return _implementations.of(grad).normalize_pair_gradients(*arguments)


def _check(
    operands: tuple[torch.Tensor, Norm, torch.Tensor, Norm],
    activation: str,
    negative_slope: float,
    **others: torch.Tensor | None,
) -> None:
    z_a, norm_a, z_b, norm_b = operands
    check_activation(activation, negative_slope)
    check_alike("normalize_pair", z_a, z_b, *others.values())
    check_sizes(z_a.shape, None)
    for name, tensor in {"z_b": z_b, **others}.items():
        if tensor is not None and tensor.shape != z_a.shape:
            raise RuntimeError(f"expected {name} to have the shape of z_a, {list(z_a.shape)}, got {list(tensor.shape)}")
    for norm in (norm_a, norm_b):
        check_numbers(z_a, z_a.shape[1], mean=norm.mean, variance=norm.variance, weight=norm.weight, bias=norm.bias)
