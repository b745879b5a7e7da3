"""The depthwise kernels, every plan forced, on a GPU or emulated, against float64; and their arithmetic of rows alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from gpukern.ops._conv2d import reference
from gpukern.ops._conv2d.depthwise import plan as depthwise
from gpukern.ops._conv2d.depthwise.plan import Axis, axes, cut_of, tiles
from gpukern.ops._conv2d.geometry import Dimension
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Layout, Operands
from gpukern.ops._conv2d.prepare import Epilogue, Request, operands_of, shapes
from gpukern.ops._conv2d.problem import ConvProblem, conv_problem
from gpukern.runtime.device import A100, EMULATED, H100
from gpukern.runtime.integers import cdiv
from gpukern.runtime.mode import EMULATE
from tests.numerics import assert_within, sum_bound

pytestmark = pytest.mark.usefixtures("poisoned")

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A depthwise convolution; padding is top, bottom, left, right."""

    name: str
    input: tuple[int, int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def problem(self) -> ConvProblem:
        channels = self.input[1]
        weight = (channels * self.multiplier, 1, *self.kernel)
        return conv_problem(self.input, weight, None, self.stride, self.padding, self.dilation, channels)


CASES = (
    Case("3x3", (2, 8, 6, 8), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, ragged channels, odd width", (2, 5, 4, 7), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, channels of 8 bytes", (1, 20, 3, 5), (3, 3), padding=(1, 1, 1, 1)),
    Case("3x3, many channels", (1, 130, 2, 4), (3, 3), padding=(1, 1, 1, 1)),
    Case("1x1", (3, 24, 2, 6), (1, 1)),
    Case("1x1, stride 2 from the padding on", (1, 8, 5, 6), (1, 1), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case("5x5, lopsided", (1, 8, 5, 6), (5, 5), padding=(2, 2, 3, 1)),
    Case("7x7", (1, 8, 5, 6), (7, 7), padding=(3, 3, 3, 3)),
    Case("2x4 oblong, lopsided", (2, 8, 5, 8), (2, 4), padding=(0, 1, 2, 1)),
    Case("stride 2", (2, 8, 7, 8), (3, 3), stride=(2, 2), padding=(1, 1, 1, 1)),
    Case("stride 2, even, lopsided", (1, 8, 8, 8), (3, 3), stride=(2, 2), padding=(0, 1, 0, 1)),
    Case("stride 3 by 1", (1, 8, 8, 6), (3, 2), stride=(3, 1), padding=(2, 1, 0, 1)),
    Case("stride beyond the kernel", (1, 8, 9, 11), (2, 2), stride=(4, 3), padding=(1, 0, 1, 1)),
    Case("dilation 3 by 2, lopsided", (1, 8, 8, 8), (3, 3), padding=(1, 4, 0, 2), dilation=(3, 2)),
    Case("stride 2, dilation 2", (1, 8, 9, 8), (3, 3), stride=(2, 2), padding=(2, 2, 2, 2), dilation=(2, 2)),
    Case("stride 2, dilation 3", (1, 8, 9, 8), (3, 3), stride=(2, 2), padding=(1, 1, 3, 3), dilation=(3, 3)),
    Case("stride along rows, dilation along columns", (1, 8, 6, 7), (3, 3), (2, 1), (1, 1, 2, 2), (1, 2)),
    Case("multiplier 2", (2, 6, 5, 6), (3, 3), padding=(1, 1, 1, 1), multiplier=2),
    Case("multiplier 3, stride 2", (1, 5, 6, 5), (3, 3), (2, 2), (1, 1, 1, 1), multiplier=3),
    Case("padding beyond the kernel", (1, 8, 2, 3), (2, 2), padding=(3, 2, 4, 3)),
    Case("one pixel", (2, 8, 1, 1), (3, 3), padding=(1, 1, 1, 1)),
)
KINDS = ((torch.float16, "channels_last"), (torch.float32, "NCHW"))


def make(case: Case, dtype: torch.dtype, device, layout: str) -> dict[str, torch.Tensor]:
    p = case.problem
    sizes = {"x": (p.N, p.C, p.H, p.W), "w": (p.K, 1, p.R, p.S), "dy": (p.N, p.K, p.P, p.Q)}
    return {
        name: torch.randn(size).to(device, dtype).contiguous(memory_format=FORMATS[layout])
        for name, size in sizes.items()
    }


OPERANDS = {
    Direction.FORWARD: ("x", "w"),
    Direction.INPUT_GRAD: ("dy", "w"),
    Direction.WEIGHT_GRAD: ("dy", "x"),
}


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    gradient = reference.conv2d_input_grad if direction is Direction.INPUT_GRAD else reference.conv2d_weight_grad
    return gradient(p, first, second, False)


def terms(p: ConvProblem, direction: Direction) -> int:
    return p.N * p.P * p.Q if direction is Direction.WEIGHT_GRAD else p.R * p.S * p.group_outputs


def plans(p: ConvProblem, direction: Direction, first, second, output) -> list[ConvPlan]:
    """The candidates, of which one takes whole images and the other small tiles: many strips, lanes and splits."""
    strides = first.stride(), second.stride(), output.stride()
    operands = operands_of(p, direction, strides, True, first.dtype, "ieee")
    found = list(depthwise.candidates(p, direction, operands, EMULATED))
    if not found:
        return []
    height = output.shape[2] if direction is not Direction.WEIGHT_GRAD else p.P
    step = axes(p, direction)[0].outputs
    lanes, _, cols = found[0].box
    small = replace(found[0], box=(max(1, lanes // 4), 2 * step, cols))
    if direction is Direction.WEIGHT_GRAD:
        small = replace(small, splits=min(3, cut_of(p, direction, small).tiles))
    lanes, _, cols = found[-1].box
    return [replace(found[-1], box=(lanes, cdiv(height, step) * step, cols), splits=1), small]


def run(p, direction, choice, first, second, output, bias=None, residual=None, epilogue=None, slope=0.0):
    """Launch ``choice``; returns the statistics, if any are asked for."""
    from gpukern.ops._conv2d.depthwise.launch import prepare

    epilogue = epilogue or Epilogue()
    strides = first.stride(), second.stride(), output.stride()
    prepared = prepare(Request(p, direction, *strides, first.dtype, epilogue, EMULATED), choice)
    statistics = None
    if prepared.row_tiles:
        statistics = torch.empty(3, prepared.row_tiles, p.K, device=output.device)
    prepared.run(first, second, output, bias, residual, statistics, slope)
    return statistics


@pytest.fixture(autouse=True, scope="module")
def emulation():
    if EMULATE:
        from gpukern.runtime import emulation

        emulation.prepare()


@pytest.mark.parametrize("dtype, layout", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, direction, dtype, layout, device):
    p = case.problem
    made = make(case, dtype, device, layout)
    first, second = (made[name] for name in OPERANDS[direction])
    doubles = [t.double().cpu() for t in (first, second)]
    value = truth(p, direction, *doubles)
    bound = sum_bound(value, truth(p, direction, *(t.abs() for t in doubles)), terms(p, direction), dtype)
    output = torch.empty(value.shape, dtype=dtype, device=device, memory_format=FORMATS[layout])
    chosen = plans(p, direction, first, second, output)
    for choice in chosen:
        output.fill_(float("nan"))
        run(p, direction, choice, first, second, output)
        assert_within(f"{direction.value}, {choice}", output, value, bound)
    both = any(s > 1 and d > 1 for s, d in zip(case.stride, case.dilation, strict=True))
    assert chosen or (direction is Direction.INPUT_GRAD and both)
