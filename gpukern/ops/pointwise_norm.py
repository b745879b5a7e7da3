"""A 1×1 convolution between two batch norms in training, of which neither its input nor its output is stored.

With the batch's statistics, ``n`` pixels, a nonlinearity ``f`` and the inner norm's bias β:

    y = f(norm(z))     v = y Wᵀ     out = act(norm'(v) + added)     norm'(v) = (v − mean(v)) / σ · γ' + β'

The statistics of v need no v: with ``d = y − f(β)``, whose size is that of the deviations of y wherever their mean is,

    v − mean(v) = (d − mean(d)) Wᵀ        var(v_k) = w_k Cov(d) w_kᵀ,   Cov(d) = Σ d dᵀ / n − mean(d) mean(d)ᵀ

So one pass over z makes Σ d dᵀ and Σ d, and a second one everything else up to ``out``. In the backward, with the
gradient g of norm'(v) and x̂ = (v − mean(v)) / σ, a pass over g and z makes P = Σ g dᵀ and Σ g, and then

    Σ g·x̂_k = w_k · (P_k − mean(d) Σ g_k) / σ_k
    ∂L/∂W_k = γ'/σ_k · (P_k − mean(d) Σ g_k − Σ g·x̂_k / σ_k · w_k Cov(d))
    ∂L/∂y   = ∂L/∂v W,   ∂L/∂v = γ'/σ · (g − Σ g / n − x̂ · Σ g·x̂ / n),   x̂ from d W once more, on the chip

d is rounded to the dtype of z, as y is where it is stored; all sums and both matrices are fp32. v is not rounded.

These are plain functions for the inside of an autograd Function, which record nothing.
"""

from __future__ import annotations

import torch

from gpukern.ops._batch_norm.problem import Running
from gpukern.ops._pointwise_norm.planner import pays, why_not
from gpukern.ops._pointwise_norm.problem import Added, Gradients, Inner, Moments, Outer
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.mode import Implementations

_implementations = Implementations("gpukern.ops._pointwise_norm")


def takes(z: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether this is possible for z [N, C, H, W] and W [K, C, 1, 1], and expected to take less time than apart.

    It is for halves in channels_last, all of one dtype: the products of fp32 would have to be more exact than TF32.
    ``others``: the tensor that is added.
    """
    dtype = z.dtype
    if dtype is not torch.float16 and dtype is not torch.bfloat16:
        return False
    for each in (z, *others):
        if each is not None and not (each.dtype is dtype and each.is_contiguous(memory_format=torch.channels_last)):
            return False
    K, C, *_ = weight.shape
    N, _, H, W = z.shape
    if weight.dtype is not dtype or why_not(C, K) or N * H * W < 2:
        return False
    return pays(N * H * W, C, K, str(dtype).removeprefix("torch."), device_spec(z.device))


def convolve_between_norms(
    inner: Inner, weight: torch.Tensor, outer: Outer, added: Added | None, running: Running | None
) -> tuple[torch.Tensor, Moments]:
    """Return (out in channels_last, what the backward needs); update ``running``."""
    return _implementations.of(inner.z).forward(inner, weight, outer, added, running)


def convolve_between_norms_backward(
    grad: torch.Tensor,
    inner: Inner,
    weight: torch.Tensor,
    outer: Outer,
    moments: Moments,
    needs: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Return the gradients, ``grad`` being g; ``needs``: of W, γ', β' and norm(z)."""
    return _implementations.of(grad).backward(grad, inner, weight, outer, moments, needs)
