"""Group norm and instance norm: the kernels against torch in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
from gpukern.ops._group_norm import planner, tiles
from tests.numerics import FP32_EPS, assert_within, rounding_bound
from tests.ops.batch_norm_calls import DTYPES, activate, make

pytestmark = pytest.mark.usefixtures("poisoned")
SLOPE = 0.1


@pytest.fixture(params=["resident", "split"])
def path(request, monkeypatch):
    """Groups that fit a program, and the same where none fits."""
    tiles._whole.cache_clear()
    planner.resident.cache_clear()
    if request.param == "split":
        monkeypatch.setattr(planner, "_KEPT", 0)
    yield request.param
    tiles._whole.cache_clear()
    planner.resident.cache_clear()


@dataclass
class Call:
    """One group norm, its operands leaves of a graph."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    groups: int
    activation: str | None = None
    eps: float = 1e-3

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        named = {name: getattr(self, name) for name in ("x", "weight", "bias", "residual")}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def __call__(self) -> torch.Tensor:
        return F.group_norm(
            self.x, self.groups, self.weight, self.bias, self.eps,
            residual=self.residual, activation=self.activation, negative_slope=SLOPE,
        )  # fmt: skip


def call(
    shape, groups, device, *, layout="contiguous", dtype=torch.float32, parameters=torch.float32, residual=False,
    offset=0.0, activation=None,
) -> Call:  # fmt: skip
    C = shape[1]
    weight = ((0.5 + torch.rand(C)) * (-1) ** torch.arange(C)).to(parameters).to(device).requires_grad_()
    bias = (2 * torch.rand(C) - 1).to(parameters).to(device).requires_grad_()
    x = make(shape, layout, dtype, device, offset)
    if layout == "channels_last" and len(shape) == 5:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    added = make(shape, layout, dtype, device).requires_grad_() if residual else None
    return Call(x.requires_grad_(), weight, bias, added, groups, activation)


def check(actual: Call, grad_layout: str = "contiguous") -> torch.Tensor:
    """Output and gradients against torch in float64. Returns the output.

    The bounds are those of ``tests/ops/batch_norm_calls.py`` with the ``n`` values of a group for those of a channel:
    6 ε √n for sums, 16 ε for roundings on the way to an element, and where the mean is rounded before it is subtracted,
    ε of its size in units of σ.
    """
    double = {n: None if t is None else t.detach().cpu().double() for n, t in vars(actual).items() if n in OPERANDS}
    exact = {n: None if t is None else t.requires_grad_(n in actual.leaves) for n, t in double.items()}
    x = exact["x"]
    # torch's own has no backward for a bias without a weight.
    z = T.group_norm(x, actual.groups, eps=actual.eps)
    for numbers, combine in ((exact["weight"], torch.mul), (exact["bias"], torch.add)):
        z = z if numbers is None else combine(z, numbers.view(1, -1, *(1,) * (x.dim() - 2)))
    expected = activate(z if exact["residual"] is None else z + exact["residual"], actual.activation)
    output = actual()
    assert output.dtype is actual.x.dtype
    assert output.stride() == T.group_norm(actual.x.detach().cpu(), actual.groups).stride()

    grouped = x.detach().reshape(x.shape[0], actual.groups, -1)
    var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    n = grouped.shape[2]

    def by_element(numbers):
        return numbers.expand(grouped.shape).reshape(x.shape)

    def channels(t):
        return 0 if t is None else t.detach().abs().view(1, -1, *(1,) * (x.dim() - 2))

    inverse = by_element((var + actual.eps).rsqrt())
    normal = (x.detach() - by_element(mean)) * inverse
    weight = 1 if exact["weight"] is None else channels(exact["weight"])
    slack = FP32_EPS * (16 + 6 * n**0.5 + 4 * by_element(mean).abs() * inverse)
    size = weight * (normal.abs() + 1) + channels(exact["bias"])
    size = size + (0 if exact["residual"] is None else exact["residual"].detach().abs())
    assert_within("output", output, expected.detach(), 1.5 * slack * size + rounding_bound(expected, output.dtype))

    grad = make(output.shape, grad_layout, output.dtype, output.device)
    results = torch.autograd.grad(output, [*actual.leaves.values()], grad, retain_graph=True)
    wanted = torch.autograd.grad(expected, [exact[name] for name in actual.leaves], grad.cpu().double())
    g = 1.5 * grad.cpu().double().abs()
    slack = 1.5 * slack * (size + 1) + 2 * torch.finfo(output.dtype).eps
    pixels = (0, *range(2, x.dim()))
    bounds = {"residual": slack * g, "bias": (slack * g).sum(pixels)}
    bounds["weight"] = (slack * g * (normal.abs() + 1)).sum(pixels)

    def means(t):
        return by_element(t.reshape(grouped.shape).mean(2, keepdim=True))

    each = weight * slack * g
    bounds["x"] = inverse * (each + means(each) + (normal.abs() + 1) * means(each * (normal.abs() + 1)))
    for name, result, reference in zip(actual.leaves, results, wanted, strict=True):
        assert result.dtype is getattr(actual, name).dtype
        bound = bounds[name] + rounding_bound(reference, result.dtype)
        assert_within(f"gradient of {name}", result, reference, bound)
    return output


OPERANDS = ("x", "weight", "bias", "residual")
CASES = {
    "vectors": ((9, 12), 3),
    "tiles of groups of two": ((2, 70, 3, 5), 35),
    "one group": ((2, 5, 11), 1),
    "instances": ((3, 6, 5, 7), 6),
    "ragged groups": ((2, 9, 7, 5), 3),
    "volumes": ((2, 4, 2, 3, 4), 2),
    "one image": ((1, 4, 40, 20), 2),
}


@pytest.mark.parametrize(("shape", "groups"), CASES.values(), ids=CASES)
def test_shapes(shape, groups, path, device):
    check(call(shape, groups, device))
    check(call(shape, groups, device, residual=True, activation="relu", layout="channels_last"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(layout, dtype, path, device):
    """Input, residual and gradient in any strides; parameters of both dtypes."""
    check(call((2, 20, 6, 7), 5, device, layout=layout, dtype=dtype, residual=True, activation="tanh"), "strided")
    check(call((2, 20, 6, 7), 4, device, layout=layout, dtype=dtype, parameters=dtype), "expanded")


def test_operands_of_different_layouts(path, device):
    """One in NCDHW and one in channels_last_3d: pixels of three dimensions that cannot be joined."""
    one = call((2, 4, 2, 3, 4), 2, device, residual=True, activation="silu", layout="channels_last")
    one.residual = make((2, 4, 2, 3, 4), "contiguous", torch.float32, device).requires_grad_()
    check(one)
    one.x = make((2, 4, 2, 3, 4), "strided", torch.float32, device).requires_grad_()
    check(one, "strided")


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "gelu", "silu"])
def test_activations(activation, path, device):
    for residual in (False, True):
        check(call((3, 6, 5, 7), 2, device, residual=residual, activation=activation))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "x, residual"])
def test_some_gradients(wanted, path, device):
    one = call((3, 6, 5, 7), 2, device, residual=True, activation="gelu")
    for name in OPERANDS:
        getattr(one, name).requires_grad_(name in wanted.split(", "))
    check(one)


def test_without_parameters(path, device):
    for missing in (("weight",), ("bias",), ("weight", "bias")):
        one = call((3, 6, 5, 7), 2, device, activation="relu")
        for name in missing:
            setattr(one, name, None)
        check(one)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean(layout, path, device):
    """A thousand standard deviations from zero; and a first value that is far from all others."""
    one = call((2, 6, 6, 9), 2, device, offset=1000.0, layout=layout)
    check(one)
    with torch.no_grad():
        one.x[0, ::3, 0, 0] = 0
    check(one)


def test_mean_far_above_the_deviation_is_no_error_of_the_output(device):
    """In one pass the mean is taken twice, so that not even its rounding is left: 2²⁰ deviations above zero."""
    x = (2.0**20 + torch.randint(-2, 3, (2, 4, 9, 9))).to(device)
    exact = T.group_norm(x.cpu().double(), 2)
    assert_within("output", F.group_norm(x, 2), exact, 32 * FP32_EPS * (exact.abs() + 1))


def test_constant_groups(path, device):
    """No deviation at all: nothing is left but the bias, and no NaN."""
    one = call((2, 6, 4, 5), 3, device)
    with torch.no_grad():
        one.x[:] = torch.tensor([1000.3, 0.0, -1e-3], device=device).repeat_interleave(2)[:, None, None]
    output = one()
    assert torch.equal(output, one.bias.detach()[:, None, None].expand_as(output))


def test_nan_and_infinity_stay_in_their_group(path, device):
    for value in (float("nan"), float("inf")):
        one = call((2, 6, 5, 7), 3, device, activation="relu")
        with torch.no_grad():
            one.x[1, 2, 2, 3] = value
        output = one()
        lost = torch.zeros(2, 6, dtype=torch.bool)
        lost[1, 2:4] = True
        (grad,) = torch.autograd.grad(output.sum(), one.x)
        for found in (output, grad):
            assert torch.equal(found.isnan().flatten(2).all(2).cpu(), lost)
            assert torch.equal(found.isnan().flatten(2).any(2).cpu(), lost)


@pytest.mark.parametrize("shape", [(0, 4, 4, 5), (2, 4, 0, 5), (2, 0, 4, 5), (0, 4)], ids=str)
def test_empty(shape, where):
    one = call(shape, 2, where, activation="relu")
    output = one()
    assert output.shape == shape
    grads = torch.autograd.grad(output.sum(), [*one.leaves.values()])
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, one.leaves.values(), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_every_run(layout, path, device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        one = call((5, 8, 8, 10), 2, device, layout=layout, residual=True, activation="silu", dtype=torch.float16)
        output = one()
        results.append([output, *torch.autograd.grad(output.square().sum(), [*one.leaves.values()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits(path, device):
    """Images that reach past 2³¹ elements, each stride below it, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 16 * 36, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 16, 6, 6), (apart, 1, 96, 16))
    near = torch.randn(3, 16, 6, 6).half().to(device)
    far.copy_(near)
    one = call((3, 16, 6, 6), 4, device, dtype=torch.float16, residual=True, activation="silu")
    results = []
    for x, grad in ((far, near), (near, far)):
        one.x = x.detach().requires_grad_()
        output = one()
        results.append([output, *torch.autograd.grad(output, [*one.leaves.values()], grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---- instance norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics(dtype, path, where):
    """The mean over the images, of means and unbiased variances; a strided one is written where it is."""
    x = torch.randn(5, 7, 6, 3, device=where).to(dtype) + 3
    exact = x.cpu().double()
    running = torch.randn(7, device=where), torch.rand(14, device=where)[::2]
    expected = [t.cpu().double() for t in running]
    output = F.instance_norm(x, *running, momentum=0.3)
    reference = T.instance_norm(exact, *expected, momentum=0.3)
    assert_within("output", output, reference, 64 * FP32_EPS * (reference.abs() + 1) + rounding_bound(reference, dtype))
    for name, got, wanted in zip(("mean", "var"), running, expected, strict=True):
        assert_within(name, got, wanted, 32 * FP32_EPS * (wanted.abs() + 3))
    before = [t.clone() for t in running]
    evaluated = F.instance_norm(x, *running, use_input_stats=False, activation="relu")
    reference = T.batch_norm(exact, *expected).relu()
    bound = 64 * FP32_EPS * (exact.abs() + 4) * (expected[1] + 1e-5).rsqrt()[:, None, None]
    assert_within("evaluated", evaluated, reference, bound + rounding_bound(reference, dtype))
    assert all(torch.equal(a, b) for a, b in zip(running, before, strict=True))


def test_running_statistics_need_values_and_both(where):
    running = torch.ones(3, device=where), torch.ones(3, device=where)
    assert F.instance_norm(torch.empty(0, 3, 4, device=where), *running).shape == (0, 3, 4)
    assert all(torch.equal(t, torch.ones_like(t)) for t in running)
    x = torch.randn(2, 3, 4, device=where)
    with pytest.raises(ValueError, match="must either both be None or neither"):
        F.instance_norm(x, running[0])
    with pytest.raises(RuntimeError, match="to be defined when use_input_stats is false"):
        F.instance_norm(x, running[0], use_input_stats=False)
    with pytest.raises(ValueError, match="Expected more than 1 spatial element when training"):
        F.instance_norm(x[..., :1], *running)
    assert F.instance_norm(x[..., :1], *running, use_input_stats=False).shape == (2, 3, 1)
    with pytest.raises(RuntimeError, match="not differentiable with respect to running_mean"):
        F.instance_norm(x, running[0].clone().requires_grad_(), running[1])
    with pytest.raises(TypeError, match="use_input_stats must be a bool"):
        F.instance_norm(x, use_input_stats=1)


def test_what_torch_refuses(where):
    x = torch.randn(2, 8, 3, device=where)
    refused = [
        (RuntimeError, "divisible by num_groups", (x, 3)),
        (RuntimeError, "num groups to be greater than 0", (x, -2)),
        (ZeroDivisionError, "zero", (x, 0)),
        (TypeError, "num_groups must be an int", (x, 2.0)),
        (RuntimeError, "Expected weight to be a vector", (x, 2, torch.ones(7, device=where))),
        (RuntimeError, "Expected bias to be a vector", (x, 2, None, torch.ones(2, 4, device=where))),
        (RuntimeError, "expected weight of torch.float32", (x, 2, torch.ones(8, device=where).half())),
        (RuntimeError, "at least 2 dimensions", (x[0, :, 0], 2)),
        (ValueError, "more than 1 value per channel", (x[:1, :, :1], 8)),
        (NotImplementedError, "not implemented for torch.int64", (x.long(), 2)),
    ]
    for kind, words, arguments in refused:
        with pytest.raises(kind, match=words):
            F.group_norm(*arguments)
    with pytest.raises(RuntimeError, match="residual to have the input's shape"):
        F.group_norm(x, 2, residual=x[:1])
    with pytest.raises(ValueError, match="unknown activation"):
        F.group_norm(x, 2, activation="mish")
