"""What networks in 8 bits launch: convolutions of networks for inference, cases those lack, and the passes between.

Convolutions are launched with their chosen plan, and with every plan of :attr:`Selection.candidates`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gpukern.ops.pool2d import max_pool2d
from gpukern.ops.quantization import dequantize, quantize
from gpukern.ops.quantized_conv2d import conv2d_quantized
from gpukern.ops.quantized_conv_transpose2d import conv_transpose2d_quantized
from gpukern.ops.quantized_linear import linear_quantized
from gpukern.ops.quantized_pool2d import adaptive_avg_pool2d_quantized, avg_pool2d_quantized
from tests.ops.conv_cases import Case, as_problem

INT8, E4M3, HALF = torch.int8, torch.float8_e4m3fn, torch.float16
META = torch.device("meta")

#: (input, weight, output) of each kind: all in 8 bits; layers that are given back between such, and the first.
TYPES = {
    "int8": ((INT8, INT8, INT8), (INT8, HALF, INT8), (HALF, HALF, INT8)),
    "float8": ((E4M3, E4M3, E4M3), (E4M3, HALF, HALF)),
}
#: Of ResNet-50 at batch 32 and 1, of an odd number of channels, with groups of many and of few.
LAYERS = (
    Case("1x1", (32, 256, 14, 14), 1024, (1, 1)),
    Case("1x1, one image", (1, 512, 7, 7), 2048, (1, 1)),
    Case("3x3", (32, 128, 28, 28), 128, (3, 3), padding=1),
    Case("3x3, one image", (1, 512, 7, 7), 512, (3, 3), padding=1),
    Case("3x3 stride 2", (32, 256, 28, 28), 256, (3, 3), stride=2, padding=1),
    Case("first", (32, 3, 224, 224), 64, (7, 7), stride=2, padding=3),
    Case("odd", (8, 17, 9, 9), 33, (3, 3), padding=1),
    Case("groups", (32, 128, 28, 28), 256, (3, 3), padding=1, groups=4),
    Case("small groups", (8, 32, 14, 14), 32, (3, 3), padding=1, groups=8),
)
#: Only these have an input of 16 bits: networks begin with them.
FIRST = ("first", "3x3")


@dataclass(frozen=True)
class Call:
    """A layer in some dtypes. ``end``: what follows the sum, "residual", "pool" or nothing."""

    case: Case
    types: tuple[torch.dtype, torch.dtype, torch.dtype]
    end: str = ""

    def __call__(self) -> None:
        first, second, output = self.types
        p, last = as_problem(self.case), torch.channels_last
        x, w = _empty(self.case.input, first, last), _empty(self.case.weight, second, last)
        scale = torch.empty(p.K, device=META)
        residual = _empty((p.N, p.K, p.P, p.Q), first, last) if self.end == "residual" else None
        of_residual = 0.5 if residual is not None and first.itemsize == 1 else 1.0
        geometry, of_output = (p.stride, p.padding, p.dilation, p.groups), 0.5 if output.itemsize == 1 else 1.0
        epilogue = "silu" if self.end == "residual" else "relu", 0.0, of_residual, of_output, output
        conv2d_quantized(x, w, scale, scale, residual, *geometry, *epilogue, self.end == "pool")


def calls(kind: str) -> Iterator[Callable[[], None]]:
    for types in TYPES[kind]:
        for case in LAYERS:
            if types[0] is HALF and case.name not in FIRST:
                continue
            if types[0] is not HALF and case.name == "first":
                continue
            yield Call(case, types, "residual")
        if types[0] is types[1]:
            yield Call(LAYERS[2], types, "pool")
    first, second, output = TYPES[kind][0]
    yield lambda: _linear(64, 2048, 1000, first, HALF)
    yield lambda: _linear(64, 512, 512, first, second)
    yield lambda: _transposed(first, second, output)
    yield from passes(first)


def passes(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """What networks in 8 bits have beside matrix products: in channels_last."""
    half = _empty((32, 64, 56, 56), HALF, torch.channels_last)
    x, last = (_empty(shape, dtype, torch.channels_last) for shape in ((32, 64, 112, 112), (8, 512, 7, 7)))
    yield lambda: max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), False)
    yield lambda: avg_pool2d_quantized(x, 0.1, (3, 3), (1, 1), (1, 1), False, False, None, 0.2, dtype)
    yield lambda: adaptive_avg_pool2d_quantized(last, 0.1, (1, 1), 1.0, HALF)
    yield lambda: quantize(half, 0.1, dtype)
    yield lambda: dequantize(last, 0.1, HALF)
    # The first reads and writes 8 bits, the second has weights of 16.
    yield lambda: _depthwise((32, 144, 56, 56), 3, 1, dtype, dtype)
    yield lambda: _depthwise((32, 240, 28, 28), 5, 2, dtype, HALF)


def _depthwise(shape: tuple[int, ...], taps: int, stride: int, dtype: torch.dtype, of_weight: torch.dtype) -> None:
    (_, C, H, W), padding = shape, taps // 2
    x, weight = _empty(shape, dtype, torch.channels_last), _empty((C, 1, taps, taps), of_weight)
    scale, bias = (torch.empty(C, device=META) for _ in range(2))
    residual = _empty((shape[0], C, -(-H // stride), -(-W // stride)), dtype, torch.channels_last)
    geometry = (stride,) * 2, (padding,) * 4, (1, 1), C
    conv2d_quantized(x, weight, scale, bias, residual, *geometry, "relu6", 0.0, 0.1, 0.2, dtype, False)


def _linear(rows: int, inputs: int, outputs: int, first: torch.dtype, second: torch.dtype) -> None:
    x, w, bias = _empty((rows, inputs), first), _empty((outputs, inputs), second), torch.empty(outputs, device=META)
    linear_quantized(x, w, bias, bias, "none", 0.0, 1.0, HALF)


def _transposed(first: torch.dtype, second: torch.dtype, output: torch.dtype) -> None:
    """A U-Net's way up, its filter in runs along the sum."""
    x, w = _empty((8, 256, 28, 28), first, torch.channels_last), _empty((128, 2, 2, 256), second).permute(3, 0, 1, 2)
    bias, geometry = torch.empty(128, device=META), ((2, 2), (0, 0), (0, 0), (1, 1), 1)
    conv_transpose2d_quantized(x, w, bias, bias, None, *geometry, "relu", 0.0, 1.0, 0.5, output)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, layout=torch.contiguous_format) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META).contiguous(memory_format=layout)
