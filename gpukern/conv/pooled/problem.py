"""The max pool that a convolution's epilogue can compute, as a separate problem."""

from __future__ import annotations

from gpukern.conv.problem import ConvProblem
from gpukern.ops._pool2d.problem import PoolProblem, pool_problem

#: kernel, stride, padding, dilation, ceil_mode.
POOL_WINDOWS = (2, 2), (2, 2), (0, 0), (1, 1), False


def windows_of(problem: ConvProblem) -> PoolProblem:
    """Return the pool of the convolution's output; RuntimeError, as torch's, if that is smaller than a window."""
    return pool_problem((problem.N, problem.K, problem.P, problem.Q), *POOL_WINDOWS)
