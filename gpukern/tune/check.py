"""Correctness check of a plan's launch: a wrong kernel must never win.

A result is right when every element is. For a sum of n products

    |y − ref| ≤ (6 · 2⁻²³ · √n + ε_product) · (|x| ∗ |w|) + eps(dtype) · |ref| + smallest subnormal

where ref and |x| ∗ |w| are computed in float64 from the same operands. Rounding errors of random sign walk √n steps of
at most 2⁻²³ (tensor cores truncate), and six standard deviations are never passed by chance; ε_product is that of
operands truncated to TF32's 11 bits, or split into three products of such (:mod:`gpukern.runtime.precision`). All
kernels round operands, but many leave it to TMA, and truncation would not be a reason to refuse a plan.

An output in 8 bits is compared after its scale, with half a step of int8 in place of eps(dtype). Sums of int8 have no
error. Tensor cores add products of float8 in 14 bits, which kernels let them do for 2,048 products at most: they cut
2⁻¹³ of a sum once for 32 of them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from gpukern.conv import (
    ConvPlan,
    ConvProblem,
    Direction,
    Shape,
    Strides,
    dtypes_of,
    prepare_launch,
    reference,
)
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.eight_bits import LARGEST
from gpukern.runtime.mode import Implementations
from gpukern.runtime.precision import TF32_CUT, TF32X3
from gpukern.tune.record import Call

_PRODUCT_ERROR = {"ieee": 0.0, "tf32": TF32_CUT, "tf32x3": TF32X3}
_SMALLEST = {
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
    torch.float8_e4m3fn: 2.0**-9,
    torch.int8: 0.501,  # half a step, and the rounding of a number of 127 of them to fp32
}
_FLOAT8_SUMS = 2048 / 32 * 2.0**-13
#: Elements of an image tensor that are computed in float64 at once.
_CHUNK = 2**25

_implementations = Implementations("gpukern.conv")
_quantized = Implementations("gpukern.conv.quantized")


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
        *dtypes, self._dtype = dtypes_of(call.dtype, call.types)
        self._first = _random(first, call.first, 1.0, call.aligned, dtypes[0], generator)
        self._second = _random(second, call.second, scale, call.aligned, dtypes[1], generator)
        self.truth = _in_full(call, self._first, self._second)
        self.absolute = _in_full(call, self._first, self._second, absolute=True)
        self._scale = 1.0
        if self._dtype.itemsize == 1:
            # A few results saturate, and are compared as such.
            largest = LARGEST[self._dtype]
            self._scale = max(4 * self.truth.std().item(), 1e-6) / largest
            self.truth.clamp_(-largest * self._scale, largest * self._scale)

    def launch(self, choice: ConvPlan) -> Callable[[], object]:
        """Return a function that launches ``choice``, after a check of its result; WrongResult, or a launch's error."""
        if self._call.types is not None:
            return self._launch_quantized(choice)
        kernels = _implementations.of(self._first)
        prepared = prepare_launch(*self._call[:-1], self._spec, plan=choice)
        with _poisoned():
            self._output = kernels.run(prepared, self._first, self._second)[0]
        self._compare(self._output, choice.precision)
        # All write to the latest output: one for each plan would fill the memory.
        return lambda: kernels.write(prepared, self._output, self._first, self._second)

    def _launch_quantized(self, choice: ConvPlan) -> Callable[[], object]:
        call, kernels = self._call, _quantized.of(self._first)
        operands = call.direction, call.problem, self._first, self._second
        rest = None, None, None, "none", 0.0, 1.0, self._scale, self._dtype, choice
        with _poisoned():
            output = kernels.launch_quantized(*operands, *rest)
        self._compare(output, choice.precision)
        return lambda: kernels.launch_quantized(*operands, *rest)

    def bound(self, precision: str) -> torch.Tensor:
        """Return the error bound of products of ``precision``; see above."""
        dtype, operands = self._dtype, (self._first.dtype, self._second.dtype)
        sum_error = 6 * torch.finfo(torch.float32).eps * math.sqrt(_terms(self._call)) + _PRODUCT_ERROR[precision]
        if operands[1] is torch.float8_e4m3fn:
            sum_error += _FLOAT8_SUMS
        elif operands == (torch.int8, torch.int8):
            sum_error = 0.0
        eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        return sum_error * self.absolute + eps * self.truth.abs() + _SMALLEST[dtype] * self._scale

    def _compare(self, output: torch.Tensor, precision: str) -> None:
        bad = ~((output.double() * self._scale - self.truth).abs() <= self.bound(precision))  # also where it is NaN
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise WrongResult(
                f"{int(bad.sum())} of {bad.numel()} elements, "
                f"at {where} {output[where].item() * self._scale:.6g} instead of {self.truth[where].item():.6g}"
            )


def _terms(call: Call) -> int:
    """Return the number of products in a sum."""
    p = call.problem
    return {
        Direction.FORWARD: p.group_inputs * p.R * p.S,
        Direction.INPUT_GRAD: p.group_outputs * p.R * p.S,
        Direction.WEIGHT_GRAD: p.N * p.P * p.Q,
    }[call.direction]


def _random(
    shape: Shape, strides: Strides, scale: float, aligned: bool, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Return a random tensor of any strides, also with shared elements; its start is aligned as in the call.

    In int8 it has every number of the symmetric range, whatever the ``scale``.
    """
    start = 0 if aligned else 1
    size = start + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if dtype is torch.int8:
        memory = torch.randint(-127, 128, (size,), generator=generator, device=generator.device, dtype=dtype)
    else:
        memory = torch.randn(size, generator=generator, device=generator.device).mul_(scale).to(dtype)
    return memory.as_strided(shape, strides, start)


def _in_full(call: Call, first: torch.Tensor, second: torch.Tensor, absolute: bool = False) -> torch.Tensor:
    """The result in float64, or that of ``absolute`` values, in plain torch from a few images at a time."""
    p = call.problem
    result = torch.zeros(call.shapes[2], dtype=torch.float64, device=first.device)

    def taken(operand: torch.Tensor) -> torch.Tensor:
        return operand.double().abs() if absolute else operand.double()

    per_image = max(p.C * p.H * p.W, p.K * p.P * p.Q)
    images = max(1, _CHUNK // per_image)
    for start in range(0, p.N, images):
        part = slice(start, start + images)
        some = replace(p, N=min(images, p.N - start))
        if call.direction is Direction.WEIGHT_GRAD:
            result += reference.conv2d_weight_grad(some, taken(first[part]), taken(second[part]), False)
        else:
            result[part] = _product(some, call.direction, taken(first[part]), taken(second))
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
