"""The convolution's plan against other plans for the same launch: what a plan database should say instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from bench.accuracy import DTYPES
from bench.predict import describe_plan
from bench.suite import Implementation, Task, register
from bench.suites.conv import Convolutions
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Variant, plan
from gpukern.ops._conv2d.prepare import prepare_gather, prepare_weight_grad
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.mode import EMULATE


class Plans(Convolutions):
    """The candidates are gpukern's own kernels under other plans; the first is the plan that a call would get."""

    name = "plans"
    title = "Plans of convolutions"

    def implementations(
        self, task: Task[ConvProblem], peers: Sequence[str], device: torch.device
    ) -> list[Implementation]:
        direction, dtype = self.directions[task.case.computation], DTYPES[task.case.dtype]
        precision = "tf32" if task.case.dtype == "tf32" else "ieee"
        name = str(dtype).removeprefix("torch.")
        chosen = plan(task.problem, direction, name, precision, device_spec(device))
        found = {}
        for each in (chosen, *_others(chosen, direction)):
            found.setdefault(describe_plan(each), each)
        missing = "" if device.type != "cpu" or EMULATE else "the kernels need a CUDA device"
        return [
            Implementation(
                f"gpukern {words}", task.case.layout, _with_plan(task, direction, precision, each), missing=missing
            )
            for words, each in found.items()
        ]


def _others(chosen: ConvPlan, direction: Direction) -> Iterator[ConvPlan]:
    """Neighbours: one thing changed at a time, and larger tiles with the warps that they want."""
    if chosen.variant is Variant.DIRECT:
        for block_m in (16, 32, 64, 128):
            yield replace(chosen, block_m=block_m)
        yield replace(chosen, num_warps=2 * chosen.num_warps)
        return
    for stages in (2, 3, 4, 5):
        yield replace(chosen, num_stages=stages)
    for warps in (2, 4, 8):
        yield replace(chosen, num_warps=warps)
    for block_k in (32, 64, 128):
        yield replace(chosen, block_k=block_k)
    for block_m, block_n in ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 64)):
        for warps in (4, 8):
            yield replace(chosen, block_m=block_m, block_n=block_n, num_warps=warps)
    if direction is Direction.WEIGHT_GRAD:
        for factor in (0.5, 2, 4):
            yield replace(chosen, splits=max(1, round(chosen.splits * factor)))


def _with_plan(
    task: Task[ConvProblem], direction: Direction, precision: str, choice: ConvPlan
) -> Callable[..., torch.Tensor]:
    p, last = task.problem, task.case.layout == "channels_last"

    def run(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        from gpukern.ops._conv2d import launch  # needs Triton, which looking at plans does not

        dtype, spec = x.dtype, device_spec(x.device)
        if direction is Direction.WEIGHT_GRAD:
            prepared = prepare_weight_grad(p, dy.stride(), x.stride(), last, dtype, precision, spec, choice)
            return launch.weight_grad(prepared, dy, x, launch.new_output(prepared, x))
        transposed = direction is Direction.INPUT_GRAD
        source = dy if transposed else x
        prepared = prepare_gather(
            p, transposed, source.stride(), w.stride(), last, dtype, precision, "none", spec, choice
        )
        return launch.gather(prepared, source, w, None, launch.new_output(prepared, source))

    return run


register(Plans())
