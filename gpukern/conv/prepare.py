"""Everything about a launch that follows from the problem and the strides of its tensors, worked out once and kept.

A call then looks its launch up, makes the output and starts the kernel.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from gpukern.conv import database
from gpukern.conv.exclusions import Exclusion, exclude
from gpukern.conv.families.registry import family_of
from gpukern.conv.layouts import Shape, Strides, dense_strides
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.planner import plan
from gpukern.conv.pooled import plan as pooled
from gpukern.conv.problem import ConvProblem, pooled_problem
from gpukern.conv.request import Epilogue, Prepared, Request, check_countable, operands_of, shapes
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.refusal import DescriptorRefused
from gpukern.runtime.strides import is_channels_last
from gpukern.runtime.tensors import check_kernel_dtype


@functools.lru_cache(maxsize=4096)
def prepare(
    problem: ConvProblem,
    direction: Direction,
    first: Strides,
    second: Strides,
    channels_last: bool | None,
    aligned: bool,
    dtype: torch.dtype,
    precision: str,
    device: DeviceSpec,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    choice: ConvPlan | None = None,
) -> Prepared:
    """The launch of a convolution or a gradient. Strides are those of NCHW and KCRS tensors.

    ``channels_last`` is the output's layout; None means channels_last if an operand is, torch's rule. ``aligned`` tells
    whether all tensors start at multiples of 16 bytes. ``choice`` takes the place of the plan, for tools that try
    others.
    """
    check_kernel_dtype("conv2d", dtype)
    of_first, of_second, of_output = of_all = shapes(problem, direction)
    check_countable(of_first, of_output)
    if problem.pool:
        check_countable((problem.N, problem.K, problem.P, problem.Q))  # which is not the output
    if channels_last is None:
        channels_last = _takes_channels_last(of_first, of_second, first, second)
    strides = dense_strides(of_output, channels_last)
    again = None
    if choice is None:
        asked = problem, direction, first, second, channels_last, aligned, dtype, precision, device, epilogue
        again = functools.partial(prepare, *asked)
        operands = operands_of(problem, direction, (first, second, strides), aligned, dtype, precision)
        measured = database.lookup(problem, direction, operands, device)
        choice = measured or plan(problem, direction, operands, device)
    seen = (
        dense_strides(shape, channels_last=True) if packed else given
        for shape, given, packed in zip(of_all, (first, second, strides), choice.pack, strict=True)
    )
    request = Request(problem, direction, *seen, dtype, epilogue, device)
    launch = _package(choice).prepare(request, choice)
    return Prepared(
        choice,
        of_output,
        strides,
        request.output,
        launch,
        epilogue.activation,
        not (any(choice.pack) or launch.row_tiles or 0 in of_first or 0 in of_output),
        again,
    )


@functools.lru_cache(maxsize=4096)
def pooled_choice(
    problem: ConvProblem,
    first: Strides,
    second: Strides,
    aligned: bool,
    dtype: torch.dtype,
    precision: str,
    device: DeviceSpec,
) -> ConvPlan | None:
    """The plan of a convolution and the max pool after it as one launch; None where two are expected to be faster."""
    check_kernel_dtype("conv2d_max_pool2d", dtype)
    both = pooled_problem(problem)
    of_first, of_second, _ = shapes(both, Direction.FORWARD)
    channels_last = _takes_channels_last(of_first, of_second, first, second)
    of_both, of_convolution = (
        operands_of(
            each,
            Direction.FORWARD,
            (first, second, dense_strides(shapes(each, Direction.FORWARD)[2], channels_last)),
            aligned,
            dtype,
            precision,
        )
        for each in (both, problem)
    )
    measured = database.lookup(both, Direction.FORWARD, of_both, device)
    return measured or pooled.choose(problem, of_both, of_convolution, device)


def plan_without(refused: ConvPlan, device: DeviceSpec, problem: DescriptorRefused) -> None:
    """Choose no plan of this kernel on GPUs like ``device`` any more, in this process, and say so once.

    What keeps every rule that is written down may still be more than a driver takes, the stem's overlapping windows
    above all. A driver that refuses one descriptor of a kernel is not asked for the next.
    """
    words = str(problem).strip().splitlines()[0]
    exclude(Exclusion(device.compute_capability, f"the driver refused its descriptors ({words})", refused.variant))
    for cached in (plan, prepare, pooled_choice):
        cached.cache_clear()
    warnings.warn(
        f"gpukern plans without its {refused.variant.value} kernel on {device.name}: "
        f"the driver refused a descriptor of {refused} ({words})",
        stacklevel=2,
    )


def _takes_channels_last(of_first: Shape, of_second: Shape, first: Strides, second: Strides) -> bool:
    """torch's rule for what a convolution makes."""
    return is_channels_last(of_first, first) or is_channels_last(of_second, second)


def _package(choice: ConvPlan) -> ModuleType:
    """The ``launch.py`` beside the ``plan.py`` that made the choice."""
    return importlib.import_module(family_of(choice).launch_module)
