"""The convolution as a problem: its sizes, checked once, and the quantities derived from them.

Names: batch N, input channels C, input size H × W, output channels K, kernel size R × S, output size P × Q.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpukern.runtime.integers import require

Pair = tuple[int, int]
#: top, bottom, left, right
Padding = tuple[int, int, int, int]


# eq=False: a problem is made once for each set of sizes (conv_problem keeps them), so identity is equality, and hashing
# it on every call costs nothing.
@dataclass(frozen=True, eq=False)
class ConvProblem:
    """A 2-D convolution (cross-correlation) with checked sizes.

    ``y[n, k, p, q] = Σ_{c,r,s} x[n, g·C/G + c, p·stride_h + r·dilation_h − top, q·stride_w + s·dilation_w − left]
    · w[k, c, r, s]`` with ``g = k // (K/G)`` and zeros outside the image.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: int
    #: Whether the maximum of each 2 × 2 pixels of y is what is written. P and Q are even then, and a launch has neither
    #: residual nor statistics.
    pool: bool = False

    @property
    def group_inputs(self) -> int:
        """Number of input channels that a group reads."""
        return self.C // self.groups

    @property
    def group_outputs(self) -> int:
        """Number of output channels that a group computes."""
        return self.K // self.groups


@functools.lru_cache(maxsize=4096)
def conv_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> ConvProblem:
    """Return the checked problem; raise RuntimeError, as torch does, for sizes that do not fit together."""
    P, Q = output_size(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups)
    N, C, H, W = input_shape
    K, _, R, S = weight_shape
    return ConvProblem(N, C, H, W, K, R, S, P, Q, (*stride,), (*padding,), (*dilation,), groups)


def output_size(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> Pair:
    """Check every size and return (P, Q). Works on a tracer's symbolic sizes too; never reads the batch size."""
    require(len(input_shape) == 4, f"expected a 4-D input [N, C, H, W], got shape {list(input_shape)}")
    require(len(weight_shape) == 4, f"expected a 4-D weight [K, C/groups, R, S], got shape {list(weight_shape)}")
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(min(dilation) > 0, f"dilation should be greater than zero, got {tuple(dilation)}")
    require(min(padding) >= 0, f"negative padding is not supported: {tuple(padding)}")
    _, C, H, W = input_shape
    K, group_inputs, R, S = weight_shape
    require(min(R, S) > 0, f"kernel size should be greater than zero, got {R} x {S}")
    require(
        groups <= K and K % groups == 0,
        f"expected the {K} output channels of weight {list(weight_shape)} to be a positive multiple of groups={groups}",
    )
    require(
        group_inputs * groups == C,
        f"given groups={groups}, weight of size {list(weight_shape)}, expected input {list(input_shape)} to have "
        f"{group_inputs * groups} channels, but got {C} channels instead",
    )
    require(
        bias_shape is None or tuple(bias_shape) == (K,),
        f"given weight of size {list(weight_shape)}, expected bias to have shape [{K}], "
        f"but got {list(bias_shape or ())} instead",
    )
    require(
        H != 0 and W != 0,
        f"expected an input of non-empty height and width (batch and channels may be empty), got {list(input_shape)}",
    )
    padded = H + padding[0] + padding[1], W + padding[2] + padding[3]
    extent = dilation[0] * (R - 1) + 1, dilation[1] * (S - 1) + 1
    require(
        padded[0] >= extent[0] and padded[1] >= extent[1],
        f"calculated padded input size per channel: ({padded[0]} x {padded[1]}). Kernel size: "
        f"({extent[0]} x {extent[1]}). Kernel size can't be greater than actual input size",
    )
    return (padded[0] - extent[0]) // stride[0] + 1, (padded[1] - extent[1]) // stride[1] + 1


@functools.lru_cache(maxsize=4096)
def pooled_problem(problem: ConvProblem) -> ConvProblem:
    """Return ``problem`` with the maxima of 2 × 2 pixels as its output; a last odd row or column is not computed."""
    return replace(problem, P=problem.P // 2 * 2, Q=problem.Q // 2 * 2, pool=True)


@functools.lru_cache(maxsize=4096)
def transposed_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
) -> ConvProblem:
    """Return the convolution whose input gradient is the transposed one of [N, K, P, Q] with [K, C/groups, R, S]."""
    H, W = transposed_size(input_shape, weight_shape, bias_shape, stride, padding, output_padding, dilation, groups)
    N, K, P, Q = input_shape
    _, group_outputs, R, S = weight_shape
    both = (padding[0], padding[0], padding[1], padding[1])
    return ConvProblem(N, group_outputs * groups, H, W, K, R, S, P, Q, (*stride,), both, (*dilation,), groups)


def transposed_size(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Pair,
    padding: Pair,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
) -> Pair:
    """Check every size and return (H, W): ``(P − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1``.

    Raises RuntimeError, as torch does, for sizes that do not fit together.
    """
    require(len(input_shape) == 4, f"expected a 4-D input [N, K, P, Q], got shape {list(input_shape)}")
    require(len(weight_shape) == 4, f"expected a 4-D weight [K, C/groups, R, S], got shape {list(weight_shape)}")
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(
        all(0 <= extra < step for extra, step in zip(output_padding, stride, strict=True)),
        f"output padding must not be negative and smaller than the stride {tuple(stride)}, got {tuple(output_padding)}",
    )
    N, K, P, Q = input_shape
    channels, group_outputs, R, S = weight_shape
    require(
        channels == K,
        f"given transposed=1, weight of size {list(weight_shape)}, expected input {list(input_shape)} to have "
        f"{channels} channels, but got {K} channels instead",
    )
    C = group_outputs * groups
    require(
        bias_shape is None or tuple(bias_shape) == (C,),
        f"given transposed=1, weight of size {list(weight_shape)}, expected bias to have shape [{C}], "
        f"but got {list(bias_shape or ())} instead",
    )
    H, W = (
        (size - 1) * step - 2 * pad + spread * (taps - 1) + extra + 1
        for size, step, pad, spread, taps, extra in zip(
            (P, Q), stride, padding, dilation, (R, S), output_padding, strict=True
        )
    )
    require(
        P > 0 and Q > 0 and H > 0 and W > 0,
        f"given input size per channel: ({P} x {Q}). Calculated output size per channel: ({H} x {W}). "
        "Output size is too small",
    )
    both = (padding[0], padding[0], padding[1], padding[1])
    output_size((N, C, H, W), weight_shape, None, stride, both, dilation, groups)  # all other checks
    return H, W


def same_padding(kernel: Pair, dilation: Pair) -> Padding:
    """Return the padding of ``padding="same"`` at stride 1; an odd remainder goes to bottom and right, as in torch."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    top, left = total[0] // 2, total[1] // 2
    return top, total[0] - top, left, total[1] - left
