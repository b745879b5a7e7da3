"""The record of steps that rules add to, and what all rules share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gpukern.densify.epilogues import Held
from gpukern.densify.errors import DenseError
from gpukern.densify.steps import Crop, Operation, Step
from gpukern.densify.values import Pair, Value, why_not_together


class Recorder:
    """The steps so far, for a model whose tensors have ``names``. ``layer``: what is being read now, for messages."""

    def __init__(self, names: dict[int, str], input: Value) -> None:
        self.steps: list[Step] = []
        self.input = input
        self.layer, self.kind = "", ""
        self._names = names
        self._slots = itertools.count(1)

    def add(
        self,
        operation: Operation,
        inputs: Sequence[Value],
        result: Value,
        *,
        kernel: Pair | None = None,
        multiply_adds: int = 0,
    ) -> Value:
        """Add a step; return ``result`` in the slot of its own that it gets."""
        slot = next(self._slots)
        made = replace(result, slot=slot, memory=slot)
        dilation = inputs[0].dilation if kernel is not None else None
        slots = tuple(value.slot for value in inputs)
        kind = self.kind or type(operation).__name__
        self.steps.append(Step(self.layer, kind, operation, slots, made, kernel, dilation, multiply_adds))
        return made

    def view(self, operation: Operation, input: Value, result: Value) -> Value:
        """:meth:`add` for what has the memory of ``input``."""
        return replace(self.add(operation, (input,), result), memory=input.memory)

    def exact(self, value: Value) -> Value:
        """``value`` without rows and columns that no patch reads."""
        if value.excess == (0, 0):
            return value
        layer, kind = self.layer, self.kind
        self.kind = "Crop"
        rows, columns = value.excess
        result = self.view(Crop((0, rows), (0, columns)), value, replace(value, excess=(0, 0)))
        self.layer, self.kind = layer, kind
        return result

    def together(self, values: Sequence[Value]) -> tuple[list[Value], Value]:
        """Values that are combined element by element, made equally large; what any such combination is like."""
        why = why_not_together(values)
        if why:
            raise DenseError(why)
        if len({value.excess for value in values}) > 1:
            values = [self.exact(value) for value in values]
        reach = max(value.reach[0] for value in values), max(value.reach[1] for value in values)
        return list(values), replace(values[0], reach=reach)

    def held(self, tensor: Any, what: str) -> Held | None:
        """A tensor of the model. DenseError for one that the model computes anew in each forward."""
        if tensor is None or isinstance(tensor, Held):
            return tensor
        if isinstance(tensor, Value):
            raise DenseError(f"its {what} depends on the image")
        name = self._names.get(id(tensor))
        if name is None:
            raise DenseError(
                f"its {what} is computed in forward: torch.nn.utils.parametrize computes a weight where the network "
                "can find it"
            )
        return Held(name)

    def is_held(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._names
