"""How often fused networks are right in 16 and in 8 bits, on images that were held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import gpukern
from bench.quantization.cases import Case

_BATCH = 100


@dataclass(frozen=True)
class Accuracy:
    """Shares of the held-out images of which the label, or the class that float32 gives them, is found.

    ``of_labels``: whether there were labels, else ``full`` is 1. ``given_back`` are the modules of groups that the
    target needed in 16 bits; ``sixteen`` counts all groups that are. Bytes are those of a batch of two.
    """

    title: str
    dtype: str
    images: int
    of_labels: bool
    full: float
    half: float
    eight: float
    groups: int
    sixteen: int
    given_back: tuple[str, ...]
    bytes_half: int
    bytes: int


@torch.no_grad()
def measure(case: Case, dtype: str, target: float) -> Accuracy:
    """Fuse in 16 and in 8 bits, and let all three classify the held-out images."""
    full = _logits(case.model, case.images)
    labels = full.argmax(1) if case.labels is None else case.labels

    def share(model: torch.nn.Module) -> float:
        return (_logits(model, case.images).argmax(1) == labels).double().mean().item()

    example = case.images[:2]
    half = gpukern.fuse(case.model, example, dtype=torch.float16)
    eight = gpukern.fuse(case.model, example, dtype=dtype, calibrate=case.calibration, target=target)
    told = eight.report.quantization
    assert told is not None
    return Accuracy(
        title=case.title,
        dtype=dtype,
        images=len(case.images),
        of_labels=case.labels is not None,
        full=(full.argmax(1) == labels).double().mean().item(),
        half=share(half),
        eight=share(eight),
        groups=len(told.groups),
        sixteen=sum(group.precision == told.precision for group in told.groups),
        given_back=tuple(group.modules[0] for group in told.groups if group.given_back),
        bytes_half=told.bytes_before,
        bytes=told.bytes,
    )


def _logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).float() for part in images.split(_BATCH)])
