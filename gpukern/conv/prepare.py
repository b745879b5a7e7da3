"""Prepared launches: everything that follows from the problem and its tensors' strides, computed once and cached.

A call then looks up its launch, allocates the output and starts the kernel.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable

import torch

from gpukern.conv import database
from gpukern.conv.choice import choose
from gpukern.conv.exclusions import Exclusion, exclude
from gpukern.conv.families.registry import family_of
from gpukern.conv.layouts import Strides
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.planner import heuristic_plan, norm_grad_plan
from gpukern.conv.pooled import plan as pooled
from gpukern.conv.problem import ConvProblem, pooled_problem
from gpukern.conv.request import Call, Epilogue, Prepared, Request, Types, check_countable, dtypes_of, shapes
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.eight_bits import check_float8
from gpukern.runtime.refusal import DescriptorRefused
from gpukern.runtime.strides import dense_strides
from gpukern.runtime.tensors import check_kernel_dtype

#: What :func:`gpukern.conv.hooks.observe` calls, with a call and its device.
Observer = Callable[[Call, DeviceSpec], None]
observers: list[Observer] = []


@functools.lru_cache(maxsize=4096)
def prepare_launch(
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
    plan: ConvPlan | None = None,
    types: Types | None = None,
) -> Prepared:
    """Return the launch of a convolution or a gradient. Strides are those of NCHW and KCRS tensors.

    ``channels_last`` is the output's layout; None means channels_last if an operand is, torch's rule. ``aligned``:
    whether all tensors start at multiples of 16 bytes. ``plan`` replaces the chosen one, for tools that try others.
    Where no kernel can go on through a batch norm (``epilogue.norm_grad``) the launch has no ``tiles``. ``types`` are
    given for a quantized launch, ``dtype`` is the second's then.
    """
    if types is None:
        check_kernel_dtype("conv2d", dtype)
    for each in dtypes_of(dtype, types):
        check_float8(each, device)
    of_first, _, of_output = of_all = shapes(problem, direction)
    check_countable(of_first, of_output)
    if problem.pool:
        check_countable((problem.N, problem.K, problem.P, problem.Q))  # which is not the output
    call = Call(problem, direction, first, second, channels_last, aligned, dtype, precision, types)
    strides = call.output
    again = None
    if plan is None:
        again = functools.partial(prepare_launch, *call[:-1], device, epilogue, types=types)
        _report(call, device)
        plan = choose(problem, direction, call.operands, device).plan
        if epilogue.norm_grad:
            through = norm_grad_plan(problem, call.operands, device, epilogue.activation, plan)
            plan, epilogue = through or plan, epilogue._replace(norm_grad=through is not None)
    seen_first, seen_second, seen_output = (
        dense_strides(shape, channels_last=True) if packed else given
        for shape, given, packed in zip(of_all, (first, second, strides), plan.pack, strict=True)
    )
    request = Request(problem, direction, seen_first, seen_second, seen_output, dtype, epilogue, device, types)
    launch = importlib.import_module(family_of(plan).launch_module).prepare(request, plan)
    return Prepared(
        plan,
        of_output,
        strides,
        request.output,
        launch,
        epilogue.activation,
        not (any(plan.pack) or launch.tiles or 0 in of_first or 0 in of_output),
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
    types: Types | None = None,
) -> ConvPlan | None:
    """Return the plan of a convolution and its max pool as one launch; None if two are expected to be faster."""
    if types is None:
        check_kernel_dtype("conv2d_max_pool2d", dtype)
    both = Call(pooled_problem(problem), Direction.FORWARD, first, second, None, aligned, dtype, precision, types)
    _report(both, device)
    operands, of_convolution = both.operands, both._replace(problem=problem).operands
    measured = database.lookup(both.problem, both.direction, operands, device)
    return measured or pooled.choose(problem, operands, of_convolution, device)


def forget() -> None:
    """Drop all prepared launches: the inputs of the plan choice have changed."""
    prepare_launch.cache_clear()
    pooled_choice.cache_clear()


def plan_without(refused: ConvPlan, device: DeviceSpec, problem: DescriptorRefused) -> None:
    """Exclude this kernel's plans on GPUs like ``device`` for the rest of the process, and warn once.

    A driver may refuse a descriptor that follows every documented rule, the stem's overlapping windows above all. After
    one refusal, no further descriptor of that kernel is tried.
    """
    words = str(problem).strip().splitlines()[0]
    exclude(Exclusion(device.compute_capability, f"the driver refused its descriptors ({words})", refused.variant))
    heuristic_plan.cache_clear()
    norm_grad_plan.cache_clear()
    forget()
    warnings.warn(
        f"gpukern plans without its {refused.variant.value} kernel on {device.name}: "
        f"the driver refused a descriptor of {refused} ({words})",
        stacklevel=2,
    )


def _report(call: Call, device: DeviceSpec) -> None:
    for observer in observers:
        observer(call, device)
