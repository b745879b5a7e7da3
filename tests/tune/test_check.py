"""What counts as a right result."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpukern.conv.choice import choose
from gpukern.conv.plan import Direction
from gpukern.conv.quantized import launch
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.precision import TF32_CUT, TF32_ROUNDED
from gpukern.tune import check, measurement
from gpukern.tune.record import calls_of
from tests.numerics import sum_bound
from tests.tune.tools import Clock, call_of

KINDS = ("float16", "bfloat16", "float32", "tf32")


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_that_of_the_tests(kind, direction, device):
    call = call_of("2x16x5x4 24x3x2 --stride 2 --padding 1", kind, direction)
    one = check.Check(call, device)
    terms = {Direction.FORWARD: 96, Direction.INPUT_GRAD: 144, Direction.WEIGHT_GRAD: 2 * 3 * 3}[direction]
    expected = sum_bound(one.truth, one.absolute, terms, call.dtype, tf32=kind == "tf32")
    precision = {"tf32": "tf32", "float32": "tf32x3"}.get(kind, "ieee")
    if kind == "tf32":
        expected += (TF32_CUT - TF32_ROUNDED) * one.absolute  # not rounded is not wrong
    torch.testing.assert_close(one.bound(precision), expected, rtol=1e-12, atol=0.0)
    for way, product in (("tf32", 2.0**-9), ("tf32x3", 3 * 2.0**-22)):
        torch.testing.assert_close(one.bound(way) - one.bound("ieee"), product * one.absolute, rtol=1e-9, atol=0.0)


def test_an_element_is_wrong_beyond_the_bound_only(device):
    one = check.Check(call_of(kind="float32"), device)
    one._compare(one.truth.float(), "ieee")
    for factor in (0.5, -0.5, 2.0, -2.0, math.nan, math.inf):
        output = one.truth.clone()
        output[1, 2, 3, 0] += factor * one.bound("ieee")[1, 2, 3, 0]
        if abs(factor) < 1:
            one._compare(output, "ieee")
        else:
            with pytest.raises(check.WrongResult, match=r"^1 of 512 elements, at \(1, 2, 3, 0\) "):
                one._compare(output, "ieee")


@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_a_few_images_at_a_time_give_the_same_truth(direction, device, monkeypatch):
    call = call_of("5x16x4x4 16x3x3 --padding 1 --groups 2", "float32", direction)
    whole = check.Check(call, device)
    monkeypatch.setattr(check, "_CHUNK", 2 * 16 * 4 * 4)
    torch.testing.assert_close(check.Check(call, device).truth, whole.truth, rtol=1e-12, atol=1e-12)
    # And both are what plain PyTorch computes.
    first, second = (tensor.double() for tensor in (whole._first, whole._second))
    image, weight = (5, 16, 4, 4), (16, 8, 3, 3)
    computed = {
        Direction.FORWARD: lambda: nn.functional.conv2d(first, second, padding=1, groups=2),
        Direction.INPUT_GRAD: lambda: nn.grad.conv2d_input(image, second, first, padding=1, groups=2),
        Direction.WEIGHT_GRAD: lambda: nn.grad.conv2d_weight(second, weight, first, padding=1, groups=2),
    }[direction]()
    torch.testing.assert_close(whole.truth, computed, rtol=1e-12, atol=1e-12)


def test_operands_are_laid_out_as_they_were_met(device, few):
    """Expanded, cropped and unaligned tensors, as they were recorded."""
    base = torch.randn(2, 24, 6, 7, device=device)
    views = {
        "expanded": base[:1, :16, :4, :4].expand(2, 16, 4, 4),
        "cropped": base[:, 3:19, 1:5, 2:6],
        "unaligned": base.flatten()[1:513].view(2, 16, 4, 4),
    }
    for name, view in views.items():
        (call,) = calls_of(nn.Conv2d(16, 16, 1, bias=False).to(device), [view], [Direction.FORWARD])
        one = check.Check(call, device)
        assert one._first.stride() == view.stride() == call.first
        assert call.aligned == (name == "expanded") == (one._first.data_ptr() % 16 == 0)
        assert not measurement.measure(call, device, Clock()).rejected


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_launches_in_8_bits_are_checked_after_their_scale(kind, device):
    call = call_of("2x16x5x4 24x3x2 --stride 2 --padding 1", kind)
    one = check.Check(call, device)
    chosen = choose(call.problem, call.direction, call.operands, device_spec(device)).plan
    one.launch(chosen)()
    output = launch.launch_quantized(*_operands(one, call), chosen)
    one._compare(output, "ieee")
    wrong = output.clone()
    wrong.view(torch.int8)[1, 2, 2, 0] += 1 if kind == "int8" else 16  # two binades' eighths
    with pytest.raises(check.WrongResult, match=r"^1 of \d+ elements, at \(1, 2, 2, 0\) "):
        one._compare(wrong, "ieee")


def _operands(one: check.Check, call) -> tuple:
    scales = None, None, None, "none", 0.0, 1.0, one._scale, one._dtype
    return call.direction, call.problem, one._first, one._second, *scales
