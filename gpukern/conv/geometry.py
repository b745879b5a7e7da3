"""Geometry of one dimension of a convolution: windows, stride phases, pixels. Imports neither torch nor Triton."""

from __future__ import annotations

from typing import NamedTuple

from gpukern.conv.plan import Direction
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.integers import cdiv


class Dimension(NamedTuple):
    """Rows or columns; ``before`` is the padding above or to the left."""

    inputs: int
    outputs: int
    taps: int
    stride: int
    dilation: int
    before: int


def dimensions(p: ConvProblem) -> tuple[Dimension, Dimension]:
    return (
        Dimension(p.H, p.P, p.R, p.stride[0], p.dilation[0], p.padding[0]),
        Dimension(p.W, p.Q, p.S, p.stride[1], p.dilation[1], p.padding[2]),
    )


def phases(d: Dimension) -> list[tuple[int, int]]:
    """Return (positions in dx, taps that reach each of them) by position modulo the stride."""
    return [
        (
            len(range(phase, d.inputs, d.stride)),
            sum((phase + d.before - tap * d.dilation) % d.stride == 0 for tap in range(d.taps)),
        )
        for phase in range(d.stride)
    ]


def tiled_pixels(p: ConvProblem, direction: Direction) -> tuple[int, int]:
    """Return (pixels, phases): the pixels that row tiles or the weight gradient's sum enumerate, and how many times.

    The pixels are those of y; for the input gradient those of dx in the largest of the stride's phases.
    """
    if direction is Direction.INPUT_GRAD:
        return p.N * cdiv(p.H, p.stride[0]) * cdiv(p.W, p.stride[1]), p.stride[0] * p.stride[1]
    return p.N * p.P * p.Q, 1


class Gemm(NamedTuple):
    """The matrix product [M, K] × [K, N] that each tap, group and phase of a convolution is."""

    M: int
    N: int
    K: int


def gemm_mnk(p: ConvProblem, direction: Direction) -> Gemm:
    """Return pixels × output channels, summed over input channels; weight gradient: K/G × C/G, summed over pixels."""
    pixels, _ = tiled_pixels(p, direction)
    return {
        Direction.FORWARD: Gemm(pixels, p.group_outputs, p.group_inputs),
        Direction.INPUT_GRAD: Gemm(pixels, p.group_inputs, p.group_outputs),
        Direction.WEIGHT_GRAD: Gemm(p.group_outputs, p.group_inputs, pixels),
    }[direction]


def channels_of(p: ConvProblem, direction: Direction) -> tuple[int, int, int]:
    """Return the channels of first, second and output; see :class:`gpukern.conv.plan.Operands`."""
    x, w, y = p.C, p.group_inputs, p.K
    return {
        Direction.FORWARD: (x, w, y),
        Direction.INPUT_GRAD: (y, w, x),
        Direction.WEIGHT_GRAD: (y, x, w),
    }[direction]
