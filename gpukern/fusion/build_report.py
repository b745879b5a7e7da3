"""Construction of the report of a fusion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph

from gpukern.fusion import describe
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.match import Match
from gpukern.fusion.matcher import Declined
from gpukern.fusion.moving import PART_OF
from gpukern.fusion.program import Program, tensor_of, title
from gpukern.fusion.report import FusedGroup, FusionReport, NotFused, Verification


@dataclass(frozen=True)
class Work:
    """Intermediate results of fusing: the captured program, the same with constants evaluated, and the outcome.

    ``operators`` and ``bytes``: of matches at some places, where they are not those of the match.
    """

    model: torch.nn.Module
    captured: Program
    program: Program
    matches: Sequence[Match]
    lowered: Lowered
    declined: Sequence[Declined]
    channels_last: bool
    operators: Mapping[int, str] = field(default_factory=dict)
    bytes: Mapping[int, int] = field(default_factory=dict)


def account(
    work: Work,
    dtype: torch.dtype,
    device: torch.device,
    prepared: Sequence[Any],
    verification: Verification | None,
    errors: Sequence[float],
    notes: Sequence[str],
) -> FusionReport:
    """Build the report. ``prepared``: the example's leaves as the graph takes them; ``errors``: per match, if known."""
    captured, lowered = work.captured, work.lowered
    before = describe.shaped(captured.graph, captured.constants, captured.modules, prepared)
    held = dict(lowered.module.named_buffers(remove_duplicate=False))
    after = describe.shaped(lowered.module.graph, held, captured.modules, prepared)
    fusing = [place for place, match in enumerate(work.matches) if match.fuses]
    numbers = {place: number for number, place in enumerate(fusing)}
    of_node = {
        node.meta.get(PART_OF, node.name): numbers[place] for place in fusing for node in work.matches[place].nodes
    }
    kernels = _kernels(after, device, work.channels_last)
    return FusionReport(
        model=type(work.model).__name__,
        dtype=_name(dtype),
        fused=tuple(_group(work, place, errors, kernels) for place in fusing),
        not_fused=tuple(NotFused(title(each.node), each.reason) for each in work.declined),
        before=describe.totals(before, sum(parameter.numel() for parameter in work.model.parameters())),
        after=describe.totals(after, describe.constants_of(lowered)),
        graph_before=describe.picture_before(work.program.graph, of_node),
        graph_after=describe.picture_after(after, work.matches, numbers),
        verification=verification,
        notes=tuple(notes),
        environment=describe.environment(device),
    )


def _group(work: Work, place: int, errors: Sequence[float], kernels: dict[int, Any]) -> FusedGroup:
    match, folded, kernel = work.matches[place], work.lowered.folded[place], kernels.get(place)
    return FusedGroup(
        modules=describe.modules_of(match, work.program.leaves),
        pattern=match.pattern,
        operator=work.operators.get(place, match.operator),
        dtype=_name(tensor_of(match.output).dtype if folded is None else folded.dtype),
        note="" if folded is None else folded.note,
        plan=kernel.plan if kernel else "",
        bytes=kernel.bytes if kernel else work.bytes.get(place),
        floor=kernel.floor if kernel else None,
        expected=kernel.expected if kernel else None,
        # Infinite if an intermediate value overflows, which the output may not show.
        error=errors[place] if errors and math.isfinite(errors[place]) else None,
    )


def _kernels(graph: Graph, device: torch.device, channels_last: bool) -> dict[int, Any]:
    """The kernel of each match that has one, by its place; on a CPU only what it moves."""
    from gpukern.explain.formatting import device_called
    from gpukern.fusion.prediction import kernel

    spec = device_called(None) if device.type == "cuda" else None
    found = {
        node.meta.get("gpukern_match"): kernel(node, spec, channels_last)
        for node in graph.nodes
        if node.op == "call_function" and "gpukern_match" in node.meta
    }
    return {place: each for place, each in found.items() if each is not None}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
