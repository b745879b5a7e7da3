"""Launches of convolutions whose windows do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpukern.conv.layouts import Strides
from gpukern.conv.plan import Direction
from gpukern.conv.volumes.patches import kernels
from gpukern.conv.volumes.patches.kernels import Digits, Matrix, Steps
from gpukern.conv.volumes.patches.planner import plan
from gpukern.conv.volumes.problem import VolumeProblem
from gpukern.ops._images import strides_of
from gpukern.ops._reduction.launch import shared_sums
from gpukern.ops._reduction.splits import chunk, fan_in
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launcher import compile_time, index_type, launch
from gpukern.runtime.strides import reach


class Side(NamedTuple):
    """One index of matrices: the sizes of its digits, and of each tensor that has it the strides along them."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return math.prod(self.sizes)

    @property
    def digits(self) -> Digits:
        return Digits(self.size, *self.sizes[1:])

    def steps(self, tensor: int) -> Steps:
        return Steps(*self.strides[tensor])

    def run(self, tensor: int) -> int:
        """Return what the starts of a tensor's runs of adjacent elements are multiples of, by this side; 1: no runs."""
        *others, last = self.strides[tensor]
        return math.gcd(16, self.sizes[-1], *others) if last == 1 else 1

    def multiple(self, tensor: int) -> int:
        """Return what all offsets of a tensor along this side are multiples of."""
        return math.gcd(16, *self.strides[tensor])


def prepare(
    p: VolumeProblem,
    direction: Direction,
    first: Strides,
    second: Strides,
    output: Strides,
    activation: str,
    dtype: str,
    precision: str,
    device: DeviceSpec,
) -> Callable[..., None]:
    """Return what starts the kernel: (first, second, output, bias, residual, negative_slope), None for absent ones.

    A residual is laid out like the output.
    """
    m, n, k = sides(p, direction, first, second, output)
    aligned = {
        "A_ALIGN_M": _alignment(m, k, 0, 0),
        "A_ALIGN_K": _alignment(k, m, 0, 0),
        "B_ALIGN_K": _alignment(k, n, 1, 0),
        "B_ALIGN_N": _alignment(n, k, 0, 1),
        "OUT_ALIGN": _alignment(n, m, 1, 1),
    }
    sixteen = 4 if dtype == "float32" else 8
    in_runs = all(
        max(aligned[f"{operand}_ALIGN_K"], aligned[f"{operand}_ALIGN_{side}"]) >= sixteen
        for operand, side in (("A", "M"), ("B", "N"))
    )
    chosen = plan(p, direction, dtype, precision, in_runs, aligned["OUT_ALIGN"] >= sixteen, device)
    size = chosen.block_m * chosen.block_n
    tiles = cdiv(m.size, chosen.block_m) * cdiv(n.size, chosen.block_n)
    share = cdiv(cdiv(k.size, chosen.splits), chosen.block_k) * chosen.block_k
    workspace = shared_sums(tiles, chosen.splits, size)
    x, w, y = p.shapes
    shapes = {Direction.FORWARD: (x, w, y), Direction.INPUT_GRAD: (y, w, x), Direction.WEIGHT_GRAD: (y, x, w)}
    offsets = (reach(*each) for each in zip(shapes[direction], (first, second, output), strict=True))

    options = {
        **aligned,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "BLOCK_K": chosen.block_k,
        "GROUP_M": chosen.group_m,
        "CHUNK": chunk(size, chosen.num_warps),
        "ACTIVATION": activation,
        "PRECISION": chosen.precision,
        "MOVABLE": direction is not Direction.WEIGHT_GRAD,
        "INDEX": index_type(max(offsets)),
        "num_warps": chosen.num_warps,
        "num_stages": chosen.num_stages,
    }
    scalars = m.digits, n.digits, k.digits, share, fan_in(chosen.splits, size)
    constants = compile_time(kernels.strided_product_kernel, options)

    def run(first, second, out, bias, residual, negative_slope) -> None:
        arguments = (
            Matrix(first, m.steps(0), k.steps(0)),
            Matrix(second, k.steps(1), n.steps(0)),
            Matrix(out, m.steps(1), n.steps(1)),
            bias,
            n.steps(2),
            residual,
            workspace(out.device),
            *scalars,
            negative_slope,
        )
        launch(kernels.strided_product_kernel, (tiles, 1, chosen.splits), out.device, arguments, constants)

    return run


def _alignment(run: Side, other: Side, of_run: int, of_other: int) -> int:
    """Return what the starts of a tensor's runs along ``run`` are multiples of, in elements; 1 without runs."""
    return math.gcd(run.run(of_run), other.multiple(of_other))


def sides(
    p: VolumeProblem, direction: Direction, first: Strides, second: Strides, output: Strides
) -> tuple[Side, Side, Side]:
    """Return M (strides of first and output), N (of second, output and the bias) and K (of first and second)."""
    x, w, y = p.shapes
    if direction is Direction.FORWARD:
        of_x, of_w, of_y = strides_of(x, first), strides_of(w, second), strides_of(y, output)
    elif direction is Direction.INPUT_GRAD:
        of_y, of_w, of_x = strides_of(y, first), strides_of(w, second), strides_of(x, output)
    else:
        of_y, of_x, of_w = strides_of(y, first), strides_of(x, second), strides_of(w, output)
    corner = (of_x[0], *(stride * step for stride, step in zip(of_x[2:], p.stride, strict=True)))
    windows, at = (p.N, *p.result), (of_y[0], *of_y[2:])
    inside, within, by = (p.C, *p.taps), of_x[1:], of_w[1:]
    channel = 1, 0, 0, 0
    if direction is Direction.FORWARD:
        return (
            _side(windows, corner, at),
            _side((p.K,), (of_w[0],), (of_y[1],), (1,)),
            _side(inside, within, by, by=within),
        )
    if direction is Direction.INPUT_GRAD:
        return (
            _side(windows, at, corner),
            _side(inside, by, within, channel, by=within),
            _side((p.K,), (of_y[1],), (of_w[0],)),
        )
    return (
        _side((p.K,), (of_y[1],), (of_w[0],)),
        _side(inside, within, by, channel, by=within),
        _side(windows, at, corner),
    )


def _side(sizes: Sequence[int], *strides: Sequence[int], by: Sequence[int] | None = None) -> Side:
    """Return an index whose digits are these, the smallest stride of ``by`` last, joined where all tensors allow it."""
    order = [i for i, size in enumerate(sizes) if size != 1]
    if by is not None:
        order.sort(key=lambda i: -by[i])
    kept: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for i in order:
        if kept and all(s[-1] == sizes[i] * given[i] for s, given in zip(steps, strides, strict=True)):
            kept[-1] *= sizes[i]
            for s, given in zip(steps, strides, strict=True):
                s[-1] = given[i]
        else:
            kept.append(sizes[i])
            for s, given in zip(steps, strides, strict=True):
                s.append(given[i])
    missing = 4 - len(kept)
    return Side((1,) * missing + tuple(kept), tuple((0,) * missing + tuple(s) for s in steps))
