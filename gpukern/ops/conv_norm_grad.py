"""Input gradient of a convolution, through the activation and into the sums of the batch norm that made its input.

With ``y = act(u)``, ``u = x̂ · γ + β [+ residual]``, ``x̂ = (z − mean) / √(variance + eps)`` and a convolution of y:

    g = (∂L/∂y by the convolution + added) · act′(u)      Σ g and Σ g·x̂ over all but the channels

which is what the backward of the batch norm needs a pass over memory for, see :mod:`gpukern.ops.batch_norm`; here the
convolution's epilogue does it.
"""

from __future__ import annotations

import torch

from gpukern.conv import Padding, Pair, conv_problem
from gpukern.ops.activation import check_activation
from gpukern.ops.batch_norm import check_numbers
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import resolved
from gpukern.runtime.tensors import check_alike

_implementations = Implementations("gpukern.ops._conv_norm_grad")


def conv2d_input_grad_norm(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_shape: tuple[int, int, int, int],
    channels_last: bool,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    added: torch.Tensor | None,
    z: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    other: torch.Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (g [N, C, H, W], its sums [2, C]): Σ g and Σ g·x̂ of the stored, rounded g, in fp32 at least.

    Not differentiable: for a backward pass, which calls it without recording.

    Parameters
    ----------
    grad, weight, input_shape, channels_last, stride, padding, dilation, groups:
        as of the input gradient, :data:`gpukern.ops.conv2d.conv2d_input_grad`: [N, K, P, Q], [K, C/groups, R, S] and
        [N, C, H, W]; ``channels_last`` is the layout of g.
    added:
        another gradient of y, of g's shape and dtype in any layout, or None.
    z, mean, variance, norm_weight, norm_bias, eps:
        the batch norm's input [N, C, H, W] and its numbers [C]; ``variance`` is the biased one of the batch, and γ and
        β may be None.
    other:
        the residual if the activation's derivative needs its input, else y; None if there was no residual or no
        activation: u is then computed from z. See :data:`gpukern.ops.batch_norm.batch_norm_backward`.
    activation, negative_slope:
        a name of :data:`gpukern.ops.activation.ACTIVATIONS`, "none" included.

    Raises
    ------
    RuntimeError
        for sizes, dtypes and devices that do not fit together, as torch does.
    ValueError
        for an unknown activation.
    """
    check_activation(activation, negative_slope)
    grad, weight, z = resolved(grad), resolved(weight), resolved(z)
    added, other = resolved(added), resolved(other) if activation != "none" else None
    check_alike("conv2d_input_grad_norm", grad, weight, added, z, other)
    problem = conv_problem(tuple(input_shape), weight.shape, None, stride, padding, dilation, groups)
    of_input = problem.N, problem.C, problem.H, problem.W
    _check_shape("grad", grad, (problem.N, problem.K, problem.P, problem.Q))
    _check_shape("z", z, of_input)
    _check_shape("added", added, of_input)
    _check_shape("other", other, of_input)
    check_numbers(z, problem.C, mean=mean, variance=variance, weight=norm_weight, bias=norm_bias)
    return _implementations.of(grad).conv2d_input_grad_norm(
        problem, grad, weight, channels_last, added, z, mean, variance, norm_weight, norm_bias, other, eps, activation,
        negative_slope,
    )  # fmt: skip


def _check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise RuntimeError(f"expected {name} to have shape {list(shape)}, but got {list(tensor.shape)}")
