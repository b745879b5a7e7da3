"""Softmax and its logarithm, against float64: any dimension, layout and length of rows, infinities, derivatives."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as T

import gpukern.functional as F
import gpukern.nn
from gpukern.ops._softmax import planner
from gpukern.ops._softmax.problem import rows_along
from gpukern.runtime.mode import EMULATE, Mode, mode_of
from tests.numerics import FP32_EPS, assert_within, rounding_bound
from tests.opinfo import check_module, check_samples
from tests.ops.softmax_cases import INFINITIES, lengths, short_tiles
from tests.traffic import counted_traffic

pytestmark = pytest.mark.usefixtures("poisoned")

FUNCTIONS = {"softmax": (F.softmax, T.softmax), "log_softmax": (F.log_softmax, T.log_softmax)}

#: shape, dimension, and what makes of a dense tensor the one at hand.
ROWS = {
    "matrix": ((5, 7), 1, lambda x: x),
    "vector": ((9,), -1, lambda x: x),
    "number": ((), 0, lambda x: x),
    "aligned": ((3, 64), 1, lambda x: x),
    "columns": ((6, 5), 0, lambda x: x),
    "NCHW": ((2, 5, 3, 4), 1, lambda x: x),
    "channels_last": ((2, 5, 3, 4), 1, lambda x: x.to(memory_format=torch.channels_last)),
    "rows of images": ((2, 5, 3, 4), 2, lambda x: x),
    "every second": ((3, 14), 1, lambda x: x[:, ::2]),
    "five dimensions": ((2, 3, 2, 4, 2), 3, lambda x: x.transpose(1, 4)),
    "expanded": ((1, 6), 1, lambda x: x.expand(3, 6)),
    "no rows": ((0, 3), 1, lambda x: x),
    "empty rows": ((2, 0), 1, lambda x: x),
}


def relative_error(x: torch.Tensor, dim: int) -> torch.Tensor:
    """What a softmax in fp32 errs by, relative to the result, in units of the last place.

    With d = x − max x: d and its product with log₂ e are rounded, half a unit of |d| each; the exponential, the
    division and the rounding of the result are two units each at most; the sum of C exponentials errs by six
    deviations of a random walk of √C halves of a unit, and by the errors of its terms, of which those with a large d
    have no weight.
    """
    d = (x - x.amax(dim, keepdim=True)).abs()
    return (d + 2) + (2 * math.log(x.shape[dim] + 1) + 2) + 3 * math.sqrt(x.shape[dim]) + 4


def bounds(
    name: str, x: torch.Tensor, y: torch.Tensor, g: torch.Tensor, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(of the result, of ∂L/∂x before it is rounded), from float64 values."""
    units = FP32_EPS * relative_error(x, dim)
    terms = 6 * FP32_EPS * math.sqrt(x.shape[dim])
    if name == "softmax":
        of_y = units * y + rounding_bound(y, dtype)
        sizes = (g * y).abs().sum(dim, keepdim=True)
        of_sum = (g.abs() * of_y).sum(dim, keepdim=True) + terms * sizes
        of_grad = of_y * (g.abs() + sizes) + y * of_sum + 4 * FP32_EPS * y * (g.abs() + sizes)
    else:
        of_y = units + FP32_EPS * y.abs() + rounding_bound(y, dtype)
        of_p = y.exp() * (of_y + FP32_EPS * (y.abs() + 4))
        of_grad = of_p * g.sum(dim, keepdim=True).abs() + terms * (y.exp() + FP32_EPS) * g.abs().sum(dim, keepdim=True)
        of_grad += 4 * FP32_EPS * g.abs()
    return of_y, of_grad


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_of_every_kind(name, dtype, where):
    ours, theirs = FUNCTIONS[name]
    for short, (kind, (shape, dim, view)) in itertools.product(lengths(where, dtype), ROWS.items()):
        base = 3 * torch.randn(shape)
        x = view(base.to(dtype).to(where)).detach().requires_grad_()
        truth = x.detach().cpu().double().requires_grad_()
        g = torch.randn(shape and view(torch.empty(shape)).shape).to(dtype)
        with short_tiles(short):
            y = ours(x, dim)
            (grad,) = torch.autograd.grad(y, x, g.to(where))
        reference = theirs(truth, dim)
        assert y.dtype is dtype and y.stride() == reference.stride(), kind
        if not y.numel():
            continue
        (right,) = torch.autograd.grad(reference, truth, g.double())
        # A number is a row of one.
        values = (each.detach().reshape(y.shape or (1,)) for each in (truth, reference, g.double()))
        of_y, of_grad = bounds(name, *values, dim, dtype)
        assert_within(kind, y, reference.detach(), of_y.view(y.shape))
        assert_within(f"{kind}, gradient", grad, right, of_grad.view(y.shape) + rounding_bound(right, dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_infinities_and_nan_are_torchs(name, where):
    ours, theirs = FUNCTIONS[name]
    for short, repeats in itertools.product(lengths(where), (1, 5)):  # five: masked numbers fill whole tiles
        rows = torch.tensor(INFINITIES).repeat_interleave(repeats, 1)
        x, truth = rows.to(where).requires_grad_(), rows.double().requires_grad_()
        g = torch.randn(rows.shape)
        with short_tiles(short):
            y = ours(x, 1)
            found = [y.detach(), *torch.autograd.grad(y, x, g.to(where))]
        reference = theirs(truth, 1)
        right = [reference.detach(), *torch.autograd.grad(reference, truth, g.double())]
        torch.testing.assert_close([t.cpu().double() for t in found], right, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_wider_dtype_is_computed_in_it_and_a_narrower_one_rounds_first(where):
    x = torch.randn(3, 5).to(where).half().requires_grad_()
    y = F.softmax(x, 1, dtype=torch.float32)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y.cpu().double(), T.softmax(x.detach().cpu().double(), 1), rtol=1e-6, atol=1e-7)
    y.square().sum().backward()
    assert x.grad.dtype is torch.float16
    large = torch.tensor([[1e5, 0.0]]).to(where)
    assert F.softmax(large, 1, dtype=torch.float16).isnan().all()
    assert F.log_softmax(torch.ones(2, 3, dtype=torch.int64).to(where), 1, dtype=torch.float32).dtype is torch.float32


def test_arguments_and_errors_are_torchs(where):
    for name, (ours, theirs) in FUNCTIONS.items():
        for shape in ((), (3,), (2, 3), (2, 3, 2), (1, 2, 3, 2)):
            x = torch.randn(shape)
            with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name} has") as caught:
                y, expected = ours(x.to(where)), theirs(x)
            assert {each.filename for each in caught} == {__file__}
            torch.testing.assert_close(y.cpu(), expected)
        for error, arguments in (
            (IndexError, (torch.ones(2, 3), 2)),
            (IndexError, (torch.ones(()), 1)),
            (TypeError, (torch.ones(2, 3), 1.0)),
            (NotImplementedError, (torch.ones(2, 3, dtype=torch.int64), 1)),
            (NotImplementedError, (torch.ones(2, 3), 1, 3, torch.int64)),
            (NotImplementedError, (torch.ones(2, 3).to_sparse(), 1)),
        ):
            with pytest.raises(error):
                theirs(*arguments)
            with pytest.raises(error):
                ours(arguments[0].to(where), *arguments[1:])


def test_layers(where):
    with pytest.raises(ValueError, match="expected input to be 3D or 4D, got 2D instead"):
        gpukern.nn.Softmax2d()(torch.ones(2, 3, device=where))
    with pytest.warns(UserWarning) as caught:
        gpukern.nn.Softmax()(torch.ones(2, 3, device=where))
        torch.nn.Softmax()(torch.ones(2, 3))
    assert caught[0].filename == caught[1].filename
    for layer in ("Softmax", "Softmax2d", "LogSoftmax"):
        check_module(getattr(gpukern.nn, layer), device=where)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_sample_is_right(name, where):
    check_samples(name, FUNCTIONS[name][0], device=where)
    if mode_of(torch.empty(0, device=where)) is Mode.REFERENCE:  # all of them are float64
        check_samples(name, FUNCTIONS[name][0], variant="with_dtype", device=where)


def test_a_row_that_fits_is_read_once():
    if not EMULATE:
        pytest.skip("counts what the interpreter does")
    for shape, last in (((64, 300), False), ((2, 21, 16, 16), False), ((2, 21, 16, 16), True)):
        x = torch.randn(shape)
        x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
        with counted_traffic() as forward:
            y = F.softmax(x, 1)
        g = torch.randn(shape)
        with counted_traffic() as backward:
            torch.autograd.grad(y, x, g)
        assert forward.total == 2 * 4 * x.numel()
        assert backward.total == 3 * 4 * x.numel()


def test_plan_of_rows():
    def planned(shape, strides, itemsize=2, kept=1):
        return planner.plan(rows_along(1, shape, strides), itemsize, kept)

    rows = planned((8192, 1000), ((1000, 1),) * 2)
    assert (rows.pixels, rows.channels, rows.warps, rows.whole, rows.steps) == (2, 1024, 4, True, 4096)
    long = planned((64, 128000), ((128000, 1),) * 2)
    assert (long.pixels, long.channels, long.whole, long.channel_tiles) == (1, 16384, False, 8)
    # 32 numbers a thread at the most.
    assert planned((64, 32768), ((32768, 1),) * 2).whole and not planned((64, 32768), ((32768, 1),) * 2, kept=2).whole
    images = (8, 21, 64, 64), ((21 * 4096, 4096, 64, 1),) * 2
    assert planned(*images).pixels * 2 >= 64  # bytes of neighbouring rows, two sectors at the least
    path = rows_along(1, (8, 24, 64), ((1536, 1, 24),), ((64, 0, 1),))
    assert (path.channels_run, path.channel_align) == (True, 8)  # labels, which lie anyhow, do not limit the logits
