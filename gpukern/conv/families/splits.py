"""Split counts for the sum of a weight gradient. Imports neither torch nor Triton."""

from __future__ import annotations

from gpukern.runtime.device import DeviceSpec


def grad_splits(programs: int, steps: int, device: DeviceSpec) -> list[int]:
    """Return the splits for one and for two programs on every multiprocessor; each keeps four steps at least."""
    return sorted({max(1, min(waves * device.sm_count // programs, steps // 4)) for waves in (1, 2)})
