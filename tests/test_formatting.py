"""The roundings are decided in one place, and these are they."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpukern import formatting as f

CASES = {
    f.number: [
        (0, "0"), (0.0123, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (161.8, "162"), (12345.6, "12,346"),
        (9.999, "10.0"), (999.6, "1,000"), (-1.234, "-1.23"), (math.inf, "inf"), (math.nan, "nan"), (None, "–"),
    ],
    f.tick: [(0.25, "0.25"), (0.0625, "0.0625"), (2048.0, "2,048"), (3.0, "3")],
    f.seconds: [(1.234, "1.23 s"), (83.2, "83.2 s"), (1234.0, "1,234 s"), (None, "–")],
    f.milli: [(0.0081, "8.10 ms"), (None, "–")],
    f.micro: [(8.4e-6, "8.40 µs"), (0.0081, "8,100 µs"), (2e-8, "0.0200 µs"), (None, "–")],
    f.size: [(0, "0 MB"), (512, "0.512 kB"), (77_300, "77.3 kB"), (233_000, "0.233 MB"), (4.95e9, "4,950 MB"),
             (None, "–")],
    f.memory: [(232_448, "227 KiB"), (52_428_800, "50 MiB"), (150_121_545_728, "140 GiB"), (1536, "1.5 KiB"),
               (100, "0.0977 KiB")],
    f.flops: [(2.312e9, "2.31 GFLOP"), (9_999_999, "10.0 MFLOP"), (50_000, "0.0500 MFLOP")],
    f.percent: [(0, "0%"), (0.637, "64%"), (0.995, "99.5%"), (0.9999, "99.9%"), (1, "100%"),
                (1.07, "107%"), (None, "–")],
    f.ratio: [(1.0, "1.00×"), (0.943, "0.94×"), (9.994, "9.99×"), (9.996, "10.0×"), (12.34, "12.3×"), (1234, "1,234×"),
              (0.01234, "0.0123×"), (None, "–")],
    f.error: [(4.123e-4, "4.1e-04"), (0.0, "0.0e+00"), (math.nan, "nan"), (None, "–")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [(form, *case) for form, cases in CASES.items() for case in cases],
    ids=lambda each: getattr(each, "__name__", str(each)),
)
def test_numbers_are_written(form, value, shown):
    assert form(value) == shown


def test_digits_can_be_chosen():
    assert (f.number(8.4012, 4), f.number(200.46, 4), f.number(1134.2, 4)) == ("8.401", "200.5", "1,134")
    assert (f.percent(0.96875, 1), f.percent(0.9996, 1), f.percent(0.5, 1)) == ("96.9%", "99.9%", "50%")


def test_counts_agree_with_their_noun():
    assert [f.count(n, "row") for n in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert (f.count(1, "loss", "losses"), f.count(2, "loss", "losses")) == ("1 loss", "2 losses")


@given(st.floats(1e-9, 1e15), st.integers(2, 6))
def test_a_number_is_as_near_as_its_digits_allow(value, significant):
    shown = f.number(value, significant)
    assert float(shown.replace(",", "")) == pytest.approx(value, rel=0.51 * 10 ** (1 - significant))
    assert len(shown.replace(",", "").replace(".", "").lstrip("0")) >= significant
