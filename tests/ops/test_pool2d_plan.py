"""Pooling plans as plain functions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpukern.ops._pool2d.planner import plan
from gpukern.ops._pool2d.problem import adaptive_problem, pool_problem


def windows_of(size=(8, 64, 56, 56), kernel=(3, 3), stride=(2, 2), padding=(1, 1)):
    return pool_problem(size, kernel, stride, padding, (1, 1), False)


def test_plan_follows_the_layout():
    rows, channels = (plan(windows_of(), last, 2).tile for last in (False, True))
    assert (rows.channels, rows.pixels) == (4, 128)
    assert (channels.channels, channels.pixels) == (64, 16)  # 16 bytes for each of 128 threads
    assert plan(windows_of((8, 40, 9, 9)), True, 4).tile.channels == 8  # 32 bytes, five blocks without a rest
    assert plan(windows_of((8, 40, 9, 9)), True, 2).tile.channels == 64


def test_plan_keeps_to_the_grid():
    tile = plan(windows_of((1, 300_000, 3, 3)), False, 4).tile
    assert -(-300_000 // tile.channels) <= 65535


def test_plan_gives_large_windows_a_program_each():
    assert plan(adaptive_problem((8, 512, 7, 7), (1, 1)), True, 2).whole_window
    assert plan(adaptive_problem((8, 512, 7, 7), (7, 7)), True, 2).whole_window is None
    assert plan(windows_of(kernel=(8, 8), stride=(8, 8)), False, 4).whole_window
    assert plan(windows_of(kernel=(8, 8), stride=(1, 1)), False, 4).whole_window is None  # each pixel read 64 times


def test_plan_knows_the_common_divisor():
    assert plan(windows_of(padding=(0, 0)), False, 4).divisor == 9
    assert plan(windows_of(), False, 4).divisor == 9
    without = pool_problem((1, 1, 9, 9), (3, 3), (2, 2), (1, 1), (1, 1), False, False)
    assert plan(without, False, 4).divisor == 0
    hanging = pool_problem((1, 1, 6, 6), (3, 3), (2, 2), (0, 0), (1, 1), True)
    assert plan(hanging, False, 4).divisor == 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_adaptive_bounds_are_tight(size, outputs):
    """The loop bounds of the kernels: the largest window, and the most windows that see one pixel."""
    chosen = plan(adaptive_problem((1, 1, size, 1), (outputs, 1)), False, 4)
    windows = [range(p * size // outputs, -(-(p + 1) * size // outputs)) for p in range(outputs)]
    assert chosen.window[0] == max(map(len, windows))
    assert chosen.owners[0] == max(sum(h in window for window in windows) for h in range(size))
