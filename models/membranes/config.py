"""What decides a training of a segmenting network, and the settings that suit a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from models.config import PRECISIONS
from models.membranes.networks import NETWORKS

SAMPLINGS = ("crops", "patches")
PRESETS = ("cpu", "gpu")
DEFAULT_NETWORK, DEFAULT_PRESET = "unet", "cpu"


@dataclass(frozen=True)
class Config:
    """``batch_size`` crops of ``crop`` pixels a side are a step's; ``lr`` is the highest of a one-cycle schedule.

    Of a network of patches, ``width`` are the maps of each convolution and ``pixels`` of a step's crops, half of them
    membrane, are learned, all at once (``sampling`` "crops") or each from its own patch ("patches"): the same gradient.
    For U-Nets, ``w0`` and ``sigma`` are those of :func:`models.membranes.weights.border_weights`. ``elastic`` is the
    standard deviation of the deformation, in pixels. Every ``evaluate_every`` steps the held-out sections are
    segmented. ValueError for what makes no sense.
    """

    network: str = DEFAULT_NETWORK
    width: int = 16
    depth: int = 4
    dropout: float = 0.0
    steps: int = 1000
    batch_size: int = 4
    crop: int = 192
    sampling: str = "crops"
    pixels: int = 4096
    lr: float = 0.003
    weight_decay: float = 0.001
    ema: float = 0.99
    w0: float = 10.0
    sigma: float = 5.0
    elastic: float = 8.0
    precision: str = "fp32"
    seed: int = 0
    evaluate_every: int = 250

    def __post_init__(self) -> None:
        for what, value, known in (
            ("network", self.network, tuple(NETWORKS)),
            ("sampling", self.sampling, SAMPLINGS),
            ("precision", self.precision, tuple(PRECISIONS)),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(known)}")
        if self.sampling == "patches" and not NETWORKS[self.network].patches:
            raise ValueError(f"{NETWORKS[self.network].title} takes no patches: --sampling crops")
        self._check_ranges()

    def _check_ranges(self) -> None:
        for name in ("width", "depth", "batch_size", "crop", "pixels", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("steps", "lr", "weight_decay", "w0", "elastic"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2³¹ − 1, got {self.seed}")


#: A training of minutes on a GPU.
_ON_A_GPU: dict[str, Any] = {"steps": 6000, "batch_size": 16, "precision": "bf16", "evaluate_every": 1000}
#: What differs from the defaults: (network, preset) → settings. Those for a CPU take a quarter of
#: an hour on two cores, the N4's twenty minutes.
_SUITED: dict[tuple[str, str], dict[str, Any]] = {
    ("unet", "cpu"): {},
    ("unet-valid", "cpu"): {"crop": 132, "steps": 900},
    ("ciresan", "cpu"): {"width": 48, "batch_size": 2, "crop": 96, "pixels": 8192, "lr": 0.001, "steps": 1500},
    ("unet", "gpu"): {**_ON_A_GPU, "width": 32, "crop": 256, "dropout": 0.2},
    ("unet-valid", "gpu"): {**_ON_A_GPU, "width": 32, "crop": 260, "dropout": 0.2},
    ("ciresan", "gpu"): {**_ON_A_GPU, "width": 48, "crop": 128, "pixels": 65536, "lr": 0.001},
}


def settings(network: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """The arguments of :class:`Config` for a network on such a machine. ValueError for unknown names."""
    network, preset = network or DEFAULT_NETWORK, preset or DEFAULT_PRESET
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}, expected one of {', '.join(NETWORKS)}")
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}, expected one of {', '.join(PRESETS)}")
    return {"network": network, **_SUITED[network, preset]}
