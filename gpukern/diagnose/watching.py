"""Hooks on the innermost modules of a model, and on the activation functions that a forward calls by itself."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gpukern.diagnose.activation_kinds import FUNCTIONS, can_die, kind_of, saturated
from gpukern.diagnose.calling import floating
from gpukern.diagnose.distribution import Gathering


@dataclass
class Watched:
    """What is gathered of one layer, over all its calls."""

    name: str
    type: str
    kind: str
    layer: nn.Module | None
    calls: int = 0
    output: Gathering = field(default_factory=Gathering)
    gradient: Gathering = field(default_factory=Gathering)
    weight_gradient: Gathering = field(default_factory=Gathering)
    saturated: int | None = None
    #: For each unit, whether any of its outputs was not zero.
    alive: torch.Tensor | None = None
    #: Output values of one unit.
    observed: int = 0


class _Functions(TorchFunctionMode):
    """Tells of every call of an activation function."""

    def __init__(self, told: Callable[[str, torch.Tensor], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FUNCTIONS and isinstance(result, torch.Tensor):
            self._told(FUNCTIONS[func], result)
        return result


class Watcher:
    """Gathers statistics of a model's layers while :meth:`watching`, in memory that does not grow with the batches."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[tuple[str, int], Watched] = {}
        #: The modules whose forward runs: name, whether another one ran inside, functions called by kind.
        self._stack: list[tuple[str, nn.Module, list[bool], Counter[str]]] = []
        #: What modules of other libraries compute that are an activation and nothing else.
        self._kinds: dict[str, str] = {}
        self._sequences = {
            module.out_channels for module in model.modules() if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d))
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for name, module in self.model.named_modules():
                enter = functools.partial(self._enter, name)
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    handles.append(parameter.register_hook(functools.partial(self._weight_gradient, name)))
            with _Functions(self._function):
                yield
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple) -> None:
        if self._stack:
            self._stack[-1][2][0] = True
        self._stack.append((name, module, [False], Counter()))

    def _leave(self, module: nn.Module, args: tuple, result: Any) -> None:
        if not self._stack or self._stack[-1][1] is not module:
            return  # its forward ended with an error
        name, _, has_inner, _ = self._stack.pop()
        made = floating(result)
        if made and not has_inner[0]:
            kind = kind_of(module) or self._kinds.get(name, "")
            self._see(self._watched((name, 0), name, type(module).__name__, kind, module), made[0])

    def _function(self, kind: str, result: torch.Tensor) -> None:
        name, module, _, calls = self._stack[-1] if self._stack else ("", self.model, [], Counter())
        if kind_of(module) or not result.is_floating_point():
            return  # it is what the layer computes with
        if self._stack and not any(True for _ in module.parameters()) and not any(True for _ in module.children()):
            self._kinds[name] = kind
            return
        calls[kind] += 1
        number = sum(calls.values())
        shown = f"{name}.{kind.lower()}" if name else kind.lower()
        shown += f" ({number})" if number > 1 else ""
        self._see(self._watched((name, number), shown, f"{kind} (function)", kind, None), result)

    def _watched(self, key: tuple[str, int], name: str, type: str, kind: str, layer: nn.Module | None) -> Watched:
        if key not in self.layers:
            self.layers[key] = Watched(name, type, kind, layer)
        return self.layers[key]

    def _see(self, watched: Watched, output: torch.Tensor) -> None:
        watched.calls += 1
        watched.output.add(output)
        far = saturated(watched.kind, watched.layer, output)
        if far is not None:
            watched.saturated = (watched.saturated or 0) + far
        if can_die(watched.kind) and output.dim() > 1 and output.numel():
            self._see_units(watched, output.detach())
        if output.requires_grad:
            output.register_hook(watched.gradient.add)

    def _see_units(self, watched: Watched, output: torch.Tensor) -> None:
        """Note which units are not zero: channels of images, features of vectors and tokens."""
        of_sequence = output.dim() == 3 and output.shape[1] not in self._sequences
        units = output.movedim(-1 if of_sequence else 1, 0).flatten(1)
        alive = (units != 0).any(1)
        if watched.alive is None or len(watched.alive) != len(alive):
            watched.alive = alive
        else:
            watched.alive |= alive
        watched.observed += units.shape[1]

    def _weight_gradient(self, name: str, gradient: torch.Tensor) -> None:
        owner, _, own = name.rpartition(".")
        if own == "weight" and (owner, 0) in self.layers:
            self.layers[owner, 0].weight_gradient.add(gradient)
