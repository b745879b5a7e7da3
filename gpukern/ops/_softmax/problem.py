"""Softmax as a problem: the walk through its tensors, whose channels are the numbers that a row normalizes.

A row is one normalized vector. Rows are the pixels, and their numbers the channels, of the walk that batch norm takes
too. Imports neither torch nor Triton.
"""

from __future__ import annotations

import dataclasses
import math

from gpukern.ops._batch_norm.problem import Shape, Walk, walk


def rows_along(dim: int, shape: Shape, strides: tuple[Shape, ...], of_rows: tuple[Shape, ...] = ()) -> Walk:
    """Return the walk through the rows along ``dim`` of tensors of one shape, not empty, and of these strides.

    ``of_rows``: the strides of tensors with one number for a row, whose stride along ``dim`` is 0. They walk along, and
    limit the alignment of nothing else.
    """
    path = walk(_second(shape, dim), tuple(_second(each, dim) for each in strides + of_rows))
    if not of_rows:
        return path
    whole = path.strides[: len(strides)]
    pixels_run = not path.channels_run and all(w in (0, 1) for *_, w in whole)
    aligned = math.gcd(16, path.channels if path.channels_run else path.inner)
    for n, c, h, w in whole:
        aligned = math.gcd(aligned, n, h, w if path.channels_run else c)
    return dataclasses.replace(
        path, channel_align=aligned if path.channels_run else 1, pixel_align=aligned if pixels_run else 1
    )


def _second(numbers: Shape, dim: int) -> Shape:
    """Move the number of ``dim`` to the place of channels; of the only dimension, behind a batch of one."""
    others = numbers[:dim] + numbers[dim + 1 :] or (1,)
    return others[0], numbers[dim], *others[1:]
