"""The tensors that a launch reads and writes, found in its kernel's code.

Arguments do not tell: a kernel may leave a tensor that it is given alone, and one and the same argument is written by
one kernel and read by another. Triton's first representation does, and takes milliseconds to make.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from triton.compiler import CompilationError

from gpukern.runtime.compile_only import Launch

#: Operations on memory, whose first operand points to it.
READS = {
    "tt.load",
    "tt.descriptor_load",
    "tt.descriptor_gather",
    "ttg.async_copy_global_to_local",
    "ttng.async_tma_copy_global_to_local",
    "ttng.async_tma_gather",
}
WRITES = {
    "tt.store",
    "tt.descriptor_store",
    "tt.descriptor_scatter",
    "ttng.async_tma_copy_local_to_global",
    "ttng.async_tma_scatter",
}
BOTH = {"tt.atomic_rmw", "tt.atomic_cas", "tt.descriptor_reduce", "ttng.async_tma_reduce"}
#: Operations whose result points where their operands do.
_MOVES = {
    "arith.select",
    "tt.addptr",
    "tt.bitcast",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.make_tensor_descriptor",
    "tt.reshape",
    "tt.splat",
    "tt.trans",
    "ttg.convert_layout",
}

_VALUE = re.compile(r"%\w+(?:#\d+)?")
_POINTER = re.compile(r"(%\w+): !(?:tt|ttng)\.(?:ptr|tensordesc)")
_OPERATION = re.compile(r"(?:(%\w+)(?::\d+)? = )?\"?([a-z_]+\.[a-z_]+)\"?(.*)")


class Accesses(NamedTuple):
    """Positions in :func:`tensors` of what a launch reads and of what it writes."""

    reads: frozenset[int]
    writes: frozenset[int]


def tensors(launch: Launch) -> list[torch.Tensor]:
    """The tensors among a launch's arguments, those in descriptors and tuples too, in order."""
    by_name = [p.name for p in launch.function.params[len(launch.arguments) :] if not p.is_constexpr]
    return [*_tensors((*launch.arguments, *(launch.options.get(name) for name in by_name)))]


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, tuple):
        for part in argument:
            yield from _tensors(part)
    elif hasattr(argument, "block_shape"):
        yield argument.base
    elif isinstance(argument, torch.Tensor):
        yield argument


class KernelError(RuntimeError):
    """The code of a kernel cannot be made or understood."""


class AccessFinder:
    """Finds the accesses of launches, once for all that compile to the same code."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Accesses] = {}

    def __call__(self, launch: Launch) -> Accesses:
        key = launch.key
        if key not in self._found:
            try:
                self._found[key] = find_accesses(launch.first_ir())
            except (CompilationError, KernelError) as error:
                raise KernelError(f"{launch.kernel}: {_innermost(error)}") from error
        return self._found[key]


def _innermost(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _innermost(error.__cause__)


def find_accesses(text: str) -> Accesses:
    """Which of the pointers and descriptors that the kernel takes, by position, its code reads and writes.

    :class:`KernelError` for code that this reader does not understand.
    """
    functions = {function.name: function for function in _functions(text)}
    entry = next(function for function in functions.values() if function.is_kernel)
    reader = _Reader(functions)
    reader.read(entry, {name: {i} for i, name in enumerate(entry.pointers)})
    return Accesses(frozenset(reader.reads), frozenset(reader.writes))


class _Function(NamedTuple):
    """A function of the module: its parameters, those that are pointers or descriptors, and its lines."""

    name: str
    is_kernel: bool
    parameters: list[str]
    pointers: list[str]
    lines: list[str]


def _functions(text: str) -> Iterator[_Function]:
    heads = [*re.finditer(r"^ *tt\.func (public )?.*?@(\"[^\"]+\"|[\w.$]+)(\(.*)$", text, re.MULTILINE)]
    for head, end in itertools.zip_longest(heads, (following.start() for following in heads[1:])):
        lines = [line.strip() for line in text[head.end() : end].splitlines()]
        parameters = re.findall(r"(%\w+):", head[3])
        yield _Function(head[2], head[1] is not None, parameters, _POINTER.findall(head[3]), lines)


class _Reader:
    """Follows pointers through the code, from the kernel's arguments to operations on memory."""

    def __init__(self, functions: dict[str, _Function]) -> None:
        self._functions = functions
        self.reads: set[int] = set()
        self.writes: set[int] = set()

    def read(self, function: _Function, sources: dict[str, set[int]]) -> None:
        """``sources``: by the name of a value, the kernel's arguments that it may point to."""
        blocks: list[str | None] = []  # the results of each open block, where it is that of an scf.if that has some
        captured: list[str] = []
        for line in function.lines:
            opens = line.endswith("{")
            if line.startswith("}") and blocks:
                results = blocks.pop()
                if opens:  # } else {
                    blocks.append(results)
                continue
            if line.startswith("partition"):
                _alias(sources, re.findall(r"(%\w+):", line), captured)
            found = _OPERATION.match(line)
            result, operation, rest = found.groups() if found else (None, "", "")
            operands = _VALUE.findall(rest)
            _forget(sources, result)
            if operation in READS | WRITES | BOTH:
                self._touch(operation, sources.get(operands[0], set()), line)
            elif operation in _MOVES:
                _join(sources, result, operands)
            elif operation == "scf.for" and "iter_args(" in rest:
                pairs = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", rest.split("iter_args(")[1])
                _alias(sources, [a for a, _ in pairs], [b for _, b in pairs])
                _alias(sources, _results(result), [b for _, b in pairs])
            elif operation == "scf.yield" and blocks and blocks[-1]:
                _alias(sources, _results(blocks[-1]), operands)
            elif operation == "ttg.warp_specialize":
                captured = _VALUE.findall(rest.split(")")[0])
            elif operation == "tt.call":
                self._call(line, sources)
            elif operation in ("scf.while", "cf.br", "cf.cond_br"):
                raise KernelError(f"{operation} may pass a pointer on: {line}")
            if opens:
                blocks.append(result if operation == "scf.if" else None)

    def _touch(self, operation: str, at: set[int], line: str) -> None:
        if not at:
            raise KernelError(f"no argument of the kernel is known to be where this points: {line}")
        self.reads |= at if operation not in WRITES else set()
        self.writes |= at if operation not in READS else set()

    def _call(self, line: str, sources: dict[str, set[int]]) -> None:
        """A function that is not to be inlined. None of ours returns a pointer."""
        found = re.search(r"@(\"[^\"]+\"|[\w.$]+)\((.*?)\) : .*?(?:-> (.*))?$", line)
        if found is None or "!tt" in (found[3] or ""):
            raise KernelError(f"a pointer may come back: {line}")
        function = self._functions[found[1]]
        given = zip(function.parameters, _VALUE.findall(found[2]), strict=True)
        self.read(function, {name: sources[value] for name, value in given if value in sources})


def _results(name: str | None) -> Iterator[str]:
    """``%3#0``, ``%3#1``, ...: a single result is ``%3`` and ``%3#0`` at once, see :func:`_join`."""
    return (f"{name}#{i}" for i in itertools.count())


def _alias(sources: dict[str, set[int]], names: Any, values: list[str]) -> None:
    for name, value in zip(names, values, strict=False):
        _join(sources, name, [value])


def _forget(sources: dict[str, set[int]], name: str | None) -> None:
    """``name`` is defined: blocks beside each other use the same names for values of their own."""
    if name is not None:
        for each in [each for each in sources if each.partition("#")[0] == name]:
            del sources[each]


def _join(sources: dict[str, set[int]], name: str | None, operands: list[str]) -> None:
    found = set().union(*(sources.get(each, set()) for each in operands))
    if found and name:
        for each in {name, name.removesuffix("#0")}:
            sources[each] = sources.get(each, set()) | found
