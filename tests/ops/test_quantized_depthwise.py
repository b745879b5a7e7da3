"""The depthwise kernels in 8 bits, their plans forced: int8 bit for bit as integers say, with every epilogue."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from gpukern.conv import force_plan, prepare
from gpukern.conv.families.depthwise import launch as launches
from gpukern.conv.families.depthwise import plan as depthwise
from gpukern.conv.families.depthwise.plan import Dots, axes
from gpukern.conv.geometry import Dimension
from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.planner import heuristic_plan
from gpukern.conv.problem import ConvProblem
from gpukern.conv.request import Types, operands_of
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops.quantized_conv2d import conv2d_quantized
from gpukern.ops.quantized_conv_transpose2d import conv_transpose2d_quantized
from gpukern.runtime.device import A100, EMULATED, H200
from gpukern.runtime.integers import cdiv
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, sum_bound
from tests.ops.quantized_cases import (
    BF16,
    E4M3,
    EIGHT,
    FP32,
    HALF,
    INT8,
    OUTPUTS,
    PAIRS,
    epilogue,
    float_sums,
    integer_sums,
    numbers,
    rounded,
    same,
    transposed_sums,
)  # fmt: skip
from tests.ops.test_conv2d_depthwise import CASES, Case, layer

pytestmark = pytest.mark.usefixtures("poisoned")

BY_NAME = {case.name: case for case in CASES}
SMALL = Case("small", (2, 12, 5, 6), (3, 3), padding=(1, 1, 1, 1))
EXACT = ("none", "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish")


def plans(p: ConvProblem, direction: Direction, x, w, output: torch.dtype) -> Iterator[ConvPlan]:
    """The candidates, of which one takes whole images and the other small tiles: many strips and lanes."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    shape = (p.N, p.K, p.P, p.Q) if direction is Direction.FORWARD else (p.N, p.C, p.H, p.W)
    y = torch.empty(shape, device="meta", memory_format=torch.channels_last if last else torch.contiguous_format)
    strides = x.stride(), w.stride(), y.stride()
    operands = operands_of(p, direction, strides, True, w.dtype, "ieee", Types(x.dtype, output))
    first, *_, final = [*depthwise.candidates(p, direction, operands, EMULATED)] * 2
    step = axes(p, direction)[0].outputs
    yield replace(final, box=(final.box[0], cdiv(shape[2], step) * step, final.box[2]))
    yield replace(first, box=(max(1, first.box[0] // 4), 2 * step, first.box[2]))


def made(case: Case, pair=(INT8, INT8), last: bool = True, device="cpu") -> tuple[torch.Tensor, ...]:
    """x, w, scale, bias, such that y is about 1."""
    p = case.problem
    x = numbers(case.input, pair[0], last)
    w = numbers((p.K, 1, p.R, p.S), pair[1], last)
    size = math.prod(74.0 if dtype is INT8 else 0.3 for dtype in pair) * math.sqrt(p.R * p.S)
    return tuple(t.to(device) for t in (x, w, (torch.rand(p.K) + 0.5) / size, torch.randn(p.K) * 0.5))


def geometry(p: ConvProblem) -> tuple:
    return p.stride, p.padding, p.dilation, p.groups


def output_scale(dtype: torch.dtype) -> float:
    return 0.02 if dtype in EIGHT else 1.0


@pytest.mark.parametrize(
    "case, last", [*((case, True) for case in CASES), *((case, False) for case in CASES[:3] + CASES[9:18:4])],
    ids=lambda part: getattr(part, "name", "channels_last" if part else "NCHW"),
)  # fmt: skip
def test_int8_equals_int64(case, last, device):
    p = case.problem
    x, w, scale, bias = made(case, last=last, device=device)
    expected = rounded(epilogue(integer_sums(p, x, w), scale, bias, activation="relu6"), 0.02, INT8)
    whole, small = plans(p, Direction.FORWARD, x, w, INT8)
    for choice in (whole, small) if case in CASES[:3] else (small,):
        with force_plan(choice):
            y = conv2d_quantized(x, w, scale, bias, None, *geometry(p), "relu6", 0.0, 1.0, 0.02, INT8, False)
        assert same(y.cpu(), expected), choice
        assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize(
    "activation, residual_dtype",
    [*((name, None) for name in EXACT), *itertools.product(("relu", "leaky_relu"), (INT8, E4M3, HALF))],
    ids=str,
)
def test_epilogues_are_exact(activation, residual_dtype, device):
    p = SMALL.problem
    x, w, scale, bias = made(SMALL, device=device)
    sums = integer_sums(p, x, w)
    residual = None
    if residual_dtype is not None:
        residual = numbers((p.N, p.K, p.P, p.Q), residual_dtype, spread=2.0).to(device)
    residual_scale = {INT8: 0.013, E4M3: 0.7}.get(residual_dtype, 1.0)
    choice = next(plans(p, Direction.FORWARD, x, w, INT8))
    given = itertools.product((scale, None), (bias, None)) if residual_dtype is INT8 else [(scale, bias)]
    for (scale, bias), (dtype, step) in itertools.product(given, ((INT8, 0.03), (HALF, 1.0))):
        step = step if scale is not None or dtype is HALF else 3000.0
        with force_plan(choice):
            y = conv2d_quantized(
                x, w, scale, bias, residual, *geometry(p), activation, 0.1, residual_scale, step, dtype, False
            )
        expected = epilogue(sums, scale, bias, residual, residual_scale, activation)
        assert same(y.cpu(), rounded(expected, step, dtype))


@pytest.mark.parametrize("name", sorted(set(PROPERTIES) - set(EXACT)))
def test_other_activations(name, device):
    p = SMALL.problem
    x, w, scale, bias = made(SMALL, device=device)
    arguments = x, w, scale, bias, None, *geometry(p), name, 0.1, 1.0, 0.02, INT8, False
    with force_plan(next(plans(p, Direction.FORWARD, x, w, INT8))):
        y = conv2d_quantized(*arguments)
    with force_mode(Mode.REFERENCE):
        expected = conv2d_quantized(*(t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments))
    # What the two err by in fp32 can lie on two sides of a half.
    assert (y.cpu().int() - expected.int()).abs().max() <= 1 and (y.cpu() != expected).float().mean() < 0.02


@pytest.mark.parametrize(
    "pair, dtype", [(pair, dtype) for i, pair in enumerate(PAIRS) for dtype in (INT8, OUTPUTS[1 + i % 4])], ids=str
)
def test_every_dtype(pair, dtype, device):
    p = SMALL.problem
    last = dtype is not HALF
    x, w, scale, bias = made(SMALL, pair, last, device)
    step = output_scale(dtype)
    exact, absolute = (torch.from_numpy(s) for s in float_sums(p, x, w))
    by_channel = scale.cpu().double().view(-1, 1, 1)
    truth = (exact * by_channel + bias.cpu().double().view(-1, 1, 1)).clamp(min=0) / step
    # Products are exact; the sum, scale, bias and inverse of the step round twelve times.
    bound = sum_bound(truth, (absolute * by_channel + bias.cpu().abs().view(-1, 1, 1)) / step, 12, FP32)
    quantum = torch.full_like(truth, 0.5) if dtype is INT8 else truth.abs() * torch.finfo(dtype).eps / 2
    smallest = {E4M3: 2.0**-10, HALF: 2.0**-25}.get(dtype, 2.0**-134)
    with force_plan(next(plans(p, Direction.FORWARD, x, w, dtype))):
        y = conv2d_quantized(x, w, scale, bias, None, *geometry(p), "relu", 0.0, 1.0, step, dtype, False)
    assert y.dtype is dtype
    largest = {INT8: 127.0, E4M3: 448.0}.get(dtype, math.inf)
    assert_within("y", y, truth.clamp(max=largest), 1.01 * bound + quantum + smallest)


@pytest.mark.parametrize(
    "name", ["3x3", "stride 2", "stride 3 by 1", "dilation 3 by 2, lopsided", "multiplier 3, stride 2"]
)
def test_transposed_int8_equals_int64(name, device):
    p = BY_NAME[name].problem
    if p.padding[::2] != p.padding[1::2]:  # torch's transposed convolution has one number on both sides
        p = replace(BY_NAME[name], padding=(1, 1, 0, 0)).problem
    y, w = (numbers(shape, INT8).to(device) for shape in ((p.N, p.K, p.P, p.Q), (p.K, 1, p.R, p.S)))
    scale, bias = (t.to(device) for t in (torch.rand(p.C) / 3000, torch.randn(p.C)))
    spans = zip((p.H, p.W), p.padding[::2], p.dilation, (p.R, p.S), p.stride, strict=True)
    extra = tuple((size + 2 * pad - d * (taps - 1) - 1) % step for size, pad, d, taps, step in spans)
    expected = epilogue(transposed_sums(p, y, w), scale, bias, activation="relu")
    for choice, dtype in zip(plans(p, Direction.INPUT_GRAD, y, w, INT8), (INT8, BF16), strict=True):
        with force_plan(choice):
            x = conv_transpose2d_quantized(
                y, w, scale, bias, None, p.stride, p.padding[::2], extra, p.dilation, p.groups,
                "relu", 0.0, 1.0, output_scale(dtype), dtype,
            )  # fmt: skip
        assert same(x.cpu(), rounded(expected, output_scale(dtype), dtype))


def test_views_are_read_in_place(device):
    """A crop of channels_last, channels out of more of them, an image repeated: no copy, the same bits."""
    p = SMALL.problem
    _, w, scale, bias = made(SMALL, device=device)
    wide = numbers((2, 32, 7, 8), INT8).to(device)
    for x in (wide[:, 3:15, 1:6, :6], wide[:, 16:28, 2:, 2:], wide[:1, :12, :5, :6].expand(2, -1, -1, -1)):
        expected = rounded(epilogue(integer_sums(p, x, w), scale, bias), 0.02, INT8)
        y = conv2d_quantized(x, w, scale, bias, None, *geometry(p), "none", 0.0, 1.0, 0.02, INT8, False)
        assert same(y.cpu(), expected)


def test_an_empty_batch_launches_nothing(device, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)
    _, w, scale, bias = made(SMALL, device=device)
    x = torch.empty(0, 12, 5, 6, dtype=INT8, device=device)
    y = conv2d_quantized(x, w, scale, bias, None, *geometry(SMALL.problem), "none", 0.0, 1.0, 0.02, INT8, False)
    assert y.shape == (0, 12, 5, 6) and y.dtype is INT8


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
def test_nan_infinity_and_the_largest_sums(activation, device):
    """A NaN is 0 in int8 and stays in e4m3; infinities saturate; sums of the largest products are exact."""
    p = layer(1, 4, 5, 5)
    x, w = (torch.full(shape, -128, dtype=INT8, device=device) for shape in ((1, 4, 5, 5), (4, 1, 5, 5)))
    w[:, :, 0, 0] = 127
    bias = torch.tensor([0.0, float("nan"), float("inf"), float("-inf")], device=device)
    for dtype in (INT8, E4M3, FP32):
        y = conv2d_quantized(x, w, None, bias, None, *geometry(p), activation, 0.1, 1.0, 1.0, dtype, False)
        centre = y[0, :, 2, 2].float().tolist()
        assert math.isnan(centre[1]) or (dtype is INT8 and centre[1] == 0)
        largest = {INT8: 127.0, E4M3: 448.0, FP32: math.inf}[dtype]
        most = 6.0 if activation == "relu6" else largest
        assert centre[2] == most and centre[0] == min(most, 24 * 2.0**14 - 127 * 128)
        assert activation == "silu" or centre[3] == (-largest if activation == "none" else 0)


def test_64_bit_offsets(device, monkeypatch):
    from gpukern.runtime.launcher import index_type

    monkeypatch.setattr(launches, "index_type", lambda _: index_type(2**40))
    prepare.forget()  # launches of other tests, with their own integers
    test_int8_equals_int64(BY_NAME["stride 2"], True, device)
    prepare.forget()


@pytest.mark.parametrize("taps, stride, dilation", [*itertools.product((3, 4, 5, 7, 9), (1, 2, 3), (1, 2))])
def test_words_meet_every_tap_once(taps, stride, dilation):
    """Four sources a word, as many taps in the other: each output gets every tap of its sources, and nothing else."""
    axis = depthwise._axis(Dimension(40, 9, taps, stride, dilation, 1), False)
    for outputs in (1, 2, 3, 4, 8):
        dots = Dots(axis, outputs, 4)
        assert len(dots.words) <= outputs * cdiv(taps, 4) * (1 if taps <= 4 else axis.ratio)
        for output in range(outputs):
            met = [
                (start + byte, shift + byte)
                for start, shift in zip(dots.words, dots.shifts_of(output), strict=True)
                for byte in range(4)
                if shift is not None and 0 <= shift + byte < taps
            ]
            assert sorted(met) == [(output * axis.ratio + tap, tap) for tap in range(taps)]
            assert {shift for shift in dots.shifts_of(output) if shift is not None} <= set(dots.shifts)


def test_plans_of_mobile_networks_are_depthwise():
    """Of layers with many channels, in one access of 4 bytes or more a thread where channels come in fours."""
    for sizes, device in itertools.product(
        ((32, 96, 112, 3, 2), (32, 144, 56, 3), (8, 240, 28, 5), (32, 960, 7, 3)), (A100, H200)
    ):
        p = layer(*sizes)
        choice = heuristic_plan(p, Direction.FORWARD, Operands("int8", first_dtype="int8", output_dtype="int8"), device)
        assert choice.variant is Variant.DEPTHWISE
        lanes, _, cols = choice.box
        assert lanes * choice.block_n // (32 * choice.num_warps) * cols >= 8
