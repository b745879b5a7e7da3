"""Two batch norms that are added, and batch norm's input gradient from known sums, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from gpukern.conv import conv_problem
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._batch_norm.problem import Norm, Running
from gpukern.ops.batch_norm import gradients_from_sums
from gpukern.ops.conv_batch_norm import conv2d_batch_statistics
from gpukern.ops.norm_pair import normalize_pair, normalize_pair_backward, normalize_pair_gradients
from tests.numerics import FP32_EPS, assert_within, rounding_bound, sum_bound
from tests.ops.batch_norm_calls import DTYPES, SLOPE, activate, make

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = {
    "odd": (2, 5, 7, 5),
    "vectors": (9, 7),
    "sequences": (3, 5, 11),
    "one channel": (4, 1, 3, 3),
    "several splits": (19, 3, 4, 5),
    "several splits, 64 channels": (3, 64, 10, 10),
    "three dimensions of pixels": (2, 3, 2, 3, 4),
}


def pixels_of(z: torch.Tensor) -> tuple[int, ...]:
    return 0, *range(2, z.dim())


def channels(numbers: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return numbers.view(1, -1, *(1,) * (z.dim() - 2))


def norm_of(z: torch.Tensor, affine: bool = True) -> Norm:
    """The norm of z with its own statistics, rounded to fp32, and random parameters."""
    variance, mean = torch.var_mean(z.double(), pixels_of(z), correction=0)
    mean, variance = mean.float(), variance.float()
    if not affine:
        return Norm(mean, variance, None, None, 1e-3)
    weight = torch.rand_like(mean) + 0.5
    return Norm(mean, variance, weight, torch.rand_like(mean) - 0.5, 1e-3)


def exact_norm(norm: Norm) -> Norm:
    return Norm(*(None if t is None else t.double().cpu() for t in norm[:4]), norm.eps)


def affine_of(z: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the norm's output, x̂, weight / σ)."""
    inverse = channels((norm.variance + norm.eps).rsqrt(), z)
    normal = (z - channels(norm.mean, z)) * inverse
    if norm.weight is None:
        return normal, normal, inverse
    weight = channels(norm.weight, z)
    return normal * weight + channels(norm.bias, z), normal, inverse * weight


def check(z_a, norm_a, z_b, norm_b, grad, activation, with_y: bool = False) -> None:
    """Output, sums and gradients.

    Errors are those of ``batch_norm_calls.check``: with n values to a channel, 6 ε √n of what is summed, 16 ε of an
    element on the way, and ε of the mean in units of σ; u, a sum of two norms, has those of both. An activation makes
    errors at most 1.5 times as large; act″ is at most 1, and y, if it is read, rounded.
    """
    a, b, g = (t.double().cpu() for t in (z_a, z_b, grad))
    exact_a, exact_b = exact_norm(norm_a), exact_norm(norm_b)
    (of_a, normal_a, scale_a), (of_b, normal_b, scale_b) = affine_of(a, exact_a), affine_of(b, exact_b)
    n = a.numel() // a.shape[1]
    far = sum(channels(norm.mean.abs() * (norm.variance + norm.eps).rsqrt(), a) for norm in (exact_a, exact_b))
    slack = FP32_EPS * (16 + 6 * n**0.5 + 4 * far)
    size = of_a.abs() + of_b.abs() + normal_a.abs() * 2 + normal_b.abs() * 2 + 2

    u = (of_a + of_b).requires_grad_()
    expected = activate(u, None if activation == "none" else activation)
    y = normalize_pair(z_a, norm_a, z_b, norm_b, activation, SLOPE)
    assert y.dtype is z_a.dtype
    assert_within("y", y, expected.detach(), 1.5 * slack * size + rounding_bound(expected.detach(), y.dtype))

    dz_a, dz_b, sums = normalize_pair_backward(grad, y if with_y else None, z_a, norm_a, z_b, norm_b, activation, SLOPE)
    (exact_g,) = torch.autograd.grad(expected, u, g)
    pixels = pixels_of(a)
    error = (1.5 * slack * (size + 1) + 2 * torch.finfo(y.dtype).eps * with_y) * 1.5 * g.abs()
    wanted = [exact_g.sum(pixels), (exact_g * normal_a).sum(pixels), (exact_g * normal_b).sum(pixels)]
    of_sums = [(error * factor).sum(pixels) for factor in (1, normal_a.abs() + 1, normal_b.abs() + 1)]
    assert sums.dtype is torch.float32
    for i in range(3):
        assert_within(f"sum {i}", sums[i], wanted[i], of_sums[i])
    for name, dz, normal, scale, i in (("a", dz_a, normal_a, scale_a, 1), ("b", dz_b, normal_b, scale_b, 2)):
        mean_g, mean_gx = (channels(wanted[j] / n, a) for j in (0, i))
        reference = scale * (exact_g - mean_g - normal * mean_gx)
        bound = error + channels(of_sums[0] / n, a) + (normal.abs() + 1) * channels(of_sums[i] / n, a)
        bound = bound + slack * (mean_g.abs() + normal.abs() * mean_gx.abs())
        assert_within(f"gradient of {name}", dz, reference, scale.abs() * bound + rounding_bound(reference, dz.dtype))


def operands(shape, device, layout="contiguous", dtype=torch.float32, affine=True):
    z_a, z_b = make(shape, layout, dtype, device, 1.0), make(shape, layout, dtype, device)
    return z_a, norm_of(z_a, affine), z_b, norm_of(z_b, affine), make(shape, layout, dtype, device)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, where):
    check(*operands(shape, where), "relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(layout, dtype, device):
    for shape in ((2, 5, 7, 5), (3, 64, 10, 10)):
        check(*operands(shape, device, layout, dtype), "relu", with_y=dtype is not torch.float32)


@pytest.mark.parametrize("with_y", [False, True], ids=["recomputed", "y"])
@pytest.mark.parametrize("activation", ["none", *PROPERTIES])
def test_activations(activation, with_y, where):
    check(*operands((19, 6, 4, 5), where), activation, with_y)


def test_operands_of_different_layouts_without_parameters(device):
    z_a, norm_a, z_b, norm_b, grad = operands((3, 6, 4, 5), device, affine=False)
    z_b = z_b.contiguous(memory_format=torch.channels_last)
    check(z_a, norm_a, z_b, norm_b, grad[:1].expand(grad.shape), "silu")
    dz_a, dz_b, _ = normalize_pair_backward(grad, None, z_a, norm_a, z_b, norm_b)
    assert dz_a.is_contiguous() and dz_b.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
def test_empty(shape, where):
    z = torch.empty(shape, device=where)
    norm = Norm(*(torch.zeros(shape[1], device=where) for _ in range(4)))
    assert normalize_pair(z, norm, z, norm, "relu").shape == shape
    dz_a, dz_b, sums = normalize_pair_backward(z, None, z, norm, z, norm, "relu")
    assert dz_a.shape == dz_b.shape == shape and sums.tolist() == [[0.0] * shape[1]] * 3


def test_same_bits_every_run(device):
    z_a, norm_a, z_b, norm_b, grad = operands((19, 3, 4, 5), device)
    first, second = (normalize_pair_backward(grad, None, z_a, norm_a, z_b, norm_b, "relu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_in_its_channel(device):
    z_a, norm_a, z_b, norm_b, grad = operands((19, 3, 4, 5), device)
    grad[3, 1, 2, 2] = float("nan")
    dz_a, dz_b, sums = normalize_pair_backward(grad, None, z_a, norm_a, z_b, norm_b)
    assert sums.isnan().any(0).tolist() == [False, True, False]
    for dz in (dz_a, dz_b):
        assert dz.isnan().any(0).any(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_parameters_are_the_rounded_sums(dtype, where):
    """Each in a dtype of its own, and in memory of its own: what one optimizer changes is not another's."""
    z_a, norm_a, z_b, norm_b, grad = operands((3, 64, 5, 5), where, dtype=dtype)
    norm_a = norm_a._replace(weight=norm_a.weight.to(dtype), bias=norm_a.bias.to(dtype))
    sums, of_b = torch.randn(2, 64, device=where), torch.randn(64, device=where)
    for b in (norm_b, norm_b._replace(weight=None), norm_b._replace(bias=None)):
        _, _, *found = normalize_pair_gradients(grad, None, z_a, norm_a, z_b, b, sums, of_b)
        wanted = [sums[1].to(dtype), sums[0].to(dtype), of_b if b.weight is not None else None]
        wanted.append(sums[0] if b.bias is not None else None)
        assert [each is None for each in found] == [each is None for each in wanted]
        given = [(a, e) for a, e in zip(found, wanted, strict=True) if e is not None]
        assert all(torch.equal(actual, expected) for actual, expected in given)
        assert len({actual.data_ptr() for actual, _ in given}) == len(given)


def test_errors(where):
    z_a, norm_a, z_b, norm_b, grad = operands((2, 5, 7, 5), where)
    with pytest.raises(RuntimeError, match="the shape of z_a"):
        normalize_pair(z_a, norm_a, z_b[:1], norm_b)
    with pytest.raises(RuntimeError, match="same dtype"):
        normalize_pair(z_a, norm_a, z_b.half(), norm_b)
    with pytest.raises(RuntimeError, match="mean should contain 5 elements not 4"):
        normalize_pair(z_a, norm_a, z_b, norm_b._replace(mean=norm_b.mean[:4]))
    with pytest.raises(ValueError, match="expected one of"):
        normalize_pair(z_a, norm_a, z_b, norm_b, "selu")
    with pytest.raises(RuntimeError, match="expected sums to have shape"):
        normalize_pair_gradients(grad, None, z_a, norm_a, z_b, norm_b, z_a.new_zeros(3, 5), z_a.new_zeros(5))
    with pytest.raises(RuntimeError, match="expected of_b to have shape"):
        normalize_pair_gradients(grad, None, z_a, norm_a, z_b, norm_b, z_a.new_zeros(2, 5), z_a.new_zeros(4))
    with pytest.raises(RuntimeError, match="expected sums to have shape"):
        gradients_from_sums(grad, z_a, None, None, norm_a.mean, norm_a.variance, z_a.new_zeros(3, 5), True, 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["weight", "alone"])
def test_gradients_from_sums(layout, dtype, affine, where):
    """From exact sums, as a convolution's epilogue leaves them: roundings of an element alone, 16 ε."""
    for shape in ((2, 5, 7, 5), (3, 64, 10, 10)):
        z, norm, _, _, g = operands(shape, where, layout, dtype, affine)
        exact_z, exact_g = z.double().cpu(), g.double().cpu()
        _, normal, scale = affine_of(exact_z, exact_norm(norm))
        pixels, n = pixels_of(z), z.numel() // z.shape[1]
        sums = torch.stack([exact_g.sum(pixels), (exact_g * normal).sum(pixels)])
        mean_g, mean_gx = (channels(each / n, exact_z) for each in sums)
        expected = scale * (exact_g - mean_g - normal * mean_gx)
        numbers = norm.weight, norm.bias, norm.mean, norm.variance
        given = sums.float().to(where)
        actual, *parameters = gradients_from_sums(g, z, *numbers, given, True, norm.eps)
        for found, parameter, total in zip(parameters, numbers, given.flip(0), strict=False):
            assert (found is None) is (parameter is None)
            assert found is None or torch.equal(found, total.to(parameter.dtype))
        far = channels(norm.mean.double().cpu().abs() + 1, exact_z) * (scale.abs() + 1)
        size = scale.abs() * (exact_g.abs() + mean_g.abs() + (normal.abs() + far) * mean_gx.abs())
        assert_within("dx", actual, expected, 16 * FP32_EPS * size + rounding_bound(expected, dtype))


def test_convolution_and_statistics(where):
    x, w, bias = torch.randn(3, 4, 9, 8), torch.randn(6, 4, 3, 3), torch.randn(6) + 10
    problem = conv_problem(x.shape, w.shape, bias.shape, (2, 2), (1, 1, 1, 1), (1, 1), 1)
    running = Running(torch.zeros(6, device=where), torch.ones(6, device=where), 0.25)
    given = (t.to(where, torch.float16) for t in (x, w, bias))
    z, mean, variance = conv2d_batch_statistics(problem, *given, running)
    exact = torch.nn.functional.conv2d(*(t.half().double() for t in (x, w, bias)), stride=2, padding=1)
    absolute = torch.nn.functional.conv2d(*(t.half().double().abs() for t in (x, w, bias)), stride=2, padding=1)
    assert_within("z", z, exact, sum_bound(exact, absolute, 37, torch.float16))
    values = z.double().cpu()
    expected_variance, expected_mean = torch.var_mean(values, (0, 2, 3), correction=0)
    n = values[:, 0].numel()
    eps = 6 * FP32_EPS * n**0.5
    assert_within("mean", mean, expected_mean, eps * values.abs().mean((0, 2, 3)))
    # The mean errs by eps of itself, which counts in units of σ.
    of_variance = eps * (expected_variance + expected_mean.abs() * expected_variance.sqrt())
    assert_within("variance", variance, expected_variance, of_variance)
    assert_within("running mean", running.mean, 0.25 * expected_mean, eps * values.abs().mean((0, 2, 3)))
    unbiased = 0.75 + 0.25 * expected_variance * n / (n - 1)
    assert_within("running variance", running.variance, unbiased, of_variance + FP32_EPS * unbiased)
