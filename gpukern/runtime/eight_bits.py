"""Numbers in 8 bits and the checks that operations on them share.

A tensor in 8 bits is ``x ≈ scale · q`` with q in −127…127 (int8) or in −448…448 (float8_e4m3fn). Both are symmetric:
int8's −128 may be read and is never written. ``scale`` is that of the whole tensor, or of each output channel of a
weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import require
from gpukern.runtime.tensors import KERNEL_DTYPES

#: The largest number of each dtype of 8 bits, at which larger ones saturate.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
#: Products of two int8 are at most 2¹⁴ each: more of them could overflow a sum of 32 bits.
MOST_PRODUCTS = 2**17 - 1
_HALVES = (torch.float16, torch.bfloat16)
#: Normal numbers of fp32, whose inverses are normal too.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-126, 2.0**126


class Described(NamedTuple):
    """What is checked of a tensor: a key for caches."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def described(tensor: torch.Tensor | None) -> Described | None:
    """Return the description of a tensor, if there is one."""
    return None if tensor is None else Described(tensor.shape, tensor.dtype, tensor.device)


#: The checks read no more than a description has.
Checked = torch.Tensor | Described


def in_8_bits(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one of the two of 8 bits that are multiplied."""
    return dtype in LARGEST


def quantized(values: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """``values / scale`` in 8 bits, for ``values`` in fp32: ``values · (1 / scale)`` rounded once, to nearest even.

    Values beyond the largest number saturate. A NaN stays one in float8_e4m3fn; int8 has none and gets 0.
    """
    largest = LARGEST[dtype]
    exact = values * inverse(scale)
    if dtype is torch.int8:
        return exact.round_().clamp_(-largest, largest).nan_to_num_(nan=0.0).to(dtype)
    return exact.clamp_(-largest, largest).to(dtype)


def inverse(scale: float) -> float:
    """``1 / scale``, which is rounded to fp32 where it meets a tensor in fp32."""
    return 1.0 / scale


def check_float8(dtype: torch.dtype, device: DeviceSpec) -> None:
    """Raise NotImplementedError for floats of 8 bits on a GPU whose tensor cores do not take them."""
    if dtype is torch.float8_e4m3fn and not device.multiplies_float8:
        major, minor = device.compute_capability
        raise NotImplementedError(
            f"float8_e4m3fn needs a GPU of compute capability 8.9 or later, but {device.name} has {major}.{minor}; "
            "int8 runs there"
        )


def check_quantizable(
    operation: str, scale: float, dtype: torch.dtype, name: str = "scale", what: str = "an output"
) -> None:
    """Raise RuntimeError unless ``scale`` and ``dtype``, of ``what``, fit together.

    NotImplementedError, which is one, for a dtype that no operation writes. A scale other than 1 is for 8 bits only.
    """
    if in_8_bits(dtype):
        check_scale(operation, scale, name)
        return
    if dtype not in KERNEL_DTYPES:
        raise NotImplementedError(
            f"{operation}: expected {what} in int8, float8_e4m3fn, float16, bfloat16 or float32, but got {dtype}"
        )
    require(scale == 1.0, f"{operation}: expected {name}=1 for {what} in {dtype}, but got {scale}")


def check_scale(operation: str, scale: float, name: str = "scale") -> None:
    """Raise RuntimeError unless ``scale`` is a positive number that fp32 and its inverse can hold."""
    require(
        math.isfinite(scale) and _SMALLEST_SCALE <= scale <= _LARGEST_SCALE,
        f"{operation}: expected {name} to be a positive finite number, from 2⁻¹²⁶ to 2¹²⁶, but got {scale}",
    )


def check_products(
    operation: str,
    input: Checked,
    weight: Checked,
    scale: Checked | None,
    bias: Checked | None,
    outputs: int,
    products: int,
) -> None:
    """Raise RuntimeError unless dtypes, devices and sizes of a quantized product's operands fit together.

    input and weight have one dtype, of 8 bits or floating point, or the input has 8 bits and the weight is float16 or
    bfloat16. ``scale`` and ``bias`` are fp32 [outputs], ``bias`` also in the weight's dtype if that has 16 bits. A sum
    has so many ``products``.
    """
    pair = input.dtype, weight.dtype
    require(
        (pair[0] is pair[1] and (in_8_bits(pair[0]) or pair[0] in KERNEL_DTYPES))
        or (in_8_bits(pair[0]) and pair[1] in _HALVES),
        f"{operation}: expected input and weight to have the same dtype, int8, float8_e4m3fn or floating point, or an "
        f"input in 8 bits beside a weight in float16 or bfloat16, but got {pair[0]} and {pair[1]}",
    )
    for name, tensor in (("weight", weight), ("scale", scale), ("bias", bias)):
        if tensor is not None:
            check_device(operation, input, name, tensor)
    check_channels(operation, "scale", scale, outputs, (torch.float32,))
    check_channels(operation, "bias", bias, outputs, (torch.float32, *(pair[1:] if pair[1] in _HALVES else ())))
    require(
        pair[0] is not torch.int8 or pair[1] is not torch.int8 or products <= MOST_PRODUCTS,
        f"{operation}: {products} products of int8 can overflow their sum of 32 bits; {MOST_PRODUCTS} cannot",
    )


def check_channels(
    operation: str, name: str, tensor: Checked | None, channels: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    """Raise RuntimeError unless ``tensor``, if there is one, has a number for each of ``channels``."""
    if tensor is None:
        return
    require(
        tensor.dtype in dtypes,
        f"{operation}: expected {name} in {' or '.join(map(str, dtypes))}, but got {tensor.dtype}",
    )
    require(
        tuple(tensor.shape) == (channels,),
        f"{operation}: expected {name} to have shape [{channels}], but got {list(tensor.shape)}",
    )


def check_residual(operation: str, input: Checked, residual: Checked, scale: float) -> None:
    """Raise RuntimeError unless ``residual`` is in 8 bits, or floating point with a scale of 1."""
    check_device(operation, input, "residual", residual)
    check_quantizable(operation, scale, residual.dtype, "residual_scale", "a residual")


def check_device(operation: str, input: Checked, name: str, tensor: Checked) -> None:
    """Raise RuntimeError, as torch does, unless both tensors are on one device."""
    require(
        tensor.device == input.device,
        f"{operation}: expected all tensors to be on the same device, but input is on {input.device} and {name} on "
        f"{tensor.device}",
    )
