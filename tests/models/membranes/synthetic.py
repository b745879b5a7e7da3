"""Sections that take no download: the cells of a Voronoi diagram, drifting from section to section."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from models.membranes.volumes import Volume


def volume(sections: int = 5, height: int = 96, width: int = 112, cells: int = 14, seed: int = 0) -> Volume:
    """Bright cells with dark membranes of some three pixels, and noise."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    seeds = rng.uniform(0, (height, width), (cells, 2))
    images, labels = [], []
    for _ in range(sections):
        seeds = seeds + rng.normal(0, 1, seeds.shape)
        near = cKDTree(seeds).query(places, 2)[0]
        inside = near[..., 1] - near[..., 0] > 3
        images.append(np.clip(np.where(inside, 170, 70) + rng.normal(0, 20, inside.shape), 0, 255).astype(np.uint8))
        labels.append(inside)
    return Volume(np.stack(images), np.stack(labels), "synthetic")


def write(volume: Volume, folder: Path) -> Path:
    """As a folder of PNG files, which :func:`models.membranes.volumes.load` reads."""
    assert volume.labels is not None
    for name, stack in (("image", volume.images), ("label", volume.labels.astype(np.uint8) * 255)):
        (folder / name).mkdir(parents=True)
        for index, section in enumerate(stack):
            Image.fromarray(section).save(folder / name / f"{index}.png")
    return folder
