"""An answer on a terminal, as plain text in a pipe, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from gpukern import tables
from gpukern.conv import Ranked, shapes
from gpukern.explain.formatting import by, describe, describe_plan
from gpukern.explain.machine_code import Compiled
from gpukern.explain.ranking import Answer, reasons, residual_bytes
from gpukern.explain.roofline_chart import Point, chart
from gpukern.formatting import flops, memory, micro, number, percent, size
from gpukern.runtime.device import assumed_peaks
from gpukern.runtime.records import plain
from gpukern.tables import numbers, pairs, show

_FLOOR, _EXPECTED = "●", "○"


def print_answer(found: Answer, code: list[Compiled] | str, top: int) -> None:
    """Print in colour on a terminal, as plain text into anything else."""
    show(render(found, code, top))


def render(found: Answer, code: list[Compiled] | str, top: int) -> RenderableType:
    """Render the answer; ``code``: the machine code or why it is absent, ``top``: the number of listed alternatives."""
    parts = [_heading(found), _facts(found), *(Text(f"• {reason}") for reason in reasons(found)), _plans(found, top)]
    parts += [Text(code, style="dim")] if isinstance(code, str) else _code(code)
    return Group(*parts, *_roofline(found))


def _heading(found: Answer) -> RenderableType:
    asked = found.question
    words = (
        f"{describe(asked.problem)}: {asked.computation or asked.direction.value}, {asked.kind}, {asked.device.name}"
    )
    return Text(words, style="bold")


def _facts(found: Answer) -> RenderableType:
    asked, work = found.question, found.work
    rows = [
        ("output", by(*shapes(asked.problem, asked.direction)[2])),
        ("work", f"{flops(work.flops)}, {size(work.bytes)}, {number(found.intensity)} FLOP per byte"),
        ("floor", f"{micro(found.floor.seconds)}, bound by {found.floor.bound}"),
        ("plan", describe_plan(found.chosen.plan, asked.direction)),
        ("expected", f"{micro(found.chosen.seconds)}, {_share(found)} of the floor's speed"),
    ]
    if added := residual_bytes(asked):
        rows.insert(2, ("residual", f"{size(added)} of these bytes"))
    return Padding(pairs(rows), (0, 0, 1, 0))


def _share(found: Answer) -> str:
    return percent(found.floor.seconds / found.chosen.seconds if found.chosen.seconds else 1.0)


# ---- plans ---------------------------------------------------------------------------------------------------------

_COLUMNS = ("expected µs", "bound µs", "waves", "efficiency", "launches", "memory")


def _plans(found: Answer, top: int) -> RenderableType:
    rows = listed(found, top)
    left_out = len(found.ranking) - len([row for row in rows if row in found.ranking])
    table = tables.table("plan", *numbers(*_COLUMNS), title="plans")
    for ranked in rows:
        chosen = ranked.plan == found.chosen.plan
        words = describe_plan(ranked.plan, found.question.direction)
        mark = "→ " if chosen else "  "
        table.add_row(Text(mark + words), *map(Text, _cells(ranked)), style="bold" if chosen else None)
    if left_out:
        table.caption = Text(f"{left_out} more, all expected to be slower", style="dim")
    return table


def listed(found: Answer, top: int) -> list[Ranked]:
    """The chosen plan, the ``top`` plans of the ranking, and the best of each kernel; fastest expected first."""
    best = {ranked.plan.variant: ranked for ranked in reversed(found.ranking)}
    wanted = {found.chosen.plan, *(r.plan for r in found.ranking[:top]), *(r.plan for r in best.values())}
    rows = [ranked for ranked in found.ranking if ranked.plan in wanted]
    return rows if any(row.plan == found.chosen.plan for row in rows) else [found.chosen, *rows]


def _cells(ranked: Ranked) -> tuple[str, ...]:
    cost = ranked.cost
    return (
        number(ranked.seconds * 1e6),
        number(cost.seconds * 1e6),
        number(cost.waves),
        percent(cost.efficiency),
        str(cost.launches),
        size(cost.bytes),
    )


# ---- machine code --------------------------------------------------------------------------------------------------


def _code(code: list[Compiled]) -> Iterator[RenderableType]:
    columns = ("grid", "registers", "shared memory", "spills", "instructions", "main loop", "copies ahead")
    table = tables.table("kernel", *numbers(*columns), title="machine code")
    for each in code:
        table.add_row(
            each.kernel,
            by(*each.grid),
            str(each.registers),
            memory(each.shared_memory),
            Text(str(each.spills), style="red" if each.spills else ""),
            str(each.instructions),
            str(each.loop_length),
            str(each.copies_ahead),
        )
    yield table
    for each in code:
        if each.loop:
            mix = ", ".join(f"{count} {kind}" for kind, count in each.loop.items())
            product = f" ({each.tensor_core})" if each.tensor_core else ""
            yield Text(f"{each.kernel}, one turn of the main loop{product}: {mix}")


# ---- roofline ------------------------------------------------------------------------------------------------------


def _roofline(found: Answer) -> Iterator[RenderableType]:
    peaks, cost, work = assumed_peaks(found.question.device), found.chosen.cost, found.work
    if not (work.flops and cost.bytes and found.chosen.seconds):
        return
    points = [
        Point(_FLOOR, found.intensity, work.flops / found.floor.seconds),
        Point(_EXPECTED, work.flops / cost.bytes, work.flops / found.chosen.seconds),
    ]
    rate = peaks.matrix_rates[work.kind]
    yield Text(
        f"\nTFLOP/s of {work.kind} on {found.question.device.name}, {number(peaks.bandwidth / 1e12)} TB/s", "bold"
    )
    yield Text("\n".join(chart(rate, peaks.bandwidth, points)), no_wrap=True)
    yield Text(f"{_FLOOR} floor   {_EXPECTED} this plan as expected", style="dim")


# ---- JSON ----------------------------------------------------------------------------------------------------------


def as_json(found: Answer, code: list[Compiled] | str) -> dict[str, Any]:
    """The same for programs: seconds, bytes and FLOP; every plan of the ranking."""
    asked, p = found.question, found.question.problem
    sizes = {name: getattr(p, name) for name in ("N", "C", "H", "W", "K", "R", "S", "P", "Q")}
    geometry = {name: getattr(p, name) for name in ("stride", "padding", "dilation", "groups")}
    return {
        "problem": sizes | geometry,
        "computation": asked.computation or asked.direction.value,
        "kind": asked.kind,
        "channels_last": asked.channels_last,
        "device": asked.device.name,
        "epilogue": {"bias": asked.bias, **asked.epilogue._asdict()},
        "flops": found.work.flops,
        "bytes": found.work.bytes,
        "intensity": found.intensity,
        "floor": plain(found.floor),
        "chosen": _plan_json(found.chosen),
        "from_plan_database": found.measured,
        "reasons": reasons(found),
        "ranking": [_plan_json(ranked) for ranked in found.ranking],
        "kernels": [] if isinstance(code, str) else [_kernel_json(each) for each in code],
        "not_compiled": code if isinstance(code, str) else None,
    }


def _plan_json(ranked: Ranked) -> dict[str, Any]:
    return {
        "plan": plain(ranked.plan),
        "cost": plain(ranked.cost),
        "expected_seconds": ranked.seconds,
    }


def _kernel_json(compiled: Compiled) -> dict[str, Any]:
    return plain(compiled) | {"loop_length": compiled.loop_length}
