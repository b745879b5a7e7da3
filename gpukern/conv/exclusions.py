"""Plans that are switched off: wrong on a GPU, or refused by a driver. Imports neither torch nor Triton.

A plan that is switched off is not a candidate: neither planner nor plan database chooses it, and no tool measures it.
``gpukern explain`` gives the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpukern.conv.plan import ConvPlan, Variant
from gpukern.runtime.device import DeviceSpec


@dataclass(frozen=True)
class Exclusion:
    """A set of plans switched off on GPUs of one compute capability, and why: a clause without a full stop.

    ``variant`` and ``num_warps`` are those of the plans, None for any.
    """

    compute_capability: tuple[int, int]
    reason: str
    variant: Variant | None = None
    num_warps: int | None = None

    def __str__(self) -> str:
        """Name the plans, without where and why: "box plans of 8 warps"."""
        plans = "plans" if self.variant is None else f"{self.variant.value} plans"
        return plans if self.num_warps is None else f"{plans} of {self.num_warps} warps"

    def applies(self, plan: ConvPlan, device: DeviceSpec) -> bool:
        return (
            self.compute_capability == device.compute_capability
            and self.variant in (None, plan.variant)
            and self.num_warps in (None, plan.num_warps)
        )


#: One line each, for instance: Exclusion((9, 0), "3 of 198 launches were wrong on an H200", Variant.BOX, 8)
EXCLUSIONS: tuple[Exclusion, ...] = ()

#: Exclusions found in this process, see ``prepare.plan_without``.
_found: list[Exclusion] = []


def exclusion(plan: ConvPlan, device: DeviceSpec) -> Exclusion | None:
    """Return the first exclusion that applies to ``plan`` on ``device``."""
    return next((each for each in (*EXCLUSIONS, *_found) if each.applies(plan, device)), None)


def exclude(found: Exclusion) -> None:
    """Switch plans off for the rest of the process. The caller must drop its cached plans."""
    if found not in _found:
        _found.append(found)
