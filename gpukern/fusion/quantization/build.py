"""The scheme of a network before anything is given back: scales from what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpukern.fusion.quantization.data import Data, few
from gpukern.fusion.quantization.domains import Domains
from gpukern.fusion.quantization.network import Network
from gpukern.fusion.quantization.observe import Observer
from gpukern.fusion.quantization.ranges import scales_of
from gpukern.fusion.quantization.scheme import Scheme
from gpukern.fusion.quantization.settings import Settings
from gpukern.fusion.quantization.storage import store

#: Rows on which estimators are compared.
_ROWS = 16


@dataclass(frozen=True)
class Built:
    """``scheme`` has all possible layers in eight bits."""

    scheme: Scheme


def build(
    network: Network,
    found: Domains,
    observer: Observer,
    asked: Settings,
    data: Data,
    free: Sequence[str | None],
    layers: Sequence[str],
    told: Callable[[str], None],
) -> Built:
    """Choose a scale for every domain."""
    told("comparing the estimators of ranges")
    batches = list(few(data.observed, free, _ROWS))
    scales, estimators = scales_of(network, found, observer.of, asked.format, asked.calibration, batches)
    return Built(Scheme(network, found, asked.format, scales, estimators, store(network, found, layers)))
