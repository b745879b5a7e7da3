"""``torch.func`` and forward mode give the derivatives of torch's own functions, of every operand, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as T
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import gpukern
import gpukern.functional as F
from gpukern.ops.activation import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("full_fp32")


def _activated(convolve: Callable, name: str) -> tuple[Callable, Callable]:
    """Ours with an activation in the epilogue, torch's after it."""

    def ours(*operands: torch.Tensor) -> torch.Tensor:
        return convolve(F)(*operands, activation=name)

    def theirs(*operands: torch.Tensor) -> torch.Tensor:
        z = convolve(T)(*operands)
        return T.gelu(z, approximate="tanh") if name == "gelu_tanh" else getattr(T, name)(z)

    return ours, theirs


def _both(call: Callable[[Any], Callable]) -> tuple[Callable, Callable]:
    return call(F), call(T)


_STATISTICS = torch.tensor([0.3, -0.2]), torch.tensor([0.5, 1.5])


def _frozen(functions: Any) -> Callable:
    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functions.batch_norm(x, *(s.to(x) for s in _STATISTICS), weight, bias)

    return call


def _fused_norm(x, filters, bias, weight, shift):
    return F.conv2d_batch_norm(x, filters, bias, None, None, weight, shift, activation="silu")


def _norm_of_conv(x, filters, bias, weight, shift):
    return T.silu(T.batch_norm(T.conv2d(x, filters, bias), None, None, weight, shift, training=True))


def _entropy(smoothing: float = 0.1, **options: Any) -> tuple[Callable, Callable]:
    def call(functions: Any) -> Callable:
        labels, weight = torch.tensor([1, 0, 2]), torch.tensor([0.5, 1.5, 1.0])
        return lambda x: functions.cross_entropy(
            x, labels.to(x.device), weight.to(x), ignore_index=0, label_smoothing=smoothing, **options
        )

    return _both(call)


#: (ours, torch's), and the shapes of the operands.
CASES: dict[str, tuple[tuple[Callable, Callable], tuple[tuple[int, ...], ...]]] = {
    "conv2d": (_both(lambda f: lambda x, w, b: f.conv2d(x, w, b, 2, 1)), ((2, 2, 4, 5), (3, 2, 3, 3), (3,))),
    "conv2d, groups": (_both(lambda f: lambda x, w: f.conv2d(x, w, groups=2)), ((2, 2, 3, 4), (4, 1, 2, 2))),
    "conv2d, gelu": (_activated(lambda f: f.conv2d, "gelu"), ((1, 2, 3, 4), (3, 2, 2, 2), (3,))),
    "conv2d, tanh": (_activated(lambda f: f.conv2d, "tanh"), ((1, 2, 3, 4), (3, 2, 2, 2), (3,))),
    "conv_transpose2d": (
        _both(lambda f: lambda x, w, b: f.conv_transpose2d(x, w, b, 2, 1, 1)),
        ((2, 2, 2, 3), (2, 3, 3, 3), (3,)),
    ),
    "linear": (_both(lambda f: f.linear), ((2, 3), (4, 3), (4,))),
    "linear, silu": (_activated(lambda f: f.linear, "silu"), ((3, 3), (2, 3), (2,))),
    "batch_norm": (_both(_frozen), ((3, 2, 2, 2), (2,), (2,))),
    "batch_norm, training": (
        _both(lambda f: lambda x, w, b: f.batch_norm(x, None, None, w, b, training=True)),
        ((3, 2, 2, 2), (2,), (2,)),
    ),
    "softmax": (_both(lambda f: lambda x: f.softmax(x, 1)), ((2, 3, 2),)),
    "log_softmax": (_both(lambda f: lambda x: f.log_softmax(x, 0)), ((4, 2),)),
    "cross_entropy": (_entropy(), ((3, 3),)),
    "cross_entropy, rows": (_entropy(0.0, reduction="none"), ((3, 3),)),
    "cross_entropy, probabilities": (
        _both(lambda f: lambda x, t: f.cross_entropy(x, t, label_smoothing=0.1)),
        ((2, 3), (2, 3)),
    ),
    "group_norm": (_both(lambda f: lambda x, w, b: f.group_norm(x, 2, w, b)), ((2, 4, 3), (4,), (4,))),
    "group_norm, silu": (
        (lambda x, w: F.group_norm(x, 1, w, activation="silu"), lambda x, w: T.silu(T.group_norm(x, 1, w))),
        ((2, 2, 2), (2,)),
    ),
    "instance_norm": (_both(lambda f: lambda x: f.instance_norm(x)), ((2, 2, 2, 2),)),
    "conv2d_batch_norm": ((_fused_norm, _norm_of_conv), ((2, 2, 3, 3), (3, 2, 2, 2), (3,), (3,), (3,))),
    "max_pool2d": (_both(lambda f: lambda x: f.max_pool2d(x, 3, 2, 1)), ((2, 2, 4, 5),)),
    "avg_pool2d": (_both(lambda f: lambda x: f.avg_pool2d(x, 3, 2, 1)), ((2, 2, 4, 5),)),
    "adaptive_avg_pool2d": (_both(lambda f: lambda x: f.adaptive_avg_pool2d(x, (2, 3))), ((2, 2, 4, 5),)),
    "conv2d, then max_pool2d": (
        (
            lambda x, w, b: torch.ops.gpukern.conv2d_max_pool2d(x, w, b, [1, 1], [0] * 4, [1, 1], 1, "silu", 0.0),
            lambda x, w, b: T.max_pool2d(T.silu(T.conv2d(x, w, b)), 2),
        ),
        ((1, 2, 4, 5), (3, 2, 1, 2), (3,)),
    ),
    **{
        name: (_both(lambda f, name=name: getattr(f, name)), ((7,),))
        for name in ACTIVATIONS
        if name not in ("none", "gelu_tanh")
    },
}


def _operands(name: str) -> tuple[torch.Tensor, ...]:
    # Away from the kinks of activations, where a derivative is anything.
    return tuple(torch.randn(shape) + 0.01 for shape in CASES[name][1])


def _close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4, check_dtype=False, check_device=False)


def _doubled(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def _to(tensors: tuple[torch.Tensor, ...], where: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(where) for tensor in tensors)


@pytest.mark.parametrize("name", CASES)
def test_tangents_of_every_operand(name, where):
    (ours, theirs), _ = CASES[name]
    operands = _operands(name)
    along = tuple(torch.randn_like(t) for t in operands)
    given = _to(operands, where)
    for i in range(len(operands)):
        only = tuple(t if i == place else torch.zeros_like(t) for place, t in enumerate(along))
        _close(jvp(ours, given, _to(only, where)), jvp(theirs, _doubled(operands), _doubled(only)))
    expected = jvp(theirs, _doubled(operands), _doubled(along))
    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, d) for t, d in zip(given, _to(along, where), strict=True)]
        _close(tuple(forward_ad.unpack_dual(ours(*dual))), expected)


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_jacobians(name, where):
    (ours, theirs), _ = CASES[name]
    operands = _operands(name)
    every = tuple(range(len(operands)))
    given = _to(operands, where)

    def squares(function: Callable) -> Callable:
        return lambda *tensors: function(*tensors).square().sum()

    _close(grad(squares(ours), every)(*given), grad(squares(theirs), every)(*_doubled(operands)))
    y, pull = vjp(ours, *given)
    _close(pull(y), vjp(theirs, *_doubled(operands))[1](y.cpu().double()))
    if len(operands) == 1 or name in ("batch_norm, training", "linear, silu"):  # each column is a launch
        expected = jacrev(theirs, every)(*_doubled(operands))
        _close(jacrev(ours, every)(*given), expected)
        _close(jacfwd(ours, every)(*given), expected)


#: torch has no forward mode over the backward of its own.
_NOT_IN_TORCH = ("hardsigmoid",)


@pytest.mark.parametrize("name", [name for name in CASES if name not in _NOT_IN_TORCH])
def test_second_derivatives(name, where):
    """Forward over reverse, of all operands along a direction."""
    (ours, theirs), _ = CASES[name]
    operands = _operands(name)
    along = tuple(torch.randn_like(t) for t in operands)
    every = tuple(range(len(operands)))

    def cubes(function: Callable) -> Callable:
        return lambda *tensors: function(*tensors).pow(3).sum()

    expected = jvp(grad(cubes(theirs), every), _doubled(operands), _doubled(along))
    _close(jvp(grad(cubes(ours), every), _to(operands, where), _to(along, where)), expected)


def test_hessian(where):
    x, w, b = (torch.randn(shape) for shape in ((2, 3), (2, 3), (2,)))

    def loss(linear: Callable, square: Callable) -> Callable:
        return lambda *operands: square(linear(*operands)).sum()

    every = 0, 1, 2
    expected = hessian(loss(T.linear, T.silu), every)(*_doubled((x, w, b)))
    _close(hessian(loss(F.linear, F.silu), every)(*_to((x, w, b), where)), expected)


@pytest.mark.parametrize("name", CASES)
def test_mapped_operands(name, where):
    """vmap over one operand, over all of them, and gradients of each sample."""
    (ours, theirs), _ = CASES[name]
    operands = _operands(name)
    count = 2
    for mapped in [range(len(operands)), *([i] for i in range(len(operands)))]:
        stacked = tuple(torch.stack([t, t.flip(0)], 1) if i in mapped else t for i, t in enumerate(operands))
        dims = tuple(1 if i in mapped else None for i in range(len(operands)))
        expected = vmap(theirs, dims)(*_doubled(stacked))
        assert expected.shape[0] == count
        _close(vmap(ours, dims)(*_to(stacked, where)), expected)

    def loss(function: Callable) -> Callable:
        return lambda *tensors: function(*tensors).square().sum()

    dims = (1, *(None,) * (len(operands) - 1))
    stacked = (torch.stack([operands[0], 2 * operands[0]], 1), *operands[1:])
    which = len(operands) - 1
    expected = vmap(grad(loss(theirs), which), dims)(*_doubled(stacked))
    _close(vmap(grad(loss(ours), which), dims)(*_to(stacked, where)), expected)


def test_a_models_parameters(where):
    """``functional_call`` moves parameters, not inputs; an ensemble maps over them."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU6()).eval()
    ours = gpukern.convert(model).to(where)
    x = torch.randn(2, 2, 4, 5)
    parameters = dict(model.named_parameters())
    along = {key: torch.randn_like(value) for key, value in parameters.items()}

    def tangent(which: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
        given = [{key: t.detach().to(device, dtype) for key, t in each.items()} for each in (parameters, along)]
        return jvp(lambda p: functional_call(which, p, (x.to(device, dtype),)), (given[0],), (given[1],))

    theirs = torch.nn.Sequential(*model).double()
    parameters = {key: value.detach().float() for key, value in parameters.items()}
    _close(tangent(ours, where, torch.float32), tangent(theirs, torch.device("cpu"), torch.float64))

    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    rows = torch.randn(4, 3)
    stacked, _ = stack_module_state(layers)
    expected = torch.stack([layer(rows) for layer in layers])
    base = gpukern.convert(layers[0]).to(where)
    stacked = {key: value.detach().to(where) for key, value in stacked.items()}
    _close(vmap(lambda p: functional_call(base, p, (rows.to(where),)))(stacked), expected)


@pytest.mark.parametrize("name", CASES)
def test_functionalized(name, where):
    """Alone and inside of a transform. Around one, torch has no rule for any autograd.Function."""
    (ours, theirs), _ = CASES[name]
    operands = _operands(name)
    given, expected = _to(operands, where), _doubled(operands)
    _close(functionalize(ours)(*given), theirs(*expected))
    every = tuple(range(len(operands)))

    def sums(function: Callable) -> Callable:
        return lambda *tensors: function(*tensors).square().sum()

    _close(grad(functionalize(sums(ours)), every)(*given), grad(sums(theirs), every)(*expected))


def test_functionalized_in_place(where):
    x = torch.randn(2, 3, device=where)
    graph = make_fx(functionalize(lambda t: F.silu(t.clone(), inplace=True)))(x)
    assert not any(str(node.target).split(".")[0].endswith("_") for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), F.silu(x))


def _differentiated(normalize: Callable, x: torch.Tensor, how: Callable) -> tuple:
    """What a transform makes of ``normalize(x, mean, variance)``, and the statistics, which it was not given."""
    statistics = [s.to(x, copy=True) for s in _STATISTICS]
    found = how(lambda t: normalize(t, *statistics))(x)
    return found, *statistics


TRANSFORMS = {
    "grad": lambda f: grad(lambda t: f(t).pow(3).sum()),
    "vjp": lambda f: lambda t: (lambda y, pull: pull(y.detach()))(*vjp(f, t)),
    "jvp": lambda f: lambda t: jvp(f, (t,), (t.flip(0),)),
    "jacrev": lambda f: jacrev(lambda t: f(t).pow(3).sum()),
    "grad of grad": lambda f: grad(lambda t: grad(lambda u: f(u).pow(3).sum())(t).sum()),
}


@pytest.mark.parametrize("how", TRANSFORMS)
def test_running_statistics_that_a_transform_was_not_given_are_updated(how, where):
    x, filters = torch.randn(3, 2, 4, 4), torch.randn(2, 2, 3, 3)

    def of_conv(f):
        kernels = filters.to(where)
        return lambda t, mean, var: f.conv2d_batch_norm(t, kernels, None, mean, var, momentum=0.5)

    def after_conv(t, mean, var):
        return T.batch_norm(T.conv2d(t, filters.double()), mean, var, training=True, momentum=0.5)

    alone = _both(lambda f: lambda t, mean, var: f.batch_norm(t, mean, var, training=True, momentum=0.5))
    for ours, theirs in (alone, (of_conv(F), after_conv)):
        expected = _differentiated(theirs, x.double(), TRANSFORMS[how])
        found = _differentiated(ours, x.to(where), TRANSFORMS[how])
        for one, other in zip(found, expected, strict=True):
            _close(one, other)
        assert not torch.equal(found[1].cpu(), _STATISTICS[0])


def test_running_statistics_of_no_mapped_call_are_refused(where):
    mean, var = (s.to(where, copy=True) for s in _STATISTICS)
    x = torch.randn(3, 2, 2, 4, 4, device=where)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda t: F.batch_norm(t, mean, var, training=True))(x)
    each = mean.expand(3, 2).clone(), var.expand(3, 2).clone()
    y, *updated = vmap(lambda t, m, v: (F.batch_norm(t, m, v, training=True), m, v))(x, *each)
    expected = [s.clone() for s in (mean, var)]
    torch.testing.assert_close(y[1], F.batch_norm(x[1], *expected, training=True))
    for one, other in zip(updated, expected, strict=True):
        torch.testing.assert_close(one[1], other)


def test_what_has_no_derivative_says_so(where):
    x = torch.randn(3, device=where, requires_grad=True)
    (first,) = torch.autograd.grad(F.sigmoid(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of this order"):
        torch.autograd.grad(second.sum(), x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda t: torch.ops.gpukern.activation_grad_grad(t, t, t, "tanh"), (x.detach(),), (x.detach(),))
    mean, var = torch.zeros(2, device=where), torch.ones(2, device=where)
    image = torch.randn(2, 2, 3, 3, device=where)
    with pytest.raises(RuntimeError, match="running statistics"):
        jvp(lambda m: F.batch_norm(image, m, var), (mean,), (mean,))
