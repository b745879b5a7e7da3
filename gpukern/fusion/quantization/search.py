"""Search for the layers that must go back to 16 bits for the target: those that cost most first, as few as will do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from gpukern.fusion.errors import FusionError
from gpukern.fusion.quantization.data import Leaves, few
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.simulation import Simulation, rows_within
from gpukern.fusion.quantization.trial import FLOOR, Trial, Trials, words_of

#: Images, and bytes of all their values, on which layers are ranked.
_ROWS, _BYTES = 16, 2**30


@dataclass(frozen=True)
class Found:
    """``trial`` reaches the target, ``whole`` had all layers in eight bits. ``given_back``: names of layers, in the
    order of their ``noise``, what each alone does to the outputs in eight bits relative to their signal."""

    trial: Trial
    whole: Trial
    given_back: tuple[str, ...]
    noise: Mapping[str, float]


def fewest_given_back(
    whole: Trial,
    layers: Sequence[str],
    trials: Trials,
    observed: Sequence[Leaves],
    free: Sequence[str | None],
    told: Callable[[str], None] = lambda words: None,
) -> Found:
    """Find the fewest of ``layers``, the noisiest first, without which the target holds.

    ``whole``: the trial of all of them. FusionError if it does not hold in 16 bits either.
    """
    scheme = whole.scheme
    if whole.holds:
        return Found(whole, whole, (), {})
    if not layers:
        _impossible(whole, whole, [], {})
    told("which groups cost most")
    noise = ranked(scheme, layers, observed, free)
    order = sorted(layers, key=lambda name: -noise[name])
    failed, kept, step = 0, None, 1
    trial = whole
    while kept is None:
        count = min(step, len(order))
        told(f"{count} of {len(order)} groups given back")
        trial = trials.run(scheme, order[count:])
        if trial.holds:
            kept = count
        elif count == len(order):
            _impossible(whole, trial, order, noise)
        else:
            failed, step = count, step * 2
    while kept - failed > 1:
        middle = (kept + failed) // 2
        told(f"{middle} of {len(order)} groups given back")
        tried = trials.run(scheme, order[middle:])
        if tried.holds:
            kept, trial = middle, tried
        else:
            failed = middle
    return Found(trial, whole, tuple(order[:kept]), noise)


def ranked(
    scheme: Scheme, layers: Sequence[str], observed: Sequence[Leaves], free: Sequence[str | None]
) -> dict[str, float]:
    """For each layer, noise / signal of the outputs if it alone is in eight bits."""
    (leaves,) = list(few(observed, free, rows_within(scheme.network, _ROWS, _BYTES)))[:1]
    simulation = Simulation(scheme.network, leaves)
    return {name: 10 ** (-simulation.score(scheme.with_eight((name,))).snr / 10) for name in layers}


def _impossible(whole: Trial, last: Trial, order: Sequence[str], noise: Mapping[str, float]) -> NoReturn:
    """FusionError with the numbers, and the groups that cost most."""
    costly = "; ".join(
        f"{last.scheme.network.layers[name].match.pattern} ({name}) {noise[name]:.2g} of the output"
        for name in order[:5]
    )
    told = f"the target cannot be met, {last.target.words} and at least {FLOOR:g} dB"
    given = f": with all groups in 8 bits {words_of(whole)}, with all of them given back to 16 bits {words_of(last)}"
    raise FusionError(f"{told}{given}. Alone in 8 bits cost most: {costly}" if costly else f"{told}: {words_of(whole)}")
