"""Tables that a launch reads besides the parameters, laid out as in multi_tensor.cuh. NumPy only, no device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpukern.optim._fused.rules import Rule
from gpukern.runtime.integers import cdiv

#: Pointers that fit beside the rest into the 32,764 bytes of a launch's arguments. Fewer are passed faster.
GRADIENTS = (128, 1024, 4032)
_LARGEST_CHUNK, _SMALLEST_CHUNK = 65536, 2048
#: Blocks for each multiprocessor that a chunk size should leave, so that all end at about the same time.
_BLOCKS_EACH = 8

CHUNK = np.dtype([("tensor", "i4"), ("number", "i4")])


class Row(NamedTuple):
    """A parameter: addresses of it and of its tensors, 0 for absent ones, its elements, and its group's number."""

    parameter: int
    master: int
    states: tuple[int, ...]
    step: int
    size: int
    group: int


@functools.cache
def tensor_type(states: int) -> np.dtype:
    fields = [
        ("parameter", "u8"),
        ("master", "u8"),
        ("states", "u8", (max(states, 1),)),
        ("step", "u8"),
        ("size", "i8"),
    ]
    fields += [("group", "i4"), ("first_chunk", "i4"), ("chunks", "i4"), ("padding", "i4")]
    return np.dtype(fields, align=True)


@functools.cache
def group_type(rule: Rule) -> np.dtype:
    return np.dtype([("lr_place", "u8"), *((name, "f8") for name in rule.hyperparameters)], align=True)


@functools.cache
def arguments_type(gradients: int) -> np.dtype:
    places = ("tensors", "chunks", "groups", "arrived", "grad_scale", "found_inf", "partial", "norms", "square_sum")
    fields = [(name, "u8") for name in places]
    fields += [("max_norm", "f8"), ("max_value", "f4"), ("tensor_count", "i4"), ("chunk_size", "i4"), ("seed", "u4")]
    return np.dtype([*fields, ("gradients", "u8", (gradients,))], align=True)


def room_for(tensors: int) -> int:
    """Return the number of gradient pointers for which the launch for so many tensors has room."""
    return next(room for room in GRADIENTS if room >= tensors)


def chunk_size(elements: int, multiprocessors: int) -> int:
    """Return the number of elements that a block takes: a power of two."""
    size = _LARGEST_CHUNK
    while size > _SMALLEST_CHUNK and elements < size * _BLOCKS_EACH * multiprocessors:
        size //= 2
    return size


def tables(rows: Sequence[Row], states: int, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """(tensors, chunks) of a launch with a block for each chunk; at least one, because its last block counts steps."""
    tensors = np.zeros(len(rows), tensor_type(states))
    counts = np.array([cdiv(row.size, chunk) for row in rows], "i4")
    if not counts.any():
        counts[0] = 1
    for place, row in zip(tensors, rows, strict=True):
        for name in ("parameter", "master", "step", "size", "group"):
            place[name] = getattr(row, name)
        place["states"][: len(row.states)] = row.states
    tensors["chunks"] = counts
    tensors["first_chunk"] = np.cumsum(counts) - counts
    chunks = np.zeros(counts.sum(), CHUNK)
    chunks["tensor"] = np.repeat(np.arange(len(rows)), counts)
    chunks["number"] = np.arange(len(chunks)) - np.repeat(tensors["first_chunk"], counts)
    return tensors, chunks


def groups_table(rule: Rule, groups: Sequence[tuple[int, Sequence[float]]]) -> np.ndarray:
    """Build a table from pairs (address of a tensor learning rate or 0, hyperparameters in the rule's order)."""
    table = np.zeros(len(groups), group_type(rule))
    table["lr_place"] = [place for place, _ in groups]
    # Every field has 8 bytes: viewed as one matrix, the table is filled at once.
    table.view(np.float64).reshape(len(groups), -1)[:, 1:] = [values for _, values in groups]
    return table
