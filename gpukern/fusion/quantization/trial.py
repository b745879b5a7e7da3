"""Trials: a model in eight bits, run by its operators on the batches kept aside, beside the original in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern.fusion.decisions import See, decided
from gpukern.fusion.errors import FusionError
from gpukern.fusion.lowering import Lowered
from gpukern.fusion.module import FusedModule
from gpukern.fusion.quantization.data import Leaves
from gpukern.fusion.quantization.noise import Score
from gpukern.fusion.quantization.rewriting import quantized
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.settings import Target
from gpukern.fusion.verify import truth_of

#: Below this signal-to-noise ratio, in decibels, an output is another one, whatever its argmax.
FLOOR = 10.0


@dataclass(frozen=True)
class Base:
    """The 16-bit model that was fused and proved: its lowering, and the module around it; the original it was made of.

    ``wrapped`` makes of a module what a user's metric takes.
    """

    model: torch.nn.Module
    lowered: Lowered
    module: FusedModule
    see: See
    wrapped: Callable[[FusedModule], Any]

    def inputs(self, leaves: Leaves) -> tuple:
        """The arguments of a batch."""
        return pytree.tree_unflatten(leaves, self.module.interface.in_spec)


@dataclass(frozen=True)
class Trial:
    """``reached``: what the target is measured by."""

    module: FusedModule
    lowered: Lowered
    scheme: Scheme
    score: Score
    reached: float
    target: Target

    @property
    def holds(self) -> bool:
        """Whether it reaches the target; a NaN does not."""
        return self.reached >= self.target.least and self.score.snr >= FLOOR


class Trials:
    """Runs trials of one scheme. ``aside``: the batches."""

    def __init__(self, base: Base, target: Target, aside: Sequence[Leaves]) -> None:
        self.base, self.target, self.aside = base, target, aside

    @functools.cached_property
    def truth(self) -> list[list[torch.Tensor]]:
        """The original's outputs for each batch."""
        return [truth_of(self.base.model, self.base.inputs(leaves), self.base.see)[1] for leaves in self.aside]

    def run(self, scheme: Scheme, eight: Collection[str]) -> Trial:
        """Try the layers ``eight`` in eight bits, and the others in 16."""
        scheme = scheme.with_eight(eight)
        lowered = quantized(scheme, self.base.lowered) if scheme.storage.eight else self.base.lowered
        module = FusedModule(lowered.module, self.base.module.interface)
        score = self._score(module, lowered)
        reached = score.agreement if self.target.metric is None else self._metric(module)
        return Trial(module, lowered, scheme, score, reached, self.target)

    def _score(self, module: FusedModule, lowered: Lowered) -> Score:
        score = Score()
        if self.base.see is decided:  # by operators, whose own comparisons are not the model's
            module = FusedModule(lowered.module, module.interface)
            module.network = lowered.module
        for leaves, truth in zip(self.aside, self.truth, strict=True):
            try:
                score.add(self.base.see(module.in_order, self.base.inputs(leaves)), truth)
            except ValueError as problem:
                raise FusionError(f"the model in 8 bits is wrong: {problem}") from None
        return score

    def _metric(self, module: FusedModule) -> float:
        assert self.target.metric is not None
        found = self.target.metric(self.base.wrapped(module))
        try:
            return float(found)
        except (TypeError, ValueError):
            raise TypeError(f"the metric of target returns a number, got {type(found).__name__}") from None


def words_of(trial: Trial) -> str:
    """What a trial reached, for a message."""
    snr = "" if math.isinf(trial.score.snr) else f", {trial.score.snr:.1f} dB"
    kind = "agreement" if trial.target.metric is None else "the metric"
    return f"{kind} {trial.reached:.4g}{snr}"
