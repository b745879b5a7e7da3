"""Softmax as a problem: the walk through its tensors, whose channels are the numbers that a row normalizes.

A row is one normalized vector. Rows are the pixels, and their numbers the channels, of the walk that batch norm takes
too. Imports neither torch nor Triton.
"""

from __future__ import annotations

from gpukern.ops._batch_norm.problem import Shape, Walk, walk


def rows_along(dim: int, shape: Shape, strides: tuple[Shape, ...]) -> Walk:
    """Return the walk through the rows along ``dim`` of tensors of one shape, not empty, and of these strides."""
    return walk(_second(shape, dim), tuple(_second(each, dim) for each in strides))


def _second(numbers: Shape, dim: int) -> Shape:
    """Move the number of ``dim`` to the place of channels; of the only dimension, behind a batch of one."""
    others = numbers[:dim] + numbers[dim + 1 :] or (1,)
    return others[0], numbers[dim], *others[1:]
