"""2-D convolution in 8 bits, and of 16 bits with an output in 8, for inference: one kernel from sum to rounding."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpukern.conv import POOL_WINDOWS, ConvProblem, Padding, Pair, conv_problem, output_size
from gpukern.ops._pool2d.problem import output_size as pooled_size
from gpukern.ops.activation import check_activation
from gpukern.ops.conv2d import GEOMETRY
from gpukern.ops.conv2d import check_residual as check_residual_shape
from gpukern.runtime.eight_bits import Checked, check_products, check_quantizable, check_residual, described
from gpukern.runtime.integers import require
from gpukern.runtime.mode import Implementations
from gpukern.runtime.operator import Operator
from gpukern.runtime.tensors import memory_format_of
from gpukern.runtime.transforms import Batch

_implementations = Implementations("gpukern.conv.quantized")


def _output_shape(
    input: Checked,
    weight: Checked,
    scale: Checked | None,
    bias: Checked | None,
    residual: Checked | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    pool: bool,
) -> tuple[int, int, int, int]:
    """[N, K, P, Q], or [N, K, ⌊P/2⌋, ⌊Q/2⌋] of the pooled; RuntimeError for anything that does not fit together."""
    bias_shape = None if bias is None else bias.shape
    P, Q = output_size(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)
    shape = input.shape[0], weight.shape[0], P, Q
    _, terms, R, S = weight.shape
    check_products("conv2d_quantized", input, weight, scale, bias, shape[1], terms * R * S)
    check_quantizable("conv2d_quantized", output_scale, output_dtype, "output_scale")
    check_activation(activation, negative_slope)
    if residual is not None:
        require(not pool, "conv2d_quantized: expected no residual before a max pool")
        check_residual("conv2d_quantized", input, residual, residual_scale)
        check_residual_shape(residual, shape)
    return (*shape[:2], *pooled_size(shape, *POOL_WINDOWS)) if pool else shape


@functools.lru_cache(maxsize=4096)
def _problem(
    input: Checked,
    weight: Checked,
    scale: Checked | None,
    bias: Checked | None,
    residual: Checked | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    *epilogue: Any,
) -> ConvProblem:
    """The problem of checked operands: a second call of the same kind is not checked again."""
    _output_shape(input, weight, scale, bias, residual, stride, padding, dilation, groups, *epilogue)
    bias_shape = None if bias is None else bias.shape
    return conv_problem(input.shape, weight.shape, bias_shape, stride, padding, dilation, groups)


def _forward(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    pool: bool,
) -> torch.Tensor:
    geometry, written = (stride, padding, dilation, groups), (residual_scale, output_scale, output_dtype, pool)
    operands = described(input), described(weight), described(scale), described(bias), described(residual)
    problem = _problem(*operands, *geometry, activation, negative_slope, *written)
    launch = _implementations.of(input).conv2d_quantized
    return launch(problem, input, weight, scale, bias, residual, activation, negative_slope, *written)


def _fake(
    input, weight, scale, bias, residual, stride, padding, dilation, groups, activation, negative_slope, *written
) -> torch.Tensor:
    geometry = stride, padding, dilation, groups
    shape = _output_shape(input, weight, scale, bias, residual, *geometry, activation, negative_slope, *written)
    return input.new_empty(shape, dtype=written[2]).to(memory_format=memory_format_of(input, weight))


def _flops(of_conv, input, weight, scale, bias, residual, *geometry, out_shape, **_) -> int:
    return of_conv(input, weight, (*out_shape[:2], *output_size(input, weight, bias, *geometry[:4])))


#: ``act(s · (x ∗ w) + b + r)``, of whole numbers or floats of 8 bits, rounded:
#:
#: - products: int8 · int8, summed in int32; float8_e4m3fn · float8_e4m3fn, in fp32; an ``input`` in either beside
#:   a ``weight`` in float16 or bfloat16, or both in one of these or in float32, in fp32 too;
#: - ``y = float(sum) · scale[k]``, ``y += bias[k]``, ``y += residual · residual_scale``, ``y = act(y)``, each
#:   rounded to fp32, in this order; ``scale`` is fp32 [K], ``bias`` fp32 [K] or in a weight's 16 bits,
#:   ``residual`` laid out like the output, in 8 bits, or in floating point with a scale of 1; all three may be None;
#: - an output in int8 or float8_e4m3fn is ``y · (1 / output_scale)`` rounded to nearest even, saturating at ±127 or
#:   ±448, a NaN being 0 in int8; one in float16, bfloat16 or float32 is ``y``, and ``output_scale`` is 1;
#: - with ``pool`` the maxima of 2 × 2 pixels of the ``y``, [N, K, ⌊P/2⌋, ⌊Q/2⌋], without a residual.
#:
#: [N, C, H, W] with [K, C/groups, R, S] gives [N, K, P, Q]; padding is top, bottom, left, right. RuntimeError, as
#: torch's, for sizes, dtypes and devices that do not fit together, and for sums of int8 that could overflow. No
#: derivative. float8_e4m3fn needs a GPU of compute capability 8.9: NotImplementedError on older ones.
conv2d_quantized = Operator(
    "conv2d_quantized",
    f"(Tensor input, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, {GEOMETRY}, str activation, "
    "float negative_slope, float residual_scale, float output_scale, ScalarType output_dtype, bool pool) -> Tensor",
    forward=_forward,
    fake=_fake,
    batch=Batch(images=(0, 4)),
    flops=_flops,
)
