"""The operators in 8 bits in torch's, for exporters: the same formulas, sums in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from gpukern.ops._activation.reference import activation as activate
from gpukern.runtime.eight_bits import LARGEST, inverse


def conv2d_quantized(
    input, weight, scale, bias, residual, stride, padding, dilation, groups, activation, negative_slope,
    residual_scale, output_scale, output_dtype, pool,
) -> torch.Tensor:  # fmt: skip
    top, bottom, left, right = padding
    x = F.pad(_wide(input), (left, right, top, bottom))
    y = F.conv2d(x, _wide(weight), None, stride, 0, dilation, groups)
    y = activate(_added(y, scale, bias, residual, residual_scale), activation, negative_slope)
    return _rounded(F.max_pool2d(y, 2) if pool else y, output_scale, output_dtype)


def conv_transpose2d_quantized(
    input, weight, scale, bias, residual, stride, padding, output_padding, dilation, groups, activation,
    negative_slope, residual_scale, output_scale, output_dtype,
) -> torch.Tensor:  # fmt: skip
    geometry = stride, padding, output_padding, groups, dilation
    y = F.conv_transpose2d(_wide(input), _wide(weight), None, *geometry)
    y = activate(_added(y, scale, bias, residual, residual_scale), activation, negative_slope)
    return _rounded(y, output_scale, output_dtype)


def linear_quantized(
    input, weight, scale, bias, activation, negative_slope, output_scale, output_dtype
) -> torch.Tensor:
    y = _added(F.linear(_wide(input), _wide(weight)), scale, bias, None, 1.0)
    return _rounded(activate(y, activation, negative_slope), output_scale, output_dtype)


def adaptive_avg_pool2d_quantized(
    input: torch.Tensor, input_scale: float, output_size: tuple[int, int], output_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    x, single = _wide(input), all(size == 1 for size in output_size)
    # torch's own way to a single pixel changes strides in place, which the exporter does not take.
    y = x.mean((2, 3), keepdim=True) if single else F.adaptive_avg_pool2d(x, output_size)
    return _rounded(y * input_scale, output_scale, dtype)


def avg_pool2d_quantized(
    input, input_scale, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, output_scale, dtype
) -> torch.Tensor:
    y = F.avg_pool2d(_wide(input), kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _rounded(y * input_scale, output_scale, dtype)


def quantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return _rounded(_wide(input), scale, dtype)


def dequantize(input: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return (_wide(input) * scale).to(dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float32)


def _added(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
) -> torch.Tensor:
    by_channel = -1, *(1,) * (y.dim() - 2)
    y = y if scale is None else y * scale.view(by_channel)
    y = y if bias is None else y + _wide(bias).view(by_channel)
    return y if residual is None else y + _wide(residual) * residual_scale


def _rounded(y: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    if dtype not in LARGEST:
        return y.to(dtype)
    exact = (y * inverse(scale)).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (exact.round() if dtype is torch.int8 else exact).to(dtype)


#: By the operators' names.
DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        conv2d_quantized,
        conv_transpose2d_quantized,
        linear_quantized,
        adaptive_avg_pool2d_quantized,
        avg_pool2d_quantized,
        quantize,
        dequantize,
    )
}
