"""Queries: a launch by its sizes, dtype, layout and device."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from gpukern.conv import ConvProblem, Direction, Epilogue, Operands, Strides, Types, conv_problem, operands_of, shapes
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.strides import dense_strides

#: The dtype of the tensors, and the precision of products, of each kind of operands.
KINDS = {
    "float16": (torch.float16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
}
#: Kinds of forward launches alone: operands and output in 8 bits, a scale for each channel.
QUANTIZED_KINDS = {"int8": (torch.int8, "ieee"), "float8": (torch.float8_e4m3fn, "ieee")}


@dataclass(frozen=True)
class Question:
    """A launch. ``first`` and ``second`` are the strides of tensors [N, C, H, W] or [K, C/groups, R, S].

    ``channels_last`` is the output's layout, ``kind`` one of :data:`KINDS` or :data:`QUANTIZED_KINDS`; only a forward
    has a ``bias`` or an ``epilogue``. ``computation`` names its purpose if that is not the direction.
    """

    problem: ConvProblem
    direction: Direction
    kind: str
    first: Strides
    second: Strides
    channels_last: bool
    device: DeviceSpec
    bias: bool = False
    epilogue: Epilogue = Epilogue()  # noqa: RUF009 - immutable
    computation: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return (KINDS | QUANTIZED_KINDS)[self.kind][0]

    @property
    def types(self) -> Types | None:
        """dtypes of input and output, for a quantized launch."""
        return Types(self.dtype, self.dtype) if self.kind in QUANTIZED_KINDS else None

    @functools.cached_property
    def operands(self) -> Operands:
        dtype, precision = (KINDS | QUANTIZED_KINDS)[self.kind]
        output = dense_strides(shapes(self.problem, self.direction)[2], self.channels_last)
        strides = self.first, self.second, output
        return operands_of(self.problem, self.direction, strides, True, dtype, precision, self.types)


def convolution(
    problem: ConvProblem,
    direction: Direction,
    kind: str,
    channels_last: bool,
    device: DeviceSpec,
    bias: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
) -> Question:
    """Return the query for dense tensors, all in one layout; a gradient has neither bias nor epilogue."""
    first, second, _ = (dense_strides(shape, channels_last) for shape in shapes(problem, direction))
    if direction is not Direction.FORWARD:
        bias, epilogue = False, Epilogue()
    return Question(problem, direction, kind, first, second, channels_last, device, bias, epilogue)


def linear(
    rows: int,
    inputs: int,
    outputs: int,
    direction: Direction,
    kind: str,
    device: DeviceSpec,
    bias: bool = False,
    activation: str = "none",
) -> Question:
    """x [rows, inputs] times the transpose of w [outputs, inputs]: images of one pixel and a filter of one tap.

    The input gradient is a forward too, of dy [rows, outputs] and the transpose of w.
    """
    if direction is not Direction.INPUT_GRAD:
        epilogue = Epilogue(activation)
        return convolution(_product(rows, inputs, outputs), direction, kind, False, device, bias, epilogue)
    swapped = convolution(_product(rows, outputs, inputs), Direction.FORWARD, kind, False, device)
    return replace(swapped, second=(1, inputs, 0, 0), computation="input gradient as a product of dy and w")


def _product(rows: int, inputs: int, outputs: int) -> ConvProblem:
    return conv_problem((rows, inputs, 1, 1), (outputs, inputs, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
