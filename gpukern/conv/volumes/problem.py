"""The 3-D convolution as a problem: its sizes, checked once.

Names: batch N, input channels C, input size D × H × W, output channels K, kernel size T × R × S, output size Z × P × Q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpukern.conv.plan import Direction
from gpukern.conv.problem import ConvProblem, output_sizes, transposed_sizes
from gpukern.runtime.integers import cdiv

Triple = tuple[int, int, int]
#: front, back, top, bottom, left, right
Sides = tuple[int, int, int, int, int, int]


# eq=False: as ConvProblem.
@dataclass(frozen=True, eq=False)
class VolumeProblem:
    """A 3-D convolution (cross-correlation) with checked sizes, as :class:`gpukern.conv.problem.ConvProblem`.

    ``image`` is D × H × W, ``taps`` T × R × S, ``result`` Z × P × Q.
    """

    N: int
    C: int
    image: Triple
    K: int
    taps: Triple
    result: Triple
    stride: Triple
    padding: Sides
    dilation: Triple
    groups: int

    @property
    def group_inputs(self) -> int:
        """Number of input channels that a group reads."""
        return self.C // self.groups

    @property
    def group_outputs(self) -> int:
        """Number of output channels that a group computes."""
        return self.K // self.groups

    @property
    def before(self) -> Triple:
        """The padding in front, above and to the left."""
        front, _, top, _, left, _ = self.padding
        return front, top, left

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of x, w and y."""
        return (self.N, self.C, *self.image), (self.K, self.group_inputs, *self.taps), (self.N, self.K, *self.result)


@functools.lru_cache(maxsize=4096)
def volume_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Triple,
    padding: Sides,
    dilation: Triple,
    groups: int,
) -> VolumeProblem:
    """Return the checked problem; raise RuntimeError, as torch does, for sizes that do not fit together."""
    Z, P, Q = output_sizes(input_shape, weight_shape, bias_shape, stride, padding, dilation, groups)
    N, C, *image = input_shape
    K, _, *taps = weight_shape
    return VolumeProblem(
        N, C, (*image,), K, (*taps,), (Z, P, Q), (*stride,), (*padding,), (*dilation,), groups  # type: ignore[arg-type]
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def transposed_volume_problem(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Triple,
    padding: Triple,
    output_padding: Triple,
    dilation: Triple,
    groups: int,
) -> VolumeProblem:
    """Return the convolution whose input gradient is the transposed one of [N, K, Z, P, Q] with [K, C/groups, …]."""
    geometry = stride, padding, output_padding, dilation, groups
    D, H, W = transposed_sizes(input_shape, weight_shape, bias_shape, *geometry)
    N, K, Z, P, Q = input_shape
    _, group_outputs, T, R, S = weight_shape
    front, top, left = padding
    both = front, front, top, top, left, left
    C = group_outputs * groups
    return VolumeProblem(N, C, (D, H, W), K, (T, R, S), (Z, P, Q), (*stride,), both, (*dilation,), groups)


def tiled_voxels(p: VolumeProblem, direction: Direction) -> tuple[int, int]:
    """Return (voxels, phases) as :func:`gpukern.conv.geometry.tiled_pixels` does for images."""
    if direction is Direction.INPUT_GRAD:
        return p.N * math.prod(map(cdiv, p.image, p.stride)), math.prod(p.stride)
    return p.N * math.prod(p.result), 1


def as_images(p: VolumeProblem) -> ConvProblem:
    """Return the 2-D convolution that has the same tiles, taps and sums, for planning: planes below one another."""
    (D, H, W), (T, R, S), (Z, P, Q) = p.image, p.taps, p.result
    stride, dilation = (p.stride[0] * p.stride[1], p.stride[2]), (1, p.dilation[2])
    _, _, _, _, left, right = p.padding
    return ConvProblem(
        p.N, p.C, D * H, W, p.K, T * R, S, Z * P, Q, stride, (0, 0, left, right), dilation, p.groups
    )  # fmt: skip
