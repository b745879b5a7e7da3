"""A convolution and its batch norm in one: against torch in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import TF32_ROUNDED, conv_precision
from tests.numerics import FP32_EPS, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")

CONV = dict(stride=2, padding=1, groups=2)
#: Products to an output, and outputs to a channel.
TERMS, PIXELS = 2 * 9, 3 * 5 * 4


def operands(device, dtype=torch.float32, layout=torch.contiguous_format) -> list[torch.Tensor]:
    """x, filters, their bias, weight and bias of the norm, residual."""
    shapes = (3, 4, 9, 8), (6, 2, 3, 3), (6,), (6,), (6,), (3, 6, 5, 4)
    tensors = [torch.randn(shape, device=device).to(torch.float32 if len(shape) == 1 else dtype) for shape in shapes]
    tensors[2] = tensors[2].to(dtype)
    return [(t.contiguous(memory_format=layout) if t.dim() == 4 else t).requires_grad_() for t in tensors]


def exact(tensors, running, activation, training=True) -> torch.Tensor:
    x, filters, bias, weight, shift, residual = tensors
    z = T.batch_norm(T.conv2d(x, filters, bias, **CONV), *running, weight, shift, training, 0.3)
    return getattr(T, activation)(z + residual)


def assert_close(name, actual, expected, eps) -> None:
    """In the Frobenius norm, of sums of random walks: see tests/numerics.py."""
    assert (actual.detach().cpu().double() - expected).norm() <= eps * expected.norm(), name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients(layout, activation, dtype, device):
    tensors = operands(device, dtype, layout)
    running = torch.randn(6, device=device), torch.rand(6, device=device) + 0.5
    doubles = [t.detach().cpu().double().requires_grad_() for t in tensors]
    double_running = [t.cpu().double() for t in running]
    expected = exact(doubles, double_running, activation)
    x, filters, bias, weight, shift, residual = tensors
    output = F.conv2d_batch_norm(
        x, filters, bias, *running, weight, shift, **CONV, momentum=0.3, residual=residual, activation=activation
    )
    assert output.dtype is dtype and output.is_contiguous(memory_format=layout)
    # Of the convolution, of the sums over pixels, and the roundings of its output, of y and of gradients.
    eps = 6 * FP32_EPS * (TERMS**0.5 + PIXELS**0.5) + 4 * torch.finfo(dtype).eps
    if uses_tf32(dtype, conv_precision(dtype)):
        eps += TF32_ROUNDED
    assert_close("output", output, expected, eps)
    for name, actual, wanted in zip(("mean", "var"), running, double_running, strict=True):
        assert_close(name, actual, wanted, eps)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, tensors, grad)
    wanted = torch.autograd.grad(expected, doubles, grad.cpu().double())
    for i, (actual, reference) in enumerate(zip(grads, wanted, strict=True)):
        assert actual.dtype is tensors[i].dtype
        if i != 2:
            assert_close(f"gradient {i}", actual, reference, 2 * eps)
    # What the norm takes away again has no gradient: only what the others' errors leave of PIXELS terms of each.
    assert grads[2].double().abs().max() <= 2 * eps * PIXELS * grad.double().abs().max()


def test_agrees_with_the_two_operations(where):
    x, filters, bias, weight, shift, residual = operands(where)
    for training in (True, False):
        statistics = [(torch.ones(6, device=where), torch.ones(6, device=where)) for _ in range(2)]
        options = dict(training=training, residual=residual, activation="gelu")
        fused = F.conv2d_batch_norm(x, filters, bias, *statistics[0], weight, shift, **CONV, **options)
        z = F.conv2d(x, filters, bias, **CONV)
        apart = F.batch_norm(z, *statistics[1], weight, shift, **options)
        torch.testing.assert_close(fused, apart, rtol=1e-5, atol=1e-5)
        for a, b in zip(*statistics, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients():
    with force_mode(Mode.REFERENCE):
        x, filters, bias, weight, shift, _ = (t.detach().double() for t in operands("cpu"))
        bias, few = bias[:2], (x[:2, :, :3, :3], filters[:2], weight[:2], shift[:2])
        x, filters, weight, shift = (t.requires_grad_() for t in few)

        def run(x, filters, weight, shift):
            return F.conv2d_batch_norm(x, filters, bias, None, None, weight, shift, **CONV, activation="tanh")

        assert torch.autograd.gradcheck(run, (x, filters, weight, shift))
        assert torch.autograd.gradgradcheck(run, (x, filters, weight, shift))


def test_errors_and_nothing_to_do(where):
    x, filters, bias, weight, shift, residual = operands(where)
    one = torch.ones(6, device=where)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.conv2d_batch_norm(x[:1, :, :3, :3], filters, bias, None, None, groups=2)
    with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 5"):
        F.conv2d_batch_norm(x, filters, bias, one[:5], one, **CONV)
    with pytest.raises(RuntimeError, match="residual to have"):
        F.conv2d_batch_norm(x, filters, bias, one, one, **CONV, residual=residual[:1])
    with pytest.raises(RuntimeError, match="expected a batch"):
        F.conv2d_batch_norm(x[0], filters, bias, one, one, **CONV)
    with pytest.raises(ValueError, match="either both be None"):
        F.conv2d_batch_norm(x, filters, bias, one, None, **CONV)
    with pytest.raises(RuntimeError, match="residual to have"):  # as graphs call it
        torch.ops.gpukern.conv2d_batch_norm(
            *(x, filters, bias, weight, shift, residual[:1], [2, 2], [1, 1, 1, 1], [1, 1], 2, 1e-5, "none", 0.0)
        )
    empty = F.conv2d_batch_norm(x[:0], filters, bias, one, one, weight, shift, **CONV)
    assert empty.shape == (0, 6, 5, 4) and (one == 1).all()
    (grad,) = torch.autograd.grad(empty.sum(), filters)
    assert (grad == 0).all()


def test_compiled_training_is_one_graph():
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        x, filters, bias, weight, shift, residual = tensors = operands("cpu")
        results = []

        def run(*statistics):
            return F.conv2d_batch_norm(
                x, filters, bias, *statistics, weight, shift, **CONV, residual=residual, activation="relu"
            )

        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            statistics = torch.zeros(6), torch.ones(6)
            output = function(*statistics)
            grads = torch.autograd.grad(output.pow(3).sum(), tensors)
            results.append((output, *statistics, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
