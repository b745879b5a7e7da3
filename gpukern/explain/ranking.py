"""The plan of a launch, the expected costs of it and its alternatives, and the reasons for the choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gpukern import conv
from gpukern.conv import (
    Choice,
    ConvPlan,
    Exclusion,
    Ranked,
    check_countable,
    choose,
    minimum_work,
    only_measured,
    ranking,
    shapes,
    switched_off,
)
from gpukern.explain.formatting import describe_plan
from gpukern.explain.query import Question
from gpukern.formatting import micro, number, percent, size
from gpukern.runtime.device import assumed_peaks
from gpukern.runtime.eight_bits import check_float8
from gpukern.runtime.roofline import Floor, Work, floor

#: Expected times of this many times the bound need an explanation.
_FAR = 2.5


@dataclass(frozen=True)
class Answer:
    """``work`` and ``floor`` are any implementation's; ``ranking`` holds all plans, the fastest expected first.

    ``measured``: whether the plan database chose, not the expectation; ``switched_off``: the number of plans that each
    exclusion kept out of the ranking.
    """

    question: Question
    work: Work
    floor: Floor
    chosen: Ranked
    ranking: tuple[Ranked, ...]
    measured: bool
    switched_off: Mapping[Exclusion, int]

    @property
    def intensity(self) -> float:
        """FLOP per byte of device memory that must move."""
        return self.work.flops / self.work.bytes if self.work.bytes else 0.0

    @property
    def alternatives(self) -> tuple[Ranked, ...]:
        return tuple(each for each in self.ranking if each.plan != self.chosen.plan)


def answer(question: Question) -> Answer:
    """The plan that a call gets, among all others. RuntimeError, as of a call, for what no kernel can run."""
    p, direction, operands = question.problem, question.direction, question.operands
    of_first, _, of_output = shapes(p, direction)
    check_countable(of_first, of_output)
    check_float8(question.dtype, question.device)
    must = minimum_work(p, direction, operands.itemsizes, operands.kind)
    must = replace(must, bytes=must.bytes + residual_bytes(question))
    choice, measured = chosen(question)
    return Answer(
        question,
        must,
        floor(must, assumed_peaks(question.device)),
        ranked(question, choice),
        tuple(_with_residual(question, each) for each in ranking(p, direction, operands, question.device)),
        measured,
        switched_off(p, direction, operands, question.device),
    )


def chosen(question: Question) -> Choice:
    """The plan that a call gets, and whether it was measured."""
    return choose(question.problem, question.direction, question.operands, question.device)


def ranked(question: Question, choice: ConvPlan) -> Ranked:
    """Return the cost of ``choice``, whether or not the ranking has it."""
    found = conv.ranked(question.problem, question.direction, choice, question.operands, question.device)
    return _with_residual(question, found)


def _with_residual(question: Question, plain: Ranked) -> Ranked:
    """Add the bytes of the residual, which the planner leaves out: they are the same for all plans except copies."""
    extra = residual_bytes(question)
    if not extra:
        return plain
    _, _, copied = plain.plan.pack
    extra *= 3 if copied else 1
    bandwidth, cost = assumed_peaks(question.device).bandwidth, plain.cost
    cost = replace(
        cost,
        bytes=cost.bytes + extra,
        launches=cost.launches + copied,
        seconds=max(cost.compute, (cost.bytes + extra) / bandwidth),
    )
    return Ranked(plain.plan, cost, plain.seconds + extra / bandwidth)


def residual_bytes(question: Question) -> int:
    """Return the bytes of the tensor that the epilogue adds; 0 without one."""
    p = question.problem
    return question.epilogue.residual * math.prod((p.N, p.K, p.P, p.Q)) * question.dtype.itemsize


# ---- why -----------------------------------------------------------------------------------------------------------


#: Products of float32 on tensor cores, which would truncate operands that were not rounded.
_PRODUCTS = {
    "tf32": "Products are TF32's: operands are rounded to the nearest number of 10 mantissa bits, sums are float32.",
    "tf32x3": "Each product is three of TF32, of operands in two rounded halves: nearly float32's.",
}


def reasons(found: Answer) -> list[str]:
    """Return the reasons for this plan, in plain sentences."""
    if not found.chosen.cost.launches:
        return ["There is nothing to compute, so nothing is launched."]
    products = _PRODUCTS.get(found.chosen.plan.precision)
    return [_limit(found), *([products] if products else []), *_comparisons(found), *_switched_off(found)]


def _limit(found: Answer) -> str:
    cost, seconds = found.chosen.cost, found.chosen.seconds
    memory = cost.bytes / assumed_peaks(found.question.device).bandwidth
    if memory >= cost.compute:
        more = cost.bytes / found.work.bytes
        moved = size(cost.bytes) + (f" ({number(more, 2)} times what must move)" if more > 1.05 else "")
        limit = f"Memory bounds it: its {moved} take {micro(memory)}, its products {micro(cost.compute)}."
    else:
        waves = "one wave" if cost.waves <= 1 else f"{math.ceil(cost.waves)} waves"
        limit = (
            f"Arithmetic bounds it: its products take {micro(cost.compute)} in {waves} of tiles, "
            f"{percent(cost.efficiency)} of them useful, its memory traffic {micro(memory)}."
        )
    if seconds > _FAR * cost.seconds:
        limit += f" It is expected to take {micro(seconds)}: small tiles, their loops and waiting add the rest."
    return limit


def _comparisons(found: Answer) -> list[str]:
    direction, chosen = found.question.direction, found.chosen
    others = [each for each in found.alternatives if not only_measured(each.plan)]
    said = []
    if found.measured:
        said.append("The plan database has it: measured on this device, it was the fastest.")
    if others:
        said.append(_comparison("The next best", others[0], found))
        rest = next((each for each in others if each.plan.variant != chosen.plan.variant), others[0])
        if rest is not others[0]:
            said.append(_comparison("The best of another kernel", rest, found))
    else:
        said.append("No other plan can run it.")
    unproven = [each for each in found.alternatives if only_measured(each.plan) and each.seconds < chosen.seconds]
    if unproven:
        words = describe_plan(unproven[0].plan, direction)
        said.append(
            f"{words[0].upper()}{words[1:]} is expected to take {micro(unproven[0].seconds)}, but is only chosen where "
            "a GPU has shown it right and fast."
        )
    return said


def _switched_off(found: Answer) -> Iterator[str]:
    for each, count in found.switched_off.items():
        major, minor = each.compute_capability
        words = str(each)
        yield f"{words[0].upper()}{words[1:]} are switched off on sm_{major}{minor}, {count} here: {each.reason}."


def _comparison(which: str, other: Ranked, found: Answer) -> str:
    times = other.seconds / found.chosen.seconds
    if abs(times - 1) < 0.005:
        words = "as long"
    elif times < 1:
        words = f"{percent(1 - times)} less"
    else:
        words = f"{percent(times - 1)} longer" if times < 2 else f"{number(times, 2)} times as long"
    return f"{which}, {describe_plan(other.plan, found.question.direction)}, is expected to take {words}."
