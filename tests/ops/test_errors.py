"""Bad arguments raise what torch raises, before anything is launched, on the kernels and in reference mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from tests.device import DEVICE

x, w, b, m, v, scalar = (torch.randn(s, device=DEVICE) for s in ((2, 4, 8, 8), (6, 4, 3, 3), (6,), (5, 8), (7, 8), ()))

CONV = {
    "rank 2 input": lambda f: f(x[0, 0], w),
    "rank 5 input": lambda f: f(x[None], w),
    "rank 3 weight": lambda f: f(x, w[0]),
    "channels": lambda f: f(x[:, :3], w),
    "channels of an image": lambda f: f(x[0, :3], w),
    "groups do not divide": lambda f: f(x, w, groups=3),
    "groups 0": lambda f: f(x, w, groups=0),
    "groups negative": lambda f: f(x, w, groups=-1),
    "no output channel": lambda f: f(x, w[:0]),
    "bias length": lambda f: f(x, w, b[:5]),
    "bias rank": lambda f: f(x, w, b[None]),
    "kernel larger than input": lambda f: f(x[:, :, :2], w),
    "kernel wider than input": lambda f: f(x[:, :, :, :2], w),
    "dilated kernel larger": lambda f: f(x, w, dilation=4),
    "empty image": lambda f: f(x[:, :, :0], w, padding=1),
    "stride 0": lambda f: f(x, w, stride=0),
    "stride of three": lambda f: f(x, w, stride=(1, 1, 1)),
    "stride float": lambda f: f(x, w, stride=1.5),
    "stride bool": lambda f: f(x, w, stride=True),
    "stride text": lambda f: f(x, w, stride="2"),
    "padding negative": lambda f: f(x, w, padding=-1),
    "padding of three": lambda f: f(x, w, padding=(1, 2, 3)),
    "padding word": lambda f: f(x, w, padding="full"),
    "same with stride": lambda f: f(x, w, padding="same", stride=2),
    "dilation 0": lambda f: f(x, w, dilation=0),
    "input is an array": lambda f: f(x.cpu().numpy(), w),
    "weight is a list": lambda f: f(x, w.tolist()),
    "bias is a list": lambda f: f(x, w, [0.0] * 6),
    "mixed dtypes": lambda f: f(x, w.half()),
    "mixed bias dtype": lambda f: f(x, w, b.double()),
}
LINEAR = {
    "features": lambda f: f(m, v[:, :7]),
    "rank 0 input": lambda f: f(scalar, v),
    "rank 3 weight": lambda f: f(m, v[None]),
    "bias length": lambda f: f(m, v, b),
    "mixed dtypes": lambda f: f(m, v.half()),
    "input is a list": lambda f: f(m.tolist(), v),
    "bias is a number": lambda f: f(m, v, 1.0),
}
CALLS = [(F.conv2d, torch_F.conv2d, name, call) for name, call in CONV.items()] + [
    (F.linear, torch_F.linear, name, call) for name, call in LINEAR.items()
]
IDS = [f"{theirs.__name__}: {name}" for _, theirs, name, _ in CALLS]


@pytest.fixture
def no_launch(monkeypatch):
    """Fails on the first launch of a Triton kernel."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def refuse(self, *arguments, **options):
        raise AssertionError("a kernel was launched")

    for function in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(function, "run", refuse)


@pytest.mark.parametrize("ours, theirs, name, call", CALLS, ids=IDS)
def test_error_is_torchs(ours, theirs, name, call, no_launch):
    with pytest.raises(Exception) as expected:
        call(theirs)
    with pytest.raises(expected.type) as actual:
        call(ours)
    assert actual.type is expected.type
    assert len(str(actual.value)) > 20, "an error says what was expected and what came"
    with force_mode(Mode.REFERENCE), pytest.raises(expected.type):
        call(ours)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64], ids=str)
def test_kernels_refuse_other_dtypes(dtype, no_launch):
    for call in (
        lambda: F.conv2d(x.to(dtype), w.to(dtype)),
        lambda: F.linear(m.to(dtype), v.to(dtype)),
        lambda: F.tanh(x.to(dtype)),
    ):
        with pytest.raises(RuntimeError, match=r"float32|floating"):
            call()


def test_mixed_devices(no_launch):
    for call in (lambda: F.conv2d(x, w.to("meta")), lambda: F.linear(m, v.to("meta"))):
        with pytest.raises(RuntimeError, match="same device"):
            call()


def test_unknown_activation(no_launch):
    for call in (
        lambda a, s: F.conv2d(x, w, activation=a, negative_slope=s),
        lambda a, s: F.linear(m, v, activation=a, negative_slope=s),
    ):
        with pytest.raises(ValueError, match="expected one of none, relu"):
            call("selu", 0.0)
        with pytest.raises(ValueError, match="negative_slope"):
            call("leaky_relu", -0.5)
