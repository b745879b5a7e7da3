"""Recording of a model's launches: it runs once on gpukern's kernels, and every look-up of a launch is recorded."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern import conv
from gpukern.conv import Direction
from gpukern.convert import convert
from gpukern.explain.formatting import describe


class Call(conv.Call):
    """A launch of a model, with its description."""

    __slots__ = ()

    def __str__(self) -> str:
        dtype = "tf32" if self.precision == "tf32" else self.operands.types
        return f"{describe(self.problem)}, {self.direction.value}, {dtype}"


def calls_of(
    model: torch.nn.Module,
    inputs: Sequence[Any],
    directions: Collection[Direction] = tuple(Direction),
    *,
    input_gradient: bool = False,
) -> tuple[Call, ...]:
    """Every launch of a copy of ``model`` on ``inputs`` in one of ``directions``, each once.

    ``input_gradient``: whether that of ``inputs`` is wanted too, which training does not need for a first layer.
    """
    model = convert(copy.deepcopy(model), inplace=True)
    backward = any(direction is not Direction.FORWARD for direction in directions)
    if backward and input_gradient:
        inputs = [value.detach().requires_grad_() for value in inputs]
    calls: dict[Call, None] = {}
    with conv.observe(lambda call, _: calls.setdefault(Call(*call))), torch.set_grad_enabled(backward):
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
