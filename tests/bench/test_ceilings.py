"""The device's own limits."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench import ceilings as module
from bench.ceilings import ceilings


def test_a_copy_counts_both_ways_and_a_product_two_operations(monkeypatch):
    taken = []

    def seconds(calls, device):
        for call in calls:
            call()
        taken.append(len(calls))
        return 1e-3

    monkeypatch.setattr(module, "_seconds", seconds)
    found = ceilings(torch.device("cpu"))
    assert found.bandwidth == 2 * 2**26 / 1e-3
    assert found.matrix_rates == {"float32": 2 * 1024**3 / 1e-3} and taken == [1, 1, 1]


def test_a_limit_is_the_best_that_was_seen(monkeypatch):
    samples = itertools.cycle([3e-3, 1e-3, 2e-3])

    class Watch:
        def __init__(self, calls, target):
            pass

        def start(self):
            pass

        def stop(self):
            return next(samples)

    monkeypatch.setattr(module, "stopwatches", lambda device: (None, Watch))
    assert module._seconds([], torch.device("cpu")) == pytest.approx(1e-3)
