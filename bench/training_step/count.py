"""Counters of launches, of what they move, and of what autograd saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.training_step.operators import passes
from gpukern.runtime.accesses import AccessFinder, tensors
from gpukern.runtime.compile_only import Launch, record_launches
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.operator import OPERATORS, counted_by
from gpukern.runtime.transforms import tuples


class Touched(NamedTuple):
    """A tensor that a launch reads or writes. Not the tensor itself: autograd copies gradients that others hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    #: Of distinct elements: a broadcast dimension has one.
    bytes: int
    is_parameter: bool


class Pass(NamedTuple):
    """One launch, of a kernel of ours or for an operator of PyTorch, by its name."""

    name: str
    is_ours: bool
    touched: tuple[Touched, ...]


@dataclass
class Counter:
    """What runs inside :meth:`running`, and what autograd saves inside :meth:`saving`.

    Parameters and buffers of ``model`` are no activations.
    """

    model: torch.nn.Module
    launched: list[Pass] = field(default_factory=list)
    #: Shapes of the results of PyTorch's operators.
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    #: Bytes of each storage that was saved.
    saved: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._parameters = {_storage(each) for each in (*self.model.parameters(), *self.model.buffers())}
        self._accesses = AccessFinder()

    @contextlib.contextmanager
    def running(self, device: DeviceSpec | None) -> Iterator[None]:
        """Count PyTorch's operators and, with a device, record the launches that it would get."""
        with contextlib.ExitStack() as stack:
            if device is not None:
                stack.enter_context(record_launches(device, self._launch))
            stack.enter_context(counted_by(_Operators(self._operator)))
            yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield

    def _launch(self, launch: Launch) -> None:
        given, found = tensors(launch), self._accesses(launch)
        self._add(launch.kernel, True, *([given[i] for i in sorted(which)] for which in found))

    def _operator(self, operator: Any, arguments: Sequence[Any], result: Any) -> None:
        for each in passes(operator, arguments, result):
            self._add(str(operator.overloadpacket), False, each.reads, each.writes)
        results = result if isinstance(result, (tuple, list)) else [result]
        self.shapes |= {tuple(each.shape) for each in results if isinstance(each, torch.Tensor)}

    def _add(self, name: str, is_ours: bool, *groups: Sequence[torch.Tensor]) -> None:
        """Within the reads and within the writes, the same elements count once."""
        unlike = [{(each.data_ptr(), _storage(each), each.shape): each for each in group}.values() for group in groups]
        touched = tuple(self._touched(each) for group in unlike for each in group)
        self.launched.append(Pass(name, is_ours, touched))

    def _touched(self, tensor: torch.Tensor) -> Touched:
        distinct = torch.Size(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride).numel()
        moved = tensor.itemsize * (distinct if tensor.numel() else 0)
        return Touched(tuple(tensor.shape), tensor.dtype, moved, _storage(tensor) in self._parameters)

    def _save(self, tensor: torch.Tensor) -> torch.Tensor:
        # What is saved stays alive until the backward pass, so that no other storage gets its number.
        if (storage := _storage(tensor)) not in self._parameters:
            self.saved[storage] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Operators(TorchDispatchMode):
    """Tells ``seen`` of each operator of ATen after it ran, with its arguments by position: no tensor has a name."""

    def __init__(self, seen: Callable[[Any, Sequence[Any], Any], None]) -> None:
        super().__init__()
        self._seen = seen

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compiled code is taken also under this mode."""
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in OPERATORS:
            with self:  # a mode does not see what a registered operator calls
                return OPERATORS[function]._forward(*tuples(args))
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten":
            self._seen(function, args, result)
        return result


class Activations:
    """Tells activations and their gradients from all else: see the package's page."""

    def __init__(self, shapes: set[tuple[int, ...]], batch: int, dtype: torch.dtype, model: torch.nn.Module) -> None:
        self._shapes = {shape for shape in shapes if len(shape) > 1 and shape[0] == batch}
        self._sizes = {torch.Size(shape).numel() for shape in self._shapes}
        self._parameters = {tuple(each.shape) for each in model.parameters()}
        self._batch, self._dtype = batch, dtype

    def __contains__(self, tensor: Touched) -> bool:
        if tensor.is_parameter or (tensor.dtype.is_floating_point and tensor.dtype is not self._dtype):
            return False
        if tensor.shape in self._parameters or len(tensor.shape) < 2:
            return False
        size = torch.Size(tensor.shape).numel()
        return tensor.shape in self._shapes or (size in self._sizes and tensor.shape[0] % self._batch == 0)


@dataclass(frozen=True)
class Traffic:
    """Launches of a part of a step, ours and PyTorch's, and the bytes that they read and write."""

    kernels: int
    operators: int
    activations: int
    other: int

    @classmethod
    def of(cls, launched: Sequence[Pass], activations: Activations) -> Traffic:
        kernels = sum(each.is_ours for each in launched)
        touched = [tensor for each in launched for tensor in each.touched]
        total = sum(tensor.bytes for tensor in touched)
        images = sum(tensor.bytes for tensor in touched if tensor in activations)
        return cls(kernels, len(launched) - kernels, images, total - images)

    @property
    def launches(self) -> int:
        return self.kernels + self.operators

    @property
    def bytes(self) -> int:
        return self.activations + self.other

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.kernels + other.kernels,
            self.operators + other.operators,
            self.activations + other.activations,
            self.other + other.other,
        )
