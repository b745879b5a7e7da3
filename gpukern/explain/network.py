"""Every layer of a network against the roofline of a device that need not be present.

The plan of each layer, the time that no implementation can beat (*floor*), the time that this plan cannot beat
(*bound*), the time it is expected to take, and what its machine code is made of.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpukern.conv import ConvProblem, Direction
from gpukern.explain.formatting import describe, describe_plan
from gpukern.explain.layers import Kind, Linear, Pool, describe_pool, distinct, layer_calls, problem_of
from gpukern.explain.machine_code import CannotCompile, Compiled, compiled
from gpukern.explain.query import KINDS, Question, convolution, linear
from gpukern.explain.ranking import answer
from gpukern.ops._pool2d.cost_model import Pooling
from gpukern.ops._pool2d.cost_model import cost as pool_cost
from gpukern.ops._pool2d.cost_model import work as pool_work
from gpukern.ops._pool2d.planner import plan as pool_plan
from gpukern.runtime.device import DeviceSpec, assumed_peaks
from gpukern.runtime.roofline import Cost, Work, floor

#: The fields of a part that add up.
_SUMMED = ("launches", "waves", "flops", "bytes", "moved", "floor_us", "bound_us", "expected_us")
_OPERATORS = {Kind.MAX: "max_pool2d", Kind.AVERAGE: "avg_pool2d", Kind.ADAPTIVE: "adaptive_avg_pool2d"}


@dataclass(frozen=True)
class Part:
    """One computation of a layer that a network has ``count`` times. Microseconds, bytes and FLOP of one call.

    ``flops`` and ``bytes`` are any implementation's, ``moved`` the plan's bytes, ``efficiency`` the useful share of
    the work done on padded tiles. ``bound`` is what the floor is bound by: "memory" or "compute". ``registers``,
    ``spills`` and ``loop``, the instructions of one turn of the main loop, are of the main kernel, None where it was
    not compiled; ``note`` gives the reason.
    """

    layer: str
    count: int
    operation: str
    computation: str
    problem: str
    plan: str
    launches: int
    waves: float
    efficiency: float
    flops: float
    bytes: float
    moved: float
    bound: str
    floor_us: float
    bound_us: float
    expected_us: float
    registers: int | None = None
    spills: int | None = None
    loop: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Place:
    """A part's position in its network, and its computation there."""

    layer: str
    count: int
    operation: str
    computation: str
    problem: str


@dataclass(frozen=True)
class Setting:
    """Settings that all launches of a network share; ``kind`` is one of :data:`gpukern.explain.query.KINDS`."""

    kind: str
    channels_last: bool
    device: DeviceSpec
    compiles: bool = False


def parts(
    model: torch.nn.Module,
    shape: Sequence[int],
    directions: Collection[Direction],
    setting: Setting,
    left_out: Callable[[str], None] = lambda words: None,
) -> Iterator[Part]:
    """The distinct convolutions, fully-connected layers and pools of ``model`` for an input of ``shape``.

    The model, which should be on the meta device, runs once. Several ``directions`` together are a training step, in
    which a maximum keeps what its backward needs; the gradient of the network's own input belongs to none.
    ``left_out`` is called with each layer that gpukern does not take.
    """
    calls = layer_calls(model, torch.empty(*shape, device="meta"))
    for call, count, problem in distinct((call, problem_of(call)) for call in calls):
        wanted = [each for each in directions if not (call.is_first and each is Direction.INPUT_GRAD)]
        for direction in wanted:
            try:
                if not isinstance(problem, Pool):
                    operation = "linear" if isinstance(problem, Linear) else "conv2d"
                    asked = question(problem, direction, setting)
                    yield launch(call.name, count, operation, asked, setting.compiles)
                elif direction is not Direction.WEIGHT_GRAD:
                    pooling = pooling_of(problem.kind, direction, training=Direction.INPUT_GRAD in wanted)
                    yield pool(call.name, count, problem, pooling, setting)
            except RuntimeError as reason:  # more pixels than kernels can number
                left_out(f"{call.name}, {direction.value}: {reason}")


def question(problem: ConvProblem | Linear, direction: Direction, setting: Setting) -> Question:
    """The launch that a layer makes for a direction: of images in a layout, or of matrices, which have none."""
    if isinstance(problem, Linear):
        sizes = problem.rows, problem.inputs, problem.outputs
        return linear(*sizes, direction, setting.kind, setting.device)
    return convolution(problem, direction, setting.kind, setting.channels_last, setting.device)


def pooling_of(kind: Kind, direction: Direction, training: bool) -> Pooling:
    """Return a pool's computation: for training, a maximum also records its positions."""
    maximum = kind is Kind.MAX
    if direction is Direction.INPUT_GRAD:
        return Pooling.MAX_GRAD if maximum else Pooling.AVG_GRAD
    return Pooling.MAX_WITH_TAPS if maximum and training else Pooling.MAX if maximum else Pooling.AVG


# ---- cost of a part ------------------------------------------------------------------------------------------------


def launch(layer: str, count: int, operation: str, asked: Question, compiles: bool = False) -> Part:
    """The part of a convolution, or of a fully-connected layer seen as one. RuntimeError for what no kernel can run."""
    found = answer(asked)
    chosen = found.chosen
    place = Place(layer, count, operation, asked.computation or asked.direction.value, describe(asked.problem))
    words = describe_plan(chosen.plan, asked.direction)
    part = priced(place, words, found.work, chosen.cost, chosen.seconds, asked.device)
    return dataclasses.replace(part, **_code(asked, chosen.plan)) if compiles else part


def pool(layer: str, count: int, of: Pool, pooling: Pooling, setting: Setting) -> Part:
    """The part of a pool, which is expected to take its bound."""
    itemsize, device = KINDS[setting.kind][0].itemsize, setting.device
    chosen = pool_plan(of.window, setting.channels_last, itemsize)
    cost = pool_cost(of.window, pooling, chosen, itemsize, device)
    tile = chosen.whole_window or chosen.tile
    unit = "places of a window" if chosen.whole_window else "pixels"
    words = f"{tile.channels} channels × {tile.pixels} {unit}, {tile.warps} warps"
    backward = pooling in (Pooling.AVG_GRAD, Pooling.MAX_GRAD)
    place = Place(layer, count, _OPERATORS[of.kind], "backward" if backward else "forward", describe_pool(of))
    return priced(place, words, pool_work(of.window, pooling, itemsize), cost, cost.seconds, device)


def by_bytes(place: Place, moved: float, setting: Setting) -> Part:
    """The part of whatever reads its tensors and writes its result once: memory bounds it."""
    cost = Cost(1, 0.0, 1.0, moved, 1, 0.0, moved / assumed_peaks(setting.device).bandwidth)
    return priced(place, place.operation, Work(0.0, moved, setting.kind), cost, cost.seconds, setting.device)


def priced(place: Place, plan: str, must: Work, cost: Cost, expected: float, device: DeviceSpec) -> Part:
    """Return the part with the plan's ``cost`` and the work that any implementation ``must`` do."""
    least = floor(must, assumed_peaks(device))
    return Part(
        **dataclasses.asdict(place),
        plan=plan,
        launches=cost.launches,
        waves=cost.waves,
        efficiency=cost.efficiency,
        flops=must.flops,
        bytes=must.bytes,
        moved=cost.bytes,
        bound=least.bound,
        floor_us=least.seconds * 1e6,
        bound_us=cost.seconds * 1e6,
        expected_us=expected * 1e6,
    )


def total(found: Sequence[Part]) -> Part:
    """The sum over all parts, run one by one as often as the network has them."""

    summed = {name: sum(part.count * getattr(part, name) for part in found) for name in _SUMMED}
    memory = sum(part.count * part.floor_us for part in found if part.bound == "memory")
    done = sum(part.count * part.flops / part.efficiency for part in found)
    kinds: Counter[str] = Counter()
    for part in found:
        kinds[part.operation] += part.count
    return Part(
        layer="all",
        count=1,
        operation="network",
        computation=", ".join(dict.fromkeys(part.computation for part in found)),
        problem="",
        plan=", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        efficiency=summed["flops"] / done if done else 1.0,
        bound="memory" if memory > summed["floor_us"] / 2 else "compute",
        **summed,
    )


# ---- machine code --------------------------------------------------------------------------------------------------


def _code(asked: Question, plan: Any) -> dict[str, Any]:
    try:
        main = main_kernel(compiled(asked, plan))
    except CannotCompile as reason:
        return {"note": str(reason)}
    return {"registers": main.registers, "spills": main.spills, "loop": main.loop_length}


def main_kernel(kernels: list[Compiled]) -> Compiled:
    """The one that computes; others copy operands."""
    return next(kernel for kernel in kernels if kernel.kernel.startswith("conv2d_"))
