from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gpukern.diagnose.distribution import BINS, Gathering


def gathered(*tensors):
    gathering = Gathering()
    for tensor in tensors:
        gathering.add(tensor)
    return gathering.result()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_of_several_tensors_are_those_of_all_values(dtype):
    parts = [(torch.randn(size) * scale + 3).to(dtype) for size, scale in (((7, 5), 1), ((1,), 40), ((3, 2, 9), 0.1))]
    values = torch.cat([part.double().flatten() for part in parts])
    found = gathered(*parts)
    assert found.count == values.numel()
    assert found.mean == pytest.approx(values.mean().item(), rel=1e-5)
    assert found.deviation == pytest.approx(values.std(correction=0).item(), rel=1e-5)
    assert (found.smallest, found.largest) == (values.min().item(), values.max().item())


def test_histogram_counts_are_those_of_numpy_for_the_final_limit():
    parts = [torch.randn(500), 30 * torch.randn(400), torch.zeros(9), 0.01 * torch.randn(300)]
    found = gathered(*parts)
    values = torch.cat(parts)
    values = values[values != 0].numpy()
    assert found.limit == 2.0 ** math.ceil(math.log2(np.abs(values).max()))
    expected, edges = np.histogram(values, bins=BINS, range=(-found.limit, found.limit))
    assert list(found.histogram) == expected.tolist() and found.edges == pytest.approx(edges.tolist())
    assert found.zeros == 9 / 1209


def test_limit_of_a_power_of_two_is_that_power():
    assert gathered(torch.tensor([1.0, -0.5])).limit == 1.0
    assert gathered(torch.tensor([1.5])).limit == 2.0


@pytest.mark.parametrize("size", [1e38, 1e-40, 1e300, 5e-324])
def test_extreme_values_are_counted(size):
    found = gathered(torch.tensor([size, -size], dtype=torch.float64), torch.tensor([size / 4], dtype=torch.float64))
    assert sum(found.histogram) == 3 - (size / 4 == 0)
    assert found.largest == size


def test_nonfinite_values_are_counted_apart():
    found = gathered(torch.tensor([math.nan, math.inf, -math.inf, 2.0]))
    assert (found.nonfinite, found.count, found.mean) == (3, 1, 2.0)
    assert gathered(torch.tensor([math.nan])).nonfinite == 1
    assert math.isnan(gathered(torch.tensor([math.nan])).mean)


def test_nothing_and_zeros_have_no_histogram():
    assert gathered() is None and gathered(torch.empty(0, 3)) is None
    found = gathered(torch.zeros(4))
    assert (found.zeros, found.limit, sum(found.histogram), found.deviation) == (1.0, 0.0, 0, 0.0)
