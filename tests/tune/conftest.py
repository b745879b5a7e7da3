"""Tuning on emulated kernels, or on the GPU, always with a made-up clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpukern.conv import database, launch, planner
from gpukern.conv.plan import ConvPlan
from gpukern.conv.prepare import prepare_launch
from gpukern.runtime.mode import EMULATE
from gpukern.tune import measurement
from tests.device import DEVICE


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where plans go, and are looked for."""
    if DEVICE.type == "cpu" and not EMULATE:
        pytest.skip("needs the kernels")
    monkeypatch.setenv("GPUKERN_PLANS", str(tmp_path / "plans"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    database.clear()
    prepare_launch.cache_clear()
    yield tmp_path / "plans"
    database.clear()
    prepare_launch.cache_clear()


@pytest.fixture
def few(monkeypatch) -> None:
    """Only so many plans of each problem are tried, the planner's choice among them."""
    all_of_them = measurement.worth_trying

    def some(ranked, heuristic):
        others = [plan for plan in all_of_them(ranked, heuristic) if plan != heuristic]
        return [heuristic, *(plan for plan in others if not planner.only_measured(plan))][:3]

    monkeypatch.setattr(measurement, "worth_trying", some)


@pytest.fixture
def breaks(monkeypatch) -> Callable:
    """``breaks(plan, action)``: whenever ``plan`` is run, ``action(output)`` is done to the result."""

    def spoil(broken: ConvPlan, action) -> None:
        run = launch.run

        def wrapped(prepared, *arguments):
            output, statistics = run(prepared, *arguments)
            if prepared.plan == broken:
                action(output)
            return output, statistics

        monkeypatch.setattr(launch, "run", wrapped)

    return spoil
