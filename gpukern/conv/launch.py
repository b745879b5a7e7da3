"""Convolution by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import functools

import torch

from gpukern.conv.layouts import Strides
from gpukern.conv.norm_grad import NormGrad
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.prepare import plan_without, prepare_launch
from gpukern.conv.problem import ConvProblem
from gpukern.conv.requantize import Requantize
from gpukern.conv.request import Epilogue, NormBefore, Prepared
from gpukern.ops._activation.launch import activation as activate
from gpukern.ops._images import strides_of
from gpukern.ops._reduction.functions import Statistics, Sums
from gpukern.ops._reduction.launch import channels_last_copy, copy_image, sums_and_deviations, with_workspace
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.refusal import DescriptorRefused


def conv2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    return _with_epilogue(_FORWARD, problem, input, weight, bias, residual, activation, negative_slope)


def conv_transpose2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    return _with_epilogue(Direction.INPUT_GRAD, problem, input, weight, bias, residual, activation, negative_slope)


def _with_epilogue(
    direction: Direction, problem: ConvProblem, input, weight, bias, residual, activation: str, negative_slope: float
) -> torch.Tensor:
    epilogue = _epilogue(activation, residual is not None)
    prepared = prepared_for(problem, direction, input, weight, None, epilogue)
    output = input.new_empty_strided(prepared.shape, prepared.strides)
    write(prepared, output, input, weight, bias, residual, negative_slope)
    return output


_FORWARD = Direction.FORWARD  # members of an enumeration are slow to look up
#: One object per set of arguments: a look-up takes less time than making one.
_epilogue = functools.cache(Epilogue)


def conv2d_statistics(
    problem: ConvProblem, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    prepared = prepared_for(problem, Direction.FORWARD, input, weight, None, Epilogue(statistics=True))
    output, statistics = run(prepared, input, weight, bias)
    if statistics is None:  # no pixels, or no channels to sum over
        values = output.to(torch.float32)
        total, pixels = values.sum((0, 2, 3)), max(output.numel() // max(problem.K, 1), 1)
        return output, total, (values - (total / pixels)[:, None, None]).square().sum((0, 2, 3))
    return output, statistics.sums, statistics.deviations


def conv2d_input_grad(
    problem: ConvProblem,
    grad: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    epilogue = _epilogue("none", added is not None)
    prepared = prepared_for(problem, Direction.INPUT_GRAD, grad, weight, channels_last, epilogue)
    return run(prepared, grad, weight, None, added)[0]


def conv2d_input_grad_norm(
    problem: ConvProblem,
    grad: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool,
    added: torch.Tensor | None,
    norm: NormBefore,
    activation: str,
    negative_slope: float,
    plan: ConvPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (g, its sums fp32 [2, C]) of :mod:`gpukern.ops.conv_norm_grad`; None if no kernel can.

    ``plan`` replaces the chosen one, for tools that try others.
    """
    epilogue = _epilogue(activation, added is not None, False, True)
    prepared = prepared_for(problem, Direction.INPUT_GRAD, grad, weight, channels_last, epilogue, plan)
    if not prepared.launch.tiles:
        return None
    output = grad.new_empty_strided(prepared.shape, prepared.strides)
    sums = Sums(totals=torch.empty((2, problem.C), dtype=torch.float32, device=grad.device))
    try:
        made = launch_into(prepared, output, grad, weight, None, added, negative_slope, sums, norm)
    except DescriptorRefused as refusal:
        if plan is not None:
            raise
        plan_without(prepared.plan, device_spec(grad.device), refusal)
        return conv2d_input_grad_norm(problem, grad, weight, channels_last, added, norm, activation, negative_slope)
    return (output, sums.totals) if made is not None else None


def conv2d_weight_grad(
    problem: ConvProblem, grad: torch.Tensor, input: torch.Tensor, channels_last: bool
) -> torch.Tensor:
    return run(prepared_for(problem, Direction.WEIGHT_GRAD, grad, input, channels_last), grad, input)[0]


def prepared_for(
    problem: ConvProblem,
    direction: Direction,
    first: torch.Tensor,
    second: torch.Tensor,
    channels_last: bool | None,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    plan: ConvPlan | None = None,
) -> Prepared:
    """Return the launch for these tensors, [N, C, H, W] and [K, C/G, R, S]; see ``prepare_launch``."""
    dtype = first.dtype
    return prepare_launch(
        problem,
        direction,
        first.stride(),
        second.stride(),
        channels_last,
        (first.data_ptr() | second.data_ptr()) % 16 == 0,
        dtype,
        conv_precision(dtype),
        device_spec(first.device),
        epilogue,
        plan,
    )


def run(
    prepared: Prepared,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    negative_slope: float = 0.0,
    statistics: Statistics | None = None,
) -> tuple[torch.Tensor, Statistics | None]:
    """Return the output, and what :func:`write` returns."""
    output = first.new_empty_strided(prepared.shape, prepared.strides)
    return output, write(prepared, output, first, second, bias, residual, negative_slope, statistics)


def write(
    prepared: Prepared,
    output: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    negative_slope: float = 0.0,
    statistics: Statistics | None = None,
) -> Statistics | None:
    """Fill ``output``; return its statistics if the launch was prepared to compute them.

    ``statistics``: where to leave them, by default in new memory for sums and deviations. None is returned where
    nothing was launched: without pixels, or without channels to sum over.

    If the driver refuses a descriptor of the plan, a plan of another kernel replaces it; DescriptorRefused if the
    caller chose the plan.
    """
    try:
        if prepared.in_place and residual is None and (bias is None or bias.is_contiguous()):
            prepared.launch.run(first, second, output, bias, None, None, negative_slope)
            return None
        if statistics is None and prepared.launch.tiles:
            statistics = sums_and_deviations(prepared.shape[1], first.device)
        return launch_into(prepared, output, first, second, bias, residual, negative_slope, statistics)  # type: ignore
    except DescriptorRefused as problem:
        if prepared.again is None:
            raise
        plan_without(prepared.plan, device_spec(first.device), problem)
    return write(prepared.again(), output, first, second, bias, residual, negative_slope, statistics)


def launch_into(
    prepared: Prepared,
    output: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    negative_slope: float,
    merged: Statistics | Sums | None,
    norm: NormBefore | None = None,
    requantize: Requantize | None = None,
) -> Statistics | Sums | None:
    """Fill ``output`` from operands of any layout.

    Return ``merged``, the statistics, or the sums with a ``norm``, with its workspace; None if it was not made.
    """
    if output.numel() == 0:
        return None
    if first.numel() == 0:
        # Empty sums: the weight gradient of an empty batch, a linear layer without features.
        write_empty_sums(prepared.activation, output, bias, residual, negative_slope)
        return None
    of_launch = prepared.launch
    if merged is not None and of_launch.tiles:
        channels, numbers = prepared.shape[1], 3 if norm is None else 2
        merged = with_workspace(  # type: ignore[type-var]
            merged, channels, first.device, *of_launch.tiles, taken=of_launch.counters, sums=numbers
        )
    pack_first, pack_second, pack_output = prepared.plan.pack
    if pack_first:
        first = channels_last_copy(first)
    if pack_second:
        second = channels_last_copy(second)
    written = output
    if pack_output:
        written = output.new_empty_strided(prepared.shape, prepared.written)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()  # the only operand that kernels take without strides: it must be contiguous
    residual = _laid_like(residual, written, prepared.written)
    if requantize is not None:
        of_launch.run(first, second, written, bias, residual, merged, negative_slope, requantize=requantize)
    elif norm is None:
        of_launch.run(first, second, written, bias, residual, merged, negative_slope)
    else:
        z, other = (_laid_like(each, written, prepared.written) for each in (norm.z, norm.other))
        through = _norm_grad(norm)
        of_launch.run(first, second, written, bias, residual, merged, negative_slope, z, other, through)
    if pack_output:
        copy_image(written, output)
    return merged


def _norm_grad(norm: NormBefore) -> NormGrad:
    mean, variance, weight, bias = (
        None if t is None else t.contiguous() for t in (norm.mean, norm.variance, norm.weight, norm.bias)
    )
    return NormGrad(mean, variance, weight, bias, norm.eps)


def write_empty_sums(
    activation: str,
    output: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    negative_slope: float,
) -> None:
    """Write the epilogue of zeros, computed in fp32 and rounded once."""
    sums = torch.zeros_like(output, dtype=torch.float32)
    if bias is not None:
        sums += bias.view(-1, *(1,) * (output.dim() - 2))
    if residual is not None:
        sums += residual
    output.copy_(sums if activation == "none" else activate(sums, activation, negative_slope))


def _laid_like(tensor: torch.Tensor | None, written: torch.Tensor, strides: Strides) -> torch.Tensor | None:
    """Return ``tensor`` such that a kernel that writes with ``strides`` reads it at the same places, 16 bytes at once.

    ``written`` is what it writes: a copy lies like it.
    """
    if tensor is None:
        return None
    same = tensor.stride() == strides or strides_of(tensor.shape, tensor.stride()) == strides_of(tensor.shape, strides)
    if same and tensor.data_ptr() % 16 == 0:
        return tensor
    copy = torch.empty_like(written, dtype=tensor.dtype)
    copy_image(tensor, copy)
    return copy
