"""Measurement of one problem with every plan that could be the fastest: each is checked in full, then timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from gpukern.conv import ConvPlan, Ranked, heuristic_plan, ranking
from gpukern.runtime.current_device import device_spec
from gpukern.tune.check import Check
from gpukern.tune.record import Call

#: A plan whose bound is this many times the best bound is not tried: no kernel reaches its bound so much better.
HOPELESS = 3.0
#: How many times faster than the planner's choice a plan must be to replace it: less is noise.
GAIN = 1.02
#: After one sample of each plan the best of them go on, and take turns for so many rounds.
FINALISTS = 4
ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """A launch with one plan. Calling it starts the kernels."""

    plan: ConvPlan
    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()


#: Seconds of a call.
Timer = Callable[[Candidate], float]
#: Progress callback: (plans done, plans, seconds of the fastest so far or infinity).
Watch = Callable[[int, int, float], None]


class DeviceLost(RuntimeError):
    """A plan left the device in a state in which this process can use it no more."""

    def __init__(self, rejected: dict[ConvPlan, str]) -> None:
        *_, (culprit, reason) = rejected.items()
        super().__init__(f"{culprit}: {reason}")
        self.rejected = rejected


@dataclass(frozen=True)
class Outcome:
    """The fastest plan and its seconds, None if none is right; the seconds of the planner's choice, None if it is not.

    ``rejected``: why a plan was not timed.
    """

    plan: ConvPlan | None
    seconds: float | None
    heuristic_seconds: float | None
    rejected: Mapping[ConvPlan, str]


def do_bench(candidate: Candidate) -> float:
    """The median of some 20 ms of launches, each with a cold L2 cache."""
    import triton.testing

    return 1e-3 * triton.testing.do_bench(candidate, warmup=5, rep=20, return_mode="median")


def heuristic_of(call: Call, device: torch.device) -> ConvPlan:
    return heuristic_plan(call.problem, call.direction, call.operands, device_spec(device))


def measure(
    call: Call,
    device: torch.device,
    timer: Timer = do_bench,
    known: Mapping[ConvPlan, str] | None = None,
    watch: Watch = lambda done, total, best: None,
) -> Outcome:
    """Check and time the plans of ``call``, without those ``known`` to be wrong; raises DeviceLost."""
    heuristic = heuristic_of(call, device)
    choices = worth_trying(ranking(call.problem, call.direction, call.operands, device_spec(device)), heuristic)
    check = Check(call, device)
    rejected = dict(known or {})
    right: dict[Candidate, float] = {}
    for done, choice in enumerate(choices):
        watch(done, len(choices), min(right.values(), default=math.inf))
        if choice in rejected:
            continue
        try:
            candidate = Candidate(choice, check.launch(choice))
            right[candidate] = timer(candidate)
        except Exception as problem:  # a compiler's, a driver's, or a wrong result: in any case, not this plan
            rejected[choice] = reason_of(problem)
            if is_lost(device):
                raise DeviceLost(rejected) from problem
    return _final(right, heuristic, timer, rejected)


def worth_trying(ranked: list[Ranked], heuristic: ConvPlan) -> list[ConvPlan]:
    """Return the plans with a chance to be the fastest, the most promising first."""
    best = min(each.cost.seconds for each in ranked)
    return [each.plan for each in ranked if each.cost.seconds <= HOPELESS * best or each.plan == heuristic]


def _final(right: dict[Candidate, float], heuristic: ConvPlan, timer: Timer, rejected: dict[ConvPlan, str]) -> Outcome:
    """The best of one sample are mostly lucky ones, so they are timed again, in turns because clocks drift."""
    finalists = sorted(right, key=right.__getitem__)[:FINALISTS]
    finalists += [candidate for candidate in right if candidate.plan == heuristic and candidate not in finalists]
    samples: dict[ConvPlan, list[float]] = {candidate.plan: [] for candidate in finalists}
    for _ in range(ROUNDS):
        for candidate in finalists:
            samples[candidate.plan].append(timer(candidate))
    medians = {choice: statistics.median(taken) for choice, taken in samples.items()}
    best = min(medians, key=medians.__getitem__, default=None)
    planned = medians.get(heuristic)
    if best is None:
        return Outcome(None, None, planned, rejected)
    if planned is not None and planned <= GAIN * medians[best]:
        best = heuristic
    return Outcome(best, medians[best], planned, rejected)


def reason_of(problem: Exception) -> str:
    """Return the reason in one line: compilers report more than is worth keeping."""
    first = next(iter(str(problem).strip().splitlines()), "")
    return f"{type(problem).__name__}: {first}"


def is_lost(device: torch.device) -> bool:
    """Whether every call fails after one that failed, as after an illegal memory access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
