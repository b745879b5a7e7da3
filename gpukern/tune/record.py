"""Which launches a model meets: it runs once on gpukern's kernels, and every launch that is looked up is noted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from gpukern.conv import prepare as common
from gpukern.conv import request
from gpukern.conv.layouts import Shape, Strides, dense_strides
from gpukern.conv.plan import Direction, Operands
from gpukern.conv.problem import ConvProblem
from gpukern.convert import convert
from gpukern.explain.formatting import describe
from gpukern.runtime.strides import is_channels_last


class Call(NamedTuple):
    """What :func:`gpukern.conv.prepare.prepare` is asked for, but for device, epilogue and plan."""

    problem: ConvProblem
    direction: Direction
    first: Strides
    second: Strides
    channels_last: bool | None
    aligned: bool
    dtype: torch.dtype
    precision: str

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """Of first, second and output."""
        return request.shapes(self.problem, self.direction)

    @property
    def operands(self) -> Operands:
        first, second, output = self.shapes
        channels_last = self.channels_last
        if channels_last is None:
            channels_last = is_channels_last(first, self.first) or is_channels_last(second, self.second)
        strides = self.first, self.second, dense_strides(output, channels_last)
        return request.operands_of(self.problem, self.direction, strides, self.aligned, self.dtype, self.precision)

    def __str__(self) -> str:
        dtype = "tf32" if self.precision == "tf32" else str(self.dtype).removeprefix("torch.")
        return f"{describe(self.problem)}, {self.direction.value}, {dtype}"


def calls_of(
    model: torch.nn.Module,
    inputs: Sequence[Any],
    directions: Collection[Direction] = tuple(Direction),
    *,
    input_gradient: bool = False,
) -> tuple[Call, ...]:
    """Every launch of a copy of ``model`` on ``inputs`` in one of ``directions``, each once.

    ``input_gradient``: whether that of ``inputs`` is wanted too, which training does not ask of a first layer.
    """
    model = convert(copy.deepcopy(model), inplace=True)
    backward = any(direction is not Direction.FORWARD for direction in directions)
    if backward and input_gradient:
        inputs = [value.detach().requires_grad_() for value in inputs]
    with _recording() as calls, torch.set_grad_enabled(backward):
        outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor)]
        outputs = [output for output in outputs if output.requires_grad]
        if outputs:
            # Random and laid out like the outputs, as a loss would give them; a sum would give one number expanded.
            torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    # A convolution with a max pool in the same launch is not measured: its plan is expected, see pooled/plan.py.
    return tuple(
        call
        for call in calls
        if call.direction in directions and not call.problem.pool and not any(0 in s for s in call.shapes)
    )


@contextlib.contextmanager
def _recording() -> Iterator[dict[Call, None]]:
    from gpukern.conv import launch as convolution  # needs Triton
    from gpukern.ops._linear import launch as linear

    calls: dict[Call, None] = {}

    def prepare(*arguments: Any) -> request.Prepared:
        calls.setdefault(Call(*arguments[: len(Call._fields)]))
        return common.prepare(*arguments)

    convolution.prepare = linear.prepare = prepare
    try:
        yield calls
    finally:
        convolution.prepare = linear.prepare = common.prepare
