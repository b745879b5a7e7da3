"""Optimizers of the comparison, what PyTorch does in a step of one, and steps of ours that launch nothing.

PyTorch's launches are counted, not estimated: of the operations of its own code for a step, seen as they are
dispatched, and of the way MultiTensorApply.cuh packs tensors and chunks of them into launches. That has two limits: of
4 KB of arguments, and of the 32 KB that builds for CUDA 13 use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gpukern.optim as optim
from gpukern.optim._fused.param_state import kept
from gpukern.optim._fused.tensor_group import programs_from
from gpukern.runtime.mode import Mode, force_mode
from models.zoo import network

#: Tensors of a launch by how many belong to each element, with a list of numbers beside them if only one, and chunks.
LIMITS = {"4 KB": ((110, 64, 48, 36, 30), 96, 320), "32 KB": ((770, 448, 336, 252, 210), 672, 2240)}
_CHUNK = 65536
#: PyTorch's ways, by its names of them.
WAYS = ("single", "foreach", "fused")

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 1e-3}),
    "SGD, momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "Adagrad": ("Adagrad", {}),
    "RMSprop": ("RMSprop", {}),
    "RMSprop, centered, momentum": ("RMSprop", {"centered": True, "momentum": 0.9}),
    "Adam": ("Adam", {}),
    "Adam, amsgrad": ("Adam", {"amsgrad": True}),
    "AdamW": ("AdamW", {}),
    "Lion": ("Lion", {}),
    "LARS": ("LARS", {"momentum": 0.9}),
    "LAMB": ("LAMB", {}),
}


#: A language model of 1.1 billion parameters.
LLAMA = "llama"


def shapes(model: str) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of a network of models/zoo.py, or of :data:`LLAMA`."""
    if model != LLAMA:
        with torch.device("meta"):
            return [tuple(parameter.shape) for parameter in network(model).make().parameters()]
    layer = [(2048, 2048), (256, 2048), (256, 2048), (2048, 2048), *[(5632, 2048)] * 2, (2048, 5632), (2048,), (2048,)]
    return [(32000, 2048), *layer * 22, (2048,), (32000, 2048)]


#: Sizes of tensors.
Sizes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Tensors:
    """Parameters of ones with gradients of ones. ``groups``: each with its own weight decay. ``bucket``: the gradients
    lie one behind the other in memory, as DistributedDataParallel leaves them; after one number, so that none is
    aligned to more."""

    sizes: Sizes
    groups: bool = False
    bucket: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def made(self) -> list[torch.nn.Parameter]:
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        parameters = [torch.nn.Parameter(torch.ones(size, **like)) for size in self.sizes]
        if self.bucket:
            counts = [parameter.numel() for parameter in parameters]
            _, *gradients = torch.ones(1 + sum(counts), **like).split([1, *counts])
        else:
            gradients = [torch.ones_like(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view(parameter.shape)
        return parameters


def ones(name: str, tensors: Tensors, module: Any, way: str = "") -> tuple[Any, list[torch.nn.Parameter]]:
    """(optimizer, its parameters) of ``torch.optim`` or ours."""
    kind, options = OPTIMIZERS[name]
    parameters = tensors.made()
    chosen = {"foreach": way == "foreach"} | ({"fused": True, "foreach": None} if way == "fused" else {})
    decays = [{"params": [p], "weight_decay": n * 1e-6} for n, p in enumerate(parameters)]
    given = decays if tensors.groups else parameters
    return getattr(module, kind)(given, **options, **(chosen if way else {})), parameters


def has(name: str, way: str) -> bool:
    kind = getattr(torch.optim, OPTIMIZERS[name][0], None)
    return kind is not None and (way != "fused" or kind is not torch.optim.RMSprop)


def floor(name: str, tensors: Tensors) -> int:
    """Bytes that any step must read and write: the moments are of the parameters' dtype."""
    kind, options = OPTIMIZERS[name]
    optimizer = getattr(optim, kind)([torch.nn.Parameter(torch.zeros(1))], **options)
    (group,) = optimizer.param_groups
    states = sum(kept(optimizer._rule, optimizer._hyperparameters.of(group)[1]))
    return tensors.dtype.itemsize * (3 + 2 * states) * sum(torch.Size(size).numel() for size in tensors.sizes)


# ---- what PyTorch does in a step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """``tensors`` of each element that it takes or makes, ``reads`` and ``writes`` of them.

    ``lists``: it takes lists of tensors, ``numbers``: and a list of numbers. ``counts``: its tensors are numbers of
    steps.
    """

    tensors: int
    reads: int
    writes: int
    lists: bool
    numbers: bool = False
    counts: bool = False


class Recorder(TorchDispatchMode):
    """Collects what is dispatched, but for views and what is done with Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        schema = function._schema
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | (kwargs or {})
        taken = {name: value for name, value in given.items() if _tensors(value)}
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        made = int(not written and bool(_tensors(result)))
        if taken and not (made and any(r.alias_info is not None for r in schema.returns)):
            self.operations.append(_operation(function, taken, given, written, made))
        return result


def _operation(function: Any, taken: dict, given: dict, written: set[str], made: int) -> Operation:
    counts = all(tensor.dim() == 0 for value in taken.values() for tensor in _tensors(value))
    # The numbers of steps beside tensors are read and not counted; gradients are written only where they are unscaled.
    names = [name for name, value in taken.items() if counts or _tensors(value)[0].dim()]
    writes = sum(name in written and name != "grads" for name in names) + made
    reads = sum(name != "out" for name in names)
    lists = any(isinstance(value, (list, tuple)) for value in taken.values())
    numbers = any(isinstance(v, (list, tuple)) and v and isinstance(v[0], (int, float)) for v in given.values())
    return Operation(len(names) + made, reads, writes, lists, numbers, counts)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)]


def operations(name: str, way: str, tensors: int) -> list[Operation]:
    """Record PyTorch's second step, for parameters of one element. A step number on the CPU costs no launch."""
    optimizer, _ = ones(name, Tensors([(1,)] * tensors), torch.optim, way)
    optimizer.step()
    with Recorder() as recorder:
        optimizer.step()
    return [each for each in recorder.operations if way == "fused" or not each.counts]


def launches(operation: Operation, sizes: Sequence[int], limit: str) -> int:
    """Count the launches of one operation on tensors of these sizes."""
    if not operation.lists:
        return 1
    most, most_with_numbers, blocks = LIMITS[limit]
    tensors = most_with_numbers if operation.numbers and operation.tensors == 1 else most[operation.tensors - 1]
    count = in_launch = in_blocks = 0
    for size in [1] * len(sizes) if operation.counts else sizes:
        in_launch += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(chunks):
            in_blocks += 1
            ends = chunk == chunks - 1
            if in_blocks == blocks or (ends and in_launch == tensors):
                count, in_blocks, in_launch = count + 1, 0, 0 if ends else 1
    return count + (in_blocks > 0)


# ---- steps that launch nothing --------------------------------------------------------------------------------------


class Nothing:
    """Stands in for compiled kernels, and counts launches."""

    launched: list[str]

    def __init__(self, *_: Any) -> None:
        Nothing.launched = []

    def launch(self, kernel: str, blocks: int, arguments: Any) -> None:
        Nothing.launched.append(kernel)


@contextlib.contextmanager
def stubbed_launch() -> Iterator[None]:
    """Take the kernels' path on CPU tensors; a launch does nothing."""
    with programs_from(Nothing), force_mode(Mode.KERNELS):
        yield
