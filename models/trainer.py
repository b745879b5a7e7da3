"""Mini-batch gradient descent that can stop after any step and go on later as if nothing had happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import gpukern
from gpukern import optim
from models.checkpoint import CheckpointError
from models.data import Data, Samples
from models.lenet import LeNet5

#: name → (default learning rate, constructor).
OPTIMIZERS: dict[str, tuple[float, Callable[..., optim.Optimizer]]] = {
    "sgd": (0.05, optim.SGD),
    "momentum": (0.01, optim.SGD),
    "nesterov": (0.01, optim.SGD),
    "adagrad": (0.01, optim.Adagrad),
    "rmsprop": (0.0005, optim.RMSprop),
    "adam": (0.001, optim.Adam),
    "adamw": (0.001, optim.AdamW),
}
#: What checkpoints that do not name them were made with.
_LATER = {"batch_norm": False}
_WITH_MOMENTUM = ("momentum", "nesterov")


@dataclass(frozen=True)
class Config:
    """What decides the trained weights, with the data. ``lr`` and ``momentum`` None: the optimizer's default.

    ``batch_size`` 1 is stochastic, 0 (the whole training set) batch gradient descent. ValueError for what makes no
    sense.
    """

    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "momentum"
    lr: float | None = None
    momentum: float | None = None
    seed: int = 0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
        if self.epochs < 0 or self.batch_size < 0:
            raise ValueError(f"epochs and batch size must not be negative, got {self.epochs} and {self.batch_size}")
        if self.optimizer not in _WITH_MOMENTUM and self.momentum is not None:
            raise ValueError(f"a momentum is for {' and '.join(_WITH_MOMENTUM)}, not for {self.optimizer}")
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer][0])
        if self.momentum is None and self.optimizer in _WITH_MOMENTUM:
            object.__setattr__(self, "momentum", 0.9)

    def make_optimizer(self, parameters: Any) -> optim.Optimizer:
        options: dict[str, Any] = {"lr": self.lr}
        if self.optimizer in _WITH_MOMENTUM:
            options |= {"momentum": self.momentum, "nesterov": self.optimizer == "nesterov"}
        return OPTIMIZERS[self.optimizer][1](parameters, **options)


class Trainer:
    """Trains LeNet-5. :meth:`step` and :meth:`end_epoch` move it on; :meth:`state_dict` is valid between any two calls.

    ``losses`` holds the mean loss of every mini-batch so far, ``accuracies`` the held-out accuracy after every epoch.
    ``compiled``: layers of ``torch.nn`` run by ``torch.compile(backend="gpukern")``, instead of ``gpukern.nn``'s.
    """

    def __init__(self, config: Config, data: Data, device: torch.device, compiled: bool = False) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.device = config, data, device
        self.train, self.held_out = data.train.to(device), data.held_out.to(device)
        self.model = LeNet5(torch.nn if compiled else gpukern.nn, batch_norm=config.batch_norm).to(device)
        #: What computes: the model itself, or the compiled one on the same parameters.
        self.network: torch.nn.Module = self.model
        if compiled:
            self.network = torch.compile(self.model, backend="gpukern")  # type: ignore[assignment]
        self.optimizer = config.make_optimizer(self.model.parameters())
        self.epoch, self.position = 0, 0
        self.accuracies: list[float] = []
        self._losses: list[float] = []
        self._unread_losses: list[torch.Tensor] = []
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._begin_epoch()

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, len(self.train)) or len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._batches)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def losses(self) -> list[float]:
        if self._unread_losses:  # reading waits for the GPU, hence not after every step
            self._losses += torch.stack(self._unread_losses).tolist()
            self._unread_losses.clear()
        return self._losses

    def step(self) -> int:
        """One update of the weights, by the next mini-batch. Returns how many samples it saw."""
        batch = self._batches[self.position].to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.network(self.train.images[batch])
        loss = gpukern.functional.cross_entropy(logits, self.train.labels[batch])
        loss.backward()
        self.optimizer.step()
        self._unread_losses.append(loss.detach())
        self.position += 1
        return len(batch)

    def end_epoch(self) -> float:
        """The held-out accuracy after an epoch's last step; shuffles for the next one.

        ValueError if a loss of this epoch is not finite.
        """
        if not all(map(math.isfinite, self.losses[len(self.losses) - self.position :])):
            raise ValueError(
                f"the training diverged in epoch {self.epoch + 1} (a loss is not finite): try a smaller learning rate"
            )
        self.accuracies.append(accuracy(self.network, self.held_out))
        self.epoch, self.position = self.epoch + 1, 0
        self._begin_epoch()
        return self.accuracies[-1]

    def _begin_epoch(self) -> None:
        self._shuffle_state = self._shuffle.get_state()
        self._batches = torch.randperm(len(self.train), generator=self._shuffle).split(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain values and tensors.

        The order of an epoch is kept as the state of the generator that shuffled it; the global generators' states,
        which LeNet-5 does not use, are for layers such as dropout; the number of threads decides the order in which
        sums are added up on a CPU.
        """
        return {
            "config": asdict(self.config),
            "directory": str(self.data.directory.absolute()) if self.data.directory else None,
            "fingerprint": self.data.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "shuffle": self._shuffle_state,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "accuracies": list(self.accuracies),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. CheckpointError if it belongs to another configuration or other data."""
        self._check_same_training(state)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.position = state["epoch"], state["position"]
            self._losses, self.accuracies = state["losses"].tolist(), list(state["accuracies"])
            self._shuffle.set_state(state["shuffle"])
            self._begin_epoch()
            torch.set_num_threads(state["threads"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this network: {error!r}") from error

    def _check_same_training(self, state: dict[str, Any]) -> None:
        wanted, stored = asdict(self.config), {**_LATER, **state["config"]}
        differences = [
            f"{name} is {wanted[name]}, was {stored.get(name)}"
            for name in wanted
            if name != "epochs" and wanted[name] != stored.get(name)
        ]
        if state["fingerprint"] != self.data.fingerprint:
            differences.append("the images or labels are not the ones it began with")
        if wanted["epochs"] < state["epoch"]:
            differences.append(f"epochs is {wanted['epochs']}, but {state['epoch']} are done")
        if differences:
            raise CheckpointError(f"cannot resume: {'; '.join(differences)}")


@torch.no_grad()
def accuracy(model: torch.nn.Module, samples: Samples, batch_size: int = 500) -> float:
    """The share of ``samples`` whose largest logit is that of their label."""
    was_training = model.training
    model.eval()
    batches = zip(samples.images.split(batch_size), samples.labels.split(batch_size), strict=True)
    correct = sum((model(images).argmax(1) == labels).sum() for images, labels in batches)
    model.train(was_training)
    return correct.item() / len(samples)
