"""Minimum cost of a pooling and cost of a plan, predicted without a GPU. Imports neither torch nor Triton."""

from __future__ import annotations

import enum
import math

from gpukern.ops._pool2d.planner import PoolPlan
from gpukern.ops._pool2d.problem import AdaptiveProblem, PoolProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.roofline import Cost, Work, in_waves, window_reads


class Pooling(enum.Enum):
    """The computation; the values are the names of the launching functions."""

    AVG = "avg_pool2d"
    AVG_GRAD = "avg_pool2d_backward"
    MAX = "max_pool2d"
    MAX_WITH_TAPS = "max_pool2d_with_taps"
    MAX_GRAD = "max_pool2d_backward"


def work(problem: PoolProblem | AdaptiveProblem, pooling: Pooling, itemsize: int) -> Work:
    """One pass over x and y, or dy and dx, and one operation for each element of each window.

    Elements outside the image do not count, nor rows and columns of x outside all windows. The forward of a
    maximum for training writes a tap for each output, a byte for windows of up to 256 elements, and its backward reads
    it to add one gradient. Operations are of float32 whatever the tensors are.
    """
    p = problem
    planes, outputs = p.N * p.C, p.P * p.Q
    rows, columns = _reads(p)
    operations = outputs if pooling is Pooling.MAX_GRAD else len(rows) * len(columns)
    if pooling in (Pooling.AVG_GRAD, Pooling.MAX_GRAD):
        inputs = p.H * p.W
    else:
        inputs = len({h for _, h in rows}) * len({w for _, w in columns})
    tap = 0
    if pooling in (Pooling.MAX_WITH_TAPS, Pooling.MAX_GRAD):
        assert isinstance(p, PoolProblem)  # adaptive pooling is of averages
        tap = 1 if math.prod(p.kernel) <= 256 else 4
    return Work(planes * operations, planes * ((inputs + outputs) * itemsize + outputs * tap), "fma")


def cost(
    problem: PoolProblem | AdaptiveProblem, pooling: Pooling, plan: PoolPlan, itemsize: int, device: DeviceSpec
) -> Cost:
    """The cost of ``plan`` on ``device``, whose peaks must be known (ValueError)."""
    if device.peaks is None:
        raise ValueError(f"the peak rates of {device.name} are not known")
    p = problem
    must = work(p, pooling, itemsize)
    backward = pooling in (Pooling.AVG_GRAD, Pooling.MAX_GRAD)
    steps = math.prod(plan.owners if backward else plan.window)
    pixels = p.N * (p.H * p.W if backward else p.P * p.Q)
    tile = plan.tile
    if pooling is Pooling.AVG and plan.whole_window:
        # The tile's pixels are positions in one window, so many at a time.
        tile = plan.whole_window
        tiles, steps = pixels, cdiv(steps, tile.pixels)
    else:
        tiles = cdiv(pixels, tile.pixels)
    tiles *= cdiv(p.C, tile.channels)
    # Without dy, dx is filled with zeros.
    launched = tiles > 0 and p.P * p.Q > 0
    tiles *= launched
    operations = steps * tile.channels * tile.pixels
    compute = in_waves([(tiles, operations)], device.sm_count) / device.peaks.matrix_rates["fma"]
    return Cost(
        tiles=tiles,
        waves=tiles / device.sm_count,
        efficiency=must.flops / (tiles * operations) if tiles else 1.0,
        bytes=must.bytes,
        launches=int(launched),
        compute=compute,
        seconds=max(compute, must.bytes / device.peaks.bandwidth),
    )


def _reads(p: PoolProblem | AdaptiveProblem) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Reads along rows and columns: every (output, input) where a window overlaps the image."""
    if isinstance(p, AdaptiveProblem):
        return tuple(
            tuple((o, i) for o in range(outputs) for i in range(o * size // outputs, cdiv((o + 1) * size, outputs)))
            for outputs, size in ((p.P, p.H), (p.Q, p.W))
        )
    return tuple(
        window_reads(*dimension)
        for dimension in zip((p.H, p.W), (p.P, p.Q), p.kernel, p.stride, p.dilation, p.padding, strict=True)
    )
