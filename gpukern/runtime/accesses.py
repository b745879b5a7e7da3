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
_PARAMETER = re.compile(r"(%\w+): ")
_FUNCTION = re.compile(r"tt\.func (?:public|private) @([\w.$\"]+)\(")
_CALLED = re.compile(r"@([\w.$\"]+)\(")
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


class AccessFinder:
    """Finds the accesses of launches, once for all that compile to the same code."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], Accesses] = {}

    def __call__(self, launch: Launch) -> Accesses:
        key = launch.key
        if key not in self._found:
            self._found[key] = accesses_of(launch.first_ir())
        return self._found[key]


def accesses_of(text: str) -> Accesses:
    """Which of the pointers and descriptors that the kernel takes, by position, its code reads and writes.

    RuntimeError for code that this reader does not understand.
    """
    lines = [line.strip() for line in text.splitlines()]
    starts = {match.group(1): i for i, line in enumerate(lines) if (match := _FUNCTION.match(line))}
    return _of_function(lines, starts, next(i for i in starts.values() if lines[i].startswith("tt.func public")))


def _of_function(lines: list[str], starts: dict[str, int], start: int) -> Accesses:
    sources = {name: {i} for i, name in enumerate(_POINTER.findall(lines[start]))}
    reads: set[int] = set()
    writes: set[int] = set()
    blocks: list[str | None] = []  # the results of each open block, where it is that of an scf.if that has some
    captured: list[str] = []
    for line in lines[start + 1 :]:
        if line.startswith("tt.func"):
            break
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
        if operation in READS | WRITES | BOTH:
            at = sources.get(operands[0], set())
            if not at:
                raise RuntimeError(f"no argument of the kernel is known to be where this points: {line}")
            reads |= at if operation not in WRITES else set()
            writes |= at if operation not in READS else set()
        elif operation in _MOVES:
            _join(sources, result, operands)
        elif operation == "scf.for" and "iter_args(" in rest:
            pairs = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", rest.split("iter_args(")[1])
            _alias(sources, [a for a, _ in pairs], [b for _, b in pairs])
            _alias(sources, _results(result), [b for _, b in pairs])
        elif operation == "scf.yield" and blocks and blocks[-1]:
            for name, each in zip(_results(blocks[-1]), operands, strict=False):
                _join(sources, name, [each])
        elif operation == "ttg.warp_specialize":
            captured = _VALUE.findall(rest.split(")")[0])
        elif operation == "tt.call":
            called = starts[_CALLED.findall(rest)[0]]
            inner = _of_function(lines, starts, called)
            given = dict(zip(_PARAMETER.findall(lines[called]), operands, strict=False))
            passed = [sources.get(given[name], set()) for name in _POINTER.findall(lines[called])]
            reads |= set().union(*(passed[i] for i in inner.reads))
            writes |= set().union(*(passed[i] for i in inner.writes))
        elif operation in ("scf.while", "cf.br", "cf.cond_br"):
            raise RuntimeError(f"{operation} may pass a pointer on: {line}")
        if opens:
            blocks.append(result if operation == "scf.if" else None)
    return Accesses(frozenset(reads), frozenset(writes))


def _results(name: str | None) -> Iterator[str]:
    """``%3#0``, ``%3#1``, ...: a single result is ``%3`` and ``%3#0`` at once, see :func:`_join`."""
    return (f"{name}#{i}" for i in itertools.count())


def _alias(sources: dict[str, set[int]], names: Any, values: list[str]) -> None:
    for name, value in zip(names, values, strict=False):
        _join(sources, name, [value])


def _join(sources: dict[str, set[int]], name: str | None, operands: list[str]) -> None:
    found = set().union(*(sources.get(each, set()) for each in operands))
    if found and name:
        for each in {name, name.removesuffix("#0")}:
            sources[each] = sources.get(each, set()) | found
