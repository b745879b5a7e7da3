"""Runs warp-specialised Gluon kernels on the CPU: the kernel's own Python source, over a model of what Hopper adds.

Triton's interpreter knows no Gluon. Here each partition of a kernel is a thread of which one runs at a time; who goes
on at a barrier, a copy or a product is drawn at random, and so is when a copy of the copy engine arrives. The model is
as unkind as the hardware may be:

- memory that was not written, and what a copy under way will overwrite, is NaN;
- products read their operands when they are issued and again when they are waited for, and a difference is an error;
  so is one in what a write-back reads;
- a barrier that gets more arrivals than it was made for, threads that all wait for one another, memory that ordinary
  code and the copy engine touch without a fence between them, and write-backs left at the end are errors.

Layouts of registers and shared memory are not modelled: those the compiler checks.
"""

from __future__ import annotations

import math
import random
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl

from gpukern.runtime.launcher import CompileTime


def run_gluon(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: CompileTime, seed: int = 0) -> None:
    """Run every program of ``kernel[grid](*arguments, *options.values, **options.keywords)``."""
    values, keywords = options
    for program in range(math.prod(grid)):
        machine = _Machine(program, math.prod(grid), keywords["num_warps"], random.Random(f"{seed} {program}"))
        machine.translate(kernel)(*map(_argument, arguments), *values)
        if machine.stores:
            raise RuntimeError("the kernel ends before its write-backs have read their tiles")


def _argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return _Descriptor(value)
    if isinstance(value, tuple):
        return type(value)(*map(_argument, value))
    return _Pointer(value.flatten(), 0) if isinstance(value, torch.Tensor) else value


_DTYPES = ("int32", "int64", "float32")
#: Whatever an activation may call: they are named in torch as in Triton.
_ELEMENTWISE = ("abs", "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "floor", "ceil", "erf", "sigmoid")


class _Value(torch.Tensor):
    """A tensor or number of the kernel: ``a += b`` makes a new one, as in Triton."""

    __iadd__, __isub__, __imul__ = torch.Tensor.__add__, torch.Tensor.__sub__, torch.Tensor.__mul__
    __iand__, __ior__, __ixor__ = torch.Tensor.__and__, torch.Tensor.__or__, torch.Tensor.__xor__


def _value(value: Any) -> _Value:
    return torch.as_tensor(value).as_subclass(_Value)


# ---- memory --------------------------------------------------------------------------------------------------------


class _Descriptor:
    def __init__(self, host: Any) -> None:
        self.tensor = host.base.as_strided(tuple(host.shape), tuple(host.strides))
        self.dtype, self.block_shape, self.layout = host.base.dtype, list(host.block_shape), None
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block_shape) * host.base.element_size())

    def _inside(self, start: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """(the part of the box that lies in the tensor, where it lies there)."""
        box, place = [], []
        for at, block, size in zip(start, self.block_shape, self.tensor.shape, strict=True):
            first, last = max(at, 0), max(min(at + block, size), max(at, 0))
            box.append(slice(first - at, last - at))
            place.append(slice(first, last))
        return tuple(box), tuple(place)

    def read(self, start: list[int]) -> torch.Tensor:
        result = torch.zeros(self.block_shape, dtype=self.dtype)
        box, place = self._inside(start)
        result[box] = self.tensor[place]
        return result

    def write(self, start: list[int], value: torch.Tensor) -> None:
        box, place = self._inside(start)
        self.tensor[place] = value[box]


@dataclass
class _Pointer:
    memory: torch.Tensor
    offset: Any

    def __add__(self, offset: Any) -> _Pointer:
        return _Pointer(self.memory, self.offset + offset)


class _Shared:
    """Shared memory, or a view of it; ``root`` is the allocation."""

    def __init__(self, value: torch.Tensor, root: _Shared | None = None) -> None:
        self.value, self.root, self.shape = value, root or self, list(value.shape)
        self.unfenced = False  # of a root: touched by ordinary code since the last fence

    def _view(self, value: torch.Tensor) -> _Shared:
        return _Shared(value, self.root)

    def index(self, i: Any) -> _Shared:
        return self._view(self.value[int(i)])

    def reshape(self, shape: tuple[int, ...]) -> _Shared:
        return self._view(self.value.view(tuple(shape)))

    def permute(self, order: tuple[int, ...]) -> _Shared:
        return self._view(self.value.permute(order))

    def slice(self, start: int, length: int, dim: int) -> _Shared:
        return self._view(self.value.narrow(dim, start, length))

    def load(self, layout: Any) -> torch.Tensor:
        self.root.unfenced = True
        return _value(self.value.clone())

    def store(self, value: torch.Tensor) -> None:
        self.root.unfenced = True
        self.value.copy_(value)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


# ---- barriers, copies, products ------------------------------------------------------------------------------------


@dataclass
class _Barrier:
    """An mbarrier: a phase is over when all have arrived and all bytes that were announced have come."""

    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, count: int = 1, announced: int = 0) -> None:
        if count > self.missing:
            raise RuntimeError("more arrivals than the barrier waits for")
        self.missing -= count
        self.bytes += announced
        self._complete()

    def come(self, nbytes: int) -> None:
        self.bytes -= nbytes
        self._complete()

    def _complete(self) -> None:
        if self.missing == self.bytes == 0:
            self.missing, self.phase = self.count, self.phase ^ 1

    def passed(self, phase: int) -> bool:
        """Whether the phase of parity ``phase`` is over; of a new barrier, that of parity 1 is."""
        return self.phase != int(phase)


class _Barriers:
    def __init__(self, count: int) -> None:
        self._barriers = [_Barrier() for _ in range(count)]
        self.shape = [count, 1]

    def index(self, i: Any) -> _Barrier:
        return self._barriers[int(i)]


@dataclass
class _Sums:
    """An accumulator and the products under way: (operands, what they held when issued)."""

    value: torch.Tensor
    pending: list[tuple[_Shared, _Shared, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def finish(self, left: int) -> None:
        while len(self.pending) > left:
            a, b, a_then, b_then = self.pending.pop(0)
            if not (_same(a.value, a_then) and _same(b.value, b_then)):
                raise RuntimeError("an operand was overwritten under a product")
            self.value = self.value + a_then.float() @ b_then.float()


class _Stop(Exception):
    """Ends the threads of a kernel that has failed."""


class _Partition:
    def __init__(self, machine: _Machine, function: Callable, arguments: tuple) -> None:
        self.ready: Callable[[], bool] = lambda: True
        self.error: BaseException | None = None
        self.done = self.stopped = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(machine, function, arguments), daemon=True)
        self._thread.start()

    def _run(self, machine: _Machine, function: Callable, arguments: tuple) -> None:
        machine.current.partition = self
        self._go.acquire()
        try:
            if not self.stopped:
                function(*arguments)
        except _Stop:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()

    def resume(self) -> None:
        self._go.release()
        self._back.acquire()
        if self.error:
            raise self.error

    def pause(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self._back.release()
        self._go.acquire()
        if self.stopped:
            raise _Stop

    def stop(self) -> None:
        self.stopped = True
        if not self.done:
            self._go.release()
        self._thread.join()


class _Machine:
    def __init__(self, program: int, programs: int, warps: int, random: random.Random) -> None:
        self.program, self.programs, self.warps, self.random = program, programs, warps, random
        self.current = threading.local()
        self.copies: list[Callable[[], None]] = []
        self.stores: list[tuple[_Descriptor, list[int], _Shared, torch.Tensor]] = []
        self.allocations: list[_Shared] = []
        self._names = self._language()

    def translate(self, function: Any) -> Callable:
        """The Python function under a jitted one, with this machine in place of the languages it is written in."""
        plain = function.fn
        names = {name: self._name(name, value) for name, value in plain.__globals__.items()}
        return types.FunctionType(plain.__code__, names | {"range": _numbers}, plain.__name__, plain.__defaults__)

    def _name(self, name: str, value: Any) -> Any:
        if name in self._names:
            return self._names[name]
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            # Translated when it is called: functions may name one another.
            return lambda *args, **kwargs: self.translate(value)(*args, **kwargs)
        return value.value if isinstance(value, tl.constexpr) else value

    def specialize(self, partitions: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        threads = [_Partition(self, *partition) for partition in partitions]
        try:
            while any(not thread.done for thread in threads):
                able = [thread.resume for thread in threads if not thread.done and thread.ready()]
                able += [self._arrive] * bool(self.copies)
                if not able:
                    raise RuntimeError("deadlock: every partition waits for a barrier")
                self.random.choice(able)()
        finally:
            for thread in threads:
                thread.stop()
        if self.copies:
            raise RuntimeError("the kernel ends before its copies have come")

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        self.current.partition.pause(ready)

    def _arrive(self) -> None:
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> _Shared | _Barriers:
        if dtype is torch.int64:
            return _Barriers(shape[0])
        memory = _Shared(torch.full(shape, math.nan, dtype=dtype))
        self.allocations.append(memory)
        return memory

    def fetch(self, source: _Descriptor, start: list, barrier: _Barrier, target: _Shared) -> None:
        self.pause()
        self._check_fenced(target)
        target.value.fill_(math.nan)
        start = [int(at) for at in start]

        def come() -> None:
            target.value.copy_(source.read(start))
            barrier.come(source.block_type.nbytes)

        self.copies.append(come)

    def write_back(self, out: _Descriptor, start: list, tile: _Shared) -> None:
        self._check_fenced(tile)
        self.stores.append((out, [int(at) for at in start], tile, tile.value.clone()))
        self.pause()

    def store_wait(self, left: int) -> None:
        while len(self.stores) > left:
            out, start, tile, then = self.stores.pop(0)
            if not _same(tile.value, then):
                raise RuntimeError("a tile was overwritten under its write-back")
            out.write(start, then)

    def fence(self) -> None:
        for memory in self.allocations:
            memory.unfenced = False

    def _check_fenced(self, memory: _Shared) -> None:
        if memory.root.unfenced:
            raise RuntimeError("the copy engine meets memory that ordinary code touched, without a fence")

    def wait(self, barrier: _Barrier, phase: Any) -> None:
        self.pause(lambda: barrier.passed(phase))

    def arrive(self, barrier: _Barrier, pred: Any = True) -> None:
        if pred:
            barrier.arrive()
        self.pause()

    def multiply(self, a: _Shared, b: _Shared, acc: _Sums, is_async: bool) -> _Sums:
        assert is_async
        acc.pending.append((a, b, a.value.clone(), b.value.clone()))
        self.pause()
        return acc

    def multiply_wait(self, left: int, deps: tuple[_Sums]) -> torch.Tensor | _Sums:
        (acc,) = deps
        acc.finish(left)
        return acc if left else acc.value

    def _language(self) -> dict[str, Any]:
        both = {
            **{name: getattr(torch, name) for name in (*_DTYPES, *_ELEMENTWISE)},
            "where": lambda condition, a, b: torch.where(_value(condition), a, b),
            "maximum": lambda a, b: torch.maximum(a, torch.as_tensor(b, dtype=a.dtype)),
            "minimum": lambda a, b: torch.minimum(a, torch.as_tensor(b, dtype=a.dtype)),
            "sum": lambda x, axis, keep_dims=False: x.sum(axis, keepdim=keep_dims),
            "broadcast_to": lambda x, shape: x.expand(shape),
            "expand_dims": lambda x, axis: x.unsqueeze(axis),
            "cast": lambda x, dtype: _value(x).to(dtype),
            "cdiv": lambda a, b: -(-a // b),
            "arange": lambda start, end, layout=None: _value(torch.arange(start, end, dtype=torch.int32)),
            "zeros": lambda shape, dtype, layout=None: _value(torch.zeros(shape, dtype=dtype)),
            "static_range": range,
            "load": _load,
            "store": _store,
            "atomic_add": _atomic_add,
            "debug_barrier": lambda: None,
        }
        gluon = {
            "program_id": lambda axis: self.program,
            "num_programs": lambda axis: self.programs,
            "num_warps": lambda: self.warps,
            "allocate_shared_memory": self.allocate,
            "warp_specialize": self.specialize,
            "NVMMADistributedLayout": lambda *_: None,
            "SliceLayout": lambda *_: None,
            "BlockedLayout": lambda *_: None,
            "broadcast": lambda a, b: torch.broadcast_tensors(a, b),
        }
        return {
            "gl": SimpleNamespace(**both, **gluon),
            "tl": SimpleNamespace(**both),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=lambda barrier, count: barrier.init(count),
                expect=lambda barrier, nbytes: barrier.arrive(announced=nbytes),
                wait=self.wait,
                arrive=self.arrive,
            ),
            "tma": SimpleNamespace(store_wait=self.store_wait),
            "fetch": self.fetch,
            "write_back": self.write_back,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_init": lambda value: value if isinstance(value, _Sums) else _Sums(value),
            "warpgroup_mma_wait": self.multiply_wait,
        }


# ---- what the languages' functions do ------------------------------------------------------------------------------


def _numbers(*bounds: Any) -> Iterator[torch.Tensor]:
    return (_value(i) for i in range(*map(int, bounds)))


def _load(pointer: _Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
    place = torch.where(mask, pointer.offset, 0)
    return torch.where(mask, _value(pointer.memory[place.long()]), other)


def _store(pointer: _Pointer, value: Any, mask: torch.Tensor | None = None) -> None:
    if mask is None:
        pointer.memory[int(pointer.offset)] = value
    else:
        place, value, mask = torch.broadcast_tensors(pointer.offset, value, mask)
        pointer.memory[place[mask].long()] = value[mask]


def _atomic_add(pointer: _Pointer, value: int, sem: str) -> torch.Tensor:
    before = _value(pointer.memory[int(pointer.offset)].clone())
    pointer.memory[int(pointer.offset)] += value
    return before
