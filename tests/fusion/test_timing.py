"""Timing of a forward pass, on a CUDA device that is played by stubs."""

from __future__ import annotations

import contextlib
import os
import types

import pytest
import torch
from torch.autograd import DeviceType

import gpukern
from gpukern.fusion import pipeline, timing
from gpukern.fusion.calls import Signature
from tests.fusion.made_up import TIMINGS, report, tiny


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
    monkeypatch.setattr(timing, "_kernels", lambda counted, inputs, named: 7 if counted is module else None)
    found = timing.time_forward(device.call, (torch.zeros(32, 3),), {}, module)
    assert device.passes == 100 and found.kernels == 7
    assert found.median == pytest.approx(50.5e-3) and found.p99 == pytest.approx(100e-3)
    assert found.images_per_second == pytest.approx(32 / 50.5e-3)
    assert found.peak_memory == 100_000 + weights


def event(name: str, on: DeviceType = DeviceType.CUDA, annotation: bool = False):
    return types.SimpleNamespace(name=name, device_type=on, is_user_annotation=annotation)


@pytest.mark.parametrize(
    ("events", "kernels"),
    [
        (
            [
                event("aten::conv2d", DeviceType.CPU),
                event("conv2d_box_kernel"),
                event("Memcpy DtoD (Device -> Device)"),
                event("Memset (Device)"),
                event("a step", annotation=True),
                event("max_pool2d_kernel"),
            ],
            2,
        ),
        ([event("aten::conv2d", DeviceType.CPU)], None),
    ],
    ids=["seen", "nothing seen"],
)
def test_kernels_are_counted_once_the_device_is_done(monkeypatch, events, kernels):
    done = []

    class Profile:
        def __init__(self, activities):
            assert torch.profiler.ProfilerActivity.CPU in activities

        def __enter__(self):
            return self

        def __exit__(self, *_):
            assert done == ["run", "synchronized"]

        def events(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    assert timing._kernels(lambda x: done.append("run"), (torch.zeros(1),), {}) == kernels


def test_the_profiler_is_not_heard(monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: os.write(2, b"inside"))
    assert timing._kernels(torch.nn.Identity(), (torch.zeros(1),), {}) is None
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"


def timed_beside(monkeypatch, time_forward):
    monkeypatch.setattr(timing, "time_forward", time_forward)
    model, x = tiny(), torch.randn(2, 3, 8, 8)
    module = torch.nn.Identity()
    module.interface = types.SimpleNamespace(signature=Signature(by_name=("number",)))
    fused = types.SimpleNamespace(report=report(dtype="bfloat16"), module=module)
    return model, fused, timing.beside(fused, model, ({"x": x}, torch.zeros(2, 5), 3), channels_last=True)


def test_the_unfused_model_is_timed_as_it_would_run(monkeypatch):
    timed = []

    def time_forward(call, inputs, named, module):
        timed.append((call, inputs, named, module))
        return TIMINGS["timing_before" if len(timed) == 1 else "timing_after"]

    model, fused, found = timed_beside(monkeypatch, time_forward)
    assert (found.timing_before, found.timing_after) == tuple(TIMINGS.values())
    (plain, (images, flat, number), _, _), (call, by_place, named, module) = timed
    assert call is fused and module is fused.module and len(by_place) == 2 and named == {"number": 3}
    assert plain[0].weight.dtype == images["x"].dtype == flat.dtype == torch.bfloat16 and number == 3
    assert images["x"].is_contiguous(memory_format=torch.channels_last)
    assert plain[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.dtype == torch.float32 and plain is not model


def test_what_cannot_be_timed_is_a_note(monkeypatch):
    def time_forward(call, inputs, named, module):
        raise torch.OutOfMemoryError("CUDA out of memory")

    _, fused, found = timed_beside(monkeypatch, time_forward)
    assert found.notes == (*fused.report.notes, "Not timed: CUDA out of memory") and found.timing_after is None


def test_fuse_measures_on_a_cuda_device_unless_told_not_to(monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline, "beside", lambda fused, *rest: asked.append(rest) or report())
    model, x = tiny().eval(), torch.randn(2, 3, 8, 8)
    assert gpukern.fuse(model, x).report.fused and not asked
    monkeypatch.setattr(pipeline, "_device", lambda inputs: torch.device("cuda"))
    monkeypatch.setattr(pipeline, "account", lambda *_: report())
    gpukern.fuse(model, x, measure=False)
    assert not asked
    assert gpukern.fuse(model, x).report == report() and len(asked) == 1


@pytest.mark.gpu
def test_on_a_device(device):
    model, x = tiny().eval().to(device), torch.randn(2, 3, 8, 8, device=device)
    for cuda_graph in (False, True):
        found = gpukern.fuse(model, x, cuda_graph=cuda_graph).report
        before, after = found.timing_before, found.timing_after
        assert 0 < after.median <= after.p99 and after.peak_memory > 0
        assert after.kernels is None or 0 < after.kernels < before.kernels
