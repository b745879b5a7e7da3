"""Networks from checkpoints, and sections from wherever a command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import checkpoint
from models.checkpoint import CheckpointError
from models.membranes import volumes
from models.membranes.config import Config
from models.membranes.networks import Network
from models.membranes.normalization import Normalization
from models.membranes.volumes import Volume

FORMAT = "gpukern models.segment checkpoint, version 1"
#: What part of a volume is meant: as :meth:`Volume.split` divides it.
PARTS = ("all", "train", "held-out")


@dataclass(frozen=True)
class Trained:
    """A network with the weights of a training, averaged ones where there are such, in evaluation mode."""

    network: Network
    config: Config
    normalization: Normalization
    steps: int


def trained(path: Path, device: torch.device) -> Trained:
    """What :mod:`models.segment` saved. CheckpointError, naming the file, for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    state = checkpoint.load(path, FORMAT)
    try:
        config = Config(**state["config"])
        network = Network(config, device)
        network.model.load_state_dict(state["average"]["model"] if state["average"] else state["model"])
        network.train(False)
        return Trained(network, config, Normalization(**state["normalization"]), state["steps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the checkpoint does not fit its network: {error!r}") from error


def labelled(path: str | Path | None) -> Volume:
    """Sections with labels, by default the ISBI 2012 data. ValueError for sections without."""
    volume = volumes.load(path)
    if volume.labels is None:
        raise ValueError(f"{volume.path}: sections without labels: expected a folder of images and one of labels")
    return volume


def part(volume: Volume, name: str, train: int | None = None) -> Volume:
    """``name`` of :data:`PARTS`."""
    if name == "all":
        return volume
    return volume.split(train)[name == "held-out"]


def truth(data: str | None, labels: Path | None, images: Path | None, sections: str) -> Volume:
    """Sections with the labels to score against: ``data``, or two files; of ``labels`` alone these stand for both."""
    if labels is None:
        return part(labelled(data), sections)
    inside = volumes.inside(volumes.stacks.read(labels), labels)
    shown = inside.astype(np.float32) if images is None else np.asarray(volumes.open_images(images))
    return part(Volume(shown, inside, labels.name), sections)


def images(path: Path, sections: str) -> np.ndarray:
    """[sections, H, W], mapped where that is possible."""
    stack = volumes.open_images(path)
    if sections == "all":
        return stack
    if len(stack) < 2:
        raise ValueError(f"{path}: one section has no parts: --sections all")
    first = max(1, len(stack) * 4 // 5)
    return stack[:first] if sections == "train" else stack[first:]


def probabilities(path: Path) -> np.ndarray:
    """float32 [sections, H, W] from 0 to 1. ValueError naming the file for anything else."""
    found = volumes.stacks.read(path)
    if found.dtype.kind != "f" or not (found.min() >= 0 and found.max() <= 1):
        raise ValueError(f"{path}: expected probabilities, floats from 0 to 1, got {found.dtype}")
    return found.astype(np.float32, copy=False)


def state_of(path: Path) -> dict[str, Any]:
    """To go on from. CheckpointError, naming the file, where something is missing."""
    state = checkpoint.load(path, FORMAT)
    for name in ("config", "data", "train_sections", "fingerprint"):
        if name not in state:
            raise CheckpointError(f"{path}: the checkpoint has no {name}")
    return state
