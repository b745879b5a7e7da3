"""What decides a training, with the data: all that a checkpoint compares before it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpukern import optim
from models.registry import ARCHITECTURES, CLASSIFIERS, Architecture
from models.schedules import SCHEDULES, Schedule

#: name → (default learning rate, constructor).
OPTIMIZERS: dict[str, tuple[float, Callable[..., optim.Optimizer]]] = {
    "sgd": (0.05, optim.SGD),
    "momentum": (0.01, optim.SGD),
    "nesterov": (0.01, optim.SGD),
    "adagrad": (0.01, optim.Adagrad),
    "rmsprop": (0.0005, optim.RMSprop),
    "adam": (0.001, optim.Adam),
    "adamw": (0.001, optim.AdamW),
    "lion": (0.0001, optim.Lion),
    "lars": (5.0, optim.LARS),
    "lamb": (0.005, optim.LAMB),
}
_WITH_MOMENTUM = ("momentum", "nesterov", "lars")
#: What weights and activations are multiplied in; the weights themselves are float32, or float64 for checks.
PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": None
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """``lr`` and ``momentum`` None: the optimizer's default. ``batch_size`` 1 is stochastic, 0 (the whole training set)
    batch gradient descent. ValueError for what makes no sense.

    Beside what the command line says of them: ``freeze`` are patterns of names of parameters, ``lr_scale`` pairs of a
    pattern and a factor of the learning rate.
    """

    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "momentum"
    lr: float | None = None
    momentum: float | None = None
    seed: int = 0
    batch_norm: bool = False
    network: str = "lenet"
    width: int | None = None
    dropout: float | None = None
    weight_decay: float | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    step_epochs: int = 10
    gamma: float = 0.1
    label_smoothing: float = 0.0
    ema: float = 0.0
    precision: str = "fp32"
    crop: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    patience: int = 0
    fraction: float = 1.0
    held_out_fraction: float = 1.0
    image_size: int | None = None
    weights: str | None = None
    freeze: tuple[str, ...] = ()
    thaw: int | None = None
    lr_scale: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        if self.optimizer not in _WITH_MOMENTUM and self.momentum is not None:
            raise ValueError(f"a momentum is for {' and '.join(_WITH_MOMENTUM[:2])}, not for {self.optimizer}")
        if self.schedule == "one-cycle" and self.warmup:
            raise ValueError("a warm-up is part of the one-cycle schedule: it takes no other")
        if self.thaw is not None and not self.freeze:
            raise ValueError("there is nothing to thaw: no parameters are frozen")
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer][0])
        if self.momentum is None and self.optimizer in _WITH_MOMENTUM:
            object.__setattr__(self, "momentum", 0.9)

    def _check_choices(self) -> None:
        for what, value, known in (
            ("network", self.network, CLASSIFIERS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(known)}")

    def _check_ranges(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must have 64 bits, got {self.seed}")
        if self.epochs < 0 or self.batch_size < 0:
            raise ValueError(f"epochs and batch size must not be negative, got {self.epochs} and {self.batch_size}")
        for name in ("warmup", "crop", "cutout", "patience", "weight_decay", "mixup", "lr", "gamma", "thaw"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name in ("dropout", "ema", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        for name in ("width", "image_size", "step_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.network]

    @property
    def augmented(self) -> bool:
        return bool(self.crop or self.flip or self.cutout)

    @property
    def as_bytes(self) -> bool:
        """Whether images are normalised, and augmented, batch by batch."""
        return self.augmented or self.network != "lenet" or self.image_size is not None

    def make_network(self, classes: int, image_size: tuple[int, int, int], **options: Any) -> torch.nn.Module:
        """The network with new random weights for images [C, H, W]. ValueError for what it does not take."""
        side = self.image_size
        size = image_size if side is None else (image_size[0], side, side)
        given = {"width": self.width, "dropout": self.dropout, "batch_norm": self.batch_norm or None}
        return self.architecture.build(classes, size, **given, **options)

    def make_optimizer(self, parameters: Any) -> optim.Optimizer:
        """Of parameters, or of groups of them."""
        options: dict[str, Any] = {"lr": self.lr}
        if self.optimizer in _WITH_MOMENTUM:
            options |= {"momentum": self.momentum, "nesterov": self.optimizer == "nesterov"}
        if self.weight_decay is not None:
            options["weight_decay"] = self.weight_decay
        return OPTIMIZERS[self.optimizer][1](parameters, **options)

    def make_schedule(self, steps_per_epoch: int) -> Schedule:
        return Schedule(
            self.schedule,
            self.epochs * steps_per_epoch,
            round(self.warmup * steps_per_epoch),
            self.step_epochs * steps_per_epoch,
            self.gamma,
        )
