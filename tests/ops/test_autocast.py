"""Autocast: functions follow it as torch's do, and behind the door of an operator nothing sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F

pytestmark = pytest.mark.usefixtures("full_fp32")

CALLS: dict[str, Callable[[Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "conv2d": lambda f: lambda x: f.conv2d(x, _like(x, 4, 3, 2, 2), _like(x, 4)),
    "conv_transpose2d": lambda f: lambda x: f.conv_transpose2d(x, _like(x, 3, 2, 2, 2), _like(x, 2)),
    "linear": lambda f: lambda x: f.linear(x, _like(x, 4, 6), _like(x, 4)),
    "batch_norm": lambda f: lambda x: f.batch_norm(x, _like(x, 3), _like(x, 3), _like(x, 3), _like(x, 3)),
    "batch_norm, training": lambda f: lambda x: f.batch_norm(x, None, None, _like(x, 3), training=True),
    "group_norm": lambda f: lambda x: f.group_norm(x, 3, _like(x, 3), _like(x, 3)),
    "instance_norm": lambda f: lambda x: f.instance_norm(x, _like(x, 3), _like(x, 3), _like(x, 3), _like(x, 3)),
    "max_pool2d": lambda f: lambda x: f.max_pool2d(x, 2),
    "avg_pool2d": lambda f: lambda x: f.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda f: lambda x: f.adaptive_avg_pool2d(x, 2),
    "softmax": lambda f: lambda x: f.softmax(x, 1),
    "cross_entropy": lambda f: lambda x: f.cross_entropy(x, torch.zeros(2, 6, 6, dtype=torch.int64, device=x.device)),
    "cross_entropy, probabilities": lambda f: lambda x: f.cross_entropy(x, x.sigmoid()),
    **{
        name: (lambda f, name=name: getattr(f, name))
        for name in ["relu", "relu6", "leaky_relu", "sigmoid", "hardsigmoid", "tanh", "silu", "gelu", "hardswish"]
    },
}


def _like(x: torch.Tensor, *shape: int) -> torch.Tensor:
    """Parameters of float32, as under autocast."""
    return torch.linspace(0.1, 1.0, torch.Size(shape).numel()).reshape(shape).to(x.device)


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_are_torchs(name, where):
    for low in (torch.bfloat16, torch.float16):
        for given in (torch.float32, low):
            x = torch.randn(2, 3, 6, 6).to(given)
            with torch.autocast("cpu", low):
                expected = CALLS[name](T)(x)
            with torch.autocast(where.type, low):
                found = CALLS[name](F)(x.to(where))
            assert found.dtype is expected.dtype, (low, given)
            bound = 8 * torch.finfo(low).eps
            torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=bound, atol=bound * 8)


POOLS_OF_VOLUMES = {"max_pool3d": 2, "avg_pool3d": 2, "adaptive_avg_pool3d": 2, "adaptive_max_pool3d": 2}


@pytest.mark.parametrize("name", POOLS_OF_VOLUMES)
def test_volumes_are_pooled_in_float32_on_a_cpu_alone(name, where):
    x, argument = torch.randn(2, 3, 4, 4, 4).bfloat16(), POOLS_OF_VOLUMES[name]
    with torch.autocast("cpu"):
        expected = getattr(T, name)(x, argument)
    with torch.autocast(where.type, torch.bfloat16):
        found = getattr(F, name)(x.to(where), argument)
    assert found.dtype is (expected.dtype if where.type == "cpu" else torch.bfloat16)
    torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_operators_compute_in_what_they_are_given(low, where):
    """The same bits with autocast as without it: values and gradients, of registered operators too."""
    ops, geometry = torch.ops.gpukern, ([1, 1], [0] * 4, [1, 1], 1)
    x, w, b = (torch.randn(shape).to(where).requires_grad_() for shape in ((2, 3, 5, 5), (4, 3, 2, 2), (4,)))
    rows, matrix, scale = (torch.randn(shape).to(where).requires_grad_() for shape in ((4, 6), (5, 6), (3,)))
    mean, var = torch.randn(3).to(where), torch.rand(3).to(where)
    calls = {
        "conv2d": (lambda: ops.conv2d(x, w, b, None, *geometry, "gelu", 0.0), (x, w, b)),
        "conv_transpose2d": (
            lambda: ops.conv_transpose2d(
                x, w.transpose(0, 1), None, None, [1, 1], [0, 0], [0, 0], [1, 1], 1, "none", 0.0
            ),
            (x, w),
        ),
        "conv2d_max_pool2d": (lambda: ops.conv2d_max_pool2d(x, w, b, *geometry, "relu", 0.0), (x, w, b)),
        "conv2d_batch_norm": (
            lambda: ops.conv2d_batch_norm(x, w, b, None, None, None, *geometry, 1e-5, "silu", 0.0)[0],
            (x, w),
        ),
        "linear": (lambda: ops.linear(rows, matrix, None, "silu", 0.0), (rows, matrix)),
        "batch_norm": (lambda: ops.batch_norm(x, scale, None, None, mean, var, 1e-5, "tanh", 0.0), (x, scale)),
        "group_norm": (lambda: ops.group_norm(x, scale, None, None, 3, 1e-5, "tanh", 0.0)[0], (x, scale)),
        "avg_pool2d": (lambda: ops.avg_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False, True, None), (x,)),
        "activation": (lambda: ops.activation(x, "gelu", 0.0), (x,)),
    }
    for name, (call, leaves) in calls.items():
        found = []
        for enabled in (False, True):
            with torch.autocast(where.type, low, enabled=enabled):
                y = call()
                assert y.dtype is torch.float32, name
                found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        for plain, under in zip(*found, strict=True):
            assert torch.equal(plain, under), name


def test_compiled_functions_follow_it():
    """Compiled once without autocast and once inside of it, and where the function itself switches it on."""
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2)

    def both(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            inside = F.conv2d(x, w)
        return inside, F.conv2d(x, w)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for _ in range(2):
        assert [y.dtype for y in compiled(x, w)] == [torch.bfloat16, torch.float32]
    with torch.autocast("cpu", torch.float16):
        assert [y.dtype for y in compiled(x, w)] == [torch.bfloat16, torch.float16]
    assert [y.dtype for y in compiled(x, w)] == [torch.bfloat16, torch.float32]
