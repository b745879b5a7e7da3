"""The ways of the optimizers down two surfaces of the lecture: an ill-conditioned bowl and a saddle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.trainer import Config


@dataclass(frozen=True)
class Surface:
    """``value`` of x and y, tensors or arrays; a path begins at ``start`` and ends after ``steps`` updates, or where
    it leaves ``frame``: left, right, bottom, top. ``rates``: the optimizers that are shown, and their learning rates.
    """

    title: str
    value: Callable[[Any, Any], Any]
    start: tuple[float, float]
    frame: tuple[float, float, float, float]
    steps: int
    rates: dict[str, float]

    def holds(self, x: float, y: float) -> bool:
        left, right, bottom, top = self.frame
        return left <= x <= right and bottom <= y <= top


#: SGD's rate is just below 2/20, at which the steep direction no longer converges: the lecture's jitter.
BOWL = Surface(
    title="½ (x² + 20 y²): the slope is 20 times as steep in y",
    value=lambda x, y: 0.5 * (x * x + 20 * y * y),
    start=(-9.0, 2.0),
    frame=(-10.5, 4.5, -3.0, 3.0),
    steps=40,
    rates={"sgd": 0.093, "momentum": 0.02, "nesterov": 0.02, "adagrad": 0.6, "rmsprop": 0.3, "adam": 0.6},
)
#: Almost on the ridge, where nothing points down but a slope of a hundredth.
SADDLE = Surface(
    title="x² − y²: a saddle",
    value=lambda x, y: x * x - y * y,
    start=(-1.6, 0.005),
    frame=(-2.0, 1.0, -0.6, 1.2),
    steps=80,
    rates={"sgd": 0.03, "momentum": 0.03, "nesterov": 0.03, "adagrad": 0.1, "rmsprop": 0.03, "adam": 0.1},
)
SURFACES = (BOWL, SADDLE)


def path(surface: Surface, optimizer: str) -> np.ndarray:
    """[updates + 1, 2]: x and y at first and after every update, the last perhaps outside the frame."""
    place = torch.nn.Parameter(torch.tensor(surface.start))
    descent = Config(optimizer=optimizer, lr=surface.rates[optimizer]).make_optimizer([place])
    places = [surface.start]
    while len(places) <= surface.steps and surface.holds(*places[-1]):
        descent.zero_grad()
        surface.value(*place).backward()
        descent.step()
        places.append(tuple(place.tolist()))
    return np.array(places)
