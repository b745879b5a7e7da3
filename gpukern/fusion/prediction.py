"""The kernel that a fused convolution or linear layer gets, and the least time that it could take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from gpukern.conv import Direction, Epilogue, conv_problem, minimum_work, pooled_choice, pooled_problem, seconds_apart
from gpukern.explain.formatting import describe_plan
from gpukern.explain.query import KINDS, Question, convolution, linear
from gpukern.explain.ranking import chosen, ranked, residual_bytes
from gpukern.fusion.program import arguments, tensor_of
from gpukern.runtime.device import DEVICES, DeviceSpec, assumed_peaks
from gpukern.runtime.precision import conv_precision
from gpukern.runtime.roofline import Work, floor

#: Device for byte counts: they are the same on all.
_ANY = DEVICES["h100"]


class Kernel(NamedTuple):
    """A plan in words, the bytes that must move, and the seconds of the roofline and of the plan.

    Without a device there is no plan, and there are no seconds.
    """

    plan: str
    bytes: int
    floor: float | None
    expected: float | None


def kernel(node: Node, device: DeviceSpec | None, channels_last: bool) -> Kernel | None:
    """Return the kernel of a gpukern::conv2d, also with a max pool, or gpukern::linear in a shaped graph; else None."""
    question = question_of(node, device or _ANY, channels_last)
    if question is None:
        return None
    if device is None:
        problem = question.problem
        if node.target is torch.ops.gpukern.conv2d_max_pool2d.default:
            problem = pooled_problem(problem)
        return Kernel("", _least(replace(question, problem=problem))[0], None, None)
    if node.target is torch.ops.gpukern.conv2d_max_pool2d.default:
        return _with_pool(question)
    return _alone(question)


def _alone(question: Question) -> Kernel:
    plan, _ = chosen(question)
    return Kernel(describe_plan(plan, question.direction), *_least(question), ranked(question, plan).seconds)


def _with_pool(question: Question) -> Kernel:
    """Return the kernel of ``question`` and the max pool that follows: one launch or two, as the operator chooses."""
    both = replace(question, problem=pooled_problem(question.problem))
    launch = question.problem, question.first, question.second, True, *KINDS[question.kind], question.device
    if pooled_choice(*launch) is not None:
        return _alone(both)
    words = f"{_alone(question).plan}, and max_pool2d"
    return Kernel(words, *_least(both), seconds_apart(question.problem, question.operands, question.device))


def _least(question: Question) -> tuple[int, float]:
    """The bytes that must move, and the seconds of the roofline."""
    must = minimum_work(question.problem, question.direction, question.operands.itemsize, question.operands.kind)
    moved = must.bytes + residual_bytes(question)
    return int(moved), floor(Work(must.flops, moved, must.kind), assumed_peaks(question.device)).seconds


def question_of(node: Node, device: DeviceSpec, channels_last: bool) -> Question | None:
    given: dict[str, Any] = arguments(node)
    if node.target is torch.ops.gpukern.linear.default:
        (rows, inputs), (outputs, _) = tensor_of(given["input"]).shape, tensor_of(given["weight"]).shape
        kind = _kind(tensor_of(node).dtype)
        has_bias = given["bias"] is not None
        return linear(rows, inputs, outputs, Direction.FORWARD, kind, device, has_bias, given["activation"])
    if node.target not in (torch.ops.gpukern.conv2d.default, torch.ops.gpukern.conv2d_max_pool2d.default):
        return None
    shapes = tuple(tensor_of(given["input"]).shape), tuple(tensor_of(given["weight"]).shape)
    windows = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    problem = conv_problem(*shapes, None, *windows, given["groups"])
    epilogue = Epilogue(given["activation"], given.get("residual") is not None)
    has_bias = given["bias"] is not None
    return convolution(
        problem, Direction.FORWARD, _kind(tensor_of(node).dtype), channels_last, device, has_bias, epilogue
    )


def _kind(dtype: torch.dtype) -> str:
    if dtype is torch.float32:
        return "tf32" if conv_precision(dtype) == "tf32" else "float32"
    return str(dtype).removeprefix("torch.")
