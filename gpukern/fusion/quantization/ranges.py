"""The scale of every domain: by the estimator that was asked for or, for each domain, by the one with which the layers
that read it are least wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from gpukern.fusion.program import arguments
from gpukern.fusion.quantization.data import Leaves
from gpukern.fusion.quantization.domains import Domain, Domains
from gpukern.fusion.quantization.estimators import ESTIMATORS, threshold
from gpukern.fusion.quantization.formats import Format, rounded_to, scale_for
from gpukern.fusion.quantization.histogram import Histogram
from gpukern.fusion.quantization.network import Network, Run
from gpukern.fusion.quantization.reference import product


def scales_of(
    network: Network,
    found: Domains,
    histograms: Mapping[str, Histogram],
    format: Format,
    calibration: str,
    batches: Iterable[Leaves],
    only: Collection[str] | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """The scale of each value that can be stored in eight bits, and the name of the estimator that found it.

    ``only``: of the domains of these values.
    """
    usable = [domain for domain in found.every if not domain.why_not and domain.writers]
    if only is not None:
        usable = [domain for domain in usable if set(domain.values) & set(only)]
    tried = (calibration,) if calibration != "auto" else ESTIMATORS
    candidates = {
        id(domain): {each: scale_for(threshold(histograms[domain.values[0]], each, format), format) for each in tried}
        for domain in usable
    }
    chosen = {id(domain): tried[0] for domain in usable}
    if len(tried) > 1:
        errors = _errors(network, found, candidates, format, batches)
        chosen |= {place: min(each, key=each.__getitem__) for place, each in errors.items() if each}
    scales: dict[str, float] = {}
    estimators: dict[str, str] = {}
    for domain in usable:
        estimator = chosen[id(domain)]
        scales |= dict.fromkeys(domain.values, candidates[id(domain)][estimator])
        estimators |= dict.fromkeys(domain.values, estimator)
    return scales, estimators


def _errors(
    network: Network,
    found: Domains,
    candidates: Mapping[int, Mapping[str, float]],
    format: Format,
    batches: Iterable[Leaves],
) -> dict[int, dict[str, float]]:
    """For each domain and estimator, the noise that rounding it adds to the layers that read it, of their signal."""
    errors: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(domain: Domain | None, x: torch.Tensor, effect: Callable[[torch.Tensor], torch.Tensor]) -> None:
        scales = {} if domain is None else candidates.get(id(domain), {})
        if not scales:
            return
        signal = _energy(effect(x)) or 1.0
        noise = {scale: _energy(effect(rounded_to(x, scale, format) - x)) for scale in set(scales.values())}
        for estimator, scale in scales.items():
            errors[id(domain)][estimator] += noise[scale] / signal

    def see(node: Node, result: Any, args: tuple) -> None:
        if node.name not in network.layers:
            return
        given = arguments(network.names[node.name])
        add(found.of.get(given["input"].name), args[0], lambda x: product(node, x, args[1]))
        if given.get("residual") is not None:
            add(found.of.get(given["residual"].name), args[3], lambda x: x)

    run = Run(network, see=see)
    for leaves in batches:
        run.outputs(leaves)
    return errors


def _energy(x: torch.Tensor) -> float:
    return x.double().square().sum().item()
