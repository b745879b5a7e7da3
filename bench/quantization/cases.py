"""Trained networks with images that they have not seen: what 8 bits are measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models import checkpoint, data
from models.config import Config
from models.efficientnet_lite import pretrained
from models.photographs import crops
from models.registry import architecture
from models.running import CHECKPOINT, run
from models.trainer import Trainer

#: Batches that ranges are measured on, and images of each.
CALIBRATION, BATCH = 8, 32


@dataclass(frozen=True)
class Case:
    """``calibration``: batches of images the model may see; ``images`` are held out. Without ``labels`` the model in
    float32 gives them."""

    title: str
    model: torch.nn.Module
    calibration: list[torch.Tensor]
    images: torch.Tensor
    labels: torch.Tensor | None


def lenet(runs: Path, console: Console) -> Case:
    return _trained("LeNet-5", "mnist5k", _LENET, runs / "lenet", console)


def resnet8(runs: Path, console: Console) -> Case:
    return _trained("ResNet-8", "cifar10", _RESNET, runs / "resnet8", console)


def efficientnet_lite0(runs: Path, console: Console) -> Case:
    """Its weights of ImageNet; every second photograph is for calibration, the others are held out."""
    published = architecture("efficientnet_lite0")
    assert published.pixels is not None
    mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in published.pixels)
    found: dict[str, list[torch.Tensor]] = {}
    for name, image in crops(published.input_size[1]):
        found.setdefault(name, []).append((255 * image - mean) / deviation)
    photographs = list(found.values())
    seen, held_out = (torch.stack([*itertools.chain(*photographs[start::2])]) for start in (0, 1))
    chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))[: CALIBRATION * BATCH // 2]
    return Case("EfficientNet-Lite0", pretrained(), [*seen[chosen].split(BATCH // 2)], held_out, None)


CASES: dict[str, Callable[[Path, Console], Case]] = {
    "lenet": lenet,
    "resnet8": resnet8,
    "efficientnet_lite0": efficientnet_lite0,
}

_LENET = Config(epochs=10, optimizer="adam", schedule="cosine", crop=2)
_RESNET = Config(
    network="resnet8", width=32, epochs=40, optimizer="nesterov", lr=0.05, weight_decay=5e-4, schedule="one-cycle",
    precision="bf16", crop=4, flip=True, fraction=0.1, held_out_fraction=0.2,
)  # fmt: skip


def _trained(title: str, source: str, config: Config, out: Path, console: Console) -> Case:
    """A network trained to the end: now, or before, by the checkpoint in ``out``."""
    samples = data.load(source, config.fraction, config.held_out_fraction, config.as_bytes, config.image_size)
    trainer = Trainer(config, samples, torch.device("cpu"))
    path = out / CHECKPOINT
    if path.exists():
        trainer.load_state_dict(checkpoint.load(path))
    if not trainer.finished:
        out.mkdir(parents=True, exist_ok=True)
        run(trainer, path, console)
    trainer.inputs.eval()

    def made(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([trainer.inputs(part) for part in images.split(500)])

    model: Any = trainer.best_model.eval()
    seen = made(trainer.train.images[: CALIBRATION * BATCH])
    return Case(title, model, [*seen.split(BATCH)], made(trainer.held_out.images), trainer.held_out.labels)
