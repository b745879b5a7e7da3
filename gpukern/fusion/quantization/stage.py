"""The stage of :func:`gpukern.fuse` that makes eight bits of a model that was fused and proved in 16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpukern.fusion import batch
from gpukern.fusion.build_report import Work
from gpukern.fusion.decisions import See, leaves, returned
from gpukern.fusion.errors import FusionError, first_line
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.module import FusedModule
from gpukern.fusion.program import Program, operation
from gpukern.fusion.quantization.accounting import groups, moved
from gpukern.fusion.quantization.build import Calibration, build_scheme
from gpukern.fusion.quantization.data import Data, few, part, rows_of, take
from gpukern.fusion.quantization.domains import domains_of
from gpukern.fusion.quantization.network import network_of
from gpukern.fusion.quantization.noise import Energies
from gpukern.fusion.quantization.observe import Observer
from gpukern.fusion.quantization.progress import Shown, shown_progress
from gpukern.fusion.quantization.proof import Proof, true_values
from gpukern.fusion.quantization.rewriting import OF, quantized
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.search import Found, fewest_given_back
from gpukern.fusion.quantization.settings import Settings
from gpukern.fusion.quantization.simulation import rows_within
from gpukern.fusion.quantization.storage import last_layers, why_sixteen
from gpukern.fusion.quantization.trial import Base, Trial, Trials
from gpukern.fusion.report import Quantization, Reached

#: Rows on which the noise of groups is measured, those at least on which every operator is proved by itself, and bytes
#: in fp32 of what is run at once.
_PROVED, _CHECKED, _PART = 32, 8, 2**28


@dataclass(frozen=True)
class Stage:
    """What was fused in 16 bits, and for which example. ``program``: that of the matches. ``free``: the name of each
    leaf's free batch. ``see``: by what the model is judged; None if nothing shall be proved."""

    work: Work
    program: Program
    module: FusedModule
    inputs: tuple
    free: tuple[str | None, ...]
    precision: torch.dtype
    see: See | None


@dataclass(frozen=True)
class Outcome:
    """``work``: that of the 16-bit model with what is in eight bits. ``notes``: for the report. ``errors``: of each
    match's output, ‖y − truth‖ / ‖truth‖ in the whole model; none where nothing was proved."""

    module: FusedModule
    work: Work
    quantization: Quantization
    notes: tuple[str, ...]
    errors: tuple[float, ...] = ()


def in_eight_bits(stage: Stage, asked: Settings, wrapped: Any) -> Outcome:
    """Calibrate, choose the scheme, search for the target, and prove what was found.

    ValueError or TypeError for batches that are of no use; FusionError if the target cannot be met, or if an operator
    in eight bits is wrong.
    """
    with shown_progress() as shown:
        return _Quantizing(stage, asked, wrapped, shown).outcome()


class _Quantizing:
    def __init__(self, stage: Stage, asked: Settings, wrapped: Any, shown: Shown) -> None:
        self.stage, self.asked, self.shown = stage, asked, shown
        work = stage.work
        self.prepared = stage.module.prepared(stage.inputs)
        self.network = network_of(stage.program, work.matches, work.lowered, self.prepared, stage.precision)
        self.domains = domains_of(self.network)
        self.base = Base(work.model, work.lowered, stage.module, stage.see or returned, wrapped)

    def outcome(self) -> Outcome:
        try:
            observer = Observer(self.network, self.domains)
            data = take(self.asked.batches, self.stage.module, self.stage.free, observer.observe, self.shown.track)
        except (RuntimeError, NotImplementedError) as problem:
            raise FusionError(f"the folded model cannot be calibrated in float32: {first_line(problem)}") from problem
        layers, reasons = self._layers()
        free, tell = self.stage.free, self.shown.tell
        scheme = build_scheme(Calibration(self.network, self.domains, observer, self.asked, data, free, layers, tell))
        if self.stage.see is None:
            return self._unproved(scheme, data, layers, reasons)
        trials = Trials(self.base, self.asked.target, data.aside)
        tell(f"all {len(layers)} groups in 8 bits")
        whole = trials.run(scheme, layers)
        # Before anything is given back, which would hide an operator that is wrong.
        noise = self._proved(whole, data)
        found = fewest_given_back(whole, layers, trials, data.observed, free, tell)
        trial, reasons = self._with_last(found, trials, reasons)
        if trial is not whole:
            noise = self._proved(trial, data)
        self._other_sizes(trial.module)
        return self._reported(trial, found, trials, data, reasons, noise)

    # ---- which layers ----

    def _layers(self) -> tuple[list[str], dict[str, str]]:
        """The layers that may have eight bits, and why the others have not."""
        last = last_layers(self.network)
        reasons = {}
        for name in self.network.layers:
            why = why_sixteen(self.network, self.domains, name)
            if why or name in last:
                reasons[name] = why or "the last layer"
        return [name for name in self.network.layers if name not in reasons], reasons

    def _with_last(self, found: Found, trials: Trials, reasons: dict[str, str]) -> tuple[Trial, dict[str, str]]:
        """Last layers have eight bits only where the outputs are as good with them."""
        reasons |= {name: "given back" for name in found.given_back}
        best = found.trial
        for name in [each for each, why in reasons.items() if why == "the last layer"]:
            tried = trials.run(best.scheme, {*best.scheme.storage.eight, name})
            if tried.holds and tried.reached >= best.reached and tried.score.snr >= best.score.snr - _FREE:
                best = tried
                reasons.pop(name)
        return best, reasons

    # ---- proof ----

    def _proved(self, trial: Trial, data: Data) -> list[Energies] | None:
        if not trial.scheme.storage.eight:
            return None
        self.shown.tell("proving every operator")
        work, free = self.stage.work, self.stage.free
        proof = Proof(trial.scheme, trial.lowered, work.lowered, work.matches)
        size = rows_within(self.network, _PROVED, _PART)
        chosen = [
            part(leaves, free, start, start + size) if any(free) else leaves
            for leaves in few(data.aside, free, _PROVED)
            for start in range(0, rows_of(leaves, free), size)
        ]
        rows = 0
        for leaves_of, truth in zip(chosen, true_values(self.stage.program, work.matches, chosen), strict=True):
            proof.run_batch(trial.module.prepared(self.base.inputs(leaves_of)), truth, check=rows < _CHECKED)
            rows += rows_of(leaves_of, free)
        return proof.noise

    def _other_sizes(self, module: FusedModule) -> None:
        """The model in eight bits takes the batch sizes that the one in 16 takes, and returns what that does."""
        if not any(self.stage.free):
            return
        for size in (0, 1, 3):
            given = batch.resized(self.stage.inputs, self.stage.free, size)
            try:
                expected = leaves(self.stage.module.in_order(*given))
            except Exception:  # the model in 16 bits does not take it either
                continue
            if [each.shape for each in leaves(module.in_order(*given))] != [each.shape for each in expected]:
                raise FusionError(f"the fused model is wrong in 8 bits: with a batch of {size} its shapes are others")

    # ---- report ----

    def _unproved(self, scheme: Scheme, data: Data, layers: Sequence[str], reasons: dict[str, str]) -> Outcome:
        scheme = scheme.with_eight(layers)
        lowered = quantized(scheme, self.stage.work.lowered) if scheme.storage.eight else self.stage.work.lowered
        module = FusedModule(lowered.module, self.stage.module.interface)
        return self._outcome(module, lowered, scheme, data, reasons, None, {}, ())

    def _reported(
        self,
        trial: Trial,
        found: Found,
        trials: Trials,
        data: Data,
        reasons: dict[str, str],
        noise: list[Energies] | None,
    ) -> Outcome:
        made = self._outcome(
            trial.module, trial.lowered, trial.scheme, data, reasons, noise, found.noise, found.given_back
        )
        sixteen = trials.run(trial.scheme, ())
        whole = self._bytes(found.whole.lowered)
        told = replace(
            made.quantization,
            sixteen=Reached(sixteen.reached, sixteen.score.snr, made.quantization.bytes_before),
            every=Reached(found.whole.reached, found.whole.score.snr, whole),
            reached=Reached(trial.reached, trial.score.snr, made.quantization.bytes),
        )
        return replace(made, quantization=told)

    def _bytes(self, lowered: Lowered) -> int:
        return moved(self.stage.program, lowered, self.prepared).total

    def _outcome(
        self,
        module: FusedModule,
        lowered: Lowered,
        scheme: Scheme,
        data: Data,
        reasons: Mapping[str, str],
        noise: list[Energies] | None,
        costs: Mapping[str, float],
        given_back: Sequence[str],
    ) -> Outcome:
        work = self.stage.work
        before, after = (moved(self.stage.program, each, self.prepared) for each in (work.lowered, lowered))
        rows = groups(scheme, work.matches, work.program.leaves, noise, costs, reasons, given_back, before, after)
        metric = self.asked.target.metric
        told = Quantization(
            format=str(self.asked.format),
            precision=str(self.stage.precision).removeprefix("torch."),
            calibration=self.asked.calibration,
            metric="agreement" if metric is None else getattr(metric, "__name__", type(metric).__name__),
            target=self.asked.target.least,
            observed=data.observed_rows,
            aside=data.aside_rows,
            groups=rows,
            bytes_before=before.total,
            bytes=after.total,
        )
        notes = [data.words]
        if not scheme.storage.eight:
            notes.append("No group is in 8 bits: the model is the one in 16 bits")
        operators = {
            node.meta["gpukern_match"]: f"gpukern::{operation(node)}"
            for node in lowered.module.graph.nodes
            if OF in node.meta and "gpukern_match" in node.meta
        }
        made = replace(work, lowered=lowered, operators=operators, bytes=after.by_place)
        errors = () if noise is None else tuple(10 ** (-each.snr / 20) for each in noise)
        return Outcome(module, made, told, tuple(notes), errors)


#: Decibels that the outputs may lose to a last layer in eight bits.
_FREE = 0.1
