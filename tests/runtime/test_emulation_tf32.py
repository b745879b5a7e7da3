"""TF32 in the interpreter: operands are cut as the tensor cores cut them, or rounded where a kernel rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpukern.runtime.mode import EMULATE, EMULATE_TF32

if not (EMULATE and EMULATE_TF32):
    pytest.skip("only the interpreter is taught TF32", allow_module_level=True)

import triton
import triton.language as tl

from gpukern.runtime import emulation
from gpukern.runtime.emulation_tf32 import cut_to_tf32, round_to_tf32
from gpukern.runtime.launcher import launch
from gpukern.runtime.precision import TF32X3

emulation.prepare()
INF, NAN = float("inf"), float("nan")


def test_11_bits_are_kept():
    values = np.concatenate([np.random.randn(100_000), [0.0, 1.0, -1.0]]).astype(np.float32)
    exponent = np.frexp(values)[1]
    scaled = np.ldexp(values.astype(np.float64), 11 - exponent)  # of 2¹⁰ to 2¹¹: TF32 are the whole ones
    assert np.array_equal(cut_to_tf32(values), np.ldexp(np.trunc(scaled), exponent - 11))
    nearest = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
    assert np.array_equal(round_to_tf32(values), np.ldexp(nearest, exponent - 11))


def test_what_is_no_number_stays_so():
    edges = np.array([INF, -INF, 3.4e38, NAN], np.float32)
    low_payload = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)
    for way in (cut_to_tf32, round_to_tf32):
        assert np.isnan(way(low_payload)).all() and np.isnan(way(edges)[3])
        assert np.array_equal(way(edges)[:2], edges[:2]) and 3.39e38 < way(edges)[2] < INF
    assert round_to_tf32(np.finfo(np.float32).max.reshape(1))[0] == INF


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    acc = tl.full((N, N), 1.0, tl.float32)
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), acc, input_precision=PRECISION))


def product(a: torch.Tensor, b: torch.Tensor, precision: str) -> torch.Tensor:
    out = torch.empty(32, 32)
    launch(product_kernel, (1,), a.device, (a, b, out, 32, precision), {})
    return out


def test_products():
    a, b = torch.rand(32, 32) + 0.1, torch.rand(32, 32) + 0.1
    exact = a.double() @ b.double() + 1
    cut = torch.from_numpy(cut_to_tf32(a.numpy())).double() @ torch.from_numpy(cut_to_tf32(b.numpy())).double() + 1
    sums = 6 * 2.0**-23 * 32**0.5
    assert ((product(a, b, "tf32") - cut).abs() <= sums * cut).all()
    assert 4e-4 < ((exact - cut) / exact).mean() < 9e-4  # which is not what the other ways give
    assert ((product(a, b, "ieee") - exact).abs() <= sums * exact).all()
    assert ((product(a, b, "tf32x3") - exact).abs() <= (sums + TF32X3) * exact).all()


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinities_and_nan_are_those_of_the_exact_product(precision):
    a, b = torch.ones(32, 32), torch.ones(32, 32)
    a[3, 4], a[5, 6], a[7, 8], b[8, :] = INF, NAN, INF, 0.0
    expected = (a.double() @ b.double() + 1).float()
    assert expected[3].isinf().all() and expected[5].isnan().all() and expected[7].isnan().all()
    assert torch.equal(product(a, b, precision).nan_to_num(-1.0), expected.nan_to_num(-1.0))


@triton.jit
def rounding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + at, y)


def test_rounding_in_a_kernel():
    x, y = torch.randn(64), torch.empty(64)
    launch(rounding_kernel, (1,), x.device, (x, y, 64), {})
    assert torch.equal(y, torch.from_numpy(round_to_tf32(x.numpy()))) and not torch.equal(x, y)


def test_unasked_emulation_multiplies_in_full(run_python):
    """As torch does on a CPU, for products of TF32 and of three TF32 products."""
    run = run_python(
        "import torch, gpukern.functional as F\n"
        "torch.manual_seed(0)\n"
        "for allow in (True, False):\n"
        "    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow\n"
        "    x, w = torch.rand(2, 16, 6, 6), torch.rand(8, 16, 3, 3)\n"
        "    truth = torch.nn.functional.conv2d(x.double(), w.double())\n"
        "    assert ((F.conv2d(x, w) - truth).norm() / truth.norm()) < 1e-6\n"
        "    a, b = torch.rand(5, 40), torch.rand(7, 40)\n"
        "    truth = a.double() @ b.double().t()\n"
        "    assert ((F.linear(a, b) - truth).norm() / truth.norm()) < 1e-6\n",
        GPUKERN_EMULATE="1",
        GPUKERN_EMULATE_TF32="0",
    )
    assert run.returncode == 0, run.stderr
