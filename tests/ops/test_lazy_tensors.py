"""Tensors whose memory holds other values than they have: lazily negated ones, and zeros without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T

import gpukern
import gpukern.functional as F
from gpukern.ops.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("full_fp32")


def negated(*shape: int) -> torch.Tensor:
    """As of an imaginary part of a conjugate."""
    tensor = torch.randn(shape, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    return tensor


def dense(*shape: int) -> torch.Tensor:
    return torch._neg_view(torch.randn(shape))


#: (a call with every operand, the shapes of the operands)
CALLS: dict[str, tuple[Callable[[Any], Callable], tuple[tuple[int, ...], ...]]] = {
    "conv2d": (lambda f: lambda x, w, b: f.conv2d(x, w, b, padding=1), ((2, 2, 4, 5), (3, 2, 3, 3), (3,))),
    "conv_transpose2d": (lambda f: lambda x, w, b: f.conv_transpose2d(x, w, b), ((2, 2, 3, 3), (2, 3, 2, 2), (3,))),
    "linear": (lambda f: f.linear, ((4, 3), (2, 3), (2,))),
    "batch_norm": (
        lambda f: lambda x, w, b: f.batch_norm(x, w.detach(), b.detach().abs(), w, b),
        ((2, 3, 2, 3), (3,), (3,)),
    ),
    "batch_norm, training": (
        lambda f: lambda x, w, b: f.batch_norm(x, None, None, w, b, training=True),
        ((2, 3, 2, 3), (3,), (3,)),
    ),
    "softmax": (lambda f: lambda x: f.softmax(x, 1), ((2, 3),)),
    "cross_entropy": (lambda f: lambda x, t, w: f.cross_entropy(x, t, w), ((2, 3), (2, 3), (3,))),
    "cross_entropy, labels": (lambda f: lambda x: f.cross_entropy(x, torch.tensor([2, 0], device=x.device)), ((2, 3),)),
    "group_norm": (lambda f: lambda x, w, b: f.group_norm(x, 2, w, b), ((2, 4, 2, 3), (4,), (4,))),
    "instance_norm": (lambda f: lambda x, w, b: f.instance_norm(x, None, None, w, b), ((2, 3, 4), (3,), (3,))),
    "max_pool2d": (lambda f: lambda x: f.max_pool2d(x, 2), ((2, 3, 4, 4),)),
    "avg_pool2d": (lambda f: lambda x: f.avg_pool2d(x, 2), ((2, 3, 4, 4),)),
    "adaptive_avg_pool2d": (lambda f: lambda x: f.adaptive_avg_pool2d(x, 2), ((2, 3, 4, 5),)),
    **{
        name: (lambda f, name=name: getattr(f, name), ((3, 7),))
        for name in ACTIVATIONS
        if name not in ("none", "gelu_tanh")
    },
}


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [negated, dense])
@pytest.mark.parametrize("name", CALLS)
def test_every_operand_and_gradient(name, make, where):
    call, shapes = CALLS[name]
    lazy = tuple(make(*shape).to(where) for shape in shapes)
    for which in {(True,) * len(shapes), *(tuple(i == j for j in range(len(shapes))) for i in range(len(shapes)))}:
        given = [t if chosen else t.clone().resolve_neg() for t, chosen in zip(lazy, which, strict=True)]
        expected = call(T)(*(t.cpu().double() for t in given))
        _close(call(F)(*given), expected)
        leaves = [t.detach().requires_grad_() for t in given]
        truths = [t.detach().cpu().double().requires_grad_() for t in given]
        y, truth = call(F)(*leaves), call(T)(*truths)
        arriving = make(*y.shape)
        found = torch.autograd.grad(y, leaves, arriving.to(where))
        for ours, theirs in zip(found, torch.autograd.grad(truth, truths, arriving.double()), strict=True):
            _close(ours, theirs)


def test_residuals_and_running_statistics(where):
    x, w, residual = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 1, 1), negated(2, 3, 4, 4)
    expected = T.silu(T.conv2d(x.double(), w.double()) + residual.double())
    _close(F.conv2d(x.to(where), w.to(where), residual=residual.to(where), activation="silu"), expected)
    mean, var = negated(3), torch._neg_view(-torch.rand(3) - 0.5)
    for fused in (False, True):
        kept = [torch._neg_view(-t.clone().resolve_neg()).to(where) for t in (mean, var)]
        truths = [t.double() for t in (mean, var)]
        z = T.conv2d(x.double(), w.double())
        truth = T.relu(T.batch_norm(z, *truths, training=True) + residual.double())
        options = {"training": True, "residual": residual.to(where), "activation": "relu"}
        if fused:
            y = F.conv2d_batch_norm(x.to(where), w.to(where), None, *kept, **options)
        else:
            y = F.batch_norm(z.float().to(where), *kept, **options)
        _close(y, truth)
        assert all(t.is_neg() for t in kept)
        for ours, theirs in zip(kept, truths, strict=True):
            _close(ours, theirs)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardsigmoid", "silu", "hardswish"])
def test_in_place(name, where):
    """The memory holds the negative of the result; whoever shares it sees the result."""
    for grad in (False, True):
        base = torch.randn(3, 5, dtype=torch.complex64).to(where)
        x = base.conj().imag
        truth = base.cpu().to(torch.complex128)
        expected = getattr(T, name)(truth.conj().imag)
        if grad:
            base.requires_grad_()
            x = (base * 1).conj().imag
        returned = getattr(F, name)(x, inplace=True)
        assert returned is x and x.is_neg()
        _close(x, expected)
        if not grad:
            _close(base.imag, -expected)
            continue
        arriving = torch.randn(3, 5)
        (found,) = torch.autograd.grad(x, base, arriving.to(where))
        leaf = truth.requires_grad_()
        (right,) = torch.autograd.grad(getattr(T, name)((leaf * 1).conj().imag), leaf, arriving.double())
        torch.testing.assert_close(found.cpu().to(torch.complex128), right, rtol=1e-4, atol=1e-4)


def test_registered_operators_and_layers(where):
    x, w = negated(2, 2, 4, 4), dense(3, 2, 1, 1)
    conv = torch.ops.gpukern.conv2d(x.to(where), w.to(where), None, None, [1, 1], [0] * 4, [1, 1], 1, "none", 0.0)
    _close(conv, T.conv2d(x.double(), w.double()))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    )
    expected = copy.deepcopy(model).double()(x.double())
    _close(gpukern.convert(model).to(where)(x.to(where)), expected)


def test_zeros_without_memory(where):
    """What differentiation passes on for a derivative of zero."""
    zeros = torch._efficientzerotensor((2, 2, 4, 4), device=where)
    assert zeros._is_zerotensor()
    w, b = torch.randn(3, 2, 3, 3), torch.randn(3)
    _close(F.conv2d(zeros, w.to(where), b.to(where)), b.double()[:, None, None].expand(2, 3, 2, 2))
    assert not F.relu(zeros).any() and not F.avg_pool2d(zeros, 2).any() and not F.max_pool2d(zeros, 2).any()


def test_wrappers_that_outlived_their_transform(where):
    """What a function kept of ``torch.func.grad``'s tensors has no memory of its own; torch's operators take it off."""
    x, w = torch.randn(2, 2, 4, 4).to(where), torch.randn(3, 2, 1, 1).to(where)
    kept: list[torch.Tensor] = []
    torch.func.grad(lambda t: (kept.append(t), t.sum())[1])(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(kept[0])
    leaf = w.clone().requires_grad_()
    for weight in (w, leaf):
        _close(F.conv2d(kept[0], weight), T.conv2d(x.cpu().double(), w.cpu().double()))
    (found,) = torch.autograd.grad(F.conv2d(kept[0], leaf).sum(), leaf)
    _close(found, x.cpu().double().sum((0, 2, 3)).expand(3, 2)[:, :, None, None])
    mean, var = torch.zeros(2).to(where), torch.ones(2).to(where)
    y = F.batch_norm(kept[0], mean, var, training=True, momentum=1.0)
    _close(y, T.batch_norm(x.cpu().double(), None, None, training=True))
    _close(mean, x.cpu().double().mean((0, 2, 3)))
