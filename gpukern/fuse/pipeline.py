"""Capture → match → fold → lower → verify → report, on copies of the model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern.fuse.account import Work, account
from gpukern.fuse.alone import judge_alone, what_is_wrong
from gpukern.fuse.capture import capture, private_copy
from gpukern.fuse.constants import evaluate_constants
from gpukern.fuse.errors import FusionError
from gpukern.fuse.lower import Lowered, lower
from gpukern.fuse.match import Match, find
from gpukern.fuse.model import FusedModel
from gpukern.fuse.module import FusedModule, Interface
from gpukern.fuse.program import Program, aten, is_call
from gpukern.fuse.settle import settle
from gpukern.fuse.timing import beside
from gpukern.fuse.verify import Witness, blame, cast
from gpukern.fuse.why import Left, left, require_account

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def run(
    model: torch.nn.Module,
    inputs: tuple,
    *,
    dtype: torch.dtype | None,
    channels_last: bool,
    cuda_graph: bool,
    dynamic_batch: bool,
    verify: bool,
    measure: bool,
    skip: Sequence[str],
    strict: bool,
) -> FusedModel:
    """:func:`gpukern.fuse` of the tuple of arguments that ``inputs`` is."""
    device = _device(inputs)
    if cuda_graph and device.type != "cuda":
        raise RuntimeError(f"cuda_graph=True needs the model and its inputs on a CUDA device, got {device}")
    exact = private_copy(model)
    notes = _notes_on(model)
    dtype = dtype or _dtype_of(exact, inputs)
    if dtype not in _DTYPES:
        raise ValueError(f"fuse() computes in one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    inputs = _telling(inputs, notes)
    with torch.no_grad():
        captured = capture(private_copy(exact).to(dtype), exact, cast(inputs, dtype), dynamic_batch=dynamic_batch)
        evaluated = evaluate_constants(captured)
        program = settle(evaluated, skip)
        matches = find(program, skip)
        unfused = left(program, matches, skip)
        require_account(evaluated, program, matches, unfused)
        if strict:
            _require_all(unfused)
        if channels_last and any(is_call(node, aten.as_strided.default) for node in program.graph.nodes):
            channels_last = False
            notes.append("The model reads tensors by strides of its own: not channels_last")
        build = functools.partial(_build, program, channels_last)
        lowered, module = build(matches)
        found, alone = None, []
        prepared = module.prepared(inputs)
        if verify:
            witness = Witness(exact, inputs, dtype, channels_last=channels_last)
            found = witness.judge(module)
            alone = judge_alone(program, matches, lowered, prepared, dtype)
            found = replace(found, wrong=what_is_wrong(alone) or "")
        work = Work(exact, captured, evaluated, matches, lowered, unfused, channels_last)
        errors = [each.in_whole for each in alone]
        report = account(work, dtype, device, prepared, found, errors, (*notes, *captured.notes))
        if found is not None and not found.passed:
            told = found.wrong or blame(found, matches, lambda chosen: witness.judge(build(chosen)[1]))
            raise FusionError(told, replace(report, notes=(told, *report.notes)))
        fused = FusedModel(module, report, inputs, captured.dynamic_batch, cuda_graph)
        if measure and device.type == "cuda":
            fused.report = beside(fused, exact, inputs, channels_last)
    return fused


def _build(program: Program, channels_last: bool, matches: Sequence[Match]) -> tuple[Lowered, FusedModule]:
    lowered = lower(program, matches, channels_last=channels_last)
    return lowered, FusedModule(lowered.module, Interface.of(program, channels_last))


# ---- what was given -------------------------------------------------------------------------------------------------


def _device(inputs: tuple) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TypeError("fuse() needs an example: a tensor, or a tuple of arguments with a tensor among them")
    return tensors[0].device


def _dtype_of(model: torch.nn.Module, inputs: tuple) -> torch.dtype:
    held = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs)]
    return next((t.dtype for t in held if isinstance(t, torch.Tensor) and t.is_floating_point()), torch.float32)


def _notes_on(model: torch.nn.Module) -> list[str]:
    notes = []
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        named = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
        notes.append(f"In training mode were {named}: fused as in evaluation mode, on a copy")
        warnings.warn(f"gpukern.fuse: {named} in training mode; fused as in evaluation mode", stacklevel=4)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.isfinite().all():
            notes.append(f"{name} is not finite in {buffer.dtype}")
            warnings.warn(f"gpukern.fuse: {name} of the model is not finite in {buffer.dtype}", stacklevel=4)
    return notes


def _telling(inputs: tuple, notes: list[str]) -> tuple:
    """``inputs`` with random numbers for tensors that are all of one value: those would prove next to nothing."""

    def telling(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
            return leaf
        if not (leaf == leaf.flatten()[0]).all():
            return leaf
        notes.append("An example input has one value throughout: verified with random numbers in its place")
        generator = torch.Generator().manual_seed(0)
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return pytree.tree_map(telling, inputs)


def _require_all(unfused: Sequence[Left]) -> None:
    told = [f"{each.told.name}: {each.told.reason}" for each in unfused if each.follows and not each.asked]
    if told:
        raise FusionError("strict=True, and these stay unfused: " + "; ".join(told))
