"""What the check before the timing finds wrong, and what it cannot see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as T

from bench.accuracy import DTYPES, network_bound, relative_error, sum_bound
from bench.networks import sums

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
N, C, K, H, W = 2, 16, 24, 10, 10
TERMS = 9 * C


@pytest.fixture
def conv(dtype):
    """(x, w, reference, result) of a 3 × 3 convolution, right to the last bit but for one rounding."""
    x, w = (torch.randn(s).to(DTYPES[dtype]).double() for s in ((N, C, H, W), (K, C, 3, 3)))
    exact = T.conv2d(x, w, padding=1)
    return x, w, exact, exact.to(DTYPES[dtype])


@EVERY_DTYPE
def test_one_rounding_passes_and_so_do_partial_sums_in_the_dtype(dtype, conv):
    x, w, exact, rounded = conv
    eps = torch.finfo(DTYPES[dtype]).eps
    assert relative_error(rounded, exact) <= eps / 2 < sum_bound(dtype, TERMS) / 4
    # Two halves of the sum, rounded each and then added: what a split in 16 bit does.
    halves = [T.conv2d(x[:, i : i + 8], w[:, i : i + 8], padding=1).to(rounded.dtype) for i in (0, 8)]
    assert relative_error(halves[0] + halves[1], exact) <= sum_bound(dtype, TERMS)


@EVERY_DTYPE
def test_what_is_wrong_is_found(dtype, conv):
    x, w, exact, right = conv
    without_tap = w.clone()
    without_tap[:, :, 2, 1] = 0
    without_channel = w.clone()
    without_channel[:, -1] = 0
    unwritten_row, other_tile = right.clone(), right.clone()
    unwritten_row[-1, :, -1] = 0
    other_tile[0, 0, 0, :8] = right[1, 0, 0, :8]
    nan = right.clone()
    nan[0, 0, 0, 0] = math.nan
    wrong = {
        "zeros": torch.zeros_like(right),
        "one NaN": nan,
        "all infinite": torch.full_like(right, math.inf),
        "transposed": right.transpose(2, 3),
        "shifted": right.roll(1, dims=3),
        "images swapped": right.flip(0),
        "twice": 2 * right,
        "negated": -right,
        "without padding": T.pad(T.conv2d(x, w), (1, 1, 1, 1)),
        "without a tap": T.conv2d(x, without_tap, padding=1),
        "without a channel": T.conv2d(x, without_channel, padding=1),
        "without the bias": exact - torch.randn(K, 1, 1),
        "a row not written": unwritten_row,
        "eight elements from elsewhere": other_tile,
        "flat": right.flatten(),
        "one image": right[:1],
        "a broadcastable shape": right[None],
    }
    for name, result in wrong.items():
        assert not relative_error(result, exact) <= sum_bound(dtype, TERMS), name


@EVERY_DTYPE
@pytest.mark.parametrize("elements", [10, 10**7])
def test_one_wrong_element_is_found_among_any_number(dtype, elements):
    """One element of a hundred thousandth of the norm, where the largest is three standard deviations of them."""
    reference = torch.randn(elements, dtype=torch.float64).clamp(-3, 3)
    reference[0], reference[-1] = 3, 1
    wrong = reference.clone()
    wrong[-1] = 0
    assert relative_error(wrong, reference) > sum_bound(dtype, 64)
    norm = torch.linalg.vector_norm(reference).item()
    assert relative_error(wrong, reference) == pytest.approx(max(1 / norm, 1 / 3 / 6))


def test_the_bound_follows_its_derivation():
    assert sum_bound("float16", 1) == 2 * 2.0**-10 + 2.0**-22
    assert sum_bound("bfloat16", 100) == 2 * 2.0**-7 + 10 * 2.0**-22
    assert sum_bound("float32", 10_000) == 2 * 2.0**-23 + 100 * 2.0**-22
    assert sum_bound("tf32", 100) == sum_bound("float32", 100) + 2.0**-9
    assert sum_bound("float32", 0) == sum_bound("float32", 1)
    # Each layer errs by 1 + √9 units of 2⁻²³, 25 of them by √25 times that.
    assert network_bound("float32", [9] * 25, training=False) == pytest.approx(4 * 5 * 4 * 2.0**-23)
    assert network_bound("float16", [576] * 100, training=False) == pytest.approx(40 * 2.0**-10, rel=0.01)
    assert network_bound("bfloat16", [9] * 53, training=True) == 0.5  # never coarser


def test_sums_are_those_of_the_layers():
    assert sums("ciresan_dense") == [16, 1200, 768, 768, 432, 200]
    unet = sums("unet")
    assert len(unet) == 23 and unet.count(1) == 0 and sorted(unet)[:2] == [27, 64]


def test_errors_that_are_no_numbers():
    ones = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.ones(3), ones) == 0
    assert relative_error(torch.zeros(3), torch.zeros(3).double()) == 0
    assert relative_error(torch.ones(3), torch.zeros(3).double()) > 1
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3).double()) == 0
    # A reference that is itself no number makes nobody right.
    assert relative_error(torch.full((3,), math.nan), ones * math.nan) == math.inf
    assert relative_error(torch.full((3,), math.inf), ones * math.inf) == math.inf
