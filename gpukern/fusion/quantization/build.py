"""The scheme of a network before anything is given back: scales, equalized channels and corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from gpukern.fusion.quantization.correct import corrections
from gpukern.fusion.quantization.data import Data, Leaves, few
from gpukern.fusion.quantization.domains import Domains
from gpukern.fusion.quantization.equalize import chains, equalized
from gpukern.fusion.quantization.network import Network
from gpukern.fusion.quantization.observe import Observer
from gpukern.fusion.quantization.ranges import scales_of
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.settings import Settings
from gpukern.fusion.quantization.simulation import Simulation, rows_within
from gpukern.fusion.quantization.storage import store

#: Rows on which estimators, equalized and corrected layers are compared, and bytes of all values in fp32.
_ROWS, _BYTES = 16, 2**29


@dataclass(frozen=True)
class Calibration:
    """What a scheme is made from. ``layers``: those that may have eight bits."""

    network: Network
    domains: Domains
    observer: Observer
    asked: Settings
    data: Data
    free: Sequence[str | None]
    layers: Sequence[str]
    told: Callable[[str], None]

    def some(self, batches: Sequence[Leaves]) -> list[Leaves]:
        return list(few(batches, self.free, rows_within(self.network, _ROWS, _BYTES)))


def build_scheme(given: Calibration) -> Scheme:
    """The scheme with all ``layers`` in eight bits."""
    given.told("comparing the estimators of ranges")
    known = given.asked.format, given.asked.calibration, given.some(given.data.observed)
    scales, estimators = scales_of(given.network, given.domains, given.observer.of, *known)
    storage = store(given.network, given.domains, given.layers)
    scheme = Scheme(given.network, given.domains, given.asked.format, scales, estimators, storage)
    if not given.data.aside:
        return scheme
    scheme = _with_equalized(scheme, given)
    given.told("correcting biases")
    found = corrections(scheme, given.some(given.data.observed), given.some(given.data.aside))
    return replace(scheme, corrections=found)


def _with_equalized(scheme: Scheme, given: Calibration) -> Scheme:
    """Equalize the chains whose noise in the outputs that lowers, on batches aside."""
    possible = chains(scheme.network, scheme.domains, scheme.storage.eight | _first_of(scheme))
    if not possible:
        return scheme
    given.told("equalizing channels")
    network, divided = scheme.network, dict[str, torch.Tensor]()
    for chain in possible:
        made = equalized(network, chain)
        network, divided = made.network, {**divided, **made.divided}
    other = _rescaled(scheme, network, divided, given)
    (leaves,) = given.some(given.data.aside)[:1]
    plain, leveled = Simulation(scheme.network, leaves), Simulation(network, leaves)
    for chain in possible:
        eight = [name for name in chain if name in scheme.storage.eight]
        before, after = (run.score(each.with_eight(eight)).snr for run, each in ((plain, scheme), (leveled, other)))
        if after > before:
            scheme = _with_chain(scheme, other, chain)
    return scheme


def _first_of(scheme: Scheme) -> frozenset[str]:
    """Layers in 16 bits that write eight."""
    return frozenset(name for name in scheme.network.layers if name in scheme.storage.stored)


def _rescaled(scheme: Scheme, network: Network, divided: Mapping[str, torch.Tensor], given: Calibration) -> Scheme:
    """The scheme of the equalized network: what is between its layers is observed anew."""
    observer = Observer(network, scheme.domains)
    for leaves in given.data.observed:
        observer.observe(leaves)
    known = given.asked.format, given.asked.calibration, given.some(given.data.observed)
    scales, estimators = scales_of(network, scheme.domains, observer.of, *known, only=divided)
    return replace(
        scheme,
        network=network,
        scales={**scheme.scales, **scales},
        estimators={**scheme.estimators, **estimators},
        equalized=divided,
    )


def _with_chain(scheme: Scheme, other: Scheme, chain: Sequence[str]) -> Scheme:
    """``scheme`` with one chain of ``other``."""
    between = [value for name in chain[:-1] for value in scheme.domains.of[name].values]
    return replace(
        scheme,
        network=scheme.network.with_layers({name: other.network.layers[name] for name in chain}),
        scales={**scheme.scales, **{name: other.scales[name] for name in between}},
        estimators={**scheme.estimators, **{name: other.estimators[name] for name in between}},
        equalized={**scheme.equalized, **{name: other.equalized[name] for name in chain[:-1]}},
        rescaled=scheme.rescaled | set(chain),
    )
