"""Counters that kernels share to find out which of their programs comes last."""

from __future__ import annotations

import torch

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}


def zeroed_counters(count: int, device: torch.device) -> torch.Tensor:
    """``count`` int32 zeros for one launch, which must leave zeros behind.

    Launches on one stream follow one another and share a buffer, so that nobody has to clear it. A launch that is
    captured into a CUDA graph, which may be replayed on any stream, gets its own, cleared in the graph.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(count, dtype=torch.int32, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
    kept = _kept.get((device, stream))
    if kept is None or kept.numel() < count:
        kept = _kept[device, stream] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return kept
