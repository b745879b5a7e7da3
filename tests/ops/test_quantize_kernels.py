"""Rounding to 8 bits and back: the kernels give the bits of numpy's fp32 operations, in any layout, in one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpukern.ops._quantize import launch as launches
from gpukern.ops.quantization import dequantize, quantize
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100
from gpukern.runtime.emulation_float8 import bits_to_fp32, fp32_to_bits
from gpukern.runtime.mode import EMULATE, Mode, force_mode

pytestmark = pytest.mark.usefixtures("poisoned")

E4M3 = torch.float8_e4m3fn
WIDE = (torch.float32, torch.float16, torch.bfloat16)
#: float8_e4m3fn by its definition: the sign, 4 bits of exponent with a bias of 7, 3 of significand; 0x7F is NaN.
VALUES = np.array([(8 + b % 8) * 2.0 ** (b // 8 - 10) if b >= 8 else b * 2.0**-9 for b in range(127)], np.float32)

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels of channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 1:4],
    "every second column": lambda x: x[..., ::2],
    "rows": lambda x: x[:, :, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "transposed": lambda x: x.transpose(0, 3),
    "matrix": lambda x: x[0, 0].t(),
    "one": lambda x: x[0, 0, 0, 0],
    "none": lambda x: x[:0],
    "five dimensions": lambda x: x.reshape(2, 5, 3, 2, 7).transpose(1, 3)[:, :, ::2],
    "six that cannot be joined": lambda x: x.reshape(2, 5, 3, 2, 7, 1).expand(-1, -1, -1, -1, -1, 2)[:, :4, :2, :, :6],
}


def special(device) -> torch.Tensor:
    """Ties and their neighbours, what saturates, subnormals, zeros, infinities and NaN, at random places."""
    halves = torch.arange(-130, 131) / 2
    of_floats = torch.from_numpy(np.concatenate([VALUES, (VALUES[1:] + VALUES[:-1]) / 2]))
    ties = torch.cat([halves, of_floats, -of_floats])
    near = torch.cat([ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))])
    ends = torch.tensor([126.5, 127.5, 128.0, 448.0, 464.0, 480.0, 1e30, np.inf, np.nan, 1e-30, 2.0**-10, 0.0])
    return torch.cat([ties, near, ends, -ends, 200 * torch.randn(500)]).to(device)


def expected_of(x: torch.Tensor, inverse: float, dtype: torch.dtype) -> torch.Tensor:
    """The nearest value, of two equally near ones the even: found by looking at all of them, in float64."""
    y = (x.float().cpu().numpy() * np.float32(inverse)).astype(np.float64)
    if dtype is torch.int8:
        return torch.from_numpy(np.rint(np.clip(np.nan_to_num(y, nan=0.0), -127, 127))).to(dtype)
    magnitude = np.clip(np.abs(y), 0, 448)
    right = np.searchsorted(VALUES.astype(np.float64), np.nan_to_num(magnitude)).clip(1, 126)
    below, above = magnitude - VALUES[right - 1], VALUES[right] - magnitude
    bits = np.where((above < below) | ((above == below) & (right % 2 == 0)), right, right - 1)
    bits = np.where(np.isnan(y), 0x7F, np.where(np.signbit(y), bits + 128, bits)).astype(np.uint8)
    return torch.from_numpy(bits).view(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual, expected = actual.cpu().float(), expected.float()
    assert actual.shape == expected.shape
    assert ((actual == expected) | (actual.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_quantize_rounds_to_the_nearest(dtype, wide, scale, where):
    x = (special(where) * scale).to(wide)
    q = quantize(x, scale, dtype)
    assert q.dtype is dtype
    assert_same(q, expected_of(x, 1 / scale, dtype))


@pytest.mark.parametrize("dtype", [torch.int8, E4M3], ids=str)
@pytest.mark.parametrize("wide", WIDE, ids=str)
def test_dequantize_rounds_once(dtype, wide, where):
    q = torch.arange(256, device=where).to(torch.uint8).view(dtype)
    x = dequantize(q, 0.37, wide)
    assert x.dtype is wide
    assert_same(x, torch.from_numpy(q.cpu().float().numpy() * np.float32(0.37)).to(wide))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_kept(layout, device):
    """As torch's element-wise results, of both modes alike."""
    x = LAYOUTS[layout](torch.randn(2, 5, 6, 7, device=device))
    with force_mode(Mode.REFERENCE):
        expected = quantize(x, 0.1, torch.int8), dequantize(quantize(x, 0.1, torch.int8), 0.1, torch.float16)
    q = quantize(x, 0.1, torch.int8)
    back = dequantize(q, 0.1, torch.float16)
    for actual, other in zip((q, back), expected, strict=True):
        assert torch.equal(actual, other)
        assert actual.stride() == other.stride() or not x.numel()
    strided = LAYOUTS[layout]((10 * torch.randn(2, 5, 6, 7, device=device)).to(torch.int8))
    assert torch.equal(dequantize(strided, 0.5, torch.float32), strided * 0.5)


def test_64_bit_offsets(device, monkeypatch):
    from gpukern.runtime.launcher import index_type

    monkeypatch.setattr(launches, "index_type", lambda _: index_type(2**40))
    for layout in ("contiguous", "every second column"):
        test_layouts_are_kept(layout, device)


def test_one_launch_each(device, monkeypatch):
    launched = []
    monkeypatch.setattr(launches, "launch", lambda *arguments: launched.append(arguments))
    for layout in LAYOUTS:
        quantize(LAYOUTS[layout](torch.randn(2, 5, 6, 7, device=device)), 0.1, torch.int8)
    assert len(launched) == len(LAYOUTS) - 1  # none for the empty one


def test_float8_is_refused_by_older_gpus(device, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)
    x = torch.ones(3, device=device)
    with pretend(A100):
        for wrong in (lambda: quantize(x, 1.0, E4M3), lambda: dequantize(x.to(E4M3), 1.0, torch.float16)):
            with pytest.raises(NotImplementedError, match=r"8\.9 or later.*A100"):
                wrong()


@pytest.mark.skipif(not EMULATE, reason="of the emulation")
def test_emulated_conversions_of_float8():
    """Of all bits, and back from all halves: what Triton's interpreter gets wrong by itself."""
    bits = np.arange(256, dtype=np.uint8)
    exact = np.concatenate([VALUES, [np.nan], -VALUES, [np.nan]]).astype(np.float32)
    np.testing.assert_array_equal(bits_to_fp32(bits), exact)
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16).float()
    assert_same(torch.from_numpy(fp32_to_bits(halves.numpy())).view(E4M3), expected_of(halves, 1.0, E4M3))
