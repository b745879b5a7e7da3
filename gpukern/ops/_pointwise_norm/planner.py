"""Planner of a 1×1 convolution between two batch norms: tiles, and whether it pays. Imports neither torch nor Triton.

Layer by layer an activation of ``C`` channels takes three passes in the forward and two in the backward that are saved
here, one of ``K`` channels six: the inner norm's result is never stored, nor is the convolution's. In exchange there is
a Gram matrix of C × C, its product with the weights, and the convolution is computed once more in the backward.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpukern.runtime.device import DeviceSpec, assumed_peaks
from gpukern.runtime.integers import cdiv, power_of_two

#: The input gradient's program has all channels of its pixels.
_CHANNELS = 256
#: Rows of channels start at multiples of 32 bytes, and tiles have no less.
_STEP = 16
#: Passes over memory saved, in activations of C and of K channels.
_NARROW, _WIDE = 1, 6
#: Shares of the peaks that are expected: of the bandwidth, and of the tensor cores' rate with short sums.
_BANDWIDTH, _PRODUCTS = 0.88, 0.4
#: The fewest pixels for which anything is expected to pay, whatever the sizes.
_FEWEST_PIXELS = 1024


@dataclass(frozen=True)
class Tile:
    """Of one kernel: ``pixels``, ``outputs`` and ``channels`` of a step, 0 where it has none; how many ``splits``."""

    pixels: int
    outputs: int
    channels: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class PointwisePlan:
    """The tiles of every kernel."""

    gram: Tile
    statistics: Tile
    forward: Tile
    products: Tile
    gradients: Tile
    input_grad: Tile


def why_not(channels: int, outputs: int) -> str | None:
    """Return the reason why no kernel takes a convolution of these sizes; None if they do."""
    if channels % _STEP or outputs % _STEP or not channels or not outputs:
        return f"channels are no multiples of {_STEP}"
    if outputs <= channels:
        return "has no more outputs than channels"
    return f"more than {_CHANNELS} channels" if channels > _CHANNELS else None


@functools.lru_cache(maxsize=1024)
def pays(pixels: int, channels: int, outputs: int, kind: str, device: DeviceSpec) -> bool:
    """Whether less time is expected than layer by layer, for operands of the dtype ``kind``."""
    if why_not(channels, outputs) or pixels < _FEWEST_PIXELS:
        return False
    peaks = assumed_peaks(device)
    saved = 2 * pixels * (_NARROW * channels + _WIDE * outputs) / (_BANDWIDTH * peaks.bandwidth)
    again = 2 * pixels * channels * (channels + outputs) / peaks.matrix_rates[kind]
    projected = 2 * outputs * channels**2 / peaks.matrix_rates["tf32x3"]
    return (again + projected) / _PRODUCTS < saved


@functools.lru_cache(maxsize=1024)
def plan(pixels: int, channels: int, outputs: int, device: DeviceSpec) -> PointwisePlan:
    """Return the tiles for sizes that :func:`why_not` has nothing against."""
    all_channels = power_of_two(channels, _STEP)
    of_channels = min(all_channels, 128)
    of_outputs = power_of_two(outputs, _STEP, 128)
    blocks = cdiv(channels, of_channels)
    tiles = cdiv(outputs, of_outputs) * blocks
    # Without operands from shared memory the widest tile of 64 outputs leaves too few registers.
    few = all_channels > 128 and not device.multiplies_from_shared_memory
    return PointwisePlan(
        gram=Tile(64 // blocks, 0, of_channels, 8, 3, _splits(pixels, 64, blocks * (blocks + 1) // 2, device)),
        statistics=Tile(0, 16, all_channels, 4, 2),
        forward=Tile(64, of_outputs, min(all_channels, 64), 8, 2),
        products=Tile(64, of_outputs, of_channels, 8, 3, _splits(pixels, 64, tiles, device)),
        gradients=Tile(0, 16, all_channels, 4, 1),
        input_grad=Tile(64, min(of_outputs, 32 if few else 64), all_channels, 8, 2),
    )


def _splits(pixels: int, step: int, tiles: int, device: DeviceSpec) -> int:
    """One wave of programs, and at least two splits, which share their sums, of a few steps each."""
    return max(2, min(device.sm_count // tiles, cdiv(pixels, 4 * step)))
