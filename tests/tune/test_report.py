"""What a run says in the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gpukern.conv.database import Entry
from gpukern.conv.plan import ConvPlan, Variant
from gpukern.tune.report import Report, Result

PLANNED = ConvPlan(Variant.TAPS, 64, 64, 32, 4, 3)
BETTER = replace(PLANNED, block_m=128)
REJECTED = ((PLANNED, "OutOfResources: shared memory"), (BETTER, "OutOfResources: shared memory"))


def result(planned: float | None, tuned: float | None, before: bool = False, **changes) -> Result:
    plan = BETTER if tuned else None
    entry = Entry(plan, tuned, PLANNED, planned, 1, (), {}, "2026-01-31")
    return Result("a [layer]", replace(entry, **changes), before)


def test_the_mean_is_geometric_and_over_what_has_a_speedup():
    report = Report(Path("plans"), [result(40.0, 10.0), result(10.0, 10.0), result(None, 3.0), result(5.0, None)])
    assert report.speedup == pytest.approx(2.0)
    assert Report(Path("plans")).speedup is None


def test_the_table_has_every_problem():
    text = str(Report(Path("plans"), [result(40.0, 10.0), result(10.0, 10.0, before=True), result(None, None)]))
    table, _, where = text.rpartition("geometric mean")
    assert table.count("a [layer]") == 3 and table.count("(measured before)") == 1
    assert "40.0 µs   10.0 µs      4.00×   taps 128×64×32, 4 warps, 3 stages" in table and "none is right" in table
    assert where.split()[0] == "2.00×" and where.endswith("plans are in plans")


def test_complaints_are_those_of_this_run():
    report = Report(
        Path("plans"), [result(2.0, 1.0, rejected=REJECTED), result(2.0, 1.0, before=True, rejected=REJECTED)]
    )
    assert report.rejected == {"OutOfResources: shared memory": 2}
    assert "rejected 2 plans: OutOfResources: shared memory" in str(report)


def test_one_line_for_each():
    assert str(result(40.0, 10.0)) == "taps 128×64×32, 4 warps, 3 stages, 10.0 µs, 4.00 times as fast"
    assert str(result(10.0, 10.0, plan=PLANNED)).endswith("10.0 µs, the planner's choice")
    assert str(result(None, 3.0)).endswith("3.00 µs; the planner's choice is not right")
    assert str(result(None, None, rejected=REJECTED)) == "no plan is right, 2 rejected"
