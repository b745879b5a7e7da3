"""The max pool that a convolution's epilogue can compute, as a problem of its own."""

from __future__ import annotations

from gpukern.conv.problem import ConvProblem
from gpukern.ops._pool2d.problem import PoolProblem, pool_problem

#: kernel, stride, padding, dilation, ceil_mode.
POOL_WINDOWS = (2, 2), (2, 2), (0, 0), (1, 1), False


def windows_of(problem: ConvProblem) -> PoolProblem:
    """The pool of what the convolution makes; RuntimeError, as torch's, where that is less than a window."""
    return pool_problem((problem.N, problem.K, problem.P, problem.Q), *POOL_WINDOWS)
