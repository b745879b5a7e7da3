"""Types of a requested and a prepared launch; every kernel family prepares a Launch from a Request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gpukern.conv.layouts import Shape, Strides, layout_of
from gpukern.conv.plan import ConvPlan, Direction, Operands
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.strides import dense_strides, is_channels_last


class Epilogue(NamedTuple):
    """The computation of a forward kernel before it stores: a value for caches, without the tensors.

    ``residual``: whether a tensor laid out like the output is added; ``statistics``: whether sums over the pixels are
    requested. ``norm_grad``, of an input gradient: whether it goes on through the activation to the sums of the batch
    norm before the convolution; the activation is then the one whose derivative is multiplied.
    """

    activation: str = "none"
    residual: bool = False
    statistics: bool = False
    norm_grad: bool = False

    @property
    def leaves_parts(self) -> bool:
        """Whether each tile leaves a part of sums over the pixels."""
        return self.statistics or self.norm_grad


class Types(NamedTuple):
    """The dtypes of a quantized launch, of the operators of ``ops/quantized_*.py``, beside the second operand's."""

    first: torch.dtype
    output: torch.dtype


class NormBefore(NamedTuple):
    """The batch norm, with an activation, whose output a convolution reads; see :mod:`gpukern.ops.conv_norm_grad`."""

    z: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    other: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class Request:
    """The input from which a family prepares a launch; strides are those of the tensors that the kernel gets.

    ``dtype`` is that of the products and of the second operand; unless the launch is quantized (``types`` is given) all
    tensors have it.
    """

    problem: ConvProblem
    direction: Direction
    first: Strides
    second: Strides
    output: Strides
    dtype: torch.dtype
    epilogue: Epilogue
    device: DeviceSpec
    types: Types | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """dtypes of first, second and output."""
        return dtypes_of(self.dtype, self.types)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of sums of products, and of parts of them that splits leave for one another."""
        whole = self.dtype is torch.int8 and self.dtypes[0] is torch.int8
        return torch.int32 if whole else torch.float32

    @property
    def compile_options(self) -> dict[str, bool]:
        """Triton's options of a kernel with such an epilogue, for ``compile_time``."""
        # A product and a sum in one rounding would differ in bits from the reference, and from the emulated kernel.
        return {"enable_fp_fusion": False} if self.types else {}

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """Shapes of first, second and output."""
        return shapes(self.problem, self.direction)


class Call(NamedTuple):
    """The arguments of :func:`gpukern.conv.prepare.prepare_launch` except device, epilogue and plan."""

    problem: ConvProblem
    direction: Direction
    first: Strides
    second: Strides
    channels_last: bool | None
    aligned: bool
    dtype: torch.dtype
    precision: str
    types: Types | None = None

    @property
    def shapes(self) -> tuple[Shape, Shape, Shape]:
        """Shapes of first, second and output."""
        return shapes(self.problem, self.direction)

    @property
    def output(self) -> Strides:
        """Strides of the output; if ``channels_last`` is None it is channels_last if an operand is, torch's rule."""
        first, second, output = self.shapes
        channels_last = self.channels_last
        if channels_last is None:
            channels_last = is_channels_last(first, self.first) or is_channels_last(second, self.second)
        return dense_strides(output, channels_last)

    @property
    def operands(self) -> Operands:
        """Return the properties that a plan depends on besides sizes and device."""
        strides = self.first, self.second, self.output
        return operands_of(self.problem, self.direction, strides, self.aligned, self.dtype, self.precision, self.types)


#: Starts the kernels: (first, second, output, bias, residual, statistics, negative_slope), None for absent ones. Those
#: of an input gradient take more, None if left out: z and ``other``, laid out like the output, and a ``NormGrad``;
#: those of a quantized launch ``requantize``.
Run = Callable[..., None]


class Tiles(NamedTuple):
    """Number of tiles along the pixels and along the channels of an output, and of parts of a tile."""

    rows: int
    columns: int
    parts: int = 1


@dataclass(frozen=True)
class Launch:
    """A kernel's part of :class:`Prepared`.

    ``tiles``: of the statistics or sums, if these are requested. ``counters``: how many counters split sums take.
    """

    run: Run
    tiles: Tiles | None = None
    counters: int = 0


@dataclass(frozen=True)
class Prepared:
    """A launch without its tensors.

    ``shape`` and ``strides`` are the output's; ``written`` are the strides that the kernel writes, before a last copy.
    ``in_place``: the kernel takes first, second and output as they are, none of them empty, and makes no statistics or
    sums.
    ``again`` prepares the same launch again, with the plan chosen then; None if the caller chose the plan.
    """

    plan: ConvPlan
    shape: Shape
    strides: Strides
    written: Strides
    launch: Launch
    activation: str
    in_place: bool
    again: Callable[[], Prepared] | None = None


def shapes(p: ConvProblem, direction: Direction) -> tuple[Shape, Shape, Shape]:
    """Shapes of first, second and output."""
    image, result, filter = (p.N, p.C, p.H, p.W), (p.N, p.K, p.P, p.Q), (p.K, p.group_inputs, p.R, p.S)
    if p.pool:
        result = p.N, p.K, p.P // 2, p.Q // 2
    return {
        Direction.FORWARD: (image, filter, result),
        Direction.INPUT_GRAD: (result, filter, image),
        Direction.WEIGHT_GRAD: (result, image, filter),
    }[direction]


def operands_of(
    problem: ConvProblem,
    direction: Direction,
    strides: tuple[Strides, Strides, Strides],
    aligned: bool,
    dtype: torch.dtype,
    precision: str,
    types: Types | None = None,
) -> Operands:
    """Return the properties that a plan depends on besides sizes and device."""
    first, second, output = (
        layout_of(shape, given, each.itemsize, aligned)
        for shape, given, each in zip(shapes(problem, direction), strides, dtypes_of(dtype, types), strict=True)
    )
    words = [str(each).removeprefix("torch.") for each in (dtype, *(types or ()))]
    return Operands(words[0], precision, first, second, output, *words[1:])


def dtypes_of(dtype: torch.dtype, types: Types | None) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """dtypes of first, second and output, where ``dtype`` is that of the products."""
    return (dtype, dtype, dtype) if types is None else (types.first, dtype, types.output)


def check_countable(*tensors: Sequence[int], operation: str = "conv2d") -> None:
    """Raise RuntimeError if a tensor has more pixels than kernels can number."""
    # Pixels are numbered in 32 bits, and the last tile may reach past them.
    for N, _, *sizes in tensors:
        pixels = N * math.prod(sizes)
        if pixels >= 2**31 - 2**24:
            raise RuntimeError(f"{operation}: {pixels} pixels are more than gpukern's kernels can number (2³¹)")
