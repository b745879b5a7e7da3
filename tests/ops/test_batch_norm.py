"""Batch norm: the kernels against torch in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import gpukern
from gpukern.ops._activation.properties import PROPERTIES
from tests.ops.batch_norm_calls import DTYPES, LAYOUTS, SHAPES, call, check, make

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_shapes(shape, training, device):
    check(call(shape, device, training=training))
    check(call(shape, device, training=training, residual=True, activation="relu", layout="channels_last"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_dtypes_and_layouts(layout, dtype, training, device):
    """Input, residual and gradient in any strides: sliced, permuted, stride 0; parameters of both dtypes."""
    for parameters, other in ((torch.float32, "contiguous"), (dtype, layout)):
        options = dict(layout=layout, dtype=dtype, parameters=parameters, training=training)
        check(call((3, 20, 6, 7), device, residual=True, activation="tanh", **options), grad_layout=other)
        check(call((3, 20, 6, 7), device, **options), grad_layout="expanded")


def test_operands_of_different_layouts(device):
    one = call((3, 20, 6, 7), device, residual=True, activation="silu", layout="channels_last")
    one.residual = make((3, 20, 6, 7), "contiguous", torch.float32, device).requires_grad_()
    check(one, grad_layout="strided")


@pytest.mark.parametrize("activation", PROPERTIES)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_activations(activation, residual, training, device):
    check(call((3, 6, 5, 7), device, training=training, residual=residual, activation=activation))
    # Several launches, where what the first makes of the residual is read by the last.
    check(call((19, 3, 4, 5), device, training=training, residual=residual, activation=activation))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "x, residual", "weight, bias"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_some_gradients(wanted, activation, training, device):
    for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
        one = call(shape, device, training=training, residual=True, activation=activation)
        for name in ("x", "weight", "bias", "residual"):
            getattr(one, name).requires_grad_(name in wanted.split(", "))
        check(one)


@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_without_parameters(missing, training, device):
    for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
        one = call(shape, device, training=training, activation="relu")
        for name in missing:
            setattr(one, name, None)
        check(one)


@pytest.mark.parametrize("shape", [(7, 5), (2, 40, 6, 9), (3, 64, 10, 10)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(shape, dtype, device):
    """A thousand standard deviations from zero; and a first value that is far from all others."""
    check(call(shape, device, offset=1000.0, dtype=dtype))
    one = call(shape, device, offset=1000.0, dtype=dtype, layout="channels_last")
    with torch.no_grad():
        one.x[0, :, ...].view(shape[1], -1)[:, :1] = 0
    check(one)


def test_constant_channels(device):
    """No deviation at all: nothing is left but the bias, and no NaN."""
    one = call((19, 3, 4, 5), device)
    with torch.no_grad():
        one.x[:] = torch.tensor([1000.3, 0.0, -1e-3], device=device)[:, None, None]
    output = one()
    assert torch.equal(output, one.bias.detach()[:, None, None].expand_as(output))


def test_nan_and_infinity_stay_in_their_channel(device):
    for value in (float("nan"), float("inf")):
        for shape in ((3, 6, 5, 7), (19, 3, 4, 5)):
            one = call(shape, device, activation="relu")
            with torch.no_grad():
                one.x[1, 1, 2, 3] = value
            output = one()
            assert output[:, 1].isnan().all() and one.var[1].isnan()
            others = torch.arange(shape[1]) != 1
            assert not output[:, others].isnan().any() and not one.var[others].isnan().any()
            (grad,) = torch.autograd.grad(output.sum(), one.x)
            assert grad[:, 1].isnan().all() and not grad[:, others].isnan().any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
def test_empty(shape, training, where):
    one = call(shape, where, training=training, activation="relu")
    before = one.mean.clone(), one.var.clone()
    output = one()
    assert output.shape == shape
    grads = torch.autograd.grad(output.sum(), one.leaves)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, one.leaves, strict=True))
    assert torch.equal(one.mean, before[0]) and torch.equal(one.var, before[1])


@pytest.mark.parametrize(
    ("shape", "layout"), [((19, 3, 4, 5), "contiguous"), ((3, 64, 10, 10), "channels_last")], ids=["planes", "last"]
)
def test_same_bits_every_run(shape, layout, device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        one = call(shape, device, layout=layout, residual=True, activation="silu", dtype=torch.float16)
        output = one()
        results.append([output, one.mean, one.var, *torch.autograd.grad(output.square().sum(), one.leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(device):
    """Images that reach past 2³¹ elements, each stride below it, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 16 * 36, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 16, 6, 6), (apart, 1, 96, 16))
    near = torch.randn(3, 16, 6, 6).half().to(device)
    far.copy_(near)
    for training in (True, False):
        one = call((3, 16, 6, 6), device, dtype=torch.float16, training=training, residual=True, activation="silu")
        results = []
        for x, grad in ((far, near), (near, far)):
            leaf = x.detach().requires_grad_()
            one.x, mean, var = leaf, one.mean, one.var
            one.mean, one.var = mean.clone(), var.clone()
            output = one()
            results.append([output, one.mean, one.var, *torch.autograd.grad(output, one.leaves, grad)])
            one.mean, one.var = mean, var
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("samples", [0, 2])
def test_result_of_running_statistics_changes_in_place(samples, where):
    """Of an empty batch too it is no view of the input, which autograd would not let be changed."""
    x = torch.randn(samples, 4, 3, 3, device=where, requires_grad=True)
    ones = torch.ones(4, device=where)
    y = gpukern.functional.batch_norm(x, 0 * ones, ones, ones, 0 * ones, False, eps=0.0)
    y.mul_(2)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))
