"""The interpreter's repairs and checks: bfloat16, accesses outside tensors, promises that do not hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpukern.runtime.mode import EMULATE

if not EMULATE:
    pytest.skip("only the interpreter is repaired", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from gpukern.runtime import emulation
from gpukern.runtime.launcher import index_type, launch
from gpukern.runtime.strides import reach

emulation.prepare()


def test_bf16_rounds_to_nearest_even_as_torch_does():
    bits = np.random.randint(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.array(
        [0, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 1, 0x3F808000, 0x3F818000]
    )
    values = np.concatenate([bits, edges.astype(np.uint32)]).view(np.float32)
    ours = torch.from_numpy(emulation.fp32_to_bf16_bits(values).view(np.int16)).view(torch.bfloat16)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))
    back = emulation.bf16_bits_to_fp32(ours.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(back, ours.float().numpy(), equal_nan=True)


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at))
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))


def test_bf16_product():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    launch(product_kernel, (1,), a.device, (a, b, out, 16), {})
    torch.testing.assert_close(out.float(), (a.float() @ b.float()).bfloat16().float(), rtol=2**-7, atol=1e-6)


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, shift, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i + shift, mask=i < size, other=0.0), mask=i < 16)


def test_accesses_outside_the_tensors_raise():
    x, y = torch.randn(64)[16:32], torch.empty(16)
    launch(copy_kernel, (1,), x.device, (x, y, 16, 0, 16), {})
    assert torch.equal(x, y)
    for size, shift in ((16, 1), (16, -1), (17, 0)):
        with pytest.raises(InterpreterError, match="read outside"):
            launch(copy_kernel, (1,), x.device, (x, y, size, shift, 32), {})
    with pytest.raises(InterpreterError, match="write outside"):
        launch(copy_kernel, (1,), x.device, (x, y[:15], 16, 0, 16), {})


@triton.jit
def hint_kernel(y_ptr, start, step, limit, MULTIPLE: tl.constexpr, CONSTANT: tl.constexpr):
    i = tl.multiple_of(start + tl.arange(0, 16) * step, MULTIPLE)
    ok = tl.max_constancy(i < limit, CONSTANT)
    tl.store(y_ptr + tl.arange(0, 16), ok.to(tl.float32))


def test_promises_that_do_not_hold_raise():
    y = torch.empty(16)
    for start, step, limit in ((8, 1, 16), (16, 8, 80), (0, 1, 24)):
        launch(hint_kernel, (1,), y.device, (y, start, step, limit, 8, 8), {})
    for start, step, limit, what in ((4, 1, 12, "divisibility"), (8, 4, 40, "divisibility"), (8, 1, 13, "constancy")):
        with pytest.raises(InterpreterError, match=what):
            launch(hint_kernel, (1,), y.device, (y, start, step, limit, 8, 8), {})


def test_offsets_choose_the_index_type():
    assert index_type(2**31 - 2**24 - 1) == tl.int32 and index_type(2**31 - 2**24) == tl.int64
    assert reach((5, 7), (0, 0)) == 0 and reach((4, 3), (6, 2)) == 3 * 6 + 2 * 2


@triton.jit
def halved_again(x):
    return tl.sum(x * 0.5, axis=0)


@triton.jit
def halved(x):
    return halved_again(x * 0.5)


@triton.jit
def calls_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, halved(x) + halved_again(x) + tl.max(x, axis=0))


def test_the_language_is_patched_once_a_launch_and_put_back(monkeypatch):
    """Device functions that call one another meet it patched; after the launch it is as it was, after errors too."""
    patched = []
    plain = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *given: patched.append(given[0]) or plain(*given))
    x, out = torch.arange(16.0), torch.empty(1)
    before = tl.load, tl.tensor.__add__, tl.range
    for _ in range(2):
        patched.clear()
        launch(calls_kernel, (1,), x.device, (x, out, 16), {})
        assert out.item() == 120 / 4 + 120 / 2 + 15
        # For the kernel, and for the first function of Triton's own, which names tl.core alone.
        assert patched.count(tl.core.tensor_descriptor_base) == 2
        assert before == (tl.load, tl.tensor.__add__, tl.range)
    with pytest.raises(InterpreterError):
        launch(copy_kernel, (1,), x.device, (x, out, 16, 10**6, 16), {})
    assert before == (tl.load, tl.tensor.__add__, tl.range)


def test_values_of_one_shape_share_it_and_others_do_not():
    names = {}
    for sizes in ((4, 8), (8, 4), (32,), (4, 8)):
        for element in (tl.float32, tl.int32, tl.pointer_type(tl.float32)):
            kind = tl.block_type(element, list(sizes))
            assert tuple(kind.shape) == sizes and kind.numel == 32 and kind.scalar == element
            assert names.setdefault(kind.name, (sizes, element.name)) == (sizes, element.name)
            value = tl.tensor(None, kind)
            assert [size.value for size in value.shape] == list(sizes) and value.numel.value == 32
    assert len(names) == 9
    scalar = tl.tensor(None, tl.int32)
    assert len(scalar.shape) == 0 and scalar.numel.value == 1
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [3])


@pytest.mark.parametrize("kind", [tl.bfloat16, tl.float16, tl.int1, tl.uint32, tl.int64, tl.float8e5], ids=str)
def test_numpy_dtypes_are_the_interpreters(kind):
    expected = {"bf16": np.uint16, "fp16": np.float16, "int1": bool, "uint32": np.uint32, "int64": np.int64}
    assert interpreter._get_np_dtype(kind) == expected.get(kind.name, np.uint8)
    assert interpreter._get_np_dtype(tl.block_type(kind, [2])) == expected.get(kind.name, np.uint8)
    assert interpreter._get_np_dtype(tl.pointer_type(kind)) == np.uint64
    assert interpreter._get_np_dtype(tl.block_type(tl.pointer_type(kind), [2])) == np.uint64
