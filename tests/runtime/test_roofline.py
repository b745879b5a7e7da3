"""The roofline's arithmetic, by hand and against brute force."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpukern.runtime.device import Peaks
from gpukern.runtime.roofline import Floor, Work, floor, in_waves, window_reads

PEAKS = Peaks(bandwidth=2e12, matrix_rates={"float16": 400e12, "float32": 20e12})


def test_floor_is_the_larger_of_two_times():
    assert floor(Work(4e9, 4e6, "float16"), PEAKS) == Floor(pytest.approx(10e-6), "compute")
    assert floor(Work(4e9, 40e6, "float16"), PEAKS) == Floor(pytest.approx(20e-6), "memory")
    assert floor(Work(4e9, 40e6, "float32"), PEAKS) == Floor(pytest.approx(200e-6), "compute")
    assert floor(Work(0, 0, "float16"), PEAKS) == Floor(0, "memory")


def test_floor_of_a_kind_without_a_rate():
    with pytest.raises(KeyError, match="int8"):
        floor(Work(1, 1, "int8"), PEAKS)


def test_window_reads():
    # A 3-wide window at stride 2 over 4 inputs with one of padding before: 1·2 = 2 outputs.
    assert window_reads(4, 2, 3, 2, 1, 1) == ((0, 0), (0, 1), (1, 1), (1, 2), (1, 3))
    assert {i for _, i in window_reads(6, 3, 1, 2, 1, 0)} == {0, 2, 4}
    assert window_reads(6, 2, 2, 1, 4, 0) == ((0, 0), (0, 4), (1, 1), (1, 5))
    assert window_reads(0, 1, 3, 1, 1, 2) == ()


def test_equal_tiles_come_in_whole_waves():
    assert [in_waves([(count, 3)], 4) for count in (0, 1, 4, 5, 8)] == [0, 12, 12, 24, 24]


def test_unequal_tiles():
    assert in_waves([(4, 1), (1, 10)], 4) == 4 * 10  # the long one lasts longest
    assert in_waves([(3, 2), (5, 1)], 2) == 11  # an even share
    assert in_waves([(1, 1), (3, 4)], 2) == 2 * 8  # two of the long ones meet


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), max_size=5), st.integers(1, 5))
def test_no_schedule_beats_the_waves(tiles, sm_count):
    busy = [0] * sm_count
    for operations in sorted((size for count, size in tiles for _ in range(count)), reverse=True):
        heapq.heapreplace(busy, busy[0] + operations)
    assert in_waves(tiles, sm_count) <= sm_count * max(busy)
    if len({size for count, size in tiles if count and size}) <= 1:
        assert in_waves(tiles, sm_count) == sm_count * max(busy)
