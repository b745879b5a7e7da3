"""gpukern's operators in those of torch, of which ``torch.onnx.export(dynamo=True)`` makes standard ONNX operators.

The exporter finds them by itself::

    torch.onnx.export(gpukern.convert(model), (x,), "model.onnx", dynamo=True)
    torch.onnx.export(gpukern.fuse(model, x), (x,), "model.onnx", dynamo=True)

Everyone else who wants a graph of torch's operators only, as other compilers do, gives them to torch.export::

    torch.export.export(model, (x,)).run_decompositions({**torch.export.default_decompositions(), **decompositions()})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from gpukern.conv import POOL_WINDOWS
from gpukern.ops._activation.reference import activation
from gpukern.ops._linear.reference import linear
from gpukern.runtime.import_hooks import when_imported

__all__ = ["decompositions"]

_gpukern = torch.ops.gpukern


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """By operator, the same computation in torch's: of all that a model's forward calls, in training too.

    For sizes that are symbols as well. Layouts are not kept, nor are the bits: torch's operators round in their way.
    """
    return {
        _gpukern.activation.default: activation,
        _gpukern.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
        _gpukern.avg_pool2d.default: _avg_pool2d,
        _gpukern.batch_norm.default: _batch_norm,
        _gpukern.batch_norm_training.default: _batch_norm_training,
        _gpukern.conv2d.default: _conv2d,
        _gpukern.conv2d_batch_norm.default: _conv2d_batch_norm,
        _gpukern.conv2d_max_pool2d.default: _conv2d_max_pool2d,
        _gpukern.conv_transpose2d.default: _conv_transpose2d,
        _gpukern.linear.default: linear,
        _gpukern.max_pool2d.default: F.max_pool2d,
        _gpukern.max_pool2d_with_taps.default: _max_pool2d_with_indices,
        _gpukern.max_pool2d_indices.default: _indices,
    }


def register_decompositions() -> None:
    """Give them to torch's exporter when it is imported. Its table is not torch's global one, by which shapes are found
    under ``torch.compile`` too."""
    when_imported("torch.onnx._internal.exporter._decomp", _extend)


def _extend(exporter: ModuleType) -> None:
    make = exporter.create_onnx_friendly_decomposition_table

    def make_with_ours(known: Any) -> dict[Any, Callable]:
        # Not those that the user translates: see torch.onnx.export's custom_translation_table.
        ours = {operator: function for operator, function in decompositions().items() if operator not in known}
        return {**make(known), **ours}

    exporter.create_onnx_friendly_decomposition_table = make_with_ours


def _conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    name: str,
    negative_slope: float,
) -> torch.Tensor:
    top, bottom, left, right = padding
    padded = input
    if top != bottom or left != right:
        padded, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
    given, filters, added = _alike(padded, weight, bias, residual)
    y = F.conv2d(given, filters, bias, stride, (top, left), dilation, groups)
    return activation(y if added is None else y + added, name, negative_slope).to(input.dtype)


def _conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    name: str,
    negative_slope: float,
) -> torch.Tensor:
    given, filters, added = _alike(input, weight, bias, residual)
    y = F.conv_transpose2d(given, filters, bias, stride, padding, output_padding, groups, dilation)
    return activation(y if added is None else y + added, name, negative_slope).to(input.dtype)


def _alike(input, weight, bias, residual) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In the dtype of a bias in fp32: one rounding at the end."""
    dtype = input.dtype if bias is None else torch.promote_types(input.dtype, bias.dtype)
    return input.to(dtype), weight.to(dtype), None if residual is None else residual.to(dtype)


def _conv2d_max_pool2d(input, weight, bias, *rest) -> torch.Tensor:
    return F.max_pool2d(_conv2d(input, weight, bias, None, *rest), *POOL_WINDOWS)


def _batch_norm(input, weight, bias, residual, mean, var, eps, name, negative_slope) -> torch.Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    mean, var, weight, bias = (None if t is None else t.to(dtype) for t in (mean, var, weight, bias))
    z = F.batch_norm(input.to(dtype), mean, var, weight, bias, eps=eps)
    z = z if residual is None else z + residual.to(dtype)
    return activation(z, name, negative_slope).to(input.dtype)


def _batch_norm_training(
    input, weight, bias, residual, eps, name, negative_slope
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean, biased variance)."""
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = x.mean(others)
    shape = [1, -1, *(1 for _ in others[1:])]
    centered = x - mean.reshape(shape)
    variance = centered.square().mean(others)
    z = centered * torch.rsqrt(variance + eps).reshape(shape)
    for factor, combine in ((weight, torch.mul), (bias, torch.add)):
        z = z if factor is None else combine(z, factor.to(x.dtype).reshape(shape))
    z = z if residual is None else z + residual.to(x.dtype)
    return activation(z, name, negative_slope).to(input.dtype), mean, variance


def _conv2d_batch_norm(
    input, weight, bias, norm_weight, norm_bias, residual, stride, padding, dilation, groups, *epilogue
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z = _conv2d(input, weight, bias, None, stride, padding, dilation, groups, "none", 0.0)
    y, mean, variance = _batch_norm_training(z, norm_weight, norm_bias, residual, *epilogue)
    return y, z, mean, variance


def _max_pool2d_with_indices(input, *geometry) -> tuple[torch.Tensor, torch.Tensor]:
    # By two operators: the indices are mostly for a backward that there will not be.
    return F.max_pool2d(input, *geometry), F.max_pool2d(input, *geometry, return_indices=True)[1]


def _indices(taps, *_) -> torch.Tensor:
    """Those of :func:`_max_pool2d_with_indices` are torch's already."""
    return taps.clone()


def _avg_pool2d(
    input, kernel, stride, padding, dilation, ceil_mode, count_include_pad, divisor_override
) -> torch.Tensor:
    return F.avg_pool2d(input, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _adaptive_avg_pool2d(input: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    if all(size == 1 for size in output_size):
        # torch's own way there changes strides in place, which the exporter does not take.
        return input.mean((2, 3), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)
