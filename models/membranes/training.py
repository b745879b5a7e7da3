"""Gradient descent on crops of sections that can stop after any step and go on later as if nothing had happened."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from gpukern import optim
from models.averaging import Average
from models.checkpoint import CheckpointError
from models.config import PRECISIONS
from models.membranes import objective
from models.membranes.config import Config
from models.membranes.crops import Crops
from models.membranes.networks import Network
from models.membranes.normalization import Normalization
from models.membranes.volumes import Volume
from models.schedules import Schedule

#: What a checkpoint is compared by; the others may change when a training goes on.
_FREE = ("evaluate_every",)


class Trainer:
    """Trains a network on ``volume``; after any :meth:`step` :meth:`state_dict` is all that the next ones depend on.

    All that is random in a step follows from the seed and its number. ``losses`` holds the loss of every step so far,
    ``history`` what was measured on held-out sections, by whoever measures it.
    """

    def __init__(self, config: Config, volume: Volume, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.fingerprint = _fingerprint(volume)
        self.network = Network(config, device)
        self._average = Average(self.network.model, config.ema) if config.ema else None
        self.averaged = Network(config, device, self._average.model) if self._average else self.network
        self.normalization = Normalization.of(volume.normalized())
        self._crops = Crops(config, volume, self.normalization, self.network)
        self.optimizer = optim.AdamW(self.network.model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._schedule = Schedule("one-cycle", config.steps)
        self.steps_done = 0
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._unread: list[torch.Tensor] = []

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.config.steps

    @property
    def losses(self) -> list[float]:
        if self._unread:  # reading waits for the GPU, hence not after every step
            self._losses += torch.stack(self._unread).tolist()
            self._unread.clear()
        return self._losses

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.lr * self._schedule.factor(self.steps_done)

    def step(self) -> None:
        """One update of the weights."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average:
            self._average.update(self.network.model)
        self._unread.append(loss.detach().float())
        self.steps_done += 1

    def _loss(self) -> torch.Tensor:
        dtype = PRECISIONS[self.config.precision]
        crops = self._crops(self.steps_done)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            if self.config.sampling == "patches":
                return objective.of_patches(self.network, crops, self.config.pixels)
            if self.network.patches:
                return objective.of_pixels(self.network, crops, self.config.pixels)
            return objective.weighted(self.network, crops)

    def check(self) -> None:
        """ValueError where a loss is not finite."""
        if not all(map(math.isfinite, self.losses)):
            raise ValueError(
                f"the training diverged before step {self.steps_done} (a loss is not finite): try a smaller learning "
                "rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. On a CPU the number of threads decides in which order sums are added up."""
        return {
            "config": asdict(self.config),
            "fingerprint": self.fingerprint,
            "normalization": asdict(self.normalization),
            "model": self.network.model.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "steps": self.steps_done,
            "threads": torch.get_num_threads(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. CheckpointError if it belongs to another configuration or other data."""
        self._check_same_training(state)
        try:
            self.network.model.load_state_dict(state["model"])
            if self._average:
                self._average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state["scaler"])
            self.steps_done, self._losses = state["steps"], state["losses"].tolist()
            self.history = [dict(measured) for measured in state["history"]]
            torch.set_num_threads(state["threads"])
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this network: {error!r}") from error

    def _check_same_training(self, state: dict[str, Any]) -> None:
        wanted, stored = asdict(self.config), state["config"]
        differences = [
            f"{name} is {value}, was {stored.get(name)}"
            for name, value in wanted.items()
            if name not in _FREE and value != stored.get(name)
        ]
        if state["fingerprint"] != self.fingerprint:
            differences.append("the sections or labels are not the ones it began with")
        if differences:
            raise CheckpointError(f"cannot resume: {'; '.join(differences)}")


def _fingerprint(volume: Volume) -> str:
    """Of what is trained on."""
    assert volume.labels is not None
    hashed = hashlib.sha256(str(volume.images.shape).encode())
    for array in (volume.images, volume.labels):
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()
