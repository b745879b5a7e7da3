"""3-D pooling as a problem: its sizes, checked once, as :mod:`gpukern.ops._pool2d.problem`.

Names: batch N, channels C, input size D × H × W, kernel size T × R × S, output size Z × P × Q.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from gpukern.ops._pool2d.problem import check_adaptive, output_sizes
from gpukern.runtime.integers import require

Triple = tuple[int, int, int]


# eq=False: as PoolProblem.
@dataclass(frozen=True, eq=False)
class VolumePool:
    """A 3-D pooling with checked sizes: ``image`` is D × H × W, ``result`` Z × P × Q."""

    N: int
    C: int
    image: Triple
    result: Triple
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    ceil_mode: bool
    #: For averages: whether padding counts as zeros, and the divisor that replaces the count.
    count_include_pad: bool = True
    divisor_override: int | None = None


@dataclass(frozen=True, eq=False)
class AdaptivePool:
    """A pooling over windows that split the volume evenly: output z reads the planes ⌊z·D/Z⌋ … ⌈(z+1)·D/Z⌉ − 1."""

    N: int
    C: int
    image: Triple
    result: Triple


@functools.lru_cache(maxsize=4096)
def volume_pool(
    input_shape: Sequence[int],
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    ceil_mode: bool,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> VolumePool:
    """The checked problem; raises RuntimeError, as torch does, for sizes that do not fit together."""
    Z, P, Q = output_sizes(input_shape, kernel, stride, padding, dilation, ceil_mode)
    require(divisor_override != 0, "divisor_override must not be zero")
    N, C, D, H, W = input_shape
    window = kernel, stride, padding, dilation, ceil_mode
    return VolumePool(N, C, (D, H, W), (Z, P, Q), *window, count_include_pad, divisor_override)


@functools.lru_cache(maxsize=4096)
def adaptive_pool(input_shape: Sequence[int], output_size: Triple) -> AdaptivePool:
    """The checked problem; raises RuntimeError as torch does."""
    check_adaptive(input_shape, output_size)
    N, C, D, H, W = input_shape
    return AdaptivePool(N, C, (D, H, W), output_size)
