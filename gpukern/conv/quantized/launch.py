"""Convolutions in 8 bits by the kernels, in functions of the same names and signatures as ``reference.py``."""

from __future__ import annotations

import torch

from gpukern.conv.launch import launch_into
from gpukern.conv.plan import ConvPlan, Direction
from gpukern.conv.pooled.problem import windows_of
from gpukern.conv.prepare import plan_without, pooled_choice, prepare_launch
from gpukern.conv.problem import ConvProblem, matrix_problem, pooled_problem
from gpukern.conv.quantized import reference
from gpukern.conv.requantize import Requantize
from gpukern.conv.request import Epilogue, Prepared, Types
from gpukern.ops._pool2d.launch import max_pool2d
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.eight_bits import check_float8, in_8_bits, inverse
from gpukern.runtime.precision import conv_precision, matmul_precision
from gpukern.runtime.refusal import DescriptorRefused
from gpukern.runtime.tensors import memory_format_of


def conv2d_quantized(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    pool: bool,
) -> torch.Tensor:
    operands = input, weight, scale, bias, residual
    epilogue = activation, negative_slope, residual_scale, output_scale, output_dtype
    if not pool:
        return launch_quantized(Direction.FORWARD, problem, *operands, *epilogue)
    device = device_spec(input.device)
    plan = pooled_choice(
        problem,
        input.stride(),
        weight.stride(),
        (input.data_ptr() | weight.data_ptr()) % 16 == 0,
        weight.dtype,
        conv_precision(weight.dtype),
        device,
        Types(input.dtype, output_dtype),
    )
    if plan is None:
        y = launch_quantized(Direction.FORWARD, problem, *operands, *epilogue)
        return max_pool2d(windows_of(problem), y, memory_format_of(input, weight))
    try:
        return launch_quantized(Direction.FORWARD, pooled_problem(problem), *operands, *epilogue, plan)
    except DescriptorRefused as refusal:
        plan_without(plan, device, refusal)
    return conv2d_quantized(problem, *operands, *epilogue, True)


def conv_transpose2d_quantized(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    operands = input, weight, scale, bias, residual
    epilogue = activation, negative_slope, residual_scale, output_scale, output_dtype
    return launch_quantized(Direction.INPUT_GRAD, problem, *operands, *epilogue)


def linear_quantized(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute the product as a convolution of images of one pixel."""
    outputs, inputs = weight.shape
    problem = matrix_problem(input.shape[0], inputs, outputs)
    prepared = _prepared(problem, Direction.FORWARD, input, weight, False, Epilogue(activation), output_dtype)
    output = input.new_empty_strided((problem.N, outputs), (max(outputs, 1), 1), dtype=output_dtype)
    scales = _scales(scale, None, 1.0, output_scale, output_dtype)
    _write(prepared, output, input, weight, bias, None, negative_slope, scales, output_scale)
    return output


def launch_quantized(
    direction: Direction,
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    negative_slope: float,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
    plan: ConvPlan | None = None,
) -> torch.Tensor:
    """Return the output of a convolution, or of a transposed one; ``plan`` replaces the chosen one."""
    epilogue = Epilogue(activation, residual is not None)
    if residual is not None:
        check_float8(residual.dtype, device_spec(input.device))
    prepared = _prepared(problem, direction, input, weight, None, epilogue, output_dtype, plan)
    output = input.new_empty_strided(prepared.shape, prepared.strides, dtype=output_dtype)
    scales = _scales(scale, residual, residual_scale, output_scale, output_dtype)
    _write(prepared, output, input, weight, bias, residual, negative_slope, scales, output_scale)
    return output


def _prepared(
    problem: ConvProblem,
    direction: Direction,
    input: torch.Tensor,
    weight: torch.Tensor,
    channels_last: bool | None,
    epilogue: Epilogue,
    output_dtype: torch.dtype,
    plan: ConvPlan | None = None,
) -> Prepared:
    """Return the launch for these tensors, images and filters or matrices."""
    precision = conv_precision if input.dim() == 4 else matmul_precision
    first, second = ((*tensor.stride(), 0, 0)[:4] for tensor in (input, weight))
    return prepare_launch(
        problem,
        direction,
        first,
        second,
        channels_last,
        (input.data_ptr() | weight.data_ptr()) % 16 == 0,
        weight.dtype,
        precision(weight.dtype),
        device_spec(input.device),
        epilogue,
        plan,
        Types(input.dtype, output_dtype),
    )


def _scales(
    scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_scale: float,
    output_scale: float,
    output_dtype: torch.dtype,
) -> Requantize:
    return Requantize(
        None if scale is None else scale.contiguous(),
        residual_scale if residual is not None and in_8_bits(residual.dtype) else None,
        inverse(output_scale) if in_8_bits(output_dtype) else None,
    )


def _write(
    prepared: Prepared,
    output: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    negative_slope: float,
    scales: Requantize,
    output_scale: float,
) -> None:
    """Fill ``output``, with another kernel if the driver refuses a descriptor of a plan that no caller chose."""
    if output.numel() and not first.numel():
        zeros = torch.zeros_like(output, dtype=torch.float32)
        given = scales.scale, bias, residual, scales.residual_scale or 1.0
        y = reference.epilogue(zeros, *given, prepared.activation, negative_slope)
        output.copy_(reference.rounded(y, output_scale, output.dtype))
        return
    try:
        launch_into(prepared, output, first, second, bias, residual, negative_slope, None, requantize=scales)
        return
    except DescriptorRefused as refusal:
        if prepared.again is None:
            raise
        plan_without(prepared.plan, device_spec(first.device), refusal)
    _write(prepared.again(), output, first, second, bias, residual, negative_slope, scales, output_scale)
