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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """Check every size and return (P, Q), or (Q,) of sequences. Works on a tracer's symbolic sizes too; never reads the
    batch size. ``padding`` has two numbers for each dimension.
    """
    _check_ranks(input_shape, weight_shape, len(stride))
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(min(dilation) > 0, f"dilation should be greater than zero, got {tuple(dilation)}")
    require(min(padding) >= 0, f"negative padding is not supported: {tuple(padding)}")
    C, sizes = input_shape[1], input_shape[2:]
    K, group_inputs, *kernel = weight_shape
    require(min(kernel) > 0, f"kernel size should be greater than zero, got {_by(kernel)}")
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
        all(size != 0 for size in sizes),
        f"expected an input of non-empty {_EXTENTS[len(sizes)]} (batch and channels may be empty), "
        f"got {list(input_shape)}",
    )
    padded = [size + before + after for size, before, after in zip(sizes, padding[::2], padding[1::2], strict=True)]
    extents = [spread * (taps - 1) + 1 for spread, taps in zip(dilation, kernel, strict=True)]
    require(
        all(size >= extent for size, extent in zip(padded, extents, strict=True)),
        f"calculated padded input size per channel: ({_by(padded)}). Kernel size: "
        f"({_by(extents)}). Kernel size can't be greater than actual input size",
    )
    return tuple((size - extent) // step + 1 for size, extent, step in zip(padded, extents, stride, strict=True))


#: By the number of dimensions: shapes, and what they measure.
_SHAPES = {1: ("[N, C, L]", "[K, C/groups, S]"), 2: ("[N, C, H, W]", "[K, C/groups, R, S]")}
_EXTENTS = {1: "length", 2: "height and width"}


def _check_ranks(input_shape: Sequence[int], weight_shape: Sequence[int], dimensions: int) -> None:
    for name, shape, letters in zip(("input", "weight"), (input_shape, weight_shape), _SHAPES[dimensions], strict=True):
        require(
            len(shape) == dimensions + 2,
            f"expected a {dimensions + 2}-D {name} {letters}, got shape {list(shape)}",
        )


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


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
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """Check every size and return (H, W): ``(P − 1)·stride − 2·padding + dilation·(R − 1) + output_padding + 1``.

    Of sequences it is (L,). Raises RuntimeError, as torch does, for sizes that do not fit together.
    """
    _check_ranks(input_shape, weight_shape, len(stride))
    require(groups > 0, f"non-positive groups is not supported: {groups}")
    require(min(stride) > 0, f"non-positive stride is not supported: {tuple(stride)}")
    require(
        all(0 <= extra < step for extra, step in zip(output_padding, stride, strict=True)),
        f"output padding must not be negative and smaller than the stride {tuple(stride)}, got {tuple(output_padding)}",
    )
    N, K, *outputs = input_shape
    channels, group_outputs, *kernel = weight_shape
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
    inputs = tuple(
        (size - 1) * step - 2 * pad + spread * (taps - 1) + extra + 1
        for size, step, pad, spread, taps, extra in zip(
            outputs, stride, padding, dilation, kernel, output_padding, strict=True
        )
    )
    require(
        all(size > 0 for size in (*outputs, *inputs)),
        f"given input size per channel: ({_by(outputs)}). Calculated output size per channel: ({_by(inputs)}). "
        "Output size is too small",
    )
    both = [pad for pad in padding for _ in range(2)]
    output_size((N, C, *inputs), weight_shape, None, stride, both, dilation, groups)  # all other checks
    return inputs


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
    output_size(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups)
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
    transposed_size(input_shape, weight_shape, bias_shape, stride, padding, output_padding, dilation, groups)
    (step,), (pad,), (extra,), (spread,) = stride, padding, output_padding, dilation
    shapes = of_rows(input_shape), of_rows(weight_shape), bias_shape
    return transposed_problem(*shapes, (1, step), (0, pad), (0, extra), (1, spread), groups)


def same_padding(kernel: Pair, dilation: Pair) -> Padding:
    """Return the padding of ``padding="same"`` at stride 1; an odd remainder goes to bottom and right, as in torch."""
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    top, left = total[0] // 2, total[1] // 2
    return top, total[0] - top, left, total[1] - left
