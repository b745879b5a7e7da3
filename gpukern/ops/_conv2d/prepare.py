"""Everything about a launch that follows from the problem and the strides of its tensors, worked out once and kept.

A call then looks its launch up, makes the output and starts the kernel. Layouts are what this file is about: which
operand is copied into runs of channels first, and how wide the kernel may read.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from gpukern.ops._conv2d.gather import Sizes
from gpukern.ops._conv2d.plan import ConvPlan, Direction, Variant, grid, plan, tiled_pixels
from gpukern.ops._conv2d.problem import ConvProblem
from gpukern.ops._image import strides_of
from gpukern.runtime.device import DeviceSpec
from gpukern.runtime.integers import cdiv
from gpukern.runtime.launch import index_type, reach
from gpukern.runtime.tensors import check_kernel_dtype

Shape = tuple[int, ...]
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Prepared:
    """A launch but for its tensors.

    ``shape`` and ``strides`` are the output's. ``pack`` says which of the two operands is first copied into runs of
    channels; ``first``, ``second`` and ``output`` are the strides that the kernel's three tensor arguments carry;
    ``scalars`` and ``meta`` its other arguments.
    """

    shape: Shape
    strides: Strides
    grid: tuple[int, ...]
    pack: tuple[bool, bool]
    first: Strides
    second: Strides
    output: Strides
    scalars: tuple[Any, ...]
    meta: dict[str, Any]
    splits: int = 1


@functools.lru_cache(maxsize=4096)
def prepare_gather(
    problem: ConvProblem,
    transposed: bool,
    source: Strides,
    weight: Strides,
    channels_last: bool | None,
    dtype: torch.dtype,
    precision: str,
    activation: str,
    device: DeviceSpec,
    choice: ConvPlan | None = None,
) -> Prepared:
    """The gather kernel: forward, or the input gradient if ``transposed``. Strides are those of NCHW and KCRS.

    ``channels_last`` is the output's layout; None means channels_last if an operand is, torch's rule. ``choice`` takes
    the place of the plan, for tools that try others.
    """
    check_kernel_dtype("conv2d", dtype)
    p = problem
    direction = Direction.INPUT_GRAD if transposed else Direction.FORWARD
    choice = choice or plan(p, direction, _name(dtype), precision, device)
    image, result = (p.N, p.C, p.H, p.W), (p.N, p.K, p.P, p.Q)
    columns, reduction = p.group_outputs, p.group_inputs
    if transposed:
        image, result, columns, reduction = result, image, reduction, columns
    filter = (p.K, p.group_inputs, p.R, p.S)
    if channels_last is None:
        channels_last = is_channels_last(image, source) or is_channels_last(filter, weight)
    strides = dense_strides(result, channels_last)
    (source, weight), pack = _packed(choice, (image, source), (filter, weight))
    source, weight, output = strides_of(image, source), strides_of(filter, weight), strides_of(result, strides)

    direct = choice.variant is Variant.DIRECT
    steps = (1, 1)
    if transposed:
        steps = tuple(s // math.gcd(s, d) for s, d in zip(p.stride, p.dilation, strict=True))
    _check_countable(tiled_pixels(p, direction)[0])
    k, c, r, s = weight
    group = p.group_outputs * k
    return Prepared(
        shape=result,
        strides=strides,
        grid=grid(p, direction, choice),
        pack=pack,
        first=source,
        second=(group, c, k, r, s) if transposed else (group, k, c, r, s),
        output=output,
        scalars=(
            Sizes(p.N, *image[2:], *result[2:], p.groups, columns, reduction),
            p.padding[0],
            p.padding[2],
        ),
        meta={
            **_window(p),
            "TAP_STEP_H": steps[0],
            "TAP_STEP_W": steps[1],
            "TRANSPOSED": transposed,
            "VARIANT": choice.variant.value,
            "EVEN_K": reduction % choice.block_k == 0,
            "SOURCE_ALIGN": alignment(source, 1, image[1] if direct else reduction),
            "FILTER_ALIGN": _filter_alignment(weight, p),
            "OUT_ALIGN": alignment(output, 1, result[1] if direct else columns),
            "ACTIVATION": activation,
            "PRECISION": precision,
            "INDEX": index_type(max(reach(image, source), reach(filter, weight), reach(result, output))),
            **_tile(choice),
        },
    )


@functools.lru_cache(maxsize=4096)
def prepare_weight_grad(
    problem: ConvProblem,
    grad: Strides,
    source: Strides,
    channels_last: bool,
    dtype: torch.dtype,
    precision: str,
    device: DeviceSpec,
    choice: ConvPlan | None = None,
) -> Prepared:
    """The weight gradient, itself in channels_last or contiguous. ``choice`` as in :func:`prepare_gather`."""
    check_kernel_dtype("conv2d_weight_grad", dtype)
    p = problem
    choice = choice or plan(p, Direction.WEIGHT_GRAD, _name(dtype), precision, device)
    result, image = (p.N, p.K, p.P, p.Q), (p.N, p.C, p.H, p.W)
    filter = (p.K, p.group_inputs, p.R, p.S)
    (grad, source), pack = _packed(choice, (result, grad), (image, source))
    grad, source = strides_of(result, grad), strides_of(image, source)
    strides = dense_strides(filter, channels_last)
    k, c, r, s = strides_of(filter, strides)

    pixels, _ = tiled_pixels(p, Direction.WEIGHT_GRAD)
    _check_countable(pixels)
    direct = choice.variant is Variant.DIRECT
    return Prepared(
        shape=filter,
        strides=strides,
        grid=grid(p, Direction.WEIGHT_GRAD, choice),
        pack=pack,
        first=grad,
        second=source,
        output=(p.group_outputs * k, k, c, r, s),
        scalars=(
            math.prod(filter),
            Sizes(p.N, p.H, p.W, p.P, p.Q, p.groups, p.group_outputs, p.group_inputs),
            cdiv(pixels, choice.splits),
            p.padding[0],
            p.padding[2],
        ),
        meta={
            **_window(p),
            "VARIANT": choice.variant.value,
            "GRAD_ALIGN": alignment(grad, 1, p.K if direct else p.group_outputs),
            "SOURCE_ALIGN": alignment(source, 1, p.C if direct else p.group_inputs),
            "PRECISION": precision,
            "INDEX": index_type(max(reach(result, grad), reach(image, source))),
            **_tile(choice),
        },
        splits=choice.splits,
    )


# ---- layouts -------------------------------------------------------------------------------------------------------


def dense_strides(shape: Shape, channels_last: bool) -> Strides:
    """The strides PyTorch gives a new tensor; of an empty one too."""
    _, C, H, W = (max(size, 1) for size in shape)
    return (H * W * C, 1, W * C, C) if channels_last else (C * H * W, H * W, W, 1)


def is_channels_last(shape: Shape, strides: Strides) -> bool:
    """Whether a tensor is dense in channels_last and not also contiguous."""

    def dense(channels_last: bool) -> bool:
        wanted = dense_strides(shape, channels_last)
        return all(size == 1 or s == w for size, s, w in zip(shape, strides, wanted, strict=True))

    return dense(True) and not dense(False)


def _packed(choice: ConvPlan, *operands: tuple[Shape, Strides]) -> tuple[tuple[Strides, ...], tuple[bool, ...]]:
    """Each operand's strides as the kernel sees them, and whether it is copied into runs of channels to have them.

    A matrix product that reads across the runs needs one small load for every element, which costs more than a pass
    over the tensor. With few channels, and element by element, it reads what is there.
    """
    pack = tuple(
        choice.variant is Variant.TAPS and shape[1] > 1 and stride[1] != 1 and stride[0] != 1
        for shape, stride in operands
    )
    strides = tuple(
        dense_strides(shape, channels_last=True) if packed else stride
        for (shape, stride), packed in zip(operands, pack, strict=True)
    )
    return strides, pack


def alignment(strides: Strides, dimension: int, run: int) -> int:
    """The power of two, at most 16, that every run of ``run`` elements along ``dimension`` starts at a multiple of.

    1 where the dimension is not contiguous. The kernels pass it to the compiler, which then reads 16 bytes at once; a
    claim too high would make it read the wrong ones. ``strides`` are those of :func:`gpukern.ops._image.strides_of`.
    """
    if strides[dimension] != 1:
        return 1
    return math.gcd(16, run, *(stride for i, stride in enumerate(strides) if i != dimension))


def _filter_alignment(weight: Strides, problem: ConvProblem) -> int:
    """:func:`alignment` of a filter, whose runs may lie along C/groups or along K."""
    if weight[1] == 1:
        return alignment(weight, 1, 16)
    # Along K a group starts after group_outputs elements.
    return alignment(weight, 0, 16 if problem.groups == 1 else problem.group_outputs)


# ---- kernel arguments ----------------------------------------------------------------------------------------------


def _check_countable(pixels: int) -> None:
    # Pixels are numbered in 32 bits, and the last tile may reach past them.
    if pixels >= 2**31 - 2**24:
        raise RuntimeError(f"conv2d: {pixels} output pixels are more than gpukern's kernels can number (2³¹)")


def _window(problem: ConvProblem) -> dict[str, int]:
    return {
        "TAPS_H": problem.R,
        "TAPS_W": problem.S,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
    }


def _tile(choice: ConvPlan) -> dict[str, int]:
    return {
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
        "GROUP_M": choice.group_m,
        "num_warps": choice.num_warps,
        "num_stages": choice.num_stages,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
