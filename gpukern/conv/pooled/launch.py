"""Launch of a convolution and the max pool after it, as one kernel or as two."""

from __future__ import annotations

import torch

from gpukern.conv.launch import conv2d, prepared_for, run
from gpukern.conv.plan import Direction
from gpukern.conv.pooled.problem import windows_of
from gpukern.conv.prepare import plan_without, pooled_choice
from gpukern.conv.problem import ConvProblem, pooled_problem
from gpukern.conv.request import Epilogue
from gpukern.ops._pool2d.launch import max_pool2d
from gpukern.runtime.current_device import device_spec
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.refusal import DescriptorRefused
from gpukern.runtime.tensors import memory_format_of


def conv2d_max_pool2d(
    problem: ConvProblem,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    negative_slope: float,
) -> torch.Tensor:
    device = device_spec(input.device)
    plan = pooled_choice(
        problem,
        input.stride(),
        weight.stride(),
        (input.data_ptr() | weight.data_ptr()) % 16 == 0,
        input.dtype,
        conv_precision(input.dtype),
        device,
    )
    if plan is None:
        y = conv2d(problem, input, weight, bias, None, activation, negative_slope)
        return max_pool2d(windows_of(problem), y, memory_format_of(input, weight))
    epilogue = Epilogue(activation)
    prepared = prepared_for(pooled_problem(problem), Direction.FORWARD, input, weight, None, epilogue, plan)
    try:
        return run(prepared, input, weight, bias, None, negative_slope)[0]
    except DescriptorRefused as refusal:
        plan_without(plan, device, refusal)
    return conv2d_max_pool2d(problem, input, weight, bias, activation, negative_slope)
