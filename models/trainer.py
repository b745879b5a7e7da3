"""Mini-batch gradient descent that can stop after any step and go on later as if nothing had happened."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

import gpukern
import gpukern.data
from models import freezing, inputs, pretrained
from models.averaging import Average
from models.checkpoint import CheckpointError
from models.config import OPTIMIZERS, PRECISIONS, Config
from models.data import Data, Samples
from models.distributed import Group
from models.evaluation import accuracy, evaluate
from models.registry import with_kernels

__all__ = ["OPTIMIZERS", "Config", "Trainer", "accuracy"]

#: How many training images at most are looked at after every epoch, for the gap to the held-out ones.
_LOOKED_AT = 1000


class Trainer:
    """Trains a network. :meth:`step` and :meth:`end_epoch` move it on; between them :meth:`state_dict` is valid.

    ``losses`` holds the mean loss of every mini-batch so far, ``accuracies`` the held-out accuracy after every epoch,
    ``history`` all that was measured then. ``compiled``: layers of ``torch.nn`` run by
    ``torch.compile(backend="gpukern")``, instead of ``gpukern.nn``'s. ``group``: the processes that train together;
    every one calls all methods alike, and a batch is divided among them. Unless ``fresh``, it starts without the
    weights that the configuration names: those of a checkpoint follow.
    """

    def __init__(
        self,
        config: Config,
        data: Data,
        device: torch.device,
        compiled: bool = False,
        group: Group | None = None,
        fresh: bool = True,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.data, self.device, self.group = config, data, device, group or Group()
        self.train, self.held_out = data.train.to(device), data.held_out.to(device)
        self.model = self._make_model(compiled).to(device)
        self.loaded = pretrained.load(self.model, config.weights) if config.weights and fresh else None
        #: What computes: the model itself, one in several processes, or a compiled one, all on the same parameters.
        self.network = self.group.wrap(self.model, frozen=bool(config.freeze))
        if compiled:
            self.network = torch.compile(self.network, backend="gpukern")  # type: ignore[assignment]
        self.frozen = freezing.freeze(self.model, config.freeze)
        if config.thaw != 0 and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(f"there is nothing to train: {', '.join(config.freeze)} freezes all parameters")
        assert config.lr is not None
        self.optimizer = config.make_optimizer(freezing.groups(self.model, config.lr, config.lr_scale))
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = Average(self.model, config.ema) if config.ema else None
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.inputs = inputs.make(config, data).to(device)
        self.epoch, self.position = 0, 0
        self.accuracies: list[float] = []
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._unread_losses: list[torch.Tensor] = []
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._begin_epoch()
        self.schedule = config.make_schedule(self.steps_per_epoch)

    def _make_model(self, compiled: bool) -> torch.nn.Module:
        data, config = self.data, self.config
        layers = {"layers": torch.nn if compiled else gpukern.nn} if config.network == "lenet" else {}
        model = config.make_network(len(data.class_names), data.image_size, **layers)
        if config.network != "lenet" and not compiled:
            # In several processes batch norms are gpukern's in any mode, and so are then their neighbours.
            together = self.group.size > 1
            model = gpukern.convert(model, inplace=True) if together else with_kernels(model, self.device)
        if data.as_bytes:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.double() if config.precision == "fp64" else model

    @property
    def batch_size(self) -> int:
        return min(self.config.batch_size, len(self.train)) or len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        return len(self._batches)

    @property
    def steps_done(self) -> int:
        return self.epoch * self.steps_per_epoch + self.position

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.stalled

    @property
    def best_epoch(self) -> int:
        """The first with the highest held-out accuracy, counted from 1; 0 before any."""
        return self.accuracies.index(max(self.accuracies)) + 1 if self.accuracies else 0

    @property
    def stalled(self) -> bool:
        """Whether as many epochs as ``patience`` have brought nothing better."""
        return bool(self.config.patience) and self.epoch - self.best_epoch >= self.config.patience

    @property
    def losses(self) -> list[float]:
        if self._unread_losses:  # reading waits for the GPU, hence not after every step
            self._losses += torch.stack(self._unread_losses).tolist()
            self._unread_losses.clear()
        return self._losses

    @property
    def best_model(self) -> torch.nn.Module:
        """The one that is evaluated: the averaged one where there is one."""
        return self.average.model if self.average else self.model

    def step(self) -> int:
        """One update of the weights, by the next mini-batch. Returns how many samples it saw."""
        batch = self._batches[self.position]
        mine = batch[self.group.rows].to(self.device)
        self._set_rates()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(mine, len(batch))
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.average:
            self.average.update(self.model)
        # Each process has its part of the mean, times their number, as DistributedDataParallel averages gradients.
        self._unread_losses.append(self.group.sum(loss.detach() / self.group.size).float())
        self.position += 1
        return len(batch)

    def _set_rates(self) -> None:
        factor = self.schedule.factor(self.steps_done)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _loss(self, mine: torch.Tensor, total: int) -> torch.Tensor:
        """The mean over a batch of ``total`` samples, of which ``mine`` are this process's."""
        if self.group.size > 1:  # layers that draw random numbers draw others in each process, and the same on a resume
            torch.manual_seed((self.config.seed * 1009 + self.steps_done) * self.group.size + self.group.rank)
        images = self.inputs(self.train.images, mine, self.epoch)
        targets = self.train.labels[mine]
        if self.config.mixup and len(mine):
            images, targets = gpukern.data.mixup(images, targets, self.config.mixup, classes=len(self.data.class_names))
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            logits = self.network(images)
        return self._cross_entropy(logits.float() if dtype is not None else logits, targets, total)

    def _cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, total: int) -> torch.Tensor:
        smoothing = self.config.label_smoothing
        if self.group.size == 1:
            return gpukern.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        loss = gpukern.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
        return loss * (self.group.size / total)

    def end_epoch(self) -> float:
        """The held-out accuracy after an epoch's last step; shuffles for the next one.

        ValueError if a loss of this epoch is not finite.
        """
        losses = self.losses[len(self.losses) - self.position :]
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"the training diverged in epoch {self.epoch + 1} (a loss is not finite): try a smaller learning rate"
            )
        # From all over the set: many are sorted by class.
        every = slice(None, None, -(-len(self.train) // _LOOKED_AT))
        looked_at = Samples(self.train.images[every], self.train.labels[every])
        train, held_out = (self._evaluated(samples) for samples in (looked_at, self.held_out))
        self.accuracies.append(held_out[1])
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "step": self.steps_done,
                "loss": sum(losses) / len(losses) if losses else math.nan,
                "lr": self.optimizer.param_groups[-1]["lr"],
                "train_loss": train[0],
                "train_accuracy": train[1],
                "held_out_loss": held_out[0],
                "held_out_accuracy": held_out[1],
            }
        )
        self.epoch, self.position = self.epoch + 1, 0
        self._begin_epoch()
        return self.accuracies[-1]

    def _evaluated(self, samples: Samples) -> tuple[float, float]:
        dtype = PRECISIONS[self.config.precision]
        return evaluate(self.best_model, samples, self.inputs, self.group, dtype=dtype)

    def _begin_epoch(self) -> None:
        if self.config.thaw is not None and self.frozen and self.epoch >= self.config.thaw:
            freezing.thaw(self.model)
            self.frozen = []
        self.model.train()
        self.inputs.train()
        freezing.hold_batch_norms(self.model)
        self._shuffle_state = self._shuffle.get_state()
        self._batches = torch.randperm(len(self.train), generator=self._shuffle).split(self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain values and tensors.

        The order of an epoch is kept as the state of the generator that shuffled it; the global generators' states are
        for layers such as dropout; the number of threads decides the order in which sums are added up on a CPU. The
        learning rate follows from the epoch and the position.
        """
        return {
            "config": asdict(self.config),
            "directory": self.data.source,
            "fingerprint": self.data.fingerprint,
            "classes": list(self.data.class_names),
            "image_size": list(self.data.image_size),
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "epoch": self.epoch,
            "position": self.position,
            "shuffle": self._shuffle_state,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "accuracies": list(self.accuracies),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. CheckpointError if it belongs to another configuration or other data."""
        self._check_same_training(state)
        try:
            self.model.load_state_dict(state["model"])
            if self.average:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._scaler.load_state_dict(state.get("scaler", {}))
            self.epoch, self.position = state["epoch"], state["position"]
            self._losses, self.accuracies = state["losses"].tolist(), list(state["accuracies"])
            self.history = [dict(measured) for measured in state.get("history", [])]
            self._shuffle.set_state(state["shuffle"])
            self._begin_epoch()
            torch.set_num_threads(state["threads"])
            torch.set_rng_state(state["random"])
            if self.device.type == "cuda" and state["random_cuda"] is not None:
                torch.cuda.set_rng_state(state["random_cuda"], self.device)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this network: {error!r}") from error

    def _check_same_training(self, state: dict[str, Any]) -> None:
        # Checkpoints from before there was a choice do not name it.
        wanted, stored = asdict(self.config), {**asdict(Config()), **state["config"]}
        differences = [
            f"{name} is {wanted[name]}, was {stored.get(name)}"
            for name in wanted
            if name not in ("epochs", "patience") and wanted[name] != stored.get(name)
        ]
        if state["fingerprint"] != self.data.fingerprint:
            differences.append("the images or labels are not the ones it began with")
        if wanted["epochs"] < state["epoch"]:
            differences.append(f"epochs is {wanted['epochs']}, but {state['epoch']} are done")
        if differences:
            raise CheckpointError(f"cannot resume: {'; '.join(differences)}")
