"""Convolutions in 8 bits stated a second time, in NumPy: integers in int64, the rest in fp32, one rounding each."""

from __future__ import annotations

import numpy as np
import torch

from gpukern.conv.problem import ConvProblem

INT8, E4M3, HALF, BF16, FP32 = torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32
EIGHT = (INT8, E4M3)
#: Every (input, weight) of the operators' table.
PAIRS = (
    (INT8, INT8),
    (E4M3, E4M3),
    *((eight, half) for eight in EIGHT for half in (HALF, BF16)),
    (HALF, HALF),
    (BF16, BF16),
)
OUTPUTS = (INT8, E4M3, HALF, BF16, FP32)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, last: bool = True, spread: float = 0.3) -> torch.Tensor:
    """Random numbers of ``dtype``: of int8 all of them, of the others normal ones."""
    whole = dtype is INT8
    made = torch.randint(-128, 128, shape, dtype=dtype) if whole else (torch.randn(shape) * spread).to(dtype)
    return made.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else made


def integer_sums(p: ConvProblem, x: torch.Tensor, w: torch.Tensor) -> np.ndarray:
    """Σ x · w in int64 [N, K, P, Q], one tap after the other."""
    return _sums(p, _array(x, np.int64), _array(w, np.int64))


def float_sums(p: ConvProblem, x: torch.Tensor, w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(Σ x · w, Σ |x · w|) in float64."""
    x, w = _array(x, np.float64), _array(w, np.float64)
    return _sums(p, x, w), _sums(p, np.abs(x), np.abs(w))


def _sums(p: ConvProblem, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    top, bottom, left, right = p.padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    x = x.reshape(p.N, p.groups, p.group_inputs, *x.shape[2:])
    w = w.reshape(p.groups, p.group_outputs, p.group_inputs, p.R, p.S)
    total = np.zeros((p.N, p.groups, p.group_outputs, p.P, p.Q), x.dtype)
    for r, s in np.ndindex(p.R, p.S):
        h, v = r * p.dilation[0], s * p.dilation[1]
        rows = slice(h, h + (p.P - 1) * p.stride[0] + 1, p.stride[0])
        columns = slice(v, v + (p.Q - 1) * p.stride[1] + 1, p.stride[1])
        total += np.einsum("ngchw,gkc->ngkhw", x[..., rows, columns], w[..., r, s])
    return total.reshape(p.N, p.K, p.P, p.Q)


def transposed_sums(p: ConvProblem, y: torch.Tensor, w: torch.Tensor, kind: type = np.int64) -> np.ndarray:
    """Σ y · w [N, C, H, W] of the transposed convolution: every product is added where the convolution reads it."""
    y, w = _array(y, kind), _array(w, kind)
    top, bottom, left, right = p.padding
    total = np.zeros((p.N, p.groups, p.group_inputs, p.H + top + bottom, p.W + left + right), y.dtype)
    y = y.reshape(p.N, p.groups, p.group_outputs, p.P, p.Q)
    w = w.reshape(p.groups, p.group_outputs, p.group_inputs, p.R, p.S)
    for r, s in np.ndindex(p.R, p.S):
        h, v = r * p.dilation[0], s * p.dilation[1]
        rows = slice(h, h + (p.P - 1) * p.stride[0] + 1, p.stride[0])
        columns = slice(v, v + (p.Q - 1) * p.stride[1] + 1, p.stride[1])
        total[..., rows, columns] += np.einsum("ngkhw,gkc->ngchw", y, w[..., r, s])
    return total[..., top : top + p.H, left : left + p.W].reshape(p.N, p.C, p.H, p.W)


def epilogue(
    sums: np.ndarray,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    activation: str = "none",
    negative_slope: float = 0.1,
) -> np.ndarray:
    """y in fp32, rounded after each operation, for the activations that are made of such operations."""
    y = sums.astype(np.float32)
    shape = (1, -1, *(1,) * (y.ndim - 2))
    if scale is not None:
        y = y * _array(scale, np.float32).reshape(shape)
    if bias is not None:
        y = y + _array(bias, np.float32).reshape(shape)
    if residual is not None:
        y = y + _array(residual, np.float32) * np.float32(residual_scale)
    if activation == "relu":
        y = np.where(y < 0, np.float32(0), y)
    elif activation == "relu6":
        y = np.clip(y, np.float32(0), np.float32(6))
    elif activation == "leaky_relu":
        y = np.where(y > 0, y, y * np.float32(negative_slope))
    elif activation in ("hardsigmoid", "hardswish"):
        inner = np.clip((y + np.float32(3)) * np.float32(1 / 6), np.float32(0), np.float32(1))
        y = inner if activation == "hardsigmoid" else y * inner
    else:
        assert activation == "none"
    assert y.dtype == np.float32
    return y


def pooled(y: np.ndarray) -> np.ndarray:
    N, K, P, Q = y.shape
    return y[:, :, : P // 2 * 2, : Q // 2 * 2].reshape(N, K, P // 2, 2, Q // 2, 2).max((3, 5))


def rounded(y: np.ndarray, output_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The output in ``dtype``: integers by NumPy's rounding, floats by torch's."""
    if dtype is INT8:
        whole = np.rint(y * np.float32(1 / output_scale))
        return torch.from_numpy(np.clip(np.nan_to_num(whole, nan=0.0), -127, 127).astype(np.int8))
    if dtype is E4M3:
        return torch.from_numpy(np.clip(y * np.float32(1 / output_scale), -448, 448)).to(dtype)
    return torch.from_numpy(y).to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether all bits are the same, but for the sign of a zero and the bits of a NaN."""
    assert actual.dtype is expected.dtype and actual.shape == expected.shape
    return torch.equal(actual.double().nan_to_num(9e9), expected.double().nan_to_num(9e9))


def _array(tensor: torch.Tensor, kind: type) -> np.ndarray:
    return tensor.detach().cpu().double().numpy().astype(kind)
