"""Recorder of a forward: a row for every call of a layer, and for the products that no layer owns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from gpukern.summary import layers
from gpukern.summary.products import Products, in_parts
from gpukern.summary.table import Row, Size
from gpukern.summary.views import ALL, SOME, View, ViewsBetweenLayers, tensors, through_layer


@dataclass
class _Line:
    """A line that becomes a row."""

    name: str
    layer: torch.nn.Module
    #: A layer's own row. Else that of what a module with layers inside multiplies between them.
    whole: bool
    output_size: Size = ()
    products: int = 0
    view: View | None = None


@dataclass
class _Call:
    """A module whose forward runs."""

    name: str
    module: torch.nn.Module
    whole: bool
    #: Its row, once there is one.
    line: _Line | None = None


class Recorder:
    """Makes the rows, and tracks the receptive fields of each tensor's elements in the network's ``inputs``."""

    def __init__(self, model: torch.nn.Module, inputs: Sequence[torch.Tensor], batch: int) -> None:
        self.notes: list[str] = []
        self._model, self._batch = model, batch
        self._features = inputs[0].dim() <= 2
        self._views = WeakTensorKeyDictionary()
        self._inputs = []
        for tensor in inputs:
            ones = (1,) * (tensor.dim() - 2)
            self._views[tensor] = View(ones, ones) if ones else None
            self._inputs.append(Row("", "Input", tuple(tensor.shape[1:]), receptive_field=ones or None))
        self._lines: list[_Line] = []
        self._calls: list[_Call] = []
        self._called: set[torch.nn.Module] = set()

    # ---- while it runs ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self._model.named_modules():
                if _is_watched(name, module):
                    handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
                    handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
            products = Products(self._count)
            with in_parts(), ViewsBetweenLayers(self._views), products:
                yield
            self.notes.extend(
                f"There is no formula for {name}: if it multiplies matrices, that is not counted."
                for name in products.unknown
            )
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: torch.nn.Module, args: tuple) -> None:
        self._called.add(module)
        self._calls.append(_Call(name, module, layers.is_whole(module)))

    def _count(self, products: int, result: Any) -> None:
        if not self._calls:
            return  # a hook of the user's
        call = self._calls[-1]
        # A layer with layers inside has one row; what other modules multiply stands where it happens.
        again = call.whole or _is_layer(call.module) or (self._lines and self._lines[-1] is call.line)
        if call.line is None or not again:
            call.line = _Line(call.name, call.module, call.whole or _is_layer(call.module))
            if not call.whole:
                self._lines.append(call.line)
        call.line.products += products
        output = tensors(result)
        if not call.whole and output and output[0].dim() > 1 and output[0].shape[0] == self._batch:
            call.line.output_size = tuple(output[0].shape[1:])

    def _leave(self, module: torch.nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        call = self._calls.pop()
        given, made = tensors((args, kwargs)), tensors(result)
        if not call.whole:
            if call.line is not None and call.line.whole and made:
                call.line.output_size, call.line.view = tuple(made[0].shape[1:]), self._views.get(made[0])
            return
        if not (given and made) and call.line is None:
            return
        line = call.line or _Line(call.name, module, True)
        self._lines.append(line)
        if given and made:
            self._see(line, given[0], made)

    def _see(self, line: _Line, input: torch.Tensor, made: list[torch.Tensor]) -> None:
        window = layers.window(line.layer)
        line.output_size = tuple(made[0].shape[1:])
        line.view = through_layer(line.layer, input, made[0], self._views, self._features)
        for tensor in made:
            self._views[tensor] = line.view
        if window is not None and input.dim() > len(window.kernel):
            sizes = tuple(input.shape[-len(window.kernel) :])
            self.notes.extend(layers.misfits(layers.describe(line.layer), window, sizes))

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def rows(self) -> tuple[Row, ...]:
        counted: set[torch.nn.Parameter] = set()
        return (*self._inputs, *(self._row(line, counted) for line in self._lines))

    def _row(self, line: _Line, counted: set[torch.nn.Parameter]) -> Row:
        # Layers inside that are not called are read by it, as attention reads its projection.
        owners = [module for module in line.layer.modules() if module is line.layer or module not in self._called]
        own = {parameter for module in owners for parameter in layers.parameters(module)} if line.whole else set()
        new = own - counted
        counted.update(new)
        return Row(
            line.name,
            layers.describe(line.layer) if line.whole else "(functional)",
            line.output_size,
            layers.weight_size(line.layer) if line.whole else (),
            sum(parameter.numel() for parameter in new),
            round(line.products / self._batch),
            "all" if line.view == ALL else None if line.view in (None, SOME) else line.view.size,
        )


def _is_watched(name: str, module: torch.nn.Module) -> bool:
    """Whether a module is recorded: not one that computes a layer's weights, nor TorchScript's, which has no hooks."""
    return "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule)


def _is_layer(module: torch.nn.Module) -> bool:
    """Whether a module with modules inside is a layer itself, with weights of its own and a row."""
    return not layers.is_whole(module) and any(True for _ in module.parameters(recurse=False))
