"""Lower precision: autocast around a model and inside it, and gradients that are scaled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.compiler.nets import Net, PreActBlock, classifier, conv_norm, sequential
from tests.compiler.training import assert_follows, bound, depth, loss, pair, state

pytestmark = pytest.mark.usefixtures("poisoned", "full_fp32")

SHAPE = 3, 3, 6, 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_around_a_model(dtype, where):
    def make() -> nn.Module:
        return sequential(conv_norm(3, 4), nn.SiLU(), PreActBlock(), nn.Conv2d(4, 2, 1))

    model, exact, call = pair(make, where)
    eager = copy.deepcopy(model)
    x = torch.randn(SHAPE, device=where)
    with torch.autocast(where.type, dtype):
        result, of_torch = call(x), eager(x)
    assert result.dtype is of_torch.dtype is dtype
    expected = exact(x.cpu().double())
    loss(result.float()).backward()
    loss(expected).backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    # One rounding more of each kind than a model of the dtype: of the weights.
    assert_follows({"y": result} | state(model), {"y": expected} | state(exact), 2 * bound(dtype, depth(model)))


def convolution_only(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = net.conv(x)
    return torch.tanh(net.norm(y)).float()


def all_but_the_sum(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        y, z = net.conv(x), net.conv2(x)
    return torch.tanh(y + z).float()


def all_but_the_activation(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = net.norm(net.conv(x)) + x
    return torch.tanh(y)


def one_of_two_readers(net, x):
    y = F.silu(net.norm(net.conv(x)))
    with torch.autocast("cpu", torch.bfloat16):
        z = net.norm2(net.conv2(y))
    return net.conv2(y) + z


def a_residual_of_another_dtype(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.silu(net.norm(x))
        return torch.tanh(net.norm2(net.conv2(y)) + y) + net.conv(y)


def ended_inside(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.silu(net.norm(net.conv(x)))
        with torch.autocast("cpu", enabled=False):
            y = F.silu(net.norm2(net.conv2(y.float())))
        return net.conv(y)


FORWARDS = (
    convolution_only, all_but_the_sum, all_but_the_activation, one_of_two_readers, a_residual_of_another_dtype,
    ended_inside,
)  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS)
def test_autocast_inside_a_model(forward, cpu):
    def make() -> nn.Module:
        (conv, norm), (conv2, norm2) = conv_norm(4, 4), conv_norm(4, 4)
        return Net(forward, conv=conv, norm=norm, conv2=conv2, norm2=norm2)

    model, exact, call = pair(make, cpu)
    eager = copy.deepcopy(model)
    x = torch.randn(3, 4, 6, 5)
    result, of_torch = call(x), eager(x)
    assert result.dtype is of_torch.dtype
    loss(result.float()).backward()
    for module in exact.modules():
        module.to(torch.float64)
    with torch.autocast("cpu", enabled=False):
        expected = in_float64(exact, x)
    loss(expected).backward()
    eps = 2 * bound(torch.bfloat16, depth(model))
    assert_follows({"y": result} | state(model), {"y": expected} | state(exact), eps)


def in_float64(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same computation without its conversions: autocast leaves float64 alone, but ``float()`` does not."""
    original = torch.Tensor.float
    torch.Tensor.float = lambda self: self  # type: ignore[method-assign, assignment]
    try:
        return net(x.double())
    finally:
        torch.Tensor.float = original  # type: ignore[method-assign]


def test_autocast_that_comes_and_goes(cpu):
    """A graph is compiled for each; none is used for the other."""
    _, _, call = pair(classifier, cpu)
    x = torch.randn(SHAPE)
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            assert call(x).dtype is dtype


def test_scaled_gradients(cpu):
    """A step that overflows is skipped, the others are torch's."""
    model, exact, call = pair(classifier, cpu)
    optimizer, reference = (torch.optim.SGD(net.parameters(), 0.1) for net in (model, exact))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        x = torch.randn(SHAPE)
        x = x / 0 if step == 1 else x
        before = copy.deepcopy(exact.state_dict())
        optimizer.zero_grad()
        reference.zero_grad()
        with torch.autocast("cpu", torch.float16):
            result = loss(call(x).float()) / 16
        scaler.scale(result).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert scaler.get_scale() == 512
            model.load_state_dict(before)  # the running statistics are not finite any more
            continue
        (loss(exact(x.double())) / 16).backward()
        reference.step()
    eps = 3 * bound(torch.float16, depth(model))
    assert_follows(dict(model.named_parameters()), dict(exact.named_parameters()), eps)
