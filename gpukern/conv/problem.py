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
    P, Q = output_sizes(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups)
    return P, Q


def output_sizes(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """As :func:`output_size`, of as many dimensions as ``stride`` has; ``padding`` is (before, after) of each."""
    input_names, weight_names, sizes = _NAMES[len(stride)]
    rank = len(stride) + 2
    require(len(input_shape) == rank, f"expected a {rank}-D input {input_names}, got shape {list(input_shape)}")
    require(len(weight_shape) == rank, f"expected a {rank}-D weight {weight_names}, got shape {list(weight_shape)}")
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(min(dilation) > 0, f"dilation should be greater than zero, got {tuple(dilation)}")
    require(min(padding) >= 0, f"negative padding is not supported: {tuple(padding)}")
    _, C, *image = input_shape
    K, group_inputs, *taps = weight_shape
    require(min(taps) > 0, f"kernel size should be greater than zero, got {_times(taps)}")
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
        all(size != 0 for size in image),
        f"expected an input of non-empty {sizes} (batch and channels may be empty), got {list(input_shape)}",
    )
    padded = [size + before + after for size, before, after in zip(image, padding[::2], padding[1::2], strict=True)]
    extent = [spread * (count - 1) + 1 for spread, count in zip(dilation, taps, strict=True)]
    require(
        all(size >= length for size, length in zip(padded, extent, strict=True)),
        f"calculated padded input size per channel: ({_times(padded)}). Kernel size: "
        f"({_times(extent)}). Kernel size can't be greater than actual input size",
    )
    return tuple((size - length) // step + 1 for size, length, step in zip(padded, extent, stride, strict=True))


#: By the number of dimensions: the names of the input's, of the weight's, and what its image is measured by.
_NAMES = {
    1: ("[N, C, L]", "[K, C/groups, S]", "length"),
    2: ("[N, C, H, W]", "[K, C/groups, R, S]", "height and width"),
    3: ("[N, C, D, H, W]", "[K, C/groups, T, R, S]", "depth, height and width"),
}


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


@functools.lru_cache(maxsize=4096)
def pooled_problem(problem: ConvProblem) -> ConvProblem:
    """Return ``problem`` with the maxima of 2 × 2 pixels as its output; a last odd row or column is not computed."""
    return replace(problem, P=problem.P // 2 * 2, Q=problem.Q // 2 * 2, pool=True)


@functools.lru_cache(maxsize=4096)
def matrix_problem(rows: int, inputs: int, outputs: int) -> ConvProblem:
    """The product of [rows, inputs] with [outputs, inputs] as a convolution of images of one pixel."""
    return ConvProblem(
        rows, inputs, 1, 1, outputs, 1, 1, 1, 1, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1
    )


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
    geometry = stride, padding, output_padding, dilation, groups
    H, W = transposed_sizes(input_shape, weight_shape, bias_shape, *geometry)
    return H, W


def transposed_sizes(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """As :func:`transposed_size`, of as many dimensions as ``stride`` has."""
    rank, weight_names = len(stride) + 2, _NAMES[len(stride)][1]
    input_names = {1: "[N, K, Q]", 2: "[N, K, P, Q]", 3: "[N, K, Z, P, Q]"}[len(stride)]
    require(len(input_shape) == rank, f"expected a {rank}-D input {input_names}, got shape {list(input_shape)}")
    require(len(weight_shape) == rank, f"expected a {rank}-D weight {weight_names}, got shape {list(weight_shape)}")
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(
        all(0 <= extra < step for extra, step in zip(output_padding, stride, strict=True)),
        f"output padding must not be negative and smaller than the stride {tuple(stride)}, got {tuple(output_padding)}",
    )
    N, K, *result = input_shape
    channels, group_outputs, *taps = weight_shape
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
    image = tuple(
        (size - 1) * step - 2 * pad + spread * (count - 1) + extra + 1
        for size, step, pad, spread, count, extra in zip(
            result, stride, padding, dilation, taps, output_padding, strict=True
        )
    )
    require(
        all(size > 0 for size in (*result, *image)),
        f"given input size per channel: ({_times(result)}). Calculated output size per channel: ({_times(image)}). "
        "Output size is too small",
    )
    both = [pad for pad in padding for _ in range(2)]
    output_sizes((N, C, *image), weight_shape, None, stride, both, dilation, groups)  # all other checks
    return image


def same_padding(kernel: Pair, dilation: Pair) -> Padding:
    """Return the padding of ``padding="same"`` at stride 1; an odd remainder goes to bottom and right, as in torch."""
    top, bottom, left, right = same_paddings(kernel, dilation)
    return top, bottom, left, right


def same_paddings(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """As :func:`same_padding`, of any number of dimensions: (before, after) of each."""
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple(pad for total in totals for pad in (total // 2, total - total // 2))


# ---- sequences: images of height 1 ---------------------------------------------------------------------------------


def of_rows(sizes: Sequence[int], height: int = 1) -> tuple[int, ...]:
    """``sizes``, of sequences, as those of images of one row: [N, C, L] is [N, C, 1, L]."""
    return (*sizes[:-1], height, *sizes[-1:])


@functools.lru_cache(maxsize=4096)
def sequence_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """The problem of [N, C, L] with [K, C/groups, S], ``padding`` before and after, in images of one row."""
    output_sizes(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups)
    (step,), (before, after), (spread,) = stride, padding, dilation
    shapes = of_rows(input_shape), of_rows(weight_shape), bias_shape
    return conv_problem(*shapes, (1, step), (0, 0, before, after), (1, spread), groups)


@functools.lru_cache(maxsize=4096)
def transposed_sequence_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvProblem:
    """:func:`transposed_problem` of [N, K, Q] with [K, C/groups, S], in images of one row."""
    transposed_sizes(input_shape, weight_shape, bias_shape, stride, padding, output_padding, dilation, groups)
    (step,), (pad,), (extra,), (spread,) = stride, padding, output_padding, dilation
    shapes = of_rows(input_shape), of_rows(weight_shape), bias_shape
    return transposed_problem(*shapes, (1, step), (0, pad), (0, extra), (1, spread), groups)
