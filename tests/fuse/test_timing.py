"""Timing of a forward pass, on a CUDA device that is played by stubs."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from gpukern.fuse import command, timing
from tests.fuse.made_up import TIMINGS, report, tiny


class Device:
    """The pass number n takes n milliseconds and 1,000 · n bytes; 500 bytes are there before."""

    def __init__(self) -> None:
        self.passes, self.peak = 0, 0

    def call(self, x):
        assert not torch.is_grad_enabled()
        self.passes += 1
        self.peak = max(self.peak, 500 + 1000 * self.passes)

    def reset(self):
        assert self.passes == timing._WARM_UP
        self.passes = self.peak = 0

    def event(self, enable_timing):
        assert enable_timing
        device = self

        class Event:
            def record(self):
                self.at = device.passes * (device.passes + 1) / 2

            def synchronize(self): ...

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


def test_median_worst_rate_and_memory(monkeypatch):
    device, module = Device(), tiny()
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    for name, stub in {
        "device": lambda place: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "memory_allocated": lambda: 500 + weights,
        "reset_peak_memory_stats": device.reset,
        "max_memory_allocated": lambda: device.peak + weights,
        "Event": device.event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    found = timing.time_forward(device.call, (torch.zeros(32, 3),), module)
    assert device.passes == 100
    assert found.median == pytest.approx(50.5e-3) and found.p99 == pytest.approx(100e-3)
    assert found.images_per_second == pytest.approx(32 / 50.5e-3)
    assert found.peak_memory == 100_000 + weights


def test_the_unfused_model_is_timed_as_it_would_run(monkeypatch):
    timed = []

    def time_forward(call, inputs, module):
        timed.append((call, inputs, module))
        return TIMINGS["timing_before" if len(timed) == 1 else "timing_after"]

    monkeypatch.setattr(timing, "time_forward", time_forward)
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    fused = types.SimpleNamespace(report=report(dtype="bfloat16"), module=torch.nn.Identity())
    found = command._timed(fused, model, (x, torch.zeros(2, 5)), channels_last=True)
    assert (found.timing_before, found.timing_after) == tuple(TIMINGS.values())
    (plain, inputs, _), (call, _, module) = timed
    assert call is fused and module is fused.module
    assert plain[0].weight.dtype == inputs[0].dtype == torch.bfloat16
    assert inputs[0].is_contiguous(memory_format=torch.channels_last) and inputs[1].shape == (2, 5)
    assert model[0].weight.dtype == torch.float32 and plain is not model
