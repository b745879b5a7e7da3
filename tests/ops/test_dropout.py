"""Dropout: what it draws, and that forward, backward and every transform draw the same."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as T
import triton
import triton.language as tl
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import gpukern
import gpukern.functional as F
from gpukern.ops._dropout import reference
from gpukern.ops._dropout.functions import number_at, numbers_from
from gpukern.ops._dropout.planner import plan
from gpukern.ops._dropout.problem import chance, walk
from gpukern.ops.dropout import dropout, order_of
from gpukern.runtime import random
from gpukern.runtime.device import H100
from gpukern.runtime.launcher import launch
from gpukern.runtime.mode import Mode, force_mode
from gpukern.runtime.tensors import KERNEL_DTYPES
from tests.numerics import assert_within, rounding_bound
from tests.opinfo import check_samples

pytestmark = pytest.mark.usefixtures("poisoned")

KEY, OFFSET = -0x123456789ABCDEF, 2**33 + 5
SPECIAL = torch.tensor([1.5, -1.5, math.inf, -math.inf, math.nan, -0.0, 0.0])


def mask(y: torch.Tensor, x: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements of x, none of them zero, are kept in y: all others are 0, and these scaled."""
    kept = y != 0
    expected = torch.where(kept, x.double() / (1 - p), 0.0)
    assert_within("dropout", y, expected, rounding_bound(expected, y.dtype))
    return kept


# ---- the numbers ---------------------------------------------------------------------------------------------------


def philox(counter: int, key: int, offset: int) -> list[int]:
    """The four numbers of one counter, after Salmon et al., in integers of any size."""
    a, b, c, d = offset % 2**32, offset >> 32, counter % 2**32, counter >> 32
    low, high = key % 2**32, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = second >> 32 ^ b ^ low, second % 2**32, first >> 32 ^ d ^ high, first % 2**32
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def test_numbers_are_those_of_the_publication():
    """The known answers that come with Random123: of zeros, of ones, and of the digits of pi."""
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**64 - 1
    assert philox(ones, ones, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    digits = 0x0370734413198A2E, 0x299F31D0A4093822, 0x85A308D3243F6A88
    assert philox(*digits) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@triton.jit
def number_kernel(place_ptr, out_ptr, key: tl.int64, offset: tl.int64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, number_at(tl.load(place_ptr + at), key, offset).to(tl.int64))


@triton.jit
def numbers_kernel(first_ptr, out_ptr, key: tl.int64, offset: tl.int64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, numbers_from(tl.load(first_ptr), key, offset, BLOCK).to(tl.int64))


@pytest.mark.parametrize("first", [0, 2**34 - 8, 2**45 + 4], ids=["few", "carry", "far"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernels_and_reference_count_in_64_bits(first, dtype, device):
    if first and dtype is torch.int32:
        pytest.skip("no such place in 32 bits")
    expected = [philox((first + i) // 4, KEY, OFFSET)[(first + i) % 4] for i in range(16)]
    places = torch.arange(first, first + 16, dtype=dtype, device=device)
    out = torch.empty(16, dtype=torch.int64, device=device)
    for kernel in (number_kernel, numbers_kernel):
        launch(kernel, (1,), device, (places, out.fill_(-1), KEY, OFFSET), {"BLOCK": 16})
        assert out.tolist() == expected
    counters = torch.arange(first // 4, first // 4 + 4)
    found = reference.philox(counters & 0xFFFFFFFF, counters >> 32, KEY, OFFSET)
    assert torch.stack(found, 1).flatten().tolist() == expected


def test_share_kept_and_neighbours_are_as_chance_has_them():
    """Six standard deviations: of the share kept, and of how often two that should be independent agree."""
    count, shape = 2**15, (32, 32, 32)
    streams = [(KEY, OFFSET), (KEY, OFFSET + 1), (KEY + 1, OFFSET)]
    first, next_call, next_seed = (reference.numbers(count, *stream).view(shape) for stream in streams)
    pairs = [first.roll(1, dim) for dim in range(3)]  # neighbours, rows, planes
    for p in (0.1, 0.5, 0.875):
        kept = first >= chance(p).threshold
        assert abs(kept.sum() - count * (1 - p)) <= 6 * math.sqrt(count * p * (1 - p))
        agree = p**2 + (1 - p) ** 2
        for other in (*pairs, next_call, next_seed):
            agreeing = (kept == (other >= chance(p).threshold)).sum()
            assert abs(agreeing - count * agree) <= 6 * math.sqrt(count * agree * (1 - agree))


@pytest.mark.parametrize("p, threshold, scale", [(0.5, 2**31, 2.0), (0.0, 0, 1.0), (1.0, 2**32 - 1, 0.0)])
def test_chance_is_exact_to_32_bits(p, threshold, scale):
    assert chance(p) == (threshold, scale)


# ---- values --------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "odd": lambda t: t(3, 5, 7),
    "several programs": lambda t: t(5, 501),
    "scalar": lambda t: t(),
    "permuted": lambda t: t(3, 4, 5).permute(2, 0, 1),
    "slice": lambda t: t(3, 4, 9)[:, 1:3, 1:6],
    "expanded": lambda t: t(1, 4, 1).expand(3, 4, 5),
    "channels_last": lambda t: t(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "slice of channels_last": lambda t: t(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)[:, 1:4],
    "channels_last_3d": lambda t: t(2, 3, 2, 3, 4).contiguous(memory_format=torch.channels_last_3d),
    "five strides": lambda t: t(3, 4, 4, 4, 5)[::2, ::2, ::2, ::2, ::2],
    "steps": lambda t: t(2, 70, 12)[:, :, ::3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", [0, 1, 2])
def test_kernels_equal_reference_in_every_layout(layout, features, device):
    """The same numbers, and the strides of torch's result; of the gradient, laid out in another way, too."""
    x = LAYOUTS[layout](lambda *shape: torch.randn(shape, device=device))
    if features > x.dim():
        return
    arguments = None, 0.3, features, KEY, OFFSET, order_of(x)
    y = dropout(x, None, *arguments)
    assert y.stride() == (x * 2).stride()
    kept = mask(y.cpu(), x.cpu(), 0.3)
    if 0 < features < x.dim():
        assert (kept.flatten(features).any(-1) == kept.flatten(features).all(-1)).all()
    residual, gradient = torch.randn_like(x).contiguous(), torch.ones((), device=device).expand(x.shape)
    with force_mode(Mode.REFERENCE):
        assert torch.equal(dropout(x, None, *arguments), y)
        expected = dropout(x, residual, *arguments)
    together = dropout(x, residual, *arguments)  # a GPU adds without rounding the product first
    assert_within("residual", together, expected.double().cpu(), rounding_bound(expected.double().cpu(), x.dtype, 4))
    assert torch.equal(dropout(gradient, None, *arguments) != 0, kept.to(device))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_values_are_rounded_once(dtype, where):
    x = torch.randn(7, 129, device=where).to(dtype)
    for call in (F.dropout, F.dropout1d):
        mask(call(x, 0.3).cpu(), x.cpu(), 0.3)
    residual = torch.randn_like(x)
    kept = F.dropout(torch.ones_like(x), 0.3, residual=residual * 0) != 0  # some other mask: they are drawn each time
    assert 0 < kept.sum() < kept.numel()
    torch.manual_seed(1)
    y = F.dropout(x, 0.3, residual=residual)
    torch.manual_seed(1)
    expected = residual.double() + (F.dropout(torch.ones_like(x), 0.3) != 0) * x.double() / 0.7
    bound = rounding_bound(expected.cpu(), dtype) + rounding_bound(x.double().cpu() / 0.7, torch.float32, 2)
    assert_within("residual", y, expected.cpu(), bound)


def test_float64_is_the_references(where):
    x = torch.randn(40, dtype=torch.float64, device=where)
    if where.type == "cpu":
        with force_mode(Mode.REFERENCE):
            y = F.dropout(x, 0.25)
        assert torch.equal(y, torch.where(y != 0, x * (1 / 0.75), 0.0)) and y.dtype is torch.float64
    with force_mode(Mode.KERNELS if where.type == "cuda" else Mode.EMULATED), pytest.raises(NotImplementedError):
        F.dropout(x, 0.25)


@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
@pytest.mark.parametrize("inplace", [False, True])
def test_certain_outcomes_are_torchs(name, inplace, where):
    """p = 1 multiplies by zero; p = 0, evaluation and nothing at all give back the input itself."""
    ours, theirs = getattr(F, name), getattr(T, name)
    shape = {"dropout1d": (1, 7, 1), "dropout2d": (1, 7, 1, 1), "dropout3d": (1, 7, 1, 1, 1)}.get(name, (7,))
    x = SPECIAL.to(where).reshape(shape)
    state = torch.get_rng_state()
    y, expected = ours(x.clone(), 1.0, True, inplace), theirs(x.clone(), 1.0, True, inplace)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), expected.signbit()) or where.type == "cuda"
    for p, training, given in ((0.0, True, x), (0.5, False, x), (0.5, True, x[:0])):
        assert ours(given, p, training, inplace) is given
        if name in ("dropout1d", "dropout3d") and given.numel():
            views = [each(given[0], p, training, inplace) for each in (ours, theirs)]
            assert (views[0] is given[0]) == (views[1] is given[0]) and views[0].data_ptr() == given.data_ptr()
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    leaf = torch.ones(shape, device=where, requires_grad=True)
    ours(leaf * 1, 1.0, True, inplace).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.filterwarnings("ignore:dropout[23]d")
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "dropout3d"])
def test_samples_of_certain_outcome_are_right(name, where):
    """PyTorch's own samples; the others are random, and none of ours."""

    def certain(sample) -> bool:
        return sample.kwargs.get("p") in (0.0, 1.0) or sample.kwargs.get("training") is False

    check_samples(f"nn.functional.{name}", getattr(F, name), only=certain, device=where)


def test_in_place_equals_out_of_place(where):
    for make in LAYOUTS.values():
        x = make(lambda *shape: torch.randn(shape, device=where))
        if 0 in x.stride():
            continue
        torch.manual_seed(0)
        expected = F.dropout(x, 0.4)
        torch.manual_seed(0)
        base = x.clone().requires_grad_()
        moved = base * 1
        version = moved._version
        assert F.dropout(moved, 0.4, inplace=True) is moved and moved._version > version
        assert torch.equal(moved, expected)
        moved.sum().backward()
        assert torch.equal(base.grad != 0, expected != 0)


def test_in_place_refusals_are_torchs_and_change_nothing(where):
    leaf = torch.ones(3, 3, requires_grad=True, device=where)
    derived = leaf * 1
    for x in (leaf, leaf[:], derived.unbind()[1], torch.ones(1, 3, device=where).expand(2, 3)):
        errors = []
        for functions in (F, T):
            with pytest.raises(RuntimeError) as raised:
                functions.dropout(x, 0.5, inplace=True)
            errors.append(str(raised.value)[:40])
        assert errors[0] == errors[1]
        assert torch.equal(x, torch.ones_like(x))
    with pytest.raises(ValueError, match="in place"):
        F.dropout(torch.ones(3), inplace=True, residual=torch.ones(3))


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d"])
def test_dimensions_are_taken_as_torch_takes_them(name, where):
    """Warnings, of the caller's line, and errors too; which dimensions share a number shows in the result."""
    for dims in range(7):
        shape = (5, 6, 2, 2, 2, 2)[:dims]
        outcomes = []
        for functions in (F, T):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    kept = getattr(functions, name)(torch.ones(shape, device=where), 0.5) != 0
                    same = [[bool((kept == kept.roll(1, dim)).all()) for dim in range(dims)], str(kept.shape)]
                except RuntimeError as error:
                    same = type(error)
            outcomes.append((same, [(str(each.message), each.category, each.filename) for each in said]))
        assert outcomes[0] == outcomes[1], (name, dims)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, "half", None])
def test_probabilities_are_refused_as_torch_refuses_them(p):
    for name in ("dropout", "dropout2d"):
        errors = []
        for functions in (F, T):
            with pytest.raises((ValueError, RuntimeError, TypeError)) as raised:
                getattr(functions, name)(torch.ones(2, 3, 1, 1), p)
            errors.append(raised)
        ours, theirs = errors
        assert ours.type is theirs.type
        assert isinstance(p, str) or p is None or str(ours.value).startswith(str(theirs.value)[:50])


def test_other_arguments_are_refused():
    x = torch.ones(2, 3)
    for call, error in (
        (lambda: F.dropout([1.0]), TypeError),
        (lambda: F.dropout(x, training=1), TypeError),
        (lambda: F.dropout(x.int()), RuntimeError),
        (lambda: F.dropout(x, residual=x[0]), RuntimeError),
        (lambda: F.dropout(x, residual=x.int()), RuntimeError),
        (lambda: F.dropout1d(x.to_sparse()), RuntimeError),
    ):
        with pytest.raises(error):
            call()
    assert F.dropout(x.int(), 0.5, False).dtype is torch.int32


# ---- derivatives and transforms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [False, True])
def test_every_derivative_has_forwards_mask(features, where):
    x = torch.randn(4, 6, 5, device=where, requires_grad=True)
    y = F.dropout1d(x, 0.4) if features else F.dropout(x, 0.4)
    kept = mask(y.cpu(), x.cpu(), 0.4).to(where)
    g = torch.randn_like(y, requires_grad=True)
    (first,) = torch.autograd.grad(y, x, g, create_graph=True, retain_graph=True)
    assert torch.equal(first != 0, kept)
    (second,) = torch.autograd.grad(first, g, torch.ones_like(first))
    assert torch.equal(second != 0, kept)
    (again,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(again != 0, kept)


def test_residual_gets_the_gradient_itself(where):
    x, residual = (torch.randn(3, 8, device=where, requires_grad=True) for _ in range(2))
    y = F.dropout(x, 0.5, residual=residual)
    g = torch.randn_like(y)
    by_x, by_residual = torch.autograd.grad(y, (x, residual), g)
    assert torch.equal(by_residual, g)
    assert_within("y", y - residual, (x.double() * (by_x != 0) * 2).detach().cpu(), 4e-6 * torch.ones(3, 8))
    for p, training in ((0.0, True), (0.5, False)):
        assert torch.equal(F.dropout(x, p, training, residual=residual), x + residual)


def test_residual_of_another_dtype_promotes_as_a_sum_does(where):
    for low, high in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        x = torch.randn(3, 8, device=where).to(low).requires_grad_()
        residual = torch.randn(3, 8, device=where).to(high).requires_grad_()
        y = F.dropout(x, 0.0, residual=residual)
        assert y.dtype is (x + residual).dtype
        torch.testing.assert_close(y, x + residual, rtol=1e-6, atol=1e-6)
        y = F.dropout(x, 0.5, residual=residual)
        y.sum().backward()
        assert x.grad.dtype is low and residual.grad.dtype is high
        torch.testing.assert_close(y, x * x.grad + residual, rtol=1e-6, atol=1e-6)


def test_gradients_are_exact(where):
    with force_mode(Mode.REFERENCE):
        x, residual = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

        def call(x, residual):
            torch.manual_seed(3)
            return F.dropout(x, 0.3, residual=residual) * F.dropout1d(x, 0.5)

        assert torch.autograd.gradcheck(call, (x, residual), check_forward_ad=True, check_batched_grad=False)
        assert torch.autograd.gradgradcheck(call, (x, residual))


@pytest.mark.parametrize("function", [F.dropout, F.dropout1d])
def test_vmap_draws_as_randomness_says(function, where):
    x = torch.ones(3, 64, 2, device=where)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(function)(x)
    same = vmap(function, randomness="same")(x)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2]) and (same == 0).any()
    different = vmap(function, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    unmapped = vmap(lambda i: function(x[0]) * i, randomness="different")(torch.ones(2, device=where))
    assert not torch.equal(unmapped[0], unmapped[1])
    each = vmap(grad(lambda t: (function(t) * t).sum()), randomness="different")(x)
    assert set(each.unique().tolist()) == {0.0, 4.0}


def test_jvp_has_forwards_mask(where):
    x, dx = torch.ones(50, device=where), torch.full((50,), 3.0, device=where)
    y, dy = jvp(lambda x, r: F.dropout(x, 0.5, residual=r * 0), (x, x), (dx, dx))
    assert torch.equal(y, torch.where(dy != 0, 2.0, 0.0)) and set(dy.unique().tolist()) == {0.0, 6.0}


def test_checkpoint_draws_the_same_again(where):
    for reentrant in (False, True):
        x = torch.randn(200, device=where, requires_grad=True)
        seen = []

        def part(x, seen=seen):
            seen.append(F.dropout(x, 0.5))
            return seen[-1].square()  # which keeps what it was given

        checkpoint(part, x, use_reentrant=reentrant).sum().backward()
        assert len(seen) == 2 and torch.equal(seen[0], seen[1])
        assert torch.equal(x.grad, 4 * seen[0])


@pytest.mark.slow
def test_compiled_equals_eager_and_draws_each_time():
    torch._dynamo.reset()
    with force_mode(Mode.REFERENCE):
        compiled = torch.compile(lambda x, r: F.dropout2d(F.dropout(x, 0.5, residual=r), 0.25), backend="aot_eager")
        x, r = torch.ones(2, 8, 4, 4, requires_grad=True), torch.zeros(2, 8, 4, 4)
        y = compiled(x, r)
        y.sum().backward()
        torch.testing.assert_close(x.grad, y.detach())
        assert not torch.equal(compiled(x, r), y)
    torch._dynamo.reset()


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_seeds_reproduce_and_calls_differ(where):
    x = torch.ones(300, device=where)
    torch.manual_seed(5)
    first, second = F.dropout(x), F.dropout(x)
    torch.manual_seed(5)
    assert torch.equal(F.dropout(x), first) and torch.equal(F.dropout(x), second)
    assert not torch.equal(first, second)


class Generator:
    """As a CUDA generator: a seed of 64 bits, an offset that must be a multiple of 4."""

    def __init__(self) -> None:
        self.seed, self.offset = 2**64 - 3, 8

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def test_cuda_generators_advance_by_what_is_used(monkeypatch):
    """The tensor's own generator, no launch and no number twice; in a capture an operator of torch's."""
    generators, capturing = [Generator(), Generator()], False
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    on_second: torch.Tensor = SimpleNamespace(device=torch.device("cuda", 1))  # type: ignore[assignment]
    monkeypatch.setattr(random, "needs_operator", lambda tensors: False)
    streams = [random.draw(on_second) for _ in range(3)]
    # An element's counter has the offset and its place: a call takes one offset, torch counts it as four.
    assert streams == [(None, -3, 2), (None, -3, 3), (None, -3, 4)]
    assert [each.offset for each in generators] == [8, 20]
    capturing = True
    asked = []
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: asked.append(kwargs["device"]))
    random.draw(on_second)
    assert asked == [on_second.device] and generators[1].offset == 20


@pytest.mark.gpu
def test_cuda_graphs_draw_anew_in_each_replay(device):
    x = torch.ones(4096, device=device, requires_grad=True)
    F.dropout(x).sum().backward()
    x.grad, graph = None, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.dropout(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    seen = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(y, gradient)
        seen.append(y.detach().clone())
    assert not torch.equal(*seen)


@pytest.mark.gpu
def test_cuda_state_is_saved_and_restored(device):
    x = torch.ones(4096, device=device)
    state = torch.cuda.get_rng_state(device)
    first = F.dropout(x)
    torch.rand(3, device=device)
    torch.cuda.set_rng_state(state, device)
    assert torch.equal(F.dropout(x), first)


COMPILED = """
import torch
from gpukern.ops.dropout import dropout
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import H100

x, state = torch.empty(2, 32, 8, 8, device="meta").half(), torch.empty(2, dtype=torch.int64, device="meta")
for features in (0, 2):
    with record_launches(H100) as launches:
        for p, key, offset in ((0.5, 1, 1), (0.3, 16, 32), (0.3, -5, 2**40), (0.9, 2**62, 3)):
            dropout(x, None, None, p, features, key, offset, ())
        dropout(x, None, state, 0.5, features, 0, 0, ())
    print(len(launches), len({launch.key for launch in launches}))
"""


def test_no_number_makes_another_kernel(run_python):
    """Compiling takes a second, and cannot be done while a CUDA graph is captured."""
    run = run_python(COMPILED)
    assert run.stdout == "5 1\n" * 2, run.stderr


# ---- plans and layers ----------------------------------------------------------------------------------------------


def test_plan_gives_every_multiprocessor_work():
    whole = 4 * H100.sm_count * 2048
    assert plan(whole, H100) == (2048, 4, 4 * H100.sm_count)
    assert plan(whole - 1, H100) == (1024, 2, 8 * H100.sm_count)
    assert plan(5, H100) == (512, 1, 1)


def test_walk_joins_what_lies_in_the_results_order():
    assert walk((2, 3, 4), (), ((12, 4, 1),)).flat
    assert walk((2, 3, 4, 5), (0, 2, 3, 1), ((60, 1, 15, 3),)).flat
    cut = walk((2, 3, 4), (), ((24, 8, 1),))
    assert not cut.flat and cut.sizes == (1, 1, 6, 4) and cut.strides == ((0, 0, 8, 1),)
    assert walk((2,) * 5, (), ((160, 48, 14, 4, 1),)) is None


@pytest.mark.parametrize("layer", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"])
def test_layers_are_converted_whatever_the_mode(layer, where):
    theirs = torch.nn.Sequential(getattr(torch.nn, layer)(0.5, inplace=True)).eval()
    ours, report = gpukern.convert(theirs, return_report=True)
    assert type(ours[0]) is getattr(gpukern.nn, layer) and not report.left
    assert repr(ours) == repr(theirs)
    x = torch.ones(2, 64, *(2,) * {"Dropout": 0, "Dropout1d": 1, "Dropout2d": 2, "Dropout3d": 3}[layer], device=where)
    assert ours(x) is x
    assert (ours.train()(x) == 0).any()
