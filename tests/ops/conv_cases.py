"""Convolutions of every shape class, one line each, and the float64 truth about them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gpukern.conv.problem import ConvProblem, conv_problem, same_padding


@dataclass(frozen=True)
class Case:
    name: str
    input: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] | str = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1

    @property
    def arguments(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.input[1] // self.groups, *self.kernel)


CASES = (
    # one-by-one
    Case("1x1", (2, 40, 5, 7), 24, (1, 1)),
    Case("1x1 stride 2", (2, 16, 7, 6), 20, (1, 1), stride=2),
    Case("1x1 padded", (1, 16, 4, 4), 16, (1, 1), padding=1),
    Case("1x1 one channel", (2, 1, 5, 5), 1, (1, 1)),
    # ordinary, even and ragged channels
    Case("3x3", (2, 16, 9, 7), 32, (3, 3), padding=1),
    Case("3x3 ragged 40 to 130", (1, 40, 6, 5), 130, (3, 3), padding=1),
    Case("3x3 ragged 130 to 5", (1, 130, 5, 6), 5, (3, 3)),
    Case("3x3 ragged 5 to 3", (2, 5, 6, 6), 3, (3, 3), padding=1),
    Case("3x3 one image, one pixel out", (1, 17, 3, 3), 9, (3, 3)),
    Case("5x5 LeNet first", (2, 1, 14, 14), 20, (5, 5), padding=2),
    Case("5x5 LeNet second", (1, 20, 7, 7), 50, (5, 5), padding=2),
    # even, oblong and large kernels; more than 32 taps
    Case("2x2", (2, 16, 6, 6), 16, (2, 2)),
    Case("4x2 oblong", (1, 24, 9, 8), 16, (4, 2), padding=(1, 0)),
    Case("1x7", (2, 16, 4, 12), 16, (1, 7), padding=(0, 3)),
    Case("7x7 stem", (1, 3, 19, 17), 16, (7, 7), stride=2, padding=3),
    Case("7x7 wide", (1, 18, 10, 9), 16, (7, 7), padding=3),
    Case("whole image", (2, 16, 5, 6), 10, (5, 6)),
    # stride, with and without a remainder; stride beyond the kernel; fewer rows than the stride
    Case("stride 2 remainder", (2, 16, 10, 9), 24, (3, 3), stride=2, padding=1),
    Case("stride 2 no remainder", (2, 16, 9, 9), 24, (3, 3), stride=2, padding=1),
    Case("stride 3 by 2", (1, 16, 11, 10), 16, (3, 4), stride=(3, 2), padding=(0, 1)),
    Case("stride 4, kernel 2", (1, 16, 11, 13), 16, (2, 2), stride=4),
    Case("stride 5 on 3 rows", (1, 16, 3, 9), 16, (3, 3), stride=5),
    # dilation, alone and against the stride (common divisor or none)
    Case("dilation 2", (1, 16, 9, 9), 16, (3, 3), padding=2, dilation=2),
    Case("dilation 3 by 2", (1, 16, 10, 9), 16, (3, 3), padding=(1, 2), dilation=(3, 2)),
    Case("stride 2, dilation 2", (1, 16, 11, 10), 16, (3, 3), stride=2, padding=2, dilation=2),
    Case("stride 4, dilation 6", (1, 16, 17, 16), 16, (2, 3), stride=4, padding=3, dilation=6),
    Case("stride 3, dilation 2", (1, 16, 13, 12), 16, (3, 3), stride=3, padding=1, dilation=2),
    # padding larger than the kernel; "same", also where it is lopsided
    Case("padding beyond the kernel", (1, 16, 4, 4), 16, (2, 2), padding=5),
    Case("same", (1, 16, 6, 7), 16, (3, 5), padding="same"),
    Case("same lopsided", (1, 16, 6, 7), 16, (4, 2), padding="same"),
    Case("same lopsided dilated", (2, 16, 6, 7), 16, (2, 2), padding="same", dilation=3),
    Case("valid", (1, 16, 6, 7), 16, (3, 3), padding="valid", stride=2),
    # groups as matrix products, as direct sums, depthwise, with multiplier
    Case("groups of 16 and 24", (1, 32, 7, 6), 48, (3, 3), padding=1, groups=2),
    Case("groups of 10, stride 2", (1, 30, 8, 7), 30, (3, 3), stride=2, padding=1, groups=3),
    Case("groups of 4 to 2", (2, 16, 6, 6), 8, (3, 3), padding=1, groups=4),
    Case("groups of 2 to 20", (1, 4, 6, 6), 40, (3, 3), padding=1, groups=2),
    Case("depthwise", (2, 40, 7, 6), 40, (3, 3), padding=1, groups=40),
    Case("depthwise stride 2 dilation 2", (1, 24, 11, 10), 24, (3, 3), stride=2, padding=2, dilation=2, groups=24),
    Case("depthwise multiplier 3", (1, 5, 8, 8), 15, (5, 5), stride=2, padding=2, groups=5),
    Case("depthwise, a sequence", (2, 20, 1, 37), 20, (1, 4), padding=(0, 3), groups=20),
    # sums over pixels that are split, into shares that do not come out even: as a product, directly, over joined taps
    Case("split sum", (1, 16, 23, 19), 16, (1, 1)),
    Case("split sum, depthwise", (1, 24, 21, 13), 24, (1, 1), groups=24),
    Case("split sum, few channels", (1, 2, 23, 19), 8, (2, 2), padding=1),
    # nothing to do
    Case("batch 0", (0, 16, 6, 6), 16, (3, 3), padding=1),
)


@dataclass(frozen=True)
class Truth:
    """Output and gradients in float64, each with the sum of the absolute values of its products."""

    values: dict[str, torch.Tensor]
    absolutes: dict[str, torch.Tensor]
    terms: dict[str, int]


def truth(case: Case, input, weight, bias, grad) -> Truth:
    values = _evaluate(case, *(t.detach().double().cpu() for t in (input, weight, bias, grad)))
    absolutes = _evaluate(case, *(t.detach().double().cpu().abs() for t in (input, weight, bias, grad)))
    taps = math.prod(case.kernel)
    pixels = grad.shape[0] * math.prod(grad.shape[2:])
    terms = {
        "output": weight.shape[1] * taps,
        "input gradient": case.outputs // case.groups * taps,
        "weight gradient": pixels,
        "bias gradient": pixels,
    }
    return Truth(values, absolutes, terms)


def _evaluate(case: Case, input, weight, bias, grad) -> dict[str, torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    output = {2: F.conv2d, 3: F.conv3d}[len(case.kernel)](*leaves, **case.arguments)
    output.backward(grad)
    names = ("input gradient", "weight gradient", "bias gradient")
    return {"output": output.detach(), **{name: t.grad for name, t in zip(names, leaves, strict=True)}}


def as_problem(case: Case) -> ConvProblem:
    """What :func:`gpukern.functional.conv2d` makes of the case."""
    stride, dilation = ((v, v) if isinstance(v, int) else v for v in (case.stride, case.dilation))
    if case.padding == "same":
        padding = same_padding(case.kernel, dilation)
    else:
        vertical, horizontal = (
            (case.padding, case.padding)
            if isinstance(case.padding, int)
            else (0, 0)
            if case.padding == "valid"
            else case.padding
        )
        padding = vertical, vertical, horizontal, horizontal
    return conv_problem(case.input, case.weight, None, stride, padding, dilation, case.groups)
