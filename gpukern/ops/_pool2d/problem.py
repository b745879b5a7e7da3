"""Pooling as a problem: its sizes, checked once, and the quantities derived from them.

Names: batch N, channels C, input size H × W, kernel size R × S, output size P × Q. A dimension's window is the
part of the input that one output reads along that dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from gpukern.runtime.integers import cdiv, require

Pair = tuple[int, int]


# eq=False: problems are made once for each set of sizes (the functions below keep them), so identity is equality, and
# looking one up on every call costs nothing.
@dataclass(frozen=True, eq=False)
class PoolProblem:
    """A 2-D pooling with checked sizes.

    Output p reads the rows ``p·stride − padding + r·dilation`` for r < R that lie in the image; columns likewise.
    """

    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool
    #: For averages: whether padding counts as zeros, and the divisor that replaces the count.
    count_include_pad: bool = True
    divisor_override: int | None = None


@dataclass(frozen=True, eq=False)
class AdaptiveProblem:
    """An average over windows that split the image evenly: output p reads the rows ⌊p·H/P⌋ … ⌈(p+1)·H/P⌉ − 1."""

    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int


@functools.lru_cache(maxsize=4096)
def pool_problem(
    input_shape: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> PoolProblem:
    """The checked problem; raises RuntimeError, as torch does, for sizes that do not fit together."""
    P, Q = output_size(input_shape, kernel, stride, padding, dilation, ceil_mode)
    require(divisor_override != 0, "divisor_override must not be zero")
    N, C, H, W = input_shape
    return PoolProblem(
        N, C, H, W, P, Q, kernel, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
    )


@functools.lru_cache(maxsize=4096)
def adaptive_problem(input_shape: Sequence[int], output_size: Pair) -> AdaptiveProblem:
    """The checked problem; raises RuntimeError as torch does."""
    check_adaptive(input_shape, output_size)
    N, C, H, W = input_shape
    return AdaptiveProblem(N, C, H, W, *output_size)


def output_size(
    input_shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> Pair:
    """Check every size and return (P, Q). Works on a tracer's symbolic sizes too; never reads the batch size."""
    P, Q = output_sizes(input_shape, kernel, stride, padding, dilation, ceil_mode)
    return P, Q


def output_sizes(
    input_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, ...]:
    """As :func:`output_size`, of as many dimensions as ``kernel`` has."""
    require(min(kernel) > 0, f"kernel size should be greater than zero, got {tuple(kernel)}")
    require(min(stride) > 0, f"stride should be greater than zero, got {tuple(stride)}")
    require(min(dilation) > 0, f"dilation should be greater than zero, got {tuple(dilation)}")
    require(min(padding) >= 0, f"padding must not be negative, got {tuple(padding)}")
    require(
        all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)),
        f"padding should be at most half of the kernel size, got padding={tuple(padding)}, kernel_size={tuple(kernel)}",
    )
    _, C, *image = input_shape
    require(
        all(size != 0 for size in (C, *image)),
        f"expected an input without empty dimensions (the batch may be empty), got size {list(input_shape)}",
    )
    outputs = tuple(_outputs(*sizes, ceil_mode) for sizes in zip(image, kernel, stride, padding, dilation, strict=True))
    require(
        all(size >= 1 for size in outputs),
        f"given input size ({_times(C, *image)}), calculated output size ({_times(C, *outputs)}): "
        "output size is too small",
    )
    return outputs


def check_adaptive(input_shape: Sequence[int], output_size: Sequence[int]) -> None:
    """Raise RuntimeError for sizes that no adaptive pooling takes. Never reads the batch size."""
    require(min(output_size) >= 0, f"elements of output_size must not be negative, got {tuple(output_size)}")
    require(
        all(size != 0 for size in input_shape[2:]),
        f"expected an input of non-empty {_EXTENTS[len(output_size)]}, got size {list(input_shape)}",
    )


_EXTENTS = {1: "length", 2: "height and width", 3: "depth, height and width"}


def _times(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _outputs(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    outputs = cdiv(span, stride) + 1
    # A last window that would begin in the padding after the image is dropped.
    return outputs - 1 if (outputs - 1) * stride >= size + padding else outputs
