"""The two formats of eight bits: what they hold, how numbers are rounded to them, and weights.

    x ≈ scale · q,   q = clamp(rne(x / scale))

with q an int8 in −127 … 127 or a float8_e4m3fn up to ±448: symmetric, so that zero is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """``name`` as :func:`gpukern.fuse` takes it; ``largest``: the magnitude of the largest number."""

    name: str
    dtype: torch.dtype
    largest: float

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


INT8 = Format("int8", torch.int8, 127.0)
FP8 = Format("fp8", torch.float8_e4m3fn, 448.0)

#: All that a user may call them.
BY_NAME = {
    "int8": INT8,
    torch.int8: INT8,
    "fp8": FP8,
    "float8": FP8,
    "float8_e4m3fn": FP8,
    "e4m3": FP8,
    torch.float8_e4m3fn: FP8,
}
#: Scales stay normal numbers of fp32, and so do their reciprocals.
_SMALLEST_SCALE = 1e-30


def scale_for(threshold: float, format: Format) -> float:
    """The scale with which the format's largest number is ``threshold``, as a number of fp32."""
    scale = max(threshold / format.largest, _SMALLEST_SCALE) if threshold > 0 else 1.0
    return float(torch.tensor(scale, dtype=torch.float32))


def stored(x: torch.Tensor, scale: float | torch.Tensor, format: Format) -> torch.Tensor:
    """``x / scale`` in the format. As the kernels do, ``x`` is multiplied by the reciprocal, rounded to fp32."""
    if isinstance(scale, torch.Tensor):
        scaled = x * scale.reciprocal()
    else:
        scaled = x * float(torch.tensor(1.0 / scale, dtype=torch.float32))
    scaled = scaled.clamp(-format.largest, format.largest)
    return (scaled.round() if format is INT8 else scaled).to(format.dtype)


def rounded_to(x: torch.Tensor, scale: float | torch.Tensor, format: Format) -> torch.Tensor:
    """``x`` as it is after it was stored, in its own dtype."""
    return stored(x, scale, format).to(x.dtype) * scale


def weight_scales(weight: torch.Tensor, dim: int, groups: int, format: Format) -> torch.Tensor:
    """The fp64 scale of each output channel, which lies in dimension ``dim`` of each of the ``groups``."""
    channels = by_channel(weight, dim, groups)
    largest = channels.abs().amax(1) if channels.numel() else channels.new_zeros(len(channels))
    scales = (largest / format.largest).clamp(min=_SMALLEST_SCALE)
    return torch.where(largest > 0, scales, 1.0)


def by_channel(weight: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """[K, ...] of a weight [K, C/G, ...] (``dim`` 0) or [C, K/G, ...] (``dim`` 1)."""
    if dim == 0:
        return weight.flatten(1)
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def along_channels(scales: torch.Tensor, weight: torch.Tensor, dim: int, groups: int) -> torch.Tensor:
    """``scales`` [K] in a shape that multiplies ``weight``, or is as large as it."""
    if dim == 0:
        return scales.view(-1, *[1] * (weight.dim() - 1))
    rows = scales.view(groups, 1, weight.shape[1]).expand(groups, weight.shape[0] // groups, weight.shape[1])
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def half_a_step(values: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """By how much ``values`` may differ from what they are stored as."""
    if format is INT8:
        return 0.5 * scale.expand_as(values)
    return torch.maximum(values.abs() * 2.0**-4, scale * 2.0**-10)  # 3 bits of mantissa, steps of 2⁻⁹ below 2⁻⁶
