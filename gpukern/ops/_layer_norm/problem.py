"""Layer and RMS norm as a problem: its sizes, checked, and the memory order in which kernels walk through its tensors.

The normalized dimensions, the last ones, are *columns*; all before them together are *rows*, each normalized by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpukern.runtime.strides import joined_to

Shape = tuple[int, ...]


class Norm(NamedTuple):
    """What is computed, beside the tensors.

    ``centered``: a layer norm, else an RMS norm. ``dtype``: of the result, None for the input's.
    """

    normalized_shape: Shape
    eps: float
    centered: bool
    activation: str
    negative_slope: float
    dtype: Any = None

    @property
    def dims(self) -> int:
        return len(self.normalized_shape)


def check_shapes(
    name: str, shape: Sequence[int], normalized_shape: Sequence[int], others: Mapping[str, Sequence[int]]
) -> None:
    """Raise what torch raises for sizes that do not fit. ``others``: those of "weight", "bias" and "residual"."""
    normalized, dims = tuple(normalized_shape), len(normalized_shape)
    if not dims:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, "
            "but got normalized_shape = []"
        )
    for parameter in ("weight", "bias"):
        given = others.get(parameter)
        if given is not None and tuple(given) != normalized:
            raise RuntimeError(
                f"Expected {parameter} to be of same shape as normalized_shape, but got {parameter} of shape "
                f"{list(given)} and normalized_shape = {list(normalized)}"
            )
    if len(shape) < dims and name == "rms_norm":
        raise ValueError(f"Input tensor must have at least {dims} dimensions, but got {len(shape)}")
    if len(shape) < dims or tuple(shape[len(shape) - dims :]) != normalized:
        sizes = ", ".join(map(str, normalized))
        raise RuntimeError(
            f"Given normalized_shape={list(normalized)}, expected input with shape [*, {sizes}], "
            f"but got input of size{list(shape)}"
        )
    residual = others.get("residual")
    if residual is not None and tuple(residual) != tuple(shape):
        raise RuntimeError(f"expected residual to have the input's shape {list(shape)}, but got {list(residual)}")


# eq=False: walks are made once for each set of strides (the function below keeps them), so identity is equality.
@dataclass(frozen=True, eq=False)
class Walk:
    """``outer`` · ``height`` runs of ``inner`` rows, each of ``columns`` elements.

    ``strides``: of each tensor, in elements, those of [outer, height, inner, columns]. Where all tensors allow it,
    dimensions are joined: dense tensors are (1, 1, rows), an NCHW image seen as [N, H, W, C] is (1, N, H·W).

    ``rows_run``: of each tensor, whether neighbouring rows are adjacent in it and neighbouring columns are not. Each
    run of rows in such tensors starts at a multiple of ``row_align``, a power of two of at most 16 that divides
    ``inner``; each run of columns in the others at one of ``column_align``, which divides ``columns``.
    """

    outer: int
    height: int
    inner: int
    columns: int
    strides: tuple[Shape, ...]
    rows_run: tuple[bool, ...]
    row_align: int
    column_align: int

    @property
    def rows(self) -> int:
        return self.outer * self.height * self.inner


@functools.lru_cache(maxsize=4096)
def walk(shape: Shape, dims: int, strides: tuple[Shape, ...]) -> Walk:
    """Return the walk through tensors of one shape, not empty, whose last ``dims`` dimensions are columns.

    Raises ValueError where the columns cannot be joined to one dimension, or the rows not to three.
    """
    first = len(shape) - dims
    (columns,), across = joined_to(1, shape[first:], [s[first:] for s in strides])
    (outer, height, inner), along = joined_to(3, shape[:first], [s[:first] for s in strides])
    places = tuple((*rows, *column) for rows, column in zip(along, across, strict=True))
    rows_run = tuple(p == 1 and c not in (0, 1) for _, _, p, c in places)
    row_align, column_align = math.gcd(16, inner), math.gcd(16, columns)
    for (n, h, p, c), run in zip(places, rows_run, strict=True):
        if run:
            row_align = math.gcd(row_align, n, h, c)
        else:
            column_align = math.gcd(column_align, n, h, p)
    return Walk(outer, height, inner, columns, places, rows_run, row_align, column_align)
