"""Pools of 8-bit tensors: maxima exact, averages bit for bit as sums of integers and fp32 operations say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
from gpukern.ops._pool2d import launch as launches
from gpukern.ops.pool2d import max_pool2d
from gpukern.ops.quantized_pool2d import adaptive_avg_pool2d_quantized, avg_pool2d_quantized
from gpukern.runtime.current_device import pretend
from gpukern.runtime.device import A100, RTX_3090

pytestmark = pytest.mark.usefixtures("poisoned")

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.int8, E4M3)
OUTPUTS = ((torch.int8, 0.0173), (E4M3, 0.0031), (torch.float16, 1.0), (torch.bfloat16, 1.0), (torch.float32, 1.0))
INPUT_SCALE = 0.0217
LAYOUTS = ("nchw", "channels_last", "strided")


def random_image(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device) -> torch.Tensor:
    """Every value of the dtype but NaN and −128, at random. "strided" is a crop, channels outermost."""
    N, C, H, W = shape
    sizes = (C, N, H + 2, 2 * W) if layout == "strided" else shape
    magnitude, sign = torch.randint(127, sizes), torch.randint(2, sizes)
    x = (magnitude + 128 * sign).to(torch.uint8).view(dtype) if dtype is E4M3 else (magnitude - 127 * sign).to(dtype)
    if layout == "strided":
        x = x.transpose(0, 1)[:, :, 1:-1, ::2]
    return x.to(device).contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x.to(device)


def expected_average(x: torch.Tensor, rows, columns, divisor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The formula of the operator's documentation: windows are (begin, end) of rows and of columns."""
    exact = x.cpu().double().numpy()
    sums = np.stack([[exact[:, :, a:b, c:d].sum((2, 3)) for c, d in columns] for a, b in rows])
    factors = np.float32(INPUT_SCALE) / np.array([[divisor(r, c) for c in columns] for r in rows], np.float32)
    y = sums.transpose(2, 3, 0, 1).astype(np.float32) * factors
    if dtype in DTYPES:
        y = y * np.float32(1 / scale)
    y = np.clip(y, -127, 127).round() if dtype is torch.int8 else np.clip(y, -448, 448) if dtype is E4M3 else y
    return torch.from_numpy(y).to(dtype)


def area(rows: tuple[int, int], columns: tuple[int, int]) -> int:
    return (rows[1] - rows[0]) * (columns[1] - columns[0])


def shares(size: int, parts: int) -> list[tuple[int, int]]:
    return [(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def windows(size: int, kernel: int, stride: int, padding: int) -> list[tuple[int, int]]:
    starts = range(-padding, size + padding - kernel + 1, stride)
    return [(max(start, 0), min(start + kernel, size)) for start in starts]


def assert_same(y: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert y.dtype is expected.dtype
    # Values of float8_e4m3fn are multiples of 2⁻⁹: fp32 holds their sums up to 2¹⁵, far more than those of random ones.
    assert torch.equal(y.cpu().float(), expected.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((2, 48, 7, 9), ((3, 3), (2, 2), (1, 1), (1, 1), False)),
        ((1, 5, 8, 11), ((3, 2), (1, 3), (1, 0), (1, 1), True)),
        ((2, 3, 9, 8), ((2, 3), (2, 2), (1, 1), (3, 2), True)),
    ],
    ids=["plain", "ragged", "dilated"],
)
def test_max_pool2d_of_8_bits_is_exact(dtype, layout, shape, geometry, where):
    x = random_image(shape, dtype, layout, where)
    y = max_pool2d(x, *geometry)
    assert y.dtype is dtype
    assert torch.equal(y.cpu().double(), T.max_pool2d(x.cpu().double(), *geometry))
    last = layout == "channels_last"
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def test_max_pool2d_of_8_bits_special_values(where):
    """A NaN of either sign wins; a window that sees no pixel gives the lowest value, as −∞ saturates."""
    x = torch.full((1, 1, 4, 4), 448.0, device=where).to(E4M3)
    x.view(torch.uint8)[0, 0, 0, 0] = 0x7F
    x.view(torch.uint8)[0, 0, 3, 3] = 0xFF
    y = max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False).float().cpu()
    assert y.isnan().tolist() == [[[[True, False], [False, True]]]]
    for dtype, lowest in ((torch.int8, -127), (E4M3, -448)):
        x = torch.full((1, 1, 2, 2), 5.0, device=where).to(dtype)
        y = max_pool2d(x, (2, 2), (3, 3), (1, 1), (3, 3), False)
        assert (y.float() == lowest).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_adaptive_avg_pool2d_quantized(dtype, output, where):
    for i, (shape, size) in enumerate(
        [((2, 40, 7, 7), (1, 1)), ((1, 5, 10, 13), (3, 6)), ((1, 2, 3, 4), (7, 9)), ((1, 3, 20, 20), (2, 1))]
    ):
        x = random_image(shape, dtype, LAYOUTS[i % 3], where)
        y = adaptive_avg_pool2d_quantized(x, INPUT_SCALE, size, output[1], output[0])
        windows = shares(shape[2], size[0]), shares(shape[3], size[1])
        assert_same(y, expected_average(x, *windows, area, output[1], output[0]), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_avg_pool2d_quantized(dtype, output, where):
    """Windows in the padding, counted or not; a divisor of its own, negative too; large ones, of a program each."""
    cases = (
        ((2, 33, 7, 8), (3, 3), (2, 1), (1, 1), True, None, lambda r, c: 9),
        ((2, 16, 7, 8), (3, 3), (2, 1), (1, 1), False, None, area),
        ((1, 5, 6, 9), (2, 3), (2, 3), (0, 0), True, -7, lambda r, c: -7),
        ((1, 3, 14, 13), (6, 6), (8, 7), (0, 0), True, None, lambda r, c: 36),
    )
    for i, (shape, kernel, stride, padding, include, override, divisor) in enumerate(cases):
        x = random_image(shape, dtype, LAYOUTS[(i + 1) % 3], where)
        y = avg_pool2d_quantized(x, INPUT_SCALE, kernel, stride, padding, False, include, override, *output[::-1])
        walks = [windows(*each) for each in zip(shape[2:], kernel, stride, padding, strict=True)]
        assert_same(y, expected_average(x, *walks, divisor, output[1], output[0]), x)


def test_averages_in_ceil_mode_count_as_torch(where):
    """Windows hang over the bottom and the right: nothing there counts, padding does where it is included."""
    x = random_image((1, 4, 6, 7), torch.int8, "nchw", where)
    for include in (True, False):
        y = avg_pool2d_quantized(x, 1.0, (3, 3), (2, 2), (1, 1), True, include, None, 1.0, torch.float32)
        exact = T.avg_pool2d(x.cpu().double(), 3, 2, 1, True, include)
        assert (y.cpu() - exact).abs().max() < 1e-4


def test_averages_saturate_and_keep_nan(where):
    high = torch.full((1, 2, 2, 2), 448.0, device=where).to(E4M3)
    high[:, 1] = -448.0
    for dtype, largest in ((torch.int8, 127), (E4M3, 448)):
        y = adaptive_avg_pool2d_quantized(high, 1e6, (1, 1), 1e-6, dtype)
        assert y.float().flatten().tolist() == [largest, -largest]
    high[0, 0, 0, 0] = float("nan")
    assert adaptive_avg_pool2d_quantized(high, 1.0, (1, 1), 1.0, torch.int8).flatten().tolist() == [0, -127]
    for dtype in (E4M3, torch.float16):
        y = adaptive_avg_pool2d_quantized(high, 1.0, (1, 1), 1.0, dtype)
        assert y.float().isnan().flatten().tolist() == [True, False]


def test_64_bit_offsets(device, monkeypatch):
    from gpukern.runtime.launcher import index_type

    monkeypatch.setattr(launches, "index_type", lambda _: index_type(2**40))
    monkeypatch.setattr(launches, "_prepared", launches._prepared.__wrapped__)
    test_max_pool2d_of_8_bits_is_exact(
        torch.int8, "strided", (2, 3, 8, 9), ((3, 3), (2, 2), (1, 1), (1, 1), False), device
    )
    test_averages_in_ceil_mode_count_as_torch(device)


def test_nothing_is_pooled(where, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)
    x = torch.empty(0, 3, 8, 8, dtype=torch.int8, device=where)
    assert max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False).shape == (0, 3, 4, 4)
    assert adaptive_avg_pool2d_quantized(x, 1.0, (1, 3), 1.0, torch.float16).shape == (0, 3, 1, 3)
    assert adaptive_avg_pool2d_quantized(x[:, :, :1], 1.0, (0, 2), 1.0, torch.int8).shape == (0, 3, 0, 2)
    y = avg_pool2d_quantized(x, 1.0, (2, 2), (2, 2), (0, 0), False, True, None, 1.0, E4M3)
    assert y.shape == (0, 3, 4, 4) and y.dtype is E4M3


def test_errors(where, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)
    x = torch.ones(1, 2, 4, 4, dtype=torch.int8, device=where)

    def adaptive(x=x, scale=1.0, size=(1, 1), output_scale=1.0, dtype=torch.int8):
        return adaptive_avg_pool2d_quantized(x, scale, size, output_scale, dtype)

    def windowed(kernel=(2, 2), padding=(0, 0), override=None, x=x):
        return avg_pool2d_quantized(x, 1.0, kernel, (1, 1), padding, False, True, override, 1.0, torch.int8)

    for wrong, words in (
        (lambda: adaptive(x.float()), "int8 or float8_e4m3fn"),
        (lambda: windowed(x=x.to(torch.uint8)), "int8 or float8_e4m3fn"),
        (lambda: adaptive(dtype=torch.int32), "output in int8"),
        (lambda: adaptive(dtype=torch.float16, output_scale=2.0), "output_scale=1"),
        (lambda: adaptive(scale=0.0), "input_scale"),
        (lambda: adaptive(scale=float("nan")), "input_scale"),
        (lambda: adaptive(output_scale=-1.0), "output_scale"),
        (lambda: adaptive(output_scale=float("inf")), "output_scale"),
        (lambda: adaptive(size=(-1, 1)), "negative"),
        (lambda: adaptive(x[:, :, :0]), "non-empty height"),
        (lambda: windowed(kernel=(5, 1)), "too small"),
        (lambda: windowed(padding=(2, 0)), "half of the kernel"),
        (lambda: windowed(override=0), "divisor_override"),
        (lambda: adaptive(x[:, :1, :1, :1].expand(1, 1, 2**12 + 1, 2**12 + 1)), "too large"),
    ):
        with pytest.raises(RuntimeError, match=words):
            wrong()


@pytest.mark.parametrize("spec", [A100, RTX_3090], ids=lambda spec: spec.name)
def test_float8_is_refused_by_older_gpus(spec, device, monkeypatch):
    monkeypatch.setattr(launches, "launch", None)
    x = torch.ones(1, 2, 4, 4, device=device)
    with pretend(spec):
        for wrong in (
            lambda: max_pool2d(x.to(E4M3), (2, 2), (2, 2), (0, 0), (1, 1), False),
            lambda: adaptive_avg_pool2d_quantized(x.to(E4M3), 1.0, (1, 1), 1.0, torch.float16),
            lambda: adaptive_avg_pool2d_quantized(x.to(torch.int8), 1.0, (1, 1), 1.0, E4M3),
        ):
            with pytest.raises(NotImplementedError, match=r"8\.9 or later.*" + spec.name):
                wrong()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_public_functions_refuse_8_bits_as_torch_does(dtype, where):
    x = torch.ones(1, 2, 4, 4, device=where).to(dtype)
    for pool in (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d):
        with pytest.raises(RuntimeError, match=r"not implemented|kernels take"):
            pool(x, 2)


@pytest.mark.parametrize("shape, size", [((4, 5, 5), [1, 1]), ((2, 4, 5, 5), [1])])
def test_an_adaptive_pool_of_another_rank_is_refused(shape, size):
    with pytest.raises(RuntimeError, match=r"an input \[N, C, H, W\] and a size \[P, Q\], but got"):
        torch.ops.gpukern.adaptive_avg_pool2d_quantized(torch.ones(shape, dtype=torch.int8), 0.1, size, 0.1, torch.int8)
