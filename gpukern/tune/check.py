"""Correctness check of a plan's launch: a wrong kernel must never win.

A result is right when every element is. For a sum of n products

    |y − ref| ≤ (6 · 2⁻²³ · √n + ε_product) · (|x| ∗ |w|) + eps(dtype) · |ref| + smallest subnormal

where ref and |x| ∗ |w| are computed in float64 from the same operands. Rounding errors of random sign walk √n steps of
at most 2⁻²³ (tensor cores truncate), and six standard deviations are never passed by chance; ε_product is that of
operands truncated to TF32's 11 bits, or split into three products of such (:mod:`gpukern.runtime.precision`). All
kernels round operands, but many leave it to TMA, and truncation would not be a reason to refuse a plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gpukern.conv import ConvPlan, ConvProblem, Direction, Shape, Strides, prepare_launch, reference
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.mode import Implementations
from gpukern.runtime.precision import TF32_CUT, TF32X3
from gpukern.tune.record import Call

_PRODUCT_ERROR = {"ieee": 0.0, "tf32": TF32_CUT, "tf32x3": TF32X3}
_SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
#: Elements of an image tensor that are computed in float64 at once.
_CHUNK = 2**25

_implementations = Implementations("gpukern.conv")


class WrongResult(RuntimeError):
    """A launch computed something else."""


class Check:
    """Random operands of one call, their result ``truth``, and the ``absolute`` |x| ∗ |w|, both in float64."""

    def __init__(self, call: Call, device: torch.device) -> None:
        self._call, self._spec = call, device_spec(device)
        generator = torch.Generator(device).manual_seed(0)
        first, second, _ = call.shapes
        # Results of order one: nothing overflows in 16 bits, and almost nothing is subnormal.
        scale = _terms(call) ** -0.5
        self._first = _random(first, call.first, 1.0, call, generator)
        self._second = _random(second, call.second, scale, call, generator)
        self.truth = _in_full(call, self._first, self._second)
        self.absolute = _in_full(call, self._first.abs(), self._second.abs())

    def launch(self, choice: ConvPlan) -> Callable[[], object]:
        """Return a function that launches ``choice``, after a check of its result; WrongResult, or a launch's error."""
        kernels = _implementations.of(self._first)
        prepared = prepare_launch(*self._call[:-1], self._spec, plan=choice, types=self._call.types)
        with _poisoned():
            self._output = kernels.run(prepared, self._first, self._second)[0]
        self._compare(self._output, choice.precision)
        # All write to the latest output: one for each plan would fill the memory.
        return lambda: kernels.write(prepared, self._output, self._first, self._second)

    def bound(self, precision: str) -> torch.Tensor:
        """Return the error bound of products of ``precision``; see above."""
        dtype = self._call.dtype
        sum_error = 6 * torch.finfo(torch.float32).eps * math.sqrt(_terms(self._call)) + _PRODUCT_ERROR[precision]
        return sum_error * self.absolute + torch.finfo(dtype).eps * self.truth.abs() + _SMALLEST[dtype]

    def _compare(self, output: torch.Tensor, precision: str) -> None:
        bad = ~((output.double() - self.truth).abs() <= self.bound(precision))  # also where it is NaN
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise WrongResult(
                f"{int(bad.sum())} of {bad.numel()} elements, "
                f"at {where} {output[where].item():.6g} instead of {self.truth[where].item():.6g}"
            )


def _terms(call: Call) -> int:
    """Return the number of products in a sum."""
    p = call.problem
    return {
        Direction.FORWARD: p.group_inputs * p.R * p.S,
        Direction.INPUT_GRAD: p.group_outputs * p.R * p.S,
        Direction.WEIGHT_GRAD: p.N * p.P * p.Q,
    }[call.direction]


def _random(shape: Shape, strides: Strides, scale: float, call: Call, generator: torch.Generator) -> torch.Tensor:
    """Return a random tensor of any strides, also with shared elements; its start is aligned as in the call."""
    start = 0 if call.aligned else 1
    size = start + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.randn(size, generator=generator, device=generator.device)
    return memory.mul_(scale).to(call.dtype).as_strided(shape, strides, start)


def _in_full(call: Call, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The result in float64, computed in plain torch from a few images at a time."""
    p = call.problem
    result = torch.zeros(call.shapes[2], dtype=torch.float64, device=first.device)
    per_image = max(p.C * p.H * p.W, p.K * p.P * p.Q)
    images = max(1, _CHUNK // per_image)
    for start in range(0, p.N, images):
        part = slice(start, start + images)
        some = replace(p, N=min(images, p.N - start))
        if call.direction is Direction.WEIGHT_GRAD:
            result += reference.conv2d_weight_grad(some, first[part].double(), second[part].double(), False)
        else:
            result[part] = _product(some, call.direction, first[part].double(), second.double())
    return result


def _product(p: ConvProblem, direction: Direction, image: torch.Tensor, filter: torch.Tensor) -> torch.Tensor:
    if direction is Direction.INPUT_GRAD:
        return reference.conv2d_input_grad(p, image, filter, False)
    return reference.conv2d(p, image, filter, None, None, "none", 0.0)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill new memory with NaN: elements a kernel does not write could otherwise hold an earlier right result."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
