"""Pooling: the kernels against torch in float64 on the CPU, and torch's own semantics to the letter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as T
from hypothesis import assume, given
from hypothesis import strategies as st

import gpukern.functional as F
from gpukern.ops._pool2d import launch as launches
from gpukern.ops._pool2d.planner import plan
from gpukern.ops._pool2d.problem import adaptive_problem, pool_problem
from gpukern.runtime.mode import Mode, force_mode

pytestmark = pytest.mark.usefixtures("poisoned")

LAYOUTS = ("nchw", "channels_last", "strided", "expanded")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make_image(shape, layout: str, dtype: torch.dtype, device) -> torch.Tensor:
    """Random [N, C, H, W] in a layout; whole sixteenths in a few values, so that maxima are often tied."""
    N, C, H, W = shape

    def random(*sizes):
        return (torch.randn(sizes) * 8).round().div(16).add(1 / 32).to(dtype).to(device)

    if layout == "channels_last":
        return random(*shape).contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return random(W + 1, N, 2 * C, H + 2).permute(1, 2, 3, 0)[:, ::2, 1:-1, 1:]
    if layout == "expanded":
        return random(1, C, H, 1).expand(N, C, H, W)
    return random(*shape)


def assert_within(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, roundings: int) -> None:
    """``actual`` was computed by ``roundings`` fp32 roundings of sums of ``magnitude``, then rounded to its dtype.

    A sum of k terms makes k − 1 roundings, each at most u = 2⁻²⁴ of a partial sum, which is at most the sum of the
    absolute values; a division makes one more. (1 + u)^roundings − 1 stays below 1.01 · roundings · u here. The last
    rounding, to the output's dtype, is half an eps of the result, or half of the smallest subnormal.
    """
    info = torch.finfo(actual.dtype)
    computed = 1.01 * roundings * 2.0**-24 * magnitude
    rounded = info.eps / 2 * (exact.abs() + computed) + info.smallest_normal * info.eps / 2
    error = (actual.cpu().double() - exact).abs()
    assert not error.isnan().any()
    assert (error <= computed + rounded).all(), f"{(error - computed - rounded).max():.3g} over the bound"


def gradients(function, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


def check_layout(y: torch.Tensor, x: torch.Tensor) -> None:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def check_max(x: torch.Tensor, grad_layout: str = "nchw", **options) -> None:
    exact, exact_indices = T.max_pool2d(x.cpu().double(), **options, return_indices=True)
    y, indices = F.max_pool2d(x, **options, return_indices=True)
    assert y.dtype is x.dtype and indices.dtype is torch.int64
    assert torch.equal(y.cpu().double(), exact) and torch.equal(indices.cpu(), exact_indices)
    assert torch.equal(F.max_pool2d(x, **options), y)  # the kernel without taps
    check_layout(y, x)
    grad = make_image(y.shape, grad_layout, x.dtype, x.device)
    _, actual = gradients(lambda x: F.max_pool2d(x, **options), x, grad)
    exact_grad = grad.cpu().double()
    _, expected = gradients(lambda x: T.max_pool2d(x, **options), x.cpu().double(), exact_grad)
    _, magnitude = gradients(lambda x: T.max_pool2d(x, **options), x.cpu().double(), exact_grad.abs())
    check_layout(actual, x)
    windows = plan(pool_problem(tuple(x.shape), *geometry(**options)), False, 4).owners
    assert_within(actual, expected, magnitude, windows[0] * windows[1])


def check_average(ours, theirs, x: torch.Tensor, roundings: int, grad_layout: str = "nchw") -> None:
    """``roundings``: of a sum over a window and its division, or of as many windows' shares of a gradient."""
    y = ours(x)
    exact = theirs(x.cpu().double())
    assert y.shape == exact.shape and y.dtype is x.dtype
    check_layout(y, x)
    assert_within(y, exact, theirs(x.cpu().double().abs()).abs(), roundings)
    grad = make_image(y.shape, grad_layout, x.dtype, x.device)
    _, actual = gradients(ours, x, grad)
    exact_grad = grad.cpu().double()
    _, expected = gradients(theirs, x.cpu().double(), exact_grad)
    _, magnitude = gradients(theirs, x.cpu().double(), exact_grad.abs())
    check_layout(actual, x)
    assert_within(actual, expected, magnitude.abs(), roundings)


def check_avg(x: torch.Tensor, grad_layout: str = "nchw", **options) -> None:
    R, S = pair(options["kernel_size"])
    check_average(lambda x: F.avg_pool2d(x, **options), lambda x: T.avg_pool2d(x, **options), x, R * S + 1, grad_layout)


def check_adaptive(x: torch.Tensor, size, grad_layout: str = "nchw") -> None:
    chosen = plan(adaptive_problem(tuple(x.shape), T.adaptive_avg_pool2d(x, size).shape[2:]), False, 4)
    # A window's sum and one division; or as many divisions, and sums of them, as windows see a pixel.
    roundings = max(chosen.window[0] * chosen.window[1], chosen.owners[0] * chosen.owners[1]) + 1
    check_average(
        lambda x: F.adaptive_avg_pool2d(x, size), lambda x: T.adaptive_avg_pool2d(x, size), x, roundings, grad_layout
    )


def pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def geometry(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False) -> tuple:
    return pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation), ceil_mode


# ---- values and gradients ------------------------------------------------------------------------------------------

WINDOWS = {
    "plain": ((2, 3, 7, 9), dict(kernel_size=2)),
    "overlapping, ragged channels": ((1, 5, 8, 11), dict(kernel_size=3, stride=2, padding=1)),
    "different in height and width": ((2, 1, 9, 7), dict(kernel_size=(3, 2), stride=(1, 3), padding=(1, 0))),
    "ceil mode, many channels": ((1, 40, 5, 6), dict(kernel_size=3, stride=2, padding=1, ceil_mode=True)),
    "gaps, ceil mode drops a window": ((1, 2, 6, 7), dict(kernel_size=2, stride=3, padding=1, ceil_mode=True)),
    "one pixel": ((1, 1, 1, 1), dict(kernel_size=1)),
    "as large as the image": ((2, 3, 5, 4), dict(kernel_size=(5, 4))),
    "much overlap, loop unrolled by rows": ((1, 4, 8, 8), dict(kernel_size=5, stride=1, padding=2)),
    "large, few windows": ((1, 3, 14, 13), dict(kernel_size=6, stride=(7, 6), padding=2, ceil_mode=True)),
}


@pytest.mark.parametrize(("shape", "options"), WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_max_pool2d(shape, options, layout, device):
    check_max(make_image(shape, layout, torch.float32, device), **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, dilation=2),
        dict(kernel_size=(2, 3), stride=2, padding=1, dilation=(3, 2), ceil_mode=True),
    ],
)
def test_max_pool2d_dilated(options, device):
    check_max(make_image((2, 3, 9, 8), "nchw", torch.float32, device), **options)


def test_max_pool2d_keeps_taps_of_large_windows(device):
    """More than 256 places in a window do not fit a byte."""
    assert launches.taps_dtype((16, 16)) is torch.uint8
    x = torch.randn(1, 1, 26, 17, device=device)
    x[0, 0, 25, 16] = 9  # the very last tap
    check_max(x, kernel_size=17, stride=9)


@pytest.mark.parametrize(("shape", "options"), WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_avg_pool2d(shape, options, count_include_pad, device):
    layout = "channels_last" if count_include_pad else "nchw"
    check_avg(make_image(shape, layout, torch.float32, device), **options, count_include_pad=count_include_pad)


@pytest.mark.parametrize("divisor", [1, 7, -3])
def test_avg_pool2d_divisor(divisor, device):
    x = make_image((1, 3, 7, 7), "nchw", torch.float32, device)
    check_avg(x, kernel_size=3, stride=2, padding=1, ceil_mode=True, divisor_override=divisor)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 40, 7, 7), 1),
        ((2, 3, 7, 7), (1, 1)),
        ((1, 3, 10, 13), (3, 6)),
        ((1, 5, 9, 8), (None, 3)),
        ((2, 3, 5, 4), (5, 4)),
        ((1, 2, 3, 4), (7, 9)),  # more outputs than inputs: windows repeat
        ((1, 3, 20, 20), (2, 1)),  # large windows, several of them
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_adaptive_avg_pool2d(shape, size, layout, device):
    check_adaptive(make_image(shape, layout, torch.float32, device), size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_and_layouts(dtype, layout, device):
    """Input and gradient in any strides: sliced, permuted, stride 0."""
    x = make_image((2, 5, 7, 8), layout, dtype, device)
    check_max(x, layout, kernel_size=3, stride=2, padding=1)
    check_avg(x, layout, kernel_size=3, stride=2, padding=1)
    check_adaptive(x, (1, 2), layout)


def test_offsets_beyond_32_bits(device):
    """Images that reach past 2³¹ elements, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    apart = 2**30 + 64
    far = torch.empty(2 * apart + 360, dtype=torch.float16, device=device).as_strided((3, 10, 6, 6), (apart, 1, 60, 10))
    far.copy_(torch.randn(3, 10, 6, 6))
    for pool in (lambda x: F.max_pool2d(x, 2), lambda x: F.avg_pool2d(x, 3), lambda x: F.adaptive_avg_pool2d(x, 1)):
        assert torch.equal(pool(far), pool(far.contiguous(memory_format=torch.channels_last)))


def test_64_bit_offsets(device, monkeypatch):
    """Offsets past 2³¹ take another integer type in the kernels, here for images that do not need it."""
    from gpukern.runtime.launcher import index_type

    monkeypatch.setattr(launches, "index_type", lambda _: index_type(2**40))
    # Launches of other tests are kept, with their own integers; and those of this one should not be.
    monkeypatch.setattr(launches, "_prepared", launches._prepared.__wrapped__)
    x = make_image((2, 3, 8, 9), "strided", torch.float32, device)
    check_max(x, kernel_size=3, stride=2, padding=1)
    check_avg(x, kernel_size=3, stride=2, padding=1)
    check_adaptive(x, (1, 1))


@given(st.data())
def test_any_window(device, data):
    """Sizes and arguments at random; what torch refuses, gpukern refuses too."""
    sizes = st.integers(1, 4)
    shape = data.draw(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)), "shape")
    x = make_image(shape, data.draw(st.sampled_from(LAYOUTS[:3]), "layout"), torch.float32, device)
    if data.draw(st.booleans(), "adaptive"):
        return check_adaptive(x, data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), "size"))
    options = dict(
        kernel_size=data.draw(st.tuples(sizes, sizes), "kernel"),
        stride=data.draw(st.tuples(sizes, sizes), "stride"),
        padding=data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)), "padding"),
        ceil_mode=data.draw(st.booleans(), "ceil_mode"),
    )
    if data.draw(st.booleans(), "maximum"):
        options["dilation"] = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)), "dilation")
        check, theirs, ours = check_max, T.max_pool2d, F.max_pool2d
        # torch itself gives places outside of the image to windows that lie in the padding altogether.
        assume(all(d == 1 or s > d for d, s in zip(options["dilation"], shape[2:], strict=True)))
    else:
        options["count_include_pad"] = data.draw(st.booleans(), "count_include_pad")
        check, theirs, ours = check_avg, T.avg_pool2d, F.avg_pool2d
    try:
        theirs(x.cpu(), **options)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ours(x, **options)
    else:
        check(x, **options)


# ---- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool2d_nan_and_infinity(dtype, device):
    """A NaN wins, the last of several; a window of −∞ alone reports its first place in the image."""
    x = make_image((1, 4, 6, 6), "nchw", dtype, device)
    x[0, 0, 2:4, 1:5] = float("nan")
    x[0, 1] = float("-inf")
    x[0, 2, 3, 3] = float("inf")
    x[0, 3] = -0.0
    for options in (
        dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
        dict(kernel_size=2, dilation=2, padding=1),
    ):
        y, indices = F.max_pool2d(x, **options, return_indices=True)
        exact, exact_indices = T.max_pool2d(x.cpu(), **options, return_indices=True)
        torch.testing.assert_close(y.cpu(), exact, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices.cpu(), exact_indices)
        assert torch.equal(y.isnan(), F.max_pool2d(x, **options).isnan())


def test_max_pool2d_window_without_a_pixel(device):
    """A widely dilated window can miss the image: −∞, and no gradient anywhere."""
    x = torch.randn(1, 1, 8, 9, device=device, requires_grad=True)
    y = F.max_pool2d(x, 2, 1, 1, 9)
    assert torch.equal(y.cpu(), T.max_pool2d(x.cpu(), 2, 1, 1, 9))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    assert not grad.any()


def test_avg_pool2d_ignores_what_it_does_not_see(device):
    """A NaN reaches the windows that contain it and no other; a NaN gradient likewise."""
    x = torch.ones(1, 1, 6, 6, device=device)
    x[0, 0, 0, 0] = float("nan")
    assert F.avg_pool2d(x, 2).isnan().sum() == 1
    assert F.adaptive_avg_pool2d(x, 3).isnan().sum() == 1
    grad = torch.ones(1, 1, 3, 3, device=device)
    grad[0, 0, 1, 1] = float("nan")
    for function in (lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 3), lambda x: F.max_pool2d(x, 2)):
        _, grad_input = gradients(function, torch.rand(1, 1, 6, 6, device=device), grad)
        assert grad_input[0, 0, 2:4, 2:4].isnan().any()
        grad_input[0, 0, 2:4, 2:4] = 0
        assert not grad_input.isnan().any()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_batch_of_none(layout, device, monkeypatch):
    def no_launch(*_, **__):
        raise AssertionError("an empty batch needs no kernel")

    monkeypatch.setattr(launches, "launch", no_launch)
    x = make_image((0, 3, 8, 8), layout, torch.float32, device).requires_grad_()
    y, indices = F.max_pool2d(x, 2, return_indices=True)
    assert y.shape == indices.shape == (0, 3, 4, 4)
    for pooled in (y, F.avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, (1, 3)), F.adaptive_avg_pool2d(x, 0)):
        (grad,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled), create_graph=True)
        assert grad.shape == x.shape


def test_adaptive_avg_pool2d_to_nothing(device):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    y = F.adaptive_avg_pool2d(x, (0, 2))
    assert y.shape == (2, 3, 0, 2)
    assert not torch.autograd.grad(y, x, torch.ones_like(y))[0].any()
    assert F.adaptive_avg_pool2d(x[:, :0], 2).shape == (2, 0, 2, 2)


def test_unbatched(device):
    x = torch.randn(3, 8, 7, device=device)
    for ours, theirs in (
        (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: T.max_pool2d(x, 3, 2, 1)),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], lambda x: T.max_pool2d(x, 2, return_indices=True)[1]),
        (lambda x: F.avg_pool2d(x, 2), lambda x: T.avg_pool2d(x, 2)),
        (lambda x: F.adaptive_avg_pool2d(x, (4, None)), lambda x: T.adaptive_avg_pool2d(x, (4, None))),
    ):
        torch.testing.assert_close(ours(x).cpu(), theirs(x.cpu()))


# ---- derivatives of derivatives ------------------------------------------------------------------------------------

DIFFERENTIABLE = {
    "max": lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "dilated max": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
}


@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_reference_derivatives(function):
    with force_mode(Mode.REFERENCE):
        # No two values close to each other, where a difference quotient would see another maximum.
        x = torch.randperm(2 * 5 * 5).double().reshape(1, 2, 5, 5).div_(8).requires_grad_()
        assert torch.autograd.gradcheck(function, (x,))
        assert torch.autograd.gradgradcheck(function, (x,))


@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_second_and_third_derivatives(function, device):
    """Derivatives by the gradient, and by what is multiplied with it, of the kernels and of the reference."""
    x = torch.randn(2, 3, 7, 6, device=device)

    def derivatives() -> list[torch.Tensor]:
        image = x.detach().requires_grad_()
        y = function(image)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(y.shape, generator=generator).to(device).requires_grad_()
        v = torch.randn(x.shape, generator=generator).to(device).requires_grad_()
        (first,) = torch.autograd.grad(y, image, grad, create_graph=True)
        (second,) = torch.autograd.grad(first, grad, v, create_graph=True)
        (third,) = torch.autograd.grad(second, v, grad)
        return [first, second, third]

    kernels = derivatives()
    with force_mode(Mode.REFERENCE):
        for ours, reference in zip(kernels, derivatives(), strict=True):
            torch.testing.assert_close(ours, reference)


def test_a_graph_for_inference_can_be_differentiated(device):
    """``gpukern::max_pool2d`` keeps no taps; its backward finds them again."""
    x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
    y = torch.ops.gpukern.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False)
    grad = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], gradients(lambda x: F.max_pool2d(x, 2), x, grad)[1])


def test_a_window_without_pixels_has_no_gradient(where):
    x = torch.randn(1, 2, 2, 2, device=where, requires_grad=True)
    y = F.max_pool2d(x, 2, 3, 1, dilation=3)
    y.sum().backward()
    assert y.isneginf().all() and not x.grad.any()


def test_taps_of_another_mode_are_refused(device):
    x = torch.randn(1, 2, 6, 6, device=device, requires_grad=True)
    with force_mode(Mode.REFERENCE):
        y = F.max_pool2d(x, 2)
    with pytest.raises(RuntimeError, match="another mode"):
        y.sum().backward()


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d], ids=lambda pool: pool.__name__)
def test_reference_rounds_sums_of_a_gradient_once(pool):
    """Windows overlap, so that up to nine gradients meet: torch on a CPU adds those of 16 bits in 16 bits."""
    x = torch.randn(2, 4, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(2, 4, 9, 9, dtype=torch.bfloat16)
    with force_mode(Mode.REFERENCE):
        [actual] = torch.autograd.grad(pool(x, 3, 1, 1), x, grad)
        [exact] = torch.autograd.grad(pool(wide, 3, 1, 1), wide, grad.double())
    torch.testing.assert_close(actual.double(), exact, rtol=2**-8, atol=1e-6)
