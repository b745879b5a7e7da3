"""Counters by which a kernel's programs determine which of them finishes last.

Every launch resets its counters to zero, so a buffer is cleared once, and the next launch on its stream can reuse it.
Launches that may run at the same time must not share one: each stream has its own, and for launches captured into a
CUDA graph, each stream of each capture. A graph may be replayed at any time, on any stream and concurrently with any
other, but its own launches keep their stream's order, and it does not run concurrently with itself.

A buffer cleared inside a capture would be cleared by a node of the graph in every replay, one node per launch. So
captures get buffers that were cleared before: the first launch outside a capture, the usual warm-up, makes a stock of
them. A buffer given to a capture is never reused, since nothing signals the end of a graph's life: that costs 4 KB for
each stream of a capture.
"""

from __future__ import annotations

import torch

from gpukern.runtime.capture import capture_id

#: Counters of a buffer. Launches that split their sums have fewer tiles than a few for each multiprocessor.
_SIZE = 1024
#: Buffers that are cleared together, 256 KB, and the number left at which more are made.
_STOCK, _FEW = 64, 16

_by_stream: dict[tuple[torch.device, int], torch.Tensor] = {}
_by_capture: dict[tuple[torch.device, int, int], torch.Tensor] = {}
_stock: dict[torch.device, list[torch.Tensor]] = {}


def zeroed_counters(count: int, device: torch.device) -> torch.Tensor:
    """Return at least ``count`` int32 zeros for one launch on the current stream, which must leave zeros behind.

    A captured launch gets counters that its graph clears in every replay only where nothing ran before the capture,
    the stock is used up, ``count`` exceeds a buffer, or the driver does not distinguish captures.
    """
    stream = 0
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device).cuda_stream
        if torch.cuda.is_current_stream_capturing():
            captured = _of_capture(count, device, stream)
            return _zeros(count, device) if captured is None else captured
        if len(_stock.get(device, ())) < _FEW:
            _fill_stock(device)
    kept = _by_stream.get((device, stream))
    if kept is None or kept.numel() < count:
        kept = _by_stream[device, stream] = _zeros(max(count, _SIZE), device)
    return kept


def _of_capture(count: int, device: torch.device, stream: int) -> torch.Tensor | None:
    capture = capture_id(stream)
    if capture is None or count > _SIZE:
        return None
    kept = _by_capture.get((device, stream, capture))
    if kept is None:
        try:
            kept = _stock[device].pop()  # one step, so that no two threads that capture get the same
        except LookupError:
            return None
        _by_capture[device, stream, capture] = kept
    return kept


def _fill_stock(device: torch.device) -> None:
    fresh = _zeros(_STOCK * _SIZE, device)
    # A graph may be replayed on a stream not synchronized with this one: wait here, once for so many captures.
    torch.cuda.current_stream(device).synchronize()
    _stock.setdefault(device, []).extend(fresh.split(_SIZE))


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
