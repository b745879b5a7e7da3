"""Capture → match → fold → lower → verify → report, on copies of the model."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern import formatting
from gpukern.fusion import batch, chance
from gpukern.fusion.alone import judge_alone, what_is_wrong
from gpukern.fusion.batch import BatchMatters
from gpukern.fusion.build_report import Work, account
from gpukern.fusion.calls import Signature, in_order, take_in_order
from gpukern.fusion.capture import capture_program, private_copy
from gpukern.fusion.conditions import skipped_by
from gpukern.fusion.constants import evaluate_constants
from gpukern.fusion.errors import FusionError
from gpukern.fusion.evidence import Evidence, gather, on_bound, require_rest
from gpukern.fusion.given import duplicate
from gpukern.fusion.lowering import Lowered, lower
from gpukern.fusion.match import Match
from gpukern.fusion.matcher import Declined, find, require_account
from gpukern.fusion.model import FusedModel
from gpukern.fusion.module import FusedModule, Interface
from gpukern.fusion.program import InputSpec, Program, aten, is_call, title
from gpukern.fusion.quantization.settings import Settings
from gpukern.fusion.quantization.stage import Stage, in_eight_bits
from gpukern.fusion.report.values import Verification
from gpukern.fusion.settling import settle
from gpukern.fusion.timing import beside
from gpukern.fusion.verify import Witness, blame, cast

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def run(
    model: torch.nn.Module,
    inputs: tuple,
    named: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    eight: Settings | None = None,
    channels_last: bool,
    cuda_graph: bool,
    dynamic_batch: bool,
    verify: bool,
    measure: bool,
    skip: Sequence[str],
    strict: bool,
) -> FusedModel:
    """:func:`gpukern.fuse` of the tuple of arguments that ``inputs`` is, and of ``named`` ones."""
    inputs, by_name = in_order(model, inputs, named)
    signature = Signature.of(model, by_name)
    inputs = pytree.tree_map(lambda leaf: leaf, inputs)  # a torch.Size is a tuple then
    device = _device(inputs)
    if cuda_graph and device.type != "cuda":
        raise RuntimeError(f"cuda_graph=True needs the model and its inputs on a CUDA device, got {device}")
    exact = private_copy(model)
    take_in_order(exact, by_name)
    notes = _notes_on(model, changed=not exact.training)
    own = _dtype_of(exact, inputs)
    dtype = dtype or own
    if dtype not in _DTYPES:
        raise ValueError(f"fuse() computes in one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    if torch.is_autocast_enabled(device.type):
        notes.append("Autocast was on: a fused model ignores it, and so does its proof")
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        evidence = gather(exact, inputs, own) if verify else None
        if evidence is not None:
            inputs, notes = evidence.inputs, [*notes, *evidence.notes]
        operands = exact, inputs, signature, dtype, evidence, device, cuda_graph
        fusing = functools.partial(
            _fused, *operands, channels_last=channels_last, skip=skip, strict=strict, eight=eight
        )
        try:
            fused = fusing(notes, dynamic_batch)
        except BatchMatters as problem:
            fused = fusing([*notes, f"The batch size is fixed, as in the example: {problem}"], False)
        if measure and device.type == "cuda":
            fused.report = beside(fused, exact, inputs, channels_last)
    return fused


def _fused(
    exact: torch.nn.Module,
    inputs: tuple,
    signature: Signature,
    dtype: torch.dtype,
    evidence: Evidence | None,
    device: torch.device,
    cuda_graph: bool,
    notes: list[str],
    dynamic_batch: bool,
    *,
    channels_last: bool,
    skip: Sequence[str],
    strict: bool,
    eight: Settings | None,
) -> FusedModel:
    """Fuse ``exact``, a private copy; ``eight``: what is asked of 8 bits. BatchMatters if its batch cannot be free."""
    with torch.no_grad():
        typed = private_copy(exact).to(dtype), exact, cast(inputs, dtype)
        captured = capture_program(*typed, signature, dynamic_batch=dynamic_batch)
        captured = replace(captured, inputs=tuple(map(_as_given, captured.inputs, pytree.tree_leaves(inputs))))
        notes = [*notes, *_on_chance(captured, evidence)]
        evaluated = evaluate_constants(captured)
        notes += _without_module(evaluated, skip)
        settled = settle(evaluated, skip)
        found, program = find(settled, skip), settled.program
        matches = found.matches
        require_account(evaluated, program, found)
        if strict:
            _require_all(found.declined)
        if channels_last and any(is_call(node, aten.as_strided.default) for node in program.graph.nodes):
            channels_last = False
            notes.append("The model reads tensors by strides of its own: not channels_last")
        build = functools.partial(_build, program, channels_last)
        lowered, module = build(matches)
        proof, alone = None, []
        prepared = module.prepared(inputs)
        doubled = captured.dynamic_batch and batch.size_of(inputs, captured.free) == 1
        if doubled:
            batch.require_that_it_runs(module.in_order, inputs)
        if evidence is not None:
            witness = Witness(exact, inputs, dtype, channels_last=channels_last, see=evidence.see)
            proof = witness.judge(module.in_order)
            if doubled and not proof.passed:
                raise BatchMatters("a batch of one is a case of its own for the model")
            alone = judge_alone(program, matches, lowered, prepared, dtype)
            proof = replace(proof, wrong=what_is_wrong(alone) or "")
        if evidence is not None and proof is not None and proof.passed:
            notes += on_bound(proof.unfused, proof.bound)
            require_rest(exact, inputs, dtype, evidence.outputs, module.in_order)
            if captured.dynamic_batch:
                notes += _at_other_sizes(
                    exact, inputs, dtype, module, captured.free, channels_last=channels_last, see=evidence.see
                )
        work = Work(exact, captured, evaluated, matches, lowered, found.declined, channels_last)
        errors = [each.in_whole for each in alone]
        report = account(work, dtype, device, prepared, proof, errors, (*notes, *captured.notes))
        if proof is not None and not proof.passed:
            told = proof.wrong or blame(proof, matches, lambda chosen: witness.judge(build(chosen)[1].in_order))
            raise FusionError(told, replace(report, notes=(told, *report.notes)))
        if eight is not None:
            stage = Stage(
                work, program, module, inputs, captured.free, dtype, None if evidence is None else evidence.see
            )
            made = in_eight_bits(
                stage, eight, lambda each: FusedModel(each, report, inputs, captured.dynamic_batch, False)
            )
            module, notes = made.module, [*report.notes, *made.notes]
            report = account(made.work, dtype, device, prepared, proof, made.errors, notes)
            report = replace(report, dtype=made.quantization.format, quantization=made.quantization)
    return FusedModel(module, report, inputs, captured.dynamic_batch, cuda_graph)


def _as_given(spec: InputSpec | None, leaf: Any) -> InputSpec | None:
    return spec and replace(spec, example=leaf.dtype)


def _on_chance(captured: Program, evidence: Evidence | None) -> list[str]:
    """Note that a model is random, if verification is off; otherwise raise FusionError, also for one that keeps a
    state."""
    draws = chance.draws(captured.graph)
    if evidence is None:
        return [f"The model is random, by {'; '.join(draws)}"] if draws else []
    if draws or evidence.difference:
        why = f"it draws random numbers, by {'; '.join(draws)}" if draws else "it is random, or keeps a state"
        differ = formatting.number(evidence.difference, 2)
        how = f": two calls of it with the same example differ by {differ} of its size"
        raise FusionError(
            f"nothing can be proved of a model that does not repeat itself{how if evidence.difference else ''}; {why}. "
            "Make it repeat itself in evaluation mode, or fuse with verify=False, unproved"
        )
    return []


def _at_other_sizes(
    exact: torch.nn.Module,
    inputs: tuple,
    dtype: torch.dtype,
    module: FusedModule,
    free: batch.Free,
    **settings: Any,
) -> list[str]:
    """Compare ``module`` with the original for other sizes of the batch, and let it refuse those that it must."""

    def original(given: tuple) -> Any:
        return duplicate(exact).to(dtype)(*cast(given, dtype))

    def judge(given: tuple) -> Verification:
        return Witness(exact, given, dtype, **settings).judge(module.in_order)

    apart = batch.sizes_apart(original, module.in_order, judge, inputs, free)
    module.interface = replace(module.interface, apart=apart, may_lack_it=True)
    lacking = batch.may_lack_it(module.in_order, judge, inputs, free)
    module.interface = replace(module.interface, may_lack_it=lacking)
    if not any(1 in sizes for sizes in apart.values()):
        return []
    return ["The batch size is free but for 1, which is a case of its own for the model"]


def _build(program: Program, channels_last: bool, matches: Sequence[Match]) -> tuple[Lowered, FusedModule]:
    lowered = lower(program, matches, channels_last=channels_last)
    return lowered, FusedModule(lowered.module, Interface.of(program, channels_last))


# ---- what was given -------------------------------------------------------------------------------------------------


def _device(inputs: tuple) -> torch.device:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TypeError("fuse() needs an example: a tensor, or a tuple of arguments with a tensor among them")
    for tensor in tensors:
        if tensor.is_meta:
            raise FusionError("the example is on the meta device: fuse() needs its values")
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise FusionError(
                f"the example is sparse or quantized ({tensor.layout}, {tensor.dtype}): fuse() takes dense ones"
            )
    return tensors[0].device


def _dtype_of(model: torch.nn.Module, inputs: tuple) -> torch.dtype:
    held = [*model.parameters(), *model.buffers(), *pytree.tree_leaves(inputs)]
    return next((t.dtype for t in held if isinstance(t, torch.Tensor) and t.is_floating_point()), torch.float32)


def _notes_on(model: torch.nn.Module, *, changed: bool) -> list[str]:
    """``changed``: whether its copy is in evaluation mode. What torch.export captured has no such mode."""
    notes = []
    training = [name or "the model" for name, module in model.named_modules() if changed and module.training]
    if training:
        named = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
        notes.append(f"In training mode were {named}: fused as in evaluation mode, on a copy")
        warnings.warn(f"gpukern.fuse: {named} in training mode; fused as in evaluation mode", stacklevel=4)
    for name, buffer in model.named_buffers():
        # torch has no isfinite() of 8 bits.
        if buffer.is_floating_point() and not (buffer.float() if buffer.itemsize == 1 else buffer).isfinite().all():
            notes.append(f"{name} is not finite in {buffer.dtype}")
            warnings.warn(f"gpukern.fuse: {name} of the model is not finite in {buffer.dtype}", stacklevel=4)
    return notes


def _without_module(program: Program, skip: Sequence[str]) -> list[str]:
    """A note on patterns that skip nothing."""
    unused = [
        repr(pattern) for pattern in skip if not any(skipped_by(node, (pattern,)) for node in program.graph.nodes)
    ]
    return [f"Nothing is skipped by {', '.join(unused)}: the path of no module that computes"] if unused else []


def _require_all(declined: Sequence[Declined]) -> None:
    told = [f"{title(each.node)}: {each.reason}" for each in declined if each.follows and not each.asked]
    if told:
        raise FusionError("strict=True, and these stay unfused: " + "; ".join(told))
