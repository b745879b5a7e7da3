"""The activations alone: values, derivatives, second derivatives, layouts, special values."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern
import gpukern.functional as F
from gpukern.ops.activation import ACTIVATIONS, check_activation, needs_input
from gpukern.runtime.mode import Mode, force_mode
from tests.numerics import FP32_EPS, assert_within, rounding_bound

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OURS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": F.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": F.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
}
TRUE = {
    "relu": torch.relu,
    "relu6": torch_F.relu6,
    "leaky_relu": lambda x: torch_F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": torch_F.hardsigmoid,
    "tanh": torch.tanh,
    "silu": torch_F.silu,
    "gelu": torch_F.gelu,
    "gelu_tanh": lambda x: torch_F.gelu(x, approximate="tanh"),
    "hardswish": torch_F.hardswish,
}
INPLACE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "hardswish": F.hardswish,
}
# The rounding of the result and a few roundings of fp32 before it; in the derivative the rounding of the saved output
# as well (measured: below 3 and 4).
ROUNDINGS = {"value": 4, "derivative": 8}


def value_bound(name: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far a value may lie from ``y = act(x)`` (both float64).

    - exp(x) is computed as 2^(x · log₂e): rounding x · log₂e, by at most 2⁻²⁴ of it, changes the result by the factor
      1 ± |x| · 2⁻²⁴. The argument of gelu_tanh's is u, itself computed with 4 roundings.
    - An exponential below the smallest normal number may be flushed to zero; silu and gelu_tanh multiply it by x.
    - The float64 truth of gelu_tanh is x (1 + tanh) / 2, which cancels: 2⁻⁵² times x.
    - gelu's 1 + erf(x/√2) cancels where x is negative: a few roundings of numbers near 1, multiplied by x/2. Its own
      tail needs no relative accuracy: torch's has none either.
    """
    bound = rounding_bound(y, dtype, ROUNDINGS["value"])
    if name == "gelu":
        return bound + 2 * FP32_EPS * x.abs().nan_to_num(posinf=0.0)
    if name in ("sigmoid", "silu", "gelu_tanh"):
        argument = 5 * 1.6 * (x.abs() + 0.045 * x.abs() ** 3) if name == "gelu_tanh" else x.abs()
        flushed = (1 if name == "sigmoid" else x.abs()) * torch.finfo(torch.float32).tiny
        cancelled = 2.0**-52 * x.abs() if name == "gelu_tanh" else 0.0
        bound = bound + (argument * 2.0**-24 * y.abs() + flushed + cancelled).nan_to_num(posinf=0.0)
    return bound


def assert_value(name: str, y: torch.Tensor, x: torch.Tensor) -> None:
    x = x.detach().double().cpu()
    assert_within(name, y, TRUE[name](x), value_bound(name, x, TRUE[name](x), y.dtype))


def test_every_activation_is_tested():
    assert {"none", *OURS} == {"none", *TRUE} == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_value_and_derivative(name, dtype, device):
    # Whole numbers included: the clamps bend at −3, 0, 3 and 6.
    bends = torch.arange(-20.0, 21.0)
    x = torch.cat([bends, torch.empty(2000).uniform_(-20, 20), torch.logspace(-7, 0, 200), -torch.logspace(-7, 0, 200)])
    x = x.to(device, dtype).requires_grad_()
    true_x = x.detach().double().cpu().requires_grad_()
    y, true_y = OURS[name](x), TRUE[name](true_x)
    grad = torch.randn_like(y)
    y.backward(grad)
    true_y.backward(grad.double().cpu())
    assert_value(name, y, x)
    # The derivative is taken from the rounded output: for sigmoid and tanh it cancels against 1, so its error is of the
    # size of the gradient times eps, not of the result times eps.
    bound = rounding_bound(grad.double().cpu(), dtype, ROUNDINGS["derivative"])
    assert_within(f"{name} derivative", x.grad, true_x.grad, bound)


@pytest.mark.parametrize("name", OURS)
def test_special_values_are_torchs(name, device):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, 88.0, -104.0], device=device)
    assert_value(name, OURS[name](x), x)
    x.requires_grad_()
    grad = torch.tensor([1.0, float("inf"), float("inf"), 1.0, 1.0, 1.0, 1.0, 1.0], device=device)
    OURS[name](x).backward(grad)
    # One element at a time: torch's vectorized loops treat a NaN in other ways than its scalar and its CUDA code.
    expected = torch.cat([slope_of(TRUE[name], *pair) for pair in zip(x.detach().cpu(), grad.cpu(), strict=True)])
    assert torch.equal(x.grad.cpu().isnan(), expected.isnan())
    if name in ("relu", "leaky_relu", "relu6", "hardsigmoid"):
        assert torch.equal(x.grad.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_both_modes_agree_at_the_ends(name, dtype, device):
    """Values and two derivatives, of more elements than a vector has: torch's loops treat those in other ways."""
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, 3.0, -3.0, 6.0, 88.0, -104.0, 1e10, 3e38])
    x = torch.cat([ends, -ends]).repeat(4).to(device, dtype)

    def computed() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = OURS[name](leaf)
        (first,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
        return [y.detach(), first.detach(), *torch.autograd.grad(first, leaf, torch.ones_like(y))]

    kernels = computed()
    with force_mode(Mode.REFERENCE):
        for found, expected in zip(kernels, computed(), strict=True):
            # Of a derivative that cancels: eight roundings of terms of 4 at most.
            bounds = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 32 * FP32_EPS}
            torch.testing.assert_close(found, expected, **bounds, equal_nan=True)
    if name in ("gelu", "gelu_tanh", "silu", "hardswish"):
        assert kernels[0][1] == torch.inf


def slope_of(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    leaf = x.reshape(1).requires_grad_()
    return torch.autograd.grad(function(leaf), leaf, grad.reshape(1))[0]


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
        assert_value(name, y, x)
        leaf = x.detach().requires_grad_()
        OURS[name](leaf).sum().backward()  # an expanded gradient
        other = x.detach().double().cpu().requires_grad_()
        TRUE[name](other).sum().backward()
        assert_within(name, leaf.grad, other.grad, rounding_bound(torch.ones_like(other), x.dtype, 8))


@pytest.mark.parametrize("name", INPLACE)
def test_inplace(name, device):
    function = INPLACE[name]
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
    true = {**TRUE, "hardsigmoid": lambda x: torch_F.relu6(x + 3) / 6}  # torch differentiates its own once only
    true_x = x.detach().double().cpu().requires_grad_()
    # A dozen roundings of factors no larger than 8.
    torch.testing.assert_close(
        second(OURS[name], x).double().cpu(), second(true[name], true_x), rtol=1e-5, atol=12 * 8 * 2.0**-23
    )


@pytest.mark.parametrize("name", OURS)
def test_reference_gradcheck(name):
    with force_mode(Mode.REFERENCE):
        # Scaled so that all pieces of the clamps are met, none of whose bends lies within a difference step.
        x = (4 * torch.randn(40, dtype=torch.double)).requires_grad_()
        assert torch.autograd.gradcheck(OURS[name], x) and torch.autograd.gradgradcheck(OURS[name], x)


@pytest.mark.parametrize("name", INPLACE)
def test_second_derivatives_in_place(name, where):
    """As of the form that is not in place: what is kept of the input is still a function of it."""

    def second(function, x):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf * 1.5).square().sum(), leaf, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), leaf)

    x = 2 * torch.randn(60, device=where)
    in_place = second(functools.partial(INPLACE[name], inplace=True), x)
    for found, expected in zip(in_place, second(INPLACE[name], x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OURS)
def test_reference_derivatives_are_the_kernels(name, dtype, device):
    """Both compute in fp32 and round once; second derivatives are at most 8 there."""
    x, grad = (4 * torch.randn(200)).to(device, dtype), torch.randn(200).to(device, dtype)

    def derivatives() -> list[torch.Tensor]:
        leaf, leaf_grad = x.clone().requires_grad_(), grad.clone().requires_grad_()
        (first,) = torch.autograd.grad(OURS[name](leaf), leaf, leaf_grad, create_graph=True)
        return [first, *torch.autograd.grad(first, (leaf, leaf_grad), grad)]

    kernels = derivatives()
    with force_mode(Mode.REFERENCE):
        for ours, reference in zip(kernels, derivatives(), strict=True):
            bound = 8 * 8 * torch.finfo(dtype).eps * (1 + grad.double().cpu().square())
            assert_within(name, ours, reference.detach().double().cpu(), bound)


@pytest.mark.parametrize("name", OURS)
def test_needs_input_tells_what_is_kept(name):
    """An activation that keeps its output must have a derivative that is a function of the output."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.double)
    y = TRUE[name](x)
    # silu, gelu and hardswish fall before they rise: equal values with different slopes.
    assert needs_input(name) or not (y.diff() < 0).any()
    assert not needs_input("none")
    kept = []
    with (
        force_mode(Mode.REFERENCE),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        OURS[name](x.clone().requires_grad_())
    assert len(kept) == 1 and torch.equal(kept[0], x if needs_input(name) else y)


def _in_place_after(function, x: torch.Tensor, change_result: bool) -> torch.Tensor | str:
    """The gradient where the result of ``function``, or what went into it, is changed in place."""
    leaf = x.clone().requires_grad_()
    inner = leaf * 1.5
    y = function(inner)
    (y if change_result else inner).mul_(2.0)
    try:
        y.pow(3).sum().backward()
    except RuntimeError as problem:
        return "RuntimeError" if "modified by an inplace operation" in str(problem) else str(problem)
    return leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_a_result_changes_in_place_where_torchs_may(name, inplace, where):
    """``out = act(x); out += shortcut`` trains where it does with torch's activation, which keeps its input."""
    if inplace and name not in INPLACE:
        pytest.skip("has no form in place")
    ours, theirs = (INPLACE[name], getattr(torch_F, name)) if inplace else (OURS[name], TRUE[name])
    if inplace:
        ours, theirs = functools.partial(ours, inplace=True), functools.partial(theirs, inplace=True)
    x = torch.randn(40)
    expected = _in_place_after(theirs, x.double(), True)
    found = _in_place_after(ours, x.to(where), True)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    if not inplace and not isinstance(found, str):
        # torch keeps what goes in then, and does not notice less than we do.
        assert _in_place_after(theirs, x.double(), False) == _in_place_after(ours, x.to(where), False)


@pytest.mark.parametrize("activation", ["ReLU6", "LeakyReLU", "Hardsigmoid", "SiLU", "Hardswish", "GELU"])
def test_a_fused_result_changes_in_place(activation, where, full_fp32):
    """The same where the activation is computed in the kernel of the layer before it."""
    heads = (
        (torch.nn.Conv2d(2, 3, 2), (2, 2, 4, 5)),
        (torch.nn.ConvTranspose2d(2, 3, 2), (2, 2, 3, 3)),
        (torch.nn.Linear(4, 3), (5, 4)),
        (torch.nn.BatchNorm2d(2), (2, 2, 3, 4)),
        (torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.BatchNorm2d(3)), (2, 2, 4, 5)),
    )
    for head, shape in heads:
        model = torch.nn.Sequential(*(head if isinstance(head, torch.nn.Sequential) else (head,)))
        model.append(getattr(torch.nn, activation)())
        x = torch.randn(shape)
        grads = []
        for each, given in (
            (copy.deepcopy(model).double(), x.double()),
            (gpukern.convert(model).to(where), x.to(where)),
        ):
            out = each(given)
            out += 0.5
            out.pow(3).sum().backward()
            grads.append([p.grad.cpu().double() for p in each.parameters()])
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


def test_gelu_takes_torchs_forms_only():
    with pytest.raises(RuntimeError, match="approximate"):
        F.gelu(torch.zeros(1), approximate="erf")
    assert check_activation("gelu_tanh", 0.0) == "gelu_tanh"
