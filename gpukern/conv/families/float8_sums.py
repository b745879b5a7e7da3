"""How many products of float8 tensor cores add before a part of the sum leaves them. Imports neither torch nor Triton.

Ada's and Hopper's hold a sum of such products in 14 significant bits and cut, not round, what does not fit: every 32
products may take 2⁻¹³ of the partial sum. n of them then err by n / 32 · 2⁻¹³ of the largest partial sum at most, where
the rounding of two operands to four significant bits allows 2⁻³ of each product. Runs of 2,048 products keep to a
sixteenth of that; their sums are added in fp32. It costs one addition a run for each sum, and the sums of two runs in
registers. Datacentre Blackwells (10.x) add in fp32.
"""

from __future__ import annotations

from gpukern.conv.plan import ConvPlan
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv

_MOST_PRODUCTS = 2048
#: Sums a thread holds beside those of the run: found by compiling for sm_90, with 128 some epilogues spill.
_MOST_SUMS = 64


def least_runs(steps: int, block_k: int, dtype: str, device: DeviceSpec) -> int:
    """Return the fewest runs of a sum of so many steps of ``block_k`` products of ``dtype``."""
    if dtype != "float8_e4m3fn" or device.compute_capability[0] == 10:
        return 1
    return max(cdiv(steps * block_k, _MOST_PRODUCTS), 1)


def even_runs(steps: int, block_k: int, dtype: str, device: DeviceSpec) -> int:
    """Return the fewest runs of equal length of a sum of ``steps`` ≥ 1 steps."""
    least = least_runs(steps, block_k, dtype, device)
    return next(runs for runs in range(least, steps + 1) if steps % runs == 0) if least > 1 else 1


def leaves_registers(plan: ConvPlan, runs: int) -> bool:
    """Whether a tile leaves registers for the sums of a second run."""
    return runs == 1 or plan.sums_per_thread <= _MOST_SUMS
