"""Convolutions launched with every plan there is for them, not only with the one expected to be the fastest.

A plan that was measured takes the place of the expected one, so whatever is a candidate may be launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from gpukern.conv import (
    Call,
    ConvPlan,
    Direction,
    Epilogue,
    Layout,
    NormBefore,
    Shape,
    candidates,
    choose,
    conv2d_input_grad_norm,
    family_of,
    observe,
    prepared_for,
    run,
    shapes,
)
from gpukern.conv.quantized.launch import launch_quantized
from gpukern.ops._reduction.functions import Statistics
from gpukern.runtime.device import DeviceSpec

#: What the end of a forward kernel is asked for beside the bias, by fused networks and by a batch norm in training.
EPILOGUES = (
    Epilogue("silu", residual=True),
    Epilogue("gelu"),
    Epilogue(statistics=True),
)


#: Activations that an input gradient goes on through to the sums of a batch norm, and whether with another gradient and
#: a residual. The first takes the most registers of all but gelu, whose derivative alone takes more.
NORM_GRADS = (("leaky_relu", True), ("relu", False), ("gelu", True))


class Requests:
    """The convolutions that were planned while :meth:`recording`."""

    def __init__(self) -> None:
        self._planned: list[tuple] = []
        self._launched: set[tuple] = set()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        def record(call: Call, device: DeviceSpec) -> None:
            self._planned.append((call.problem, call.direction, call.operands, device))

        with observe(record):
            yield

    def launches(self, wanted: Callable[[ConvPlan], bool]) -> Iterator[Callable[[], None]]:
        """Calls that launch what was planned with its plan and each ``wanted`` one; alike ones of alike layers once.

        A forward kernel once with each of :data:`EPILOGUES`, an input gradient with each of :data:`NORM_GRADS` too.
        """
        for asked in self._planned:
            problem, direction, operands, _ = asked
            window = problem.R, problem.S, problem.stride, problem.dilation, problem.groups > 1
            for choice in (choose(*asked).plan, *filter(wanted, candidates(*asked))):
                alike = direction, operands, window, str(choice)
                if alike not in self._launched:
                    self._launched.add(alike)
                    yield lambda args=(problem, direction, operands, choice): _launch(*args)
        self._planned.clear()


def _launch(problem, direction: Direction, operands, choice: ConvPlan) -> None:
    if operands.quantized:
        _launch_quantized(problem, direction, operands, choice)
        return
    dtype = getattr(torch, operands.dtype)
    of_first, of_second, of_output = shapes(problem, direction)
    first, second = _tensor(of_first, operands.first, dtype), _tensor(of_second, operands.second, dtype)
    channels_last = operands.output is not Layout.NCHW
    if direction is not Direction.FORWARD:
        run(prepared_for(problem, direction, first, second, channels_last, plan=choice), first, second)
        if direction is Direction.INPUT_GRAD:
            _launch_through_norm(problem, first, second, _tensor(of_output, operands.output, dtype), choice)
        return
    bias, residual = first.new_empty(of_output[1]), _tensor(of_output, operands.output, dtype)
    numbers = (torch.empty(of_output[1], device="meta") for _ in range(4))
    statistics = Statistics(None, None, None, *numbers, 0.1)
    for epilogue in EPILOGUES:
        prepared = prepared_for(problem, direction, first, second, channels_last, epilogue, choice)
        wanted = statistics if epilogue.statistics else None
        run(prepared, first, second, bias, residual if epilogue.residual else None, statistics=wanted)


def _launch_quantized(problem, direction: Direction, operands, choice: ConvPlan) -> None:
    """With the epilogue that takes most registers: a residual, if there is no pool, and the rounding."""
    dtypes = (getattr(torch, dtype) for dtype in operands.dtypes)
    of_first, of_second, of_output = shapes(problem, direction)
    first, second, output = (
        _tensor(shape, layout, dtype)
        for shape, layout, dtype in zip(
            (of_first, of_second, of_output), (operands.first, operands.second, operands.output), dtypes, strict=True
        )
    )
    numbers = torch.empty(of_output[1], device="meta")
    residual = None if problem.pool else output
    scales = [0.5 if tensor is not None and tensor.itemsize == 1 else 1.0 for tensor in (residual, output)]
    launch_quantized(
        direction, problem, first, second, numbers, numbers, residual, "silu", 0.1, *scales, output.dtype, choice
    )


def _launch_through_norm(problem, grad, weight, z: torch.Tensor, choice: ConvPlan) -> None:
    """With ``choice``, and with the plan that takes its place where its kernel cannot."""
    numbers = z.new_empty(problem.C, dtype=torch.float32)
    channels_last = z.is_contiguous(memory_format=torch.channels_last)
    for activation, with_others in NORM_GRADS:
        norm = NormBefore(z, numbers, numbers, numbers, numbers, z if with_others else None, 1e-5)
        added = z if with_others else None
        takes = not choice.pack[2] and family_of(choice).takes_norm_grad(choice, activation)
        plan = choice if takes else None
        conv2d_input_grad_norm(problem, grad, weight, channels_last, added, norm, activation, 0.1, plan)


def _tensor(shape: Shape, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """One of this layout, or of the usual one where any strides would do."""
    if layout is Layout.TRANSPOSED:
        rows, columns, *_ = shape
        return torch.empty((columns, rows), dtype=dtype, device="meta").t()[:, :, None, None]
    order = torch.contiguous_format if layout in (Layout.NCHW, Layout.STRIDED) else torch.channels_last
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=order)
