"""linear and its gradients, on the kernels, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torch_F

import gpukern.functional as F
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.precision import matmul_precision
from tests.numerics import assert_within, sum_bound, uses_tf32

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# rows, inputs, outputs: even, ragged, one of each, long sums, no row
SHAPES = ((16, 32, 64), (5, 37, 11), (1, 1, 1), (3, 2450, 10), (300, 17, 5), (70, 130, 40), (0, 8, 8))


def evaluate(input, weight, bias, grad) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (input, weight, bias)]
    output = torch_F.linear(*leaves)
    output.backward(grad)
    return [output.detach(), *(t.grad for t in leaves)]


def check(input, weight, bias, grad, results) -> None:
    tensors = [t.detach().double().cpu() for t in (input, weight, bias, grad)]
    values, absolutes = evaluate(*tensors), evaluate(*(t.abs() for t in tensors))
    rows = grad.numel() // weight.shape[0]
    terms = (weight.shape[1] + 1, weight.shape[0], rows, rows)
    tf32 = uses_tf32(input.dtype, matmul_precision(input.dtype))
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    for name, actual, value, absolute, n in zip(names, results, values, absolutes, terms, strict=True):
        assert actual.dtype == input.dtype
        assert_within(name, actual, value, sum_bound(value, absolute, n, input.dtype, tf32=tf32))


def run_and_check(input, weight, bias) -> torch.Tensor:
    output = F.linear(input, weight, bias)
    grad = torch.randn_like(output)
    output.backward(grad)
    check(input, weight, bias, grad, (output, input.grad, weight.grad, bias.grad))
    return output


def leaf(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(shape, dtype, device):
    rows, inputs, outputs = shape
    run_and_check(*(leaf(*s, dtype=dtype, device=device) for s in ((rows, inputs), (outputs, inputs), (outputs,))))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 3, 4), (0, 3)], ids=str)
def test_any_leading_dimensions(leading, device):
    output = run_and_check(*(leaf(*s, device=device) for s in ((*leading, 12), (7, 12), (7,))))
    assert output.shape == (*leading, 7)


def test_any_strides(device):
    input = torch.randn(24, 9, device=device)[::2].t().expand(9, 12)
    weight = torch.randn(12, 14, device=device).t()[::2]
    bias = torch.randn(14, device=device)[::2]
    leaves = [t.requires_grad_() for t in (weight.detach(), bias)]
    output = F.linear(input, *leaves)
    grad = torch.randn(7, 9, device=device).t()
    output.backward(grad)
    got_input = torch.autograd.grad(F.linear(x := input.detach().requires_grad_(), *leaves), x, grad)[0]
    check(input, weight, bias, grad, (output, got_input, leaves[0].grad, leaves[1].grad))


def test_weight_vector_and_broadcast_bias(device):
    input = torch.randn(5, 8, device=device)
    vector, bias = torch.randn(8, device=device), torch.randn(1, device=device)
    torch.testing.assert_close(F.linear(input, vector), input @ vector, rtol=1e-5, atol=1e-5)
    weight = torch.randn(6, 8, device=device)
    torch.testing.assert_close(F.linear(input, weight, bias), input @ weight.t() + bias, rtol=1e-5, atol=1e-5)


def test_offsets_beyond_32_bits(device):
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 64
    far = torch.empty(2 * apart + 16, dtype=torch.float16, device=device).as_strided((3, 16), (apart, 1))
    far.copy_(torch.randn(3, 16))
    weight = torch.randn(8, 16, device=device).half()
    assert torch.equal(F.linear(far, weight), F.linear(far.contiguous(), weight))


def test_gradients_of_gradients(device):
    def second(linear, tensors):
        first = torch.autograd.grad((linear(*tensors) ** 2).sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), tensors)

    tensors = [leaf(*s, device=device) for s in ((6, 9), (5, 9), (5,))]
    actual = second(F.linear, tensors)
    expected = second(torch_F.linear, [t.detach().double().cpu().requires_grad_() for t in tensors])
    for got, want in zip(actual, expected, strict=True):
        # Four chained sums of at most 9 terms.
        assert (got.double().cpu() - want).norm() <= 4 * 6 * 2.0**-23 * 3 * want.norm()


def test_reference_gradcheck():
    with force_mode(Mode.REFERENCE):
        tensors = [torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((3, 2, 4), (5, 4), (5,))]

        def linear(*tensors):
            return F.linear(*tensors, activation="tanh")

        assert torch.autograd.gradcheck(linear, tensors) and torch.autograd.gradgradcheck(linear, tensors)
