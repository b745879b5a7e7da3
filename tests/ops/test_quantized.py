"""The operators in 8 bits on CPU tensors: formulas, dtypes, layouts, errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpukern.conv.problem import transposed_problem
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops.quantized_conv2d import conv2d_quantized
from gpukern.runtime.tensors import memory_format_of
from tests.numerics import assert_within, sum_bound
from tests.ops.conv_cases import CASES, Case, as_problem
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
    pooled,
    rounded,
    same,
    transposed_sums,
)

pytestmark = pytest.mark.usefixtures("poisoned", "reference_mode")

ops = torch.ops.gpukern
#: Activations made of operations that IEEE 754 rounds in one way only.
EXACT = ("none", "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish")
PLAIN = (1, 1), (0, 0, 0, 0), (1, 1), 1
TINY = Case("tiny", (2, 17, 5, 6), 9, (3, 2), padding=1)


def geometry(p) -> tuple:
    return p.stride, p.padding, p.dilation, p.groups


def operands(case: Case, pair=(INT8, INT8), last: bool = True) -> tuple[torch.Tensor, ...]:
    """x, w, scale, bias, such that y is about 1."""
    p = as_problem(case)
    x, w = (numbers(shape, dtype, last) for shape, dtype in zip((case.input, case.weight), pair, strict=True))
    size = math.prod(74.0 if dtype is INT8 else 0.3 for dtype in pair) * math.sqrt(p.group_inputs * p.R * p.S)
    return x, w, (torch.rand(case.outputs) + 0.5) / size, torch.randn(case.outputs) * 0.5


# ---- convolution ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conv2d_of_int8_equals_int64(case):
    p = as_problem(case)
    for last, (activation, dtype) in itertools.product(
        (True, False), (("relu", INT8), ("none", E4M3), ("relu6", FP32))
    ):
        x, w, scale, bias = operands(case, last=last)
        output_scale = 1.0 if dtype is FP32 else 0.02
        y = ops.conv2d_quantized(
            x, w, scale, bias, None, *geometry(p), activation, 0.0, 1.0, output_scale, dtype, False
        )
        expected = epilogue(integer_sums(p, x, w), scale, bias, activation=activation)
        assert same(y, rounded(expected, output_scale, dtype))
        assert y.is_contiguous(memory_format=memory_format_of(x, w))


@pytest.mark.parametrize("terms", [1000, 1100, 14000])
def test_conv2d_of_the_largest_int8_is_exact(terms):
    # Partial sums pass 2²⁴, from where fp32 has no odd numbers; an odd one is left at the end.
    x, w = torch.full((1, terms, 1, 2), -128, dtype=INT8), torch.full((3, terms, 1, 1), -128, dtype=INT8)
    w[1, 1::2] = 127
    w[2, -1] = 1
    y = ops.conv2d_quantized(x, w, None, None, None, *PLAIN, "none", 0.0, 1.0, 1.0, FP32, False)
    exact = x.long()[0, :, 0, 0] @ w.long()[:, :, 0, 0].T
    assert torch.equal(y[0, :, 0, 0], exact.to(FP32)) and torch.equal(y[0, :, 0, 1], exact.to(FP32))


@pytest.mark.parametrize("pair, dtype", [*itertools.product(PAIRS, OUTPUTS)], ids=str)
def test_conv2d_of_every_dtype(pair, dtype):
    p = as_problem(TINY)
    x, w, scale, bias = operands(TINY, pair)
    output_scale = 0.02 if dtype in EIGHT else 1.0
    arguments = *geometry(p), "relu", 0.0, 1.0, output_scale, dtype, False
    y = ops.conv2d_quantized(x, w, scale, bias, None, *arguments)
    assert y.dtype is dtype
    assert ops.conv2d_quantized(*(t.to("meta") for t in (x, w, scale, bias)), None, *arguments).dtype is dtype
    if pair == (INT8, INT8):
        assert same(y, rounded(epilogue(integer_sums(p, x, w), scale, bias, activation="relu"), output_scale, dtype))
        return
    exact, absolute = (torch.from_numpy(s) for s in float_sums(p, x, w))
    by_channel = scale.double().view(-1, 1, 1)
    truth = (exact * by_channel + bias.double().view(-1, 1, 1)).clamp(min=0) / output_scale
    bound = sum_bound(truth, absolute * by_channel / output_scale, 18 * 6, FP32)
    largest = {INT8: 127.0, E4M3: 448.0}.get(dtype, math.inf)
    quantum = torch.full_like(truth, 0.5) if dtype is INT8 else truth.abs() * torch.finfo(dtype).eps / 2
    smallest = {E4M3: 2.0**-10, HALF: 2.0**-25}.get(dtype, 2.0**-134)
    assert_within("y", y, truth.clamp(max=largest), 1.01 * bound + quantum + smallest)


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("residual_dtype", [None, INT8, E4M3, HALF, BF16, FP32], ids=str)
def test_conv2d_epilogues(activation, residual_dtype):
    p = as_problem(TINY)
    x, w, scale, bias = operands(TINY)
    sums = integer_sums(p, x, w)
    residual = None if residual_dtype is None else numbers((p.N, p.K, p.P, p.Q), residual_dtype, spread=2.0)
    residual_scale = {INT8: 0.013, E4M3: 0.7}.get(residual_dtype, 1.0)
    for given in itertools.product((scale, None), (bias, None)):
        output_scale = 0.03 if given[0] is not None else 3000.0
        y = ops.conv2d_quantized(
            x, w, *given, residual, *geometry(p), activation, 0.1, residual_scale, output_scale, INT8, False
        )
        expected = epilogue(sums, *given, residual, residual_scale, activation)
        assert same(y, rounded(expected, output_scale, INT8))


@pytest.mark.parametrize("name", PROPERTIES)
def test_conv2d_takes_every_activation(name):
    p = as_problem(TINY)
    x, w, scale, bias = operands(TINY)
    plain = ops.conv2d_quantized(x, w, scale, bias, None, *geometry(p), "none", 0.0, 1.0, 1.0, FP32, False)
    y = ops.conv2d_quantized(x, w, scale, bias, None, *geometry(p), name, 0.1, 1.0, 0.02, INT8, False)
    exact = ops.activation(plain.double(), name, 0.1) / 0.02
    # Half a step, and what fp32 errs by before the rounding.
    assert (y.double() - exact.clamp(-127, 127)).abs().max() < 0.5 + 1e-4


@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
@pytest.mark.parametrize(
    "case", [TINY, Case("even", (1, 4, 6, 8), 5, (3, 3), padding=1), Case("batch 0", (0, 4, 6, 6), 3, (3, 3))],
    ids=lambda case: case.name,
)  # fmt: skip
def test_conv2d_with_a_pool(case, dtype):
    p = as_problem(case)
    x, w, scale, bias = operands(case)
    output_scale = 0.02 if dtype in EIGHT else 1.0
    y = ops.conv2d_quantized(x, w, scale, bias, None, *geometry(p), "relu", 0.0, 1.0, output_scale, dtype, True)
    expected = pooled(epilogue(integer_sums(p, x, w), scale, bias, activation="relu"))
    assert same(y, rounded(expected, output_scale, dtype))


def test_conv2d_saturates_and_rounds_to_even():
    x, scale = torch.ones(1, 1, 1, 1, dtype=INT8), torch.ones(9)
    w = torch.tensor([1, 3, 5, -1, -3, 100, 127, -127, -128], dtype=INT8).view(9, 1, 1, 1)
    y = ops.conv2d_quantized(x, w, scale, None, None, *PLAIN, "none", 0.0, 1.0, 2.0, INT8, False)
    assert y.flatten().tolist() == [0, 2, 2, 0, -2, 50, 64, -64, -64]
    y = ops.conv2d_quantized(x, w, scale, None, None, *PLAIN, "none", 0.0, 1.0, 0.5, INT8, False)
    assert y.flatten().tolist() == [2, 6, 10, -2, -6, 127, 127, -127, -127]
    y = ops.conv2d_quantized(x, w, scale, None, None, *PLAIN, "none", 0.0, 1.0, 0.25, E4M3, False)
    assert y.float().flatten().tolist() == [4, 12, 20, -4, -12, 384, 448, -448, -448]


def test_a_nan_is_zero_in_int8_and_stays_in_floats():
    x, w = torch.full((1, 1, 1, 1), math.nan).half(), torch.ones(1, 1, 1, 1).half()
    for dtype, scale in ((INT8, 0.5), (E4M3, 0.5), (HALF, 1.0)):
        y = ops.conv2d_quantized(x, w, None, None, None, *PLAIN, "relu", 0.0, 1.0, scale, dtype, False)
        assert y.item() == 0 if dtype is INT8 else y.float().isnan().all()
        q = ops.quantize(x, 0.5, dtype) if dtype in EIGHT else x
        assert q.item() == 0 if dtype is INT8 else q.float().isnan().all()


def test_conv2d_of_nothing_to_sum_is_its_epilogue():
    x, w = torch.empty(1, 0, 2, 3, dtype=INT8), torch.empty(4, 0, 1, 1, dtype=INT8)
    bias = torch.tensor([1.0, -1.0, 0.26, 9.0])
    y = ops.conv2d_quantized(x, w, None, bias, None, *PLAIN, "relu", 0.0, 1.0, 0.1, INT8, False)
    assert y[0, :, 1, 2].tolist() == [10, 0, 3, 90]


# ---- transposed convolution and linear -----------------------------------------------------------------------------

TRANSPOSED = (
    ((2, 6, 4, 5), (6, 3, 3, 2), ((2, 1), (1, 0), (1, 0), (1, 2), 1)),
    ((1, 6, 4, 5), (6, 3, 2, 2), ((2, 2), (0, 0), (0, 0), (1, 1), 2)),
    ((0, 6, 4, 5), (6, 3, 3, 3), ((2, 2), (1, 1), (1, 1), (1, 1), 1)),
    ((1, 40, 3, 3), (40, 17, 4, 4), ((2, 2), (1, 1), (0, 0), (1, 1), 1)),
)


@pytest.mark.parametrize("input, weight, shape", TRANSPOSED)
@pytest.mark.parametrize("last", [True, False])
def test_conv_transpose2d_of_int8_equals_int64(input, weight, shape, last):
    p = transposed_problem(input, weight, None, *shape)
    x, w = numbers(input, INT8, last), numbers(weight, INT8, last)
    scale, bias = torch.rand(p.C) * 1e-4, torch.randn(p.C)
    residual = numbers((p.N, p.C, p.H, p.W), INT8, last)
    y = ops.conv_transpose2d_quantized(x, w, scale, bias, residual, *shape, "leaky_relu", 0.1, 0.02, 0.03, INT8)
    expected = epilogue(transposed_sums(p, x, w), scale, bias, residual, 0.02, "leaky_relu")
    assert same(y, rounded(expected, 0.03, INT8))
    assert y.is_contiguous(memory_format=memory_format_of(x, w))


def test_conv_transpose2d_of_floats_is_within_the_bound():
    input, weight, shape = TRANSPOSED[0]
    p = transposed_problem(input, weight, None, *shape)
    for pair in PAIRS[1:]:
        x, w = numbers(input, pair[0]), numbers(weight, pair[1])
        y = ops.conv_transpose2d_quantized(x, w, None, None, None, *shape, "none", 0.0, 1.0, 1.0, FP32)
        truth, absolute = (
            torch.from_numpy(transposed_sums(p, a, b, np.float64)) for a, b in ((x, w), (_abs(x), _abs(w)))
        )
        assert_within(str(pair), y, truth, sum_bound(truth, absolute, 36, FP32))


def _abs(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs()


@pytest.mark.parametrize("rows, inputs, outputs", [(5, 33, 7), (0, 8, 4), (3, 0, 4), (4, 2050, 10)])
def test_linear_of_int8_equals_int64(rows, inputs, outputs):
    x, w = numbers((rows, inputs), INT8), numbers((outputs, inputs), INT8)
    scale, bias = torch.rand(outputs) * 1e-3, torch.randn(outputs)
    sums = x.long().numpy() @ w.long().numpy().T
    for dtype, output_scale in ((INT8, 0.1), (HALF, 1.0)):
        y = ops.linear_quantized(x, w, scale, bias, "relu", 0.0, output_scale, dtype)
        assert same(y, rounded(epilogue(sums, scale, bias, activation="relu"), output_scale, dtype))


@pytest.mark.parametrize("pair", PAIRS[1:], ids=str)
def test_linear_of_floats_is_within_the_bound(pair):
    x, w = numbers((5, 33), pair[0]), numbers((7, 33), pair[1])
    y = ops.linear_quantized(x, w, None, None, "none", 0.0, 1.0, FP32)
    truth, absolute = x.double() @ w.double().T, _abs(x) @ _abs(w).T
    assert_within(str(pair), y, truth, sum_bound(truth, absolute, 33, FP32))


# ---- rounding and back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [FP32, HALF, BF16], ids=str)
def test_quantize_rounds_once(given):
    x = (torch.randn(999) * 4).to(given)
    x[:6] = torch.tensor([0.25, 0.75, -1.25, math.inf, -math.inf, 1e4], dtype=given)
    for dtype, scale in ((INT8, 0.5), (INT8, 0.037), (E4M3, 0.5), (E4M3, 0.01)):
        q = ops.quantize(x, scale, dtype)
        assert same(q, rounded(x.float().numpy(), scale, dtype))
    assert ops.quantize(x, 0.5, INT8)[:6].tolist() == [0, 2, -2, 127, -127, 127]


@pytest.mark.parametrize("dtype", EIGHT, ids=str)
def test_dequantize_is_the_product(dtype):
    q = numbers((999,), dtype, spread=50.0)
    for result in (FP32, HALF, BF16):
        x = ops.dequantize(q, 0.037, result)
        assert same(x, torch.from_numpy(q.float().numpy() * np.float32(0.037)).to(result))
    assert torch.equal(
        ops.quantize(ops.dequantize(q, 0.037, FP32), 0.037, dtype).float(),
        q.float().clamp(min=-127) if dtype is INT8 else q.float(),
    )


def test_quantize_keeps_the_layout():
    x = torch.randn(2, 3, 4, 5)
    for given in (x, x.to(memory_format=torch.channels_last), x[:, ::2], x.permute(1, 3, 0, 2), x[:0], x[0, 0, 0, 0]):
        q = ops.quantize(given, 0.1, INT8)
        assert q.stride() == (given * 1.0).stride() == ops.quantize(given.to("meta"), 0.1, INT8).stride()
        assert ops.dequantize(q, 0.1, HALF).stride() == ops.dequantize(q.to("meta"), 0.1, HALF).stride() == q.stride()


# ---- errors --------------------------------------------------------------------------------------------------------

X, W = torch.ones(1, 4, 5, 5, dtype=INT8), torch.ones(6, 4, 3, 3, dtype=INT8)
ENDING = *PLAIN, "none", 0.0


@pytest.mark.parametrize(
    "words, call",
    {
        "same dtype": (lambda: (X, W.to(E4M3), None, None, None, *ENDING, 1.0, 1.0, FP32, False)),
        "input in 8 bits beside": (lambda: (X.half(), W, None, None, None, *ENDING, 1.0, 1.0, FP32, False)),
        "but got torch.int8 and torch.float32": (
            lambda: (X, W.float(), None, None, None, *ENDING, 1.0, 1.0, FP32, False)
        ),
        "torch.uint8": (lambda: (X.to(torch.uint8), W, None, None, None, *ENDING, 1.0, 1.0, FP32, False)),
        "scale in torch.float32": (lambda: (X, W, torch.ones(6).half(), None, None, *ENDING, 1.0, 1.0, FP32, False)),
        r"scale to have shape \[6\]": (lambda: (X, W, torch.ones(1), None, None, *ENDING, 1.0, 1.0, FP32, False)),
        "bias in torch.float32": (lambda: (X, W, None, torch.ones(6).half(), None, *ENDING, 1.0, 1.0, FP32, False)),
        r"bias to have shape \[6\]": (lambda: (X, W, None, torch.ones(5), None, *ENDING, 1.0, 1.0, FP32, False)),
        "residual to have the output's shape": (
            lambda: (X, W, None, None, torch.ones(1, 6, 3, 1), *ENDING, 1.0, 1.0, FP32, False)
        ),
        "residual_scale=1 for a residual in torch.float32": (
            lambda: (X, W, None, None, torch.ones(1, 6, 3, 3), *ENDING, 0.5, 1.0, FP32, False)
        ),
        "residual_scale to be a positive": (
            lambda: (X, W, None, None, torch.ones(1, 6, 3, 3, dtype=INT8), *ENDING, 0.0, 1.0, FP32, False)
        ),
        "no residual before a max pool": (
            lambda: (X, W, None, None, torch.ones(1, 6, 3, 3), *ENDING, 1.0, 1.0, FP32, True)
        ),
        "output_scale=1": (lambda: (X, W, None, None, None, *ENDING, 1.0, 0.5, FP32, False)),
        "output_scale to be a positive": (lambda: (X, W, None, None, None, *ENDING, 1.0, -1.0, INT8, False)),
        "finite number, .*but got nan": (lambda: (X, W, None, None, None, *ENDING, 1.0, math.nan, INT8, False)),
        "finite number, .*but got inf": (lambda: (X, W, None, None, None, *ENDING, 1.0, math.inf, E4M3, False)),
        "expected an output in int8": (lambda: (X, W, None, None, None, *ENDING, 1.0, 1.0, torch.int32, False)),
        "to have 4 channels": (lambda: (X[:, :3], W, None, None, None, *ENDING, 1.0, 1.0, FP32, False)),
        "same device": (lambda: (X, W, torch.ones(6, device="meta"), None, None, *ENDING, 1.0, 1.0, FP32, False)),
    }.items(),
)
def test_conv2d_refuses(words, call):
    with pytest.raises(RuntimeError, match=words):
        ops.conv2d_quantized(*call())
    with pytest.raises(RuntimeError, match=words):
        ops.conv2d_quantized(
            *(t.to("meta") if isinstance(t, torch.Tensor) and "device" not in words else t for t in call())
        )


def test_sums_that_could_overflow_are_refused():
    for terms in (2**17 - 1, 2**17):
        x, w = torch.ones(1, terms, dtype=INT8), torch.ones(2, terms, dtype=INT8)
        if terms < 2**17:
            assert ops.linear_quantized(x, w, None, None, "none", 0.0, 1.0, FP32).tolist() == [[terms, terms]]
        else:
            with pytest.raises(RuntimeError, match="overflow"):
                ops.linear_quantized(x, w, None, None, "none", 0.0, 1.0, FP32)
    assert ops.linear_quantized(x.half(), w.half(), None, None, "none", 0.0, 1.0, FP32).isfinite().all()


def test_other_refusals():
    with pytest.raises(ValueError, match="unknown activation"):
        ops.conv2d_quantized(X, W, None, None, None, *PLAIN, "mish", 0.0, 1.0, 1.0, FP32, False)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        ops.linear_quantized(X[0, 0], W[0, 0], None, None, "none", 0.0, 1.0, FP32)
    with pytest.raises(RuntimeError, match=r"\[rows, in_features\]"):
        ops.linear_quantized(X, W[0, 0], None, None, "none", 0.0, 1.0, FP32)
    with pytest.raises(RuntimeError, match="quantize: expected a tensor in float32"):
        ops.quantize(X, 1.0, INT8)
    with pytest.raises(NotImplementedError, match="int8 or float8_e4m3fn"):
        ops.quantize(X.float(), 1.0, torch.uint8)
    with pytest.raises(RuntimeError, match="scale to be a positive"):
        ops.quantize(X.float(), 0.0, INT8)
    with pytest.raises(RuntimeError, match="dequantize: expected a tensor in int8"):
        ops.dequantize(X.float(), 1.0, FP32)
    y = conv2d_quantized(
        X.half().requires_grad_(), W.half(), None, None, None, *PLAIN, "none", 0.0, 1.0, 1.0, FP32, False
    )
    with pytest.raises(RuntimeError, match="no derivative"):
        y.sum().backward()


# ---- in company ----------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_convolution():
    x, w = torch.ones(2, 4, 8, 8, dtype=INT8), torch.ones(6, 2, 3, 3, dtype=INT8)
    with FlopCounterMode(display=False) as counter:
        ops.conv2d_quantized(x, w, None, None, None, [2, 2], [1, 1, 1, 1], [1, 1], 2, "none", 0.0, 1.0, 1.0, FP32, True)
        assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 4 * 2 * 9
        ops.linear_quantized(x.view(2, -1), w.view(-1, 108)[:, :1].expand(1, 256), None, None, "none", 0.0, 1.0, FP32)
        assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 4 * 2 * 9 + 2 * 2 * 256
        ops.conv_transpose2d_quantized(
            x, w.view(4, 3, 3, 3), None, None, None, [1, 1], [0, 0], [0, 0], [1, 1], 1, "none", 0.0, 1.0, 1.0, FP32
        )
        assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 4 * 2 * 9 + 2 * 2 * 256 + 2 * 2 * 4 * 8 * 8 * 3 * 9


def test_vmap_merges_images():
    x, w, scale, bias = operands(TINY)
    p = as_problem(TINY)
    many = torch.stack([x, x.flip(0)])

    def run(x):
        return ops.conv2d_quantized(x, w, scale, bias, None, *geometry(p), "relu", 0.0, 1.0, 0.02, INT8, False)

    assert torch.equal(torch.vmap(run)(many), torch.stack([run(x), run(x.flip(0))]))
