"""What a 1×1 convolution between two batch norms is given, and what its forward keeps for the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpukern.ops._batch_norm.problem import Norm


class Inner(NamedTuple):
    """The convolution's input ``act(norm(z))``, which is not stored; z [N, C, H, W] has runs of channels."""

    z: Any
    norm: Norm
    activation: str
    negative_slope: float


class Outer(NamedTuple):
    """The batch norm of the convolution's output: γ and β [K] or None, and eps; the ``activation`` behind it."""

    weight: Any
    bias: Any
    eps: float
    activation: str
    negative_slope: float


class Added(NamedTuple):
    """What is added before the activation [N, K, H, W], and the batch norm that it goes through first, if any."""

    tensor: Any
    norm: Norm | None


class Moments(NamedTuple):
    """Of d, the convolution's input less act(β), and of its output; in fp32 at least."""

    total: Any  # [C]: Σ d
    center: Any  # [K]: W · the mean of d
    projected: Any  # [K, C]: W · the covariance of d
    variance: Any  # [K], biased, of the convolution's output


class Gradients(NamedTuple):
    """Of a loss; None where nothing asked for it. ``sums``: Σ and Σ · x̂ of ``inner`` [2, C]."""

    weight: Any
    norm_weight: Any
    norm_bias: Any
    inner: Any  # ∂L/∂(norm of z), laid out like z
    sums: Any
