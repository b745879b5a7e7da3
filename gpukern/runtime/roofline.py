"""The roofline: the least time a device can take for a computation, whoever implements it, and one plan's cost.

See Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
2009. Pure Python: nothing here needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpukern.runtime.device import Peaks
from gpukern.runtime.integers import cdiv


@dataclass(frozen=True)
class Work:
    """The work of any implementation: ``flops`` operations, and ``bytes`` of device memory.

    Each input is read once and each output written once. ``kind`` names the rate of the operations, a key of
    :attr:`gpukern.runtime.device.Peaks.matrix_rates`.
    """

    flops: float
    bytes: float
    kind: str


@dataclass(frozen=True)
class Floor:
    """The least time in seconds, and its limiting resource: ``bound`` is "memory" or "compute"."""

    seconds: float
    bound: str


@dataclass(frozen=True)
class Cost:
    """The work of a plan and the time it cannot beat, without fudge factors.

    - ``tiles``: programs of the main kernel; ``waves`` = tiles / multiprocessors, of which the last takes as long as a
      whole one;
    - ``efficiency``: operations of :class:`Work` / operations done: tiles and steps reach past the sizes;
    - ``bytes`` of device memory, if the L2 cache keeps all that a launch reads again and nothing from one to the next;
    - ``launches`` of kernels, the main one among them;
    - ``compute`` = operations of the busiest multiprocessor / its share of the rate, in seconds;
    - ``seconds`` = max(``compute``, bytes / bandwidth).

    One tile at a time has its multiprocessor's full rate: tiles that run together on one share it, which changes when
    each ends but not when the last does.
    """

    tiles: int
    waves: float
    efficiency: float
    bytes: float
    launches: int
    compute: float
    seconds: float


def floor(work: Work, peaks: Peaks) -> Floor:
    """max(flops / rate, bytes / bandwidth): memory and arithmetic at their peaks, perfectly overlapped."""
    memory = work.bytes / peaks.bandwidth
    compute = work.flops / peaks.matrix_rates[work.kind]
    return Floor(compute, "compute") if compute > memory else Floor(memory, "memory")


def window_reads(
    inputs: int, outputs: int, taps: int, stride: int, dilation: int, before: int
) -> tuple[tuple[int, int], ...]:
    """Every (output, input) of one dimension in which a window overlaps the image, for :class:`Work` of windows.

    Tap r of output o reads input ``o·stride + r·dilation − before``; those in the padding are left out.
    """
    reads = ((o, o * stride + r * dilation - before) for o in range(outputs) for r in range(taps))
    return tuple((o, i) for o, i in reads if 0 <= i < inputs)


def in_waves(tiles: list[tuple[int, int]], sm_count: int) -> int:
    """The least operations that a device has time for while it does ``tiles``, pairs of (count, operations of each).

    That is sm_count times those of the busiest multiprocessor. No tile is divided, so of n tiles one gets at least
    ⌈n / sm_count⌉: equal tiles come in whole waves. Of unequal ones this holds for all that are at least so large.
    """
    total = sum(count * operations for count, operations in tiles)
    seen = busiest = 0
    for count, operations in sorted(tiles, key=lambda tile: -tile[1]):
        seen += count
        busiest = max(busiest, cdiv(seen, sm_count) * operations)
    return max(total, busiest * sm_count)
