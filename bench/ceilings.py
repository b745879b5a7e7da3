"""Measured ceilings of the device: the copy bandwidth and the matrix rates that rows are compared with."""

from __future__ import annotations

import torch

from bench.accuracy import DTYPES
from bench.peers import torch_at_its_best
from bench.results import Ceilings
from bench.timing import Calls, stopwatches, target_seconds

_ROUNDS = 15


def ceilings(device: torch.device) -> Ceilings:
    """A copy far larger than any cache, counted as bytes read plus bytes written, and large square matrix products."""
    cuda = device.type == "cuda"
    # Half a gibibyte each way; on a CPU an eighth of it, which no cache holds either.
    source = torch.empty(2**29 if cuda else 2**26, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = _seconds([lambda: target.copy_(source)], device)
    bandwidth = 2 * source.numel() / seconds
    # A CPU has no 16-bit rate worth measuring, and no TF32.
    kinds = tuple(DTYPES) if cuda else ("float32",)
    return Ceilings(bandwidth, {kind: _matrix_rate(kind, 8192 if cuda else 1024, device) for kind in kinds})


def _matrix_rate(kind: str, size: int, device: torch.device) -> float:
    # Random, not zeros: zeros switch fewer transistors and leave the clock higher.
    a, b = (torch.randn(size, size, device=device).to(DTYPES[kind]) for _ in range(2))
    out = torch.empty_like(a)
    with torch_at_its_best(kind):
        rate = 2 * size**3 / _seconds([lambda: torch.mm(a, b, out=out)], device)
        return rate if device.type == "cuda" else max(rate, _convolution_rate(device))


def _convolution_rate(device: torch.device) -> float:
    """Measure a convolution too: on some CPUs its library is faster than that of matrix products."""
    x, w = torch.randn(1, 256, 32, 32, device=device), torch.randn(256, 256, 3, 3, device=device)
    x, w = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, w))
    flops = 2 * 30 * 30 * w.numel()
    return flops / _seconds([lambda: torch.nn.functional.conv2d(x, w)], device)


def _seconds(calls: Calls, device: torch.device) -> float:
    """Return the minimum: a limit is the best that the device reached, not its usual time."""
    watch = stopwatches(device)[-1](calls, target_seconds(device))
    samples = []
    for _ in range(_ROUNDS):
        watch.start()
        samples.append(watch.stop())
    return min(samples)
