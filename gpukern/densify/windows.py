"""Functions on patches as dense networks compute them: convolutions, linear layers and pools; the register of all.

A rule has the name and the parameters of the function of ``torch`` or ``torch.nn.functional``; a first parameter more
takes what it adds its steps to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from gpukern.densify.epilogues import FixedActivation, Held
from gpukern.densify.errors import DenseError
from gpukern.densify.recorder import Recorder
from gpukern.densify.steps import Average, Convolve, Maximum
from gpukern.densify.values import Pair, Value, Windows, multiplied, told
from gpukern.ops._pool2d.problem import check_adaptive
from gpukern.runtime.integers import cdiv

Rule = Callable[..., Any]
#: By the names of functions.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule under ``names`` too."""

    def register(function: Rule) -> Rule:
        for name in names or (function.__name__,):
            RULES[name] = function
        return function

    return register


def pair(value: Any) -> Pair:
    vertical, horizontal = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    return int(vertical), int(horizontal)


def images(value: Value) -> Value:
    if value.rank != 4:
        raise DenseError(f"its input is {told(value.shape)}, and not images")
    return value


def unpadded(padding: Any) -> None:
    if padding != "valid" and (isinstance(padding, str) or any(pair(padding))):
        raise DenseError(
            f"padding={padding!r}: it sees the border of the patch, which only patches one by one have. "
            "Use padding=0 and larger patches"
        )


# ---- convolution and linear layers -----------------------------------------------------------------------------------


@rule()
def conv2d(
    to: Recorder, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *,
    residual=None, activation=None, negative_slope=0.01, shape: Sequence[int] | None = None,
) -> Value:  # fmt: skip
    """Spread by the strides before it. ``shape``: of a weight that is given by its name."""
    K, C, R, S = weight.shape if shape is None else shape
    images(input)
    if padding != "same" or (R, S) != (1, 1):
        unpadded(padding)
    if residual is not None:
        raise DenseError("its residual: add it afterwards")
    if input.channels != C * groups:
        raise DenseError(f"it takes {C * groups} channels, and gets {told(input.shape)}")
    windows = Windows((R, S), pair(stride), pair(dilation))
    operation = Convolve(
        to.held(weight, "weight"),  # type: ignore[arg-type]  # there is one
        to.held(bias, "bias"),
        multiplied(input.dilation, windows.dilation),
        groups,
        activation=None if activation in (None, "none") else FixedActivation(activation, negative_slope),
    )
    made = to.add(operation, (input,), windows.through(input, K), kernel=(R, S), multiply_adds=K * C * R * S)
    return made


@rule()
def linear(to: Recorder, input, weight, bias=None, *, activation=None, negative_slope=0.01, shape=None) -> Value:
    """A convolution whose window is what was flattened."""
    features, inputs = weight.shape if shape is None else shape
    if input.rank != 2:
        raise DenseError(f"it looks along the columns of {told(input.shape)}: flatten them first")
    if input.features != inputs:
        raise DenseError(
            f"it takes {inputs:,} features, and this patch size gives {input.features:,} "
            f"({input.channels} × {input.size[0]} × {input.size[1]})"
        )
    operation = Convolve(
        to.held(weight, "weight"),  # type: ignore[arg-type]  # there is one
        to.held(bias, "bias"),
        input.dilation,
        window=input.size,
        activation=None if activation in (None, "none") else FixedActivation(activation, negative_slope),
    )
    windows = Windows(input.size, (1, 1))
    return to.add(
        operation, (input,), windows.through(input, features), kernel=input.size, multiply_adds=features * inputs
    )


# ---- pools -----------------------------------------------------------------------------------------------------------


def _windows(kernel_size, stride, dilation=1) -> Windows:
    kernel = pair(kernel_size)
    return Windows(kernel, kernel if stride in (None, (), []) else pair(stride), pair(dilation))


@rule("max_pool2d", "max_pool2d_with_indices")
def max_pool2d(
    to: Recorder, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Value:
    if return_indices:
        raise DenseError("its indices are places in the patch")
    unpadded(padding)
    return _maximum(to, images(input), _windows(kernel_size, stride, dilation), ceil_mode)


@rule()
def avg_pool2d(
    to: Recorder, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
    divisor_override=None,
) -> Value:  # fmt: skip
    unpadded(padding)
    windows = _windows(kernel_size, stride)
    return _average(to, images(input), windows, divisor_override or math.prod(windows.kernel), ceil_mode)


@rule()
def adaptive_avg_pool2d(to: Recorder, input, output_size) -> Value:
    windows = _adaptive(images(input), output_size)
    return _average(to, input, windows, math.prod(windows.kernel))


@rule("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices")
def adaptive_max_pool2d(to: Recorder, input, output_size, return_indices=False) -> Value:
    if return_indices:
        raise DenseError("its indices are places in the patch")
    return _maximum(to, input, _adaptive(images(input), output_size))


def _adaptive(input: Value, output_size: Any) -> Windows:
    sizes = (output_size,) * 2 if isinstance(output_size, int) or output_size is None else tuple(output_size)
    wanted = tuple(size if given is None else given for given, size in zip(sizes, input.size, strict=True))
    check_adaptive((1, 1, *input.size), wanted)
    kernels, strides = zip(*map(_shares, input.size, wanted), strict=True)
    return Windows(pair(kernels), pair(strides))


def _shares(size: int, parts: int) -> Pair:
    """The size of the windows ⌊i·size/parts⌋ … ⌈(i+1)·size/parts⌉ − 1, and their distance."""
    starts = [i * size // parts for i in range(parts)]
    sizes = {cdiv((i + 1) * size, parts) - start for i, start in enumerate(starts)}
    steps = {after - before for before, after in itertools.pairwise(starts)}
    if len(sizes) != 1 or len(steps) > 1 or 0 in steps:
        raise DenseError(f"it pools {size} positions to {parts}, by windows that are not all alike")
    return sizes.pop(), steps.pop() if steps else 1


def _maximum(to: Recorder, input: Value, windows: Windows, ceil_mode: bool = False) -> Value:
    operation = Maximum(windows.kernel, multiplied(input.dilation, windows.dilation))
    after = windows.through(input, input.channels, ceil_mode=ceil_mode)
    return to.add(operation, (input,), after, kernel=windows.kernel)


def _average(to: Recorder, input: Value, windows: Windows, divisor: int, ceil_mode: bool = False) -> Value:
    operation = Average(windows.kernel, divisor, input.dilation)
    after = windows.through(input, input.channels, ceil_mode=ceil_mode)
    return to.add(operation, (input,), after, kernel=windows.kernel)


@rule("mean", "amax", "sum")
def _over_positions(to: Recorder, input, dim=None, keepdim=False, *, name: str, dtype=None) -> Value:
    """A pool over the whole height or width of a patch, or both."""
    axes = {input.axis(each) for each in ((dim,) if isinstance(dim, int) else dim or range(input.rank))}
    spatial = set(range(2, input.rank))
    if not axes or not axes <= spatial or dtype is not None or (input.rank == 2):
        raise DenseError(f"{name} over the dimensions {sorted(axes)} of {told(input.shape)}: only over positions")
    whole = axes == spatial
    kernel = (input.size[0] if whole or 2 in axes else 1), (input.size[1] if whole or 3 in axes else 1)
    windows = Windows(kernel, (1, 1))
    if name == "amax":
        made = _maximum(to, input, windows)
    else:
        made = _average(to, input, windows, math.prod(kernel) if name == "mean" else 1)
    return made if keepdim else replace(made, rank=input.rank - len(axes))


# ---- what treats all pixels alike ------------------------------------------------------------------------------------


def constant(to: Recorder, tensor: torch.Tensor, like: Value) -> Any:
    """A tensor that is combined with ``like``, in the form that this has in the dense network."""
    if tensor.dim() == 0 and not to.is_held(tensor) and not tensor.requires_grad:
        return tensor.item()
    rank = 2 if like.rank == 2 else 4
    if tensor.dim() and like.rank != rank:
        raise DenseError(f"it combines {told(like.shape)} with a constant {list(tensor.shape)}")
    if tensor.dim() and rank == 2 and not like.is_pixelwise:
        raise DenseError(f"it combines the flattened {told(like.shape)} with a constant {list(tensor.shape)}")
    if tensor.dim() > rank or any(size != 1 for size in tensor.shape[::-1][: rank - 2]):
        raise DenseError(f"it combines {told(like.shape)} with a constant {list(tensor.shape)}, one for each position")
    if rank == tensor.dim() and tensor.shape[0] != 1:
        raise DenseError(f"it combines {told(like.shape)} with a constant {list(tensor.shape)}, one for each sample")
    if tensor.dim() >= rank - 1 and tensor.shape[-rank + 1] not in (1, like.channels):
        raise DenseError(f"it combines {told(like.shape)} with a constant {list(tensor.shape)}")
    held: Held = to.held(tensor, "constant")  # type: ignore[assignment]  # it is not None
    return replace(held, of_rows=rank == 2)
