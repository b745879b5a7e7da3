"""The activations alone: values, derivatives, second derivatives, layouts, special values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import assert_within, rounding_bound

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OURS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": F.sigmoid,
    "tanh": F.tanh,
}
TRUE = {
    "relu": torch.relu,
    "leaky_relu": lambda x: torch_F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# The exponential of an argument of size |x| ≤ 20 errs by a few units of fp32; with the rounding of the result, and in
# the derivative the rounding of the saved output as well, 4 and 8 roundings cover everything (measured: below 3 and 4).
ROUNDINGS = {"value": 4, "derivative": 8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_value_and_derivative(name, dtype, device):
    x = torch.cat([torch.linspace(-20, 20, 2001), torch.logspace(-7, 0, 200), -torch.logspace(-7, 0, 200)])
    x = x.to(device, dtype).requires_grad_()
    true_x = x.detach().double().cpu().requires_grad_()
    y, true_y = OURS[name](x), TRUE[name](true_x)
    grad = torch.randn_like(y)
    y.backward(grad)
    true_y.backward(grad.double().cpu())
    assert_within(name, y, true_y.detach(), rounding_bound(true_y.detach(), dtype, ROUNDINGS["value"]))
    # The derivative is taken from the rounded output: for sigmoid and tanh it cancels against 1, so its error is of the
    # size of the gradient times eps, not of the result times eps.
    bound = rounding_bound(grad.double().cpu(), dtype, ROUNDINGS["derivative"])
    assert_within(f"{name} derivative", x.grad, true_x.grad, bound)


@pytest.mark.parametrize("name", OURS)
def test_special_values_are_torchs(name, device):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 88.0, -104.0], device=device)
    assert_within(
        name, OURS[name](x), TRUE[name](x.double().cpu()), rounding_bound(TRUE[name](x.double().cpu()), x.dtype, 4)
    )
    x.requires_grad_()
    grad = torch.tensor([1.0, float("inf"), float("inf"), 1.0, 1.0, 1.0, 1.0, 1.0], device=device)
    OURS[name](x).backward(grad)
    other = x.detach().cpu().requires_grad_()
    TRUE[name](other).backward(grad.cpu())
    assert torch.equal(x.grad.cpu().isnan(), other.grad.isnan())
    if name in ("relu", "leaky_relu"):
        assert torch.equal(x.grad.cpu().nan_to_num(7.0), other.grad.nan_to_num(7.0))


@pytest.mark.parametrize("name", OURS)
def test_layouts(name, device):
    base = torch.randn(4, 6, 5, 8, device=device)
    for x in (
        base,
        base.permute(0, 2, 3, 1),
        base[:, :, :, ::2],
        base[:1].expand(3, 6, 5, 8),
        base[:0],
        base[0, 0, 0, 0],
    ):
        y = OURS[name](x)
        assert y.shape == x.shape and y.stride() == torch.empty_like(x).stride()
        assert_within(name, y, TRUE[name](x.double().cpu()), rounding_bound(TRUE[name](x.double().cpu()), x.dtype, 4))
        leaf = x.detach().requires_grad_()
        OURS[name](leaf).sum().backward()  # an expanded gradient
        other = x.detach().double().cpu().requires_grad_()
        TRUE[name](other).sum().backward()
        assert_within(name, leaf.grad, other.grad, rounding_bound(torch.ones_like(other), x.dtype, 8))


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_inplace(name, device):
    function = {"relu": F.relu, "leaky_relu": F.leaky_relu}[name]
    x = torch.randn(7, 5, device=device)
    expected = function(x)
    assert function(x, inplace=True) is x and torch.equal(x, expected)
    channels_last = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    for view in (channels_last, torch.randn(6, 8, device=device)[:, ::2], torch.randn(4, device=device)[:0]):
        expected = function(view)
        pointer = view.data_ptr()
        assert function(view, inplace=True) is view and view.data_ptr() == pointer and torch.equal(view, expected)
    leaf = torch.randn(6, device=device, requires_grad=True)
    function(leaf * 2, inplace=True).sum().backward()
    expected = torch.autograd.grad(function(leaf * 2).sum(), leaf)[0]
    assert torch.equal(leaf.grad, expected)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf"):
        function(leaf, inplace=True)
    assert torch.equal(leaf, before)
    # What another operation saved may not be overwritten unnoticed.
    base = leaf * 1
    square = base**2
    function(base, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("name", OURS)
def test_second_derivative(name, device):
    def second(function, x):
        (first,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    x = torch.randn(300, device=device, requires_grad=True)
    true_x = x.detach().double().cpu().requires_grad_()
    # A dozen roundings of factors no larger than 8.
    torch.testing.assert_close(
        second(OURS[name], x).double().cpu(), second(TRUE[name], true_x), rtol=1e-5, atol=12 * 8 * 2.0**-23
    )


def test_reference_gradcheck():
    with force_mode(Mode.REFERENCE):
        for function in OURS.values():
            x = torch.randn(20, dtype=torch.double, requires_grad=True)
            assert torch.autograd.gradcheck(function, x) and torch.autograd.gradgradcheck(function, x)
