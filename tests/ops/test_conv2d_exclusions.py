"""Kernels that are switched off: by a line of data."""

from __future__ import annotations

import pytest

from gpukern.explain import answer as answers
from gpukern.explain import show
from gpukern.explain.question import convolution
from gpukern.ops._conv2d import database, exclusions, planner, prepare
from gpukern.ops._conv2d.exclusions import Exclusion
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Operands, Variant
from gpukern.ops._conv2d.problem import conv_problem
from gpukern.runtime.device import A100, B200, H100, H200

FORWARD = Direction.FORWARD
HALF = Operands("float16")
LAYER = conv_problem((32, 128, 28, 28), (128, 128, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
SMALL = conv_problem((1, 512, 7, 7), (512, 512, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
EIGHT = Exclusion((9, 0), "3 of 198 launches were wrong", Variant.BOX, num_warps=8)
WHOLE = Exclusion((9, 0), "it hangs", Variant.BOX)


def forget() -> None:
    for cached in (planner.plan, prepare.prepare, prepare.pooled_choice):
        cached.cache_clear()


@pytest.fixture
def switch_off(monkeypatch):
    """``switch_off(line, ...)`` makes these the data. Nothing of it stays."""

    def change(*lines: Exclusion) -> None:
        monkeypatch.setattr(exclusions, "EXCLUSIONS", lines)
        forget()

    change()
    yield change
    forget()


def candidates(device=H100, p=LAYER) -> set[ConvPlan]:
    return set(planner.candidates(p, FORWARD, HALF, device))


# ---- by a line of data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        EIGHT,
        WHOLE,
        Exclusion((9, 0), "", num_warps=8),
        Exclusion((9, 0), "", Variant.TAPS, 4),
        Exclusion((9, 0), "", None),
    ],
    ids=str,
)
def test_what_a_line_names_is_no_candidate_and_all_else_is(switch_off, line):
    everything = {device: candidates(device) for device in (A100, H100, H200, B200)}
    switch_off(line)
    for device, before in everything.items():
        there = device.compute_capability == (9, 0)
        gone = {
            each
            for each in before
            if there and line.variant in (None, each.variant) and line.num_warps in (None, each.num_warps)
        }
        assert bool(gone) is there, "the layer does not show it"
        assert candidates(device) == before - gone


def test_the_next_best_plan_takes_its_place(switch_off):
    before = [r.plan for r in planner.ranking(LAYER, FORWARD, HALF, H100) if not planner.only_measured(r.plan)]
    assert planner.plan(LAYER, FORWARD, HALF, H100) == before[0] and before[0].variant is Variant.BOX
    switch_off(WHOLE)
    expected = next(each for each in before if each.variant is not Variant.BOX)
    assert planner.plan(LAYER, FORWARD, HALF, H100) == expected


def test_the_plan_database_does_not_bring_it_back(switch_off, tmp_path, monkeypatch):
    monkeypatch.setenv("GPUKERN_PLANS", str(tmp_path))
    measured = next(each for each in candidates(H200) if each.variant is Variant.BOX and each.num_warps == 8)
    entry = database.Entry(measured, 1.0, measured, 1.0, LAYER.N, (), {}, "2026-01-31")
    path = tmp_path / database.file_name(H200.name)
    database.store(path, H200.name, database.key(LAYER, FORWARD, HALF), entry)
    assert database.lookup(LAYER, FORWARD, HALF, H200) == measured
    switch_off(EIGHT)
    assert database.lookup(LAYER, FORWARD, HALF, H200) is None
    database.clear()


def test_where_nothing_is_left_the_error_says_why(switch_off):
    switch_off(Exclusion((9, 0), "all of it is wrong"))
    with pytest.raises(RuntimeError, match=r"no kernel left for forward of .* on H100: plans: all of it is wrong$"):
        planner.plan(LAYER, FORWARD, HALF, H100)


def test_explain_says_so(switch_off):
    question, elsewhere = (convolution(LAYER, FORWARD, "float16", True, device) for device in (H100, B200))
    assert not any("switched off" in each for each in answers.reasons(answers.answer(question)))
    count = sum(each.variant is Variant.BOX and each.num_warps == 8 for each in candidates())
    switch_off(EIGHT)
    found = answers.answer(question)
    said = f"Box plans of 8 warps are switched off on sm_90, {count} here: 3 of 198 launches were wrong."
    assert answers.reasons(found)[-1] == said == show.as_json(found, "")["reasons"][-1]
    assert not any(EIGHT.applies(each.plan, H100) for each in found.ranking)
    assert not any("switched off" in each for each in answers.reasons(answers.answer(elsewhere)))
