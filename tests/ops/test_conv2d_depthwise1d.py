"""The depthwise kernels of sequences, their plans forced, against float64; their plans; the bytes that they move."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from gpukern.conv import reference
from gpukern.conv.families.depthwise1d import plan as depthwise1d
from gpukern.conv.families.depthwise1d.plan import Taps, tiles
from gpukern.conv.plan import ConvPlan, Direction, Layout, Operands, Variant
from gpukern.conv.planner import heuristic_plan
from gpukern.conv.problem import ConvProblem, sequence_problem
from gpukern.conv.request import Epilogue, Request, operands_of
from gpukern.runtime.device import A100, EMULATED, H100
from gpukern.runtime.integers import power_of_two
from gpukern.runtime.mode import EMULATE
from tests.numerics import assert_within, sum_bound

pytestmark = pytest.mark.usefixtures("poisoned")


@dataclass(frozen=True)
class Case:
    name: str
    input: tuple[int, int, int]
    taps: int
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    @property
    def problem(self) -> ConvProblem:
        channels = self.input[1]
        weight = (channels, 1, self.taps)
        return sequence_problem(self.input, weight, None, (1,), self.padding, (self.dilation,), channels)


CASES = (
    Case("causal", (2, 8, 40), 4, padding=(3, 0)),
    Case("ragged", (2, 5, 19), 3, padding=(1, 1)),
    Case("unaligned output", (2, 16, 24), 4, padding=(3, 3)),
    Case("valid, eight taps", (1, 3, 44), 8),
    Case("padding beyond the taps", (1, 6, 16), 2, padding=(4, 3)),
    Case("dilated by a vector", (1, 4, 64), 3, padding=(16, 0), dilation=8),
    Case("dilated oddly", (2, 4, 30), 3, padding=(2, 3), dilation=3),
    Case("one tap", (3, 4, 8), 1),
    Case("to one output", (2, 4, 5), 5),
    Case("of one element", (2, 40, 1), 3, padding=(1, 1)),
    Case("several tiles", (2, 3, 600), 4, padding=(3, 0)),
)
#: The dtype, and whether channels are adjacent in x and in y.
KINDS = (
    (torch.float16, False, False),
    (torch.float32, False, True),
    (torch.bfloat16, True, True),
    (torch.float16, True, False),
)
OPERANDS = {
    Direction.FORWARD: ("x", "w", "y"),
    Direction.INPUT_GRAD: ("y", "w", "x"),
    Direction.WEIGHT_GRAD: ("y", "x", "w"),
}


def laid_out(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    order = torch.channels_last if channels_last else torch.contiguous_format
    return tensor.contiguous(memory_format=order).to(memory_format=order)


def make(p: ConvProblem, dtype: torch.dtype, device, x_last: bool, y_last: bool) -> dict[str, torch.Tensor]:
    made = {"x": (p.N, p.C, 1, p.W), "w": (p.C, 1, 1, p.S), "y": (p.N, p.C, 1, p.Q)}
    last = {"x": x_last, "w": False, "y": y_last}
    return {name: laid_out(torch.randn(size).to(device, dtype), last[name]) for name, size in made.items()}


def truth(p: ConvProblem, direction: Direction, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if direction is Direction.FORWARD:
        return reference.conv2d(p, first, second, None, None, "none", 0.0)
    gradient = reference.conv2d_input_grad if direction is Direction.INPUT_GRAD else reference.conv2d_weight_grad
    return gradient(p, first, second, False)


def plans(p: ConvProblem, direction: Direction, first, second, output) -> list[ConvPlan]:
    """The candidate, and one of small tiles and several splits."""
    strides = first.stride(), second.stride(), output.stride()
    operands = operands_of(p, direction, strides, True, first.dtype, "ieee")
    (found,) = depthwise1d.candidates(p, direction, operands, EMULATED)
    positions, channels = (power_of_two(size, low=low) // 4 for size, low in ((p.Q, 64), (p.C, 8)))
    if direction is Direction.WEIGHT_GRAD:
        many = p.N * depthwise1d.blocks(p, direction, positions)
        return [found, replace(found, block_m=channels, block_k=positions, splits=min(3, many))]
    return [found, replace(found, block_m=positions, block_n=channels)]


def run(p, direction, choice, first, second, output, bias=None, residual=None, epilogue=None):
    """Launch ``choice``; returns the statistics, if any are asked for."""
    from gpukern.conv.families.depthwise1d.launch import prepare
    from gpukern.ops._reduction.launch import sums_and_deviations, with_workspace

    strides = first.stride(), second.stride(), output.stride()
    prepared = prepare(Request(p, direction, *strides, first.dtype, epilogue or Epilogue(), EMULATED), choice)
    statistics = None
    if prepared.tiles:
        statistics = sums_and_deviations(p.K, output.device)
        statistics = with_workspace(statistics, p.K, output.device, *prepared.tiles)
    prepared.run(first, second, output, bias, residual, statistics, 0.0)
    return statistics


@pytest.fixture(autouse=True, scope="module")
def emulation():
    if EMULATE:
        from gpukern.runtime import emulation

        emulation.prepare()


@pytest.mark.parametrize("dtype, x_last, y_last", KINDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case, direction, dtype, x_last, y_last, device):
    p = case.problem
    made = make(p, dtype, device, x_last, y_last)
    first, second, like = (made[name] for name in OPERANDS[direction])
    doubles = [t.double().cpu() for t in (first, second)]
    value = truth(p, direction, *doubles)
    terms = p.N * p.Q if direction is Direction.WEIGHT_GRAD else p.S
    bound = sum_bound(value, truth(p, direction, *(t.abs() for t in doubles)), terms, dtype)
    for choice in plans(p, direction, first, second, like):
        output = torch.full_like(like, float("nan"))
        run(p, direction, choice, first, second, output)
        assert_within(f"{direction.value}, {choice}", output, value, bound)


def test_slices_and_expanded_tensors(device):
    """Half of the channels of a wider tensor, every second position, one sequence for all, reversed channels."""
    p = Case("", (2, 4, 24), 4, padding=(3, 0)).problem
    w = torch.randn(4, 1, 1, 4).to(device)
    wide = torch.randn(2, 8, 1, 48).to(device)
    for x in (wide[:, 4:, :, :24], wide[:, :4, :, ::2], wide[:1, ::2, :, 3:27].expand(2, -1, -1, -1)):
        value = truth(p, Direction.FORWARD, x.double().cpu(), w.double().cpu())
        bound = sum_bound(
            value, truth(p, Direction.FORWARD, x.double().cpu().abs(), w.double().cpu().abs()), 4, x.dtype
        )
        output = torch.empty(2, 4, 1, 24, device=device)
        for choice in plans(p, Direction.FORWARD, x, w, output):
            run(p, Direction.FORWARD, choice, x, w, output.fill_(float("nan")))
            assert_within(str(choice), output, value, bound)


@pytest.mark.parametrize("last", [False, True])
def test_epilogue_and_statistics(last, device):
    """Bias, residual and activation on the fp32 sum; sums and squared deviations of what is stored, tile by tile."""
    p = Case("", (2, 8, 43), 3, padding=(1, 1)).problem
    made = make(p, torch.bfloat16, device, last, last)
    x, w, residual = made["x"], made["w"], made["y"]
    # A mean far from zero: the difference of large squares would lose all that matters.
    bias = (torch.randn(p.K) + 30).to(residual)
    value = truth(p, Direction.FORWARD, x.double().cpu(), w.double().cpu()) + residual.double().cpu()
    value = (value + bias.double().cpu()[:, None, None]).relu()
    absolute = truth(p, Direction.FORWARD, x.double().cpu().abs(), w.double().cpu().abs()) + value.abs()
    for choice in plans(p, Direction.FORWARD, x, w, residual):
        output = torch.full_like(residual, float("nan"))
        epilogue = Epilogue("relu", residual=True, statistics=True)
        statistics = run(p, Direction.FORWARD, choice, x, w, output, bias, residual, epilogue)
        assert_within("output", output, value, sum_bound(value, absolute, 5, torch.bfloat16))
        stored = output.double().cpu()
        mean = stored.mean((0, 2, 3), keepdim=True)
        expected = stored.sum((0, 2, 3))
        bound = sum_bound(expected, stored.abs().sum((0, 2, 3)), p.N * p.Q, torch.float32)
        assert_within("sum", statistics.sums, expected, bound)
        # Each difference from the mean errs by an ulp of the mean.
        expected = (stored - mean).square().sum((0, 2, 3))
        slack = 2.0**-22 * mean.abs().flatten() * (stored - mean).abs().sum((0, 2, 3))
        bound = sum_bound(expected, expected, p.N * p.Q, torch.float32) + slack
        assert_within("deviations", statistics.deviations, expected, bound)


@pytest.mark.parametrize("length", [16, 19])
@pytest.mark.parametrize("last", [False, True])
def test_infinities_stay_where_they_are(length, last, device):
    """An x beyond the outputs of a group, or beyond the last, meets no zero of dy."""
    p = Case("", (1, 4, length), 3).problem
    made = make(p, torch.float32, device, last, last)
    x, w, dy = made["x"], made["w"], made["y"].abs()
    x[0, :, 0, 0], x[0, :, 0, -1], x[0, 3, 0, 7] = float("inf"), float("-inf"), float("nan")
    for direction, first, second, like in (
        (Direction.FORWARD, x, w, dy),
        (Direction.WEIGHT_GRAD, dy, x, w),
    ):
        value = truth(p, direction, first.double().cpu(), second.double().cpu())
        for choice in plans(p, direction, first, second, like):
            output = torch.empty_like(like)
            run(p, direction, choice, first, second, output)
            output = output.cpu()
            assert torch.equal(output.isnan(), value.isnan()) and torch.equal(output.isposinf(), value.isposinf())


def test_offsets_beyond_32_bits(device):
    """Sequences 2³⁰ elements apart, in a buffer whose untouched pages cost no memory."""
    torch.use_deterministic_algorithms(False)  # filling 4 GiB with NaN would touch them all
    p = Case("", (3, 8, 16), 3, padding=(1, 1)).problem
    made = make(p, torch.float16, device, False, False)
    apart = 2**30 + 4096
    buffer = torch.empty(2 * apart + 8 * 16, dtype=torch.float16, device=device)
    far = buffer.as_strided((3, 8, 1, 16), (apart, 16, 16, 1))
    for direction, names in OPERANDS.items():
        first, second, like = (made[name] for name in names)
        outputs = []
        for image in (first, far.copy_(first)):
            output = torch.empty_like(like)
            run(p, direction, plans(p, direction, first, second, output)[0], image, second, output)
            outputs.append(output)
        assert torch.equal(*outputs)


# ---- bytes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch):
    """Bytes in the sectors of 32 bytes that programs read or write, each counted once a program: what the cache of a
    multiprocessor does not spare."""
    from triton.runtime.interpreter import InterpreterBuilder

    touched: dict[tuple, set[int]] = defaultdict(set)

    def counting(name: str):
        access = getattr(InterpreterBuilder, name)

        def count(self, pointers, *rest, **named):
            mask = rest["store" in name]  # of a store, after the value
            touched[name, self.grid_idx].update((pointers.data[mask.data] // 32).tolist())
            return access(self, pointers, *rest, **named)

        return count

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, counting(name))
    return lambda: 32 * sum(map(len, touched.values()))


@pytest.mark.skipif(not EMULATE, reason="counts the accesses of emulated kernels")
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
@pytest.mark.parametrize(
    "shape, last, taps",
    [((1, 4, 4096), False, 4), ((1, 3, 4096 + 3), False, 4), ((1, 64, 512), True, 8)],
    ids=["NCL", "NCL, unaligned", "NLC"],
)
def test_bytes_moved_are_those_of_the_tensors(shape, last, taps, direction, device, moved):
    """At most 1.1 times each tensor once, reads of neighbouring tiles and partial sums included."""
    p = Case("", shape, taps, padding=(taps - 1, 0)).problem
    made = make(p, torch.float16, device, last, last)
    first, second, like = (made[name] for name in OPERANDS[direction])
    output = torch.empty_like(like)
    choice = plans(p, direction, first, second, output)[0]
    run(p, direction, choice, first, second, output)
    floor = sum(t.nbytes for t in (first, second, output))
    assert floor <= moved() <= 1.1 * floor


# Of each launch: loads and stores of 16 bytes, all stores, and bytes of shared memory.
_ACCESSES = """
import json, torch
import gpukern.functional as F
from gpukern.runtime.compile_only import record_launches
from gpukern.runtime.device import A100, H100

rows = []
for device, last in ((H100, False), (H100, True), (A100, False)):
    x = torch.empty((8, 2048, 768) if last else (8, 768, 2048), dtype=torch.float16, device="meta")
    w = torch.empty((768, 4, 1) if last else (768, 1, 4), dtype=torch.float16, device="meta")
    with record_launches(device) as launches:
        F.conv1d(*((t.transpose(1, 2) for t in (x, w)) if last else (x, w)), padding="causal", groups=768)
    (launch,) = launches
    compiled = launch.compile()
    code = compiled.asm["sass"]
    accesses = (code.count(f"{name}.E.128") for name in ("LDG", "STG"))
    rows.append((launch.kernel, *accesses, code.count("STG"), compiled.metadata.shared))
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_machine_code_moves_vectors_and_exchanges_nothing(run_python):
    """A thread of [N, C, L] stores two vectors of 8 positions, one of [N, L, C] four positions of 8 channels."""
    rows = json.loads(run_python(_ACCESSES).stdout.splitlines()[-1])
    for (kernel, loads, *stores, shared), count in zip(rows, (2, 4, 2), strict=True):
        assert kernel == "conv2d_depthwise1d_kernel" and shared == 0
        assert loads >= count and stores == [count, count]


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_which_problems_have_a_plan():
    def count(shape=(2, 8, 32), weight=(8, 1, 4), stride=1, groups=8, precision="ieee"):
        p = sequence_problem(shape, weight, None, (stride,), (3, 0), (1,), groups)
        return len([*depthwise1d.candidates(p, Direction.FORWARD, Operands("float32", precision), H100)])

    assert count() == 1
    assert count(weight=(8, 1, 8)) == 1 and count(weight=(8, 1, 9)) == 0
    assert count(stride=2) == 0
    assert count(weight=(16, 1, 4)) == 0 and count(weight=(8, 2, 4), groups=4) == 0
    assert count(shape=(2, 1, 32), weight=(1, 1, 4), groups=1) == 0
    assert count(shape=(0, 8, 32)) == 0
    assert count(precision="tf32x3") == 0


@pytest.mark.parametrize("layout", [Layout.NHWC, Layout.NCHW], ids=lambda layout: layout.value)
@pytest.mark.parametrize("direction", Direction, ids=lambda direction: direction.value)
def test_plans_cover_the_work_and_are_chosen(layout, direction):
    operands = Operands("float16", "ieee", layout, layout, layout)
    for shape, taps in (((8, 2048, 2048), 4), ((8, 768, 202), 3), ((64, 512, 1001), 7)):
        for device in (A100, H100):
            p = sequence_problem(shape, (shape[1], 1, taps), None, (1,), (taps - 1, 0), (1,), shape[1])
            choice = heuristic_plan(p, direction, operands, device)
            assert choice.variant is Variant.DEPTHWISE_1D
            ((programs, steps),) = tiles(p, direction, choice)
            assert programs * steps * choice.block_m * choice.block_n * choice.block_k >= p.N * p.C * p.Q * taps


def test_a_group_reads_each_vector_once():
    taps = Taps((-3, -2, -1, 0), 8)
    assert taps.needed(True) == (-1, 0) and taps.needed(False) == tuple(range(-3, 8))
    assert taps.element(True, -3) == 5 and taps.element(True, 7) == 15 and taps.element(False, -3) == 0
    assert Taps((-16, -8, 0), 8).needed(True) == (-2, -1, 0)
