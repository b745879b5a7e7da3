"""Arguments of kernels whose programs leave partial results for the last of them to merge."""

from typing import Any, NamedTuple


class Statistics(NamedTuple):
    """Where a kernel leaves the statistics of each channel of its output; pointers."""

    parts: Any  # fp32 [3, tiles, channels]: each tile's sums, squared deviations from its mean, counts
