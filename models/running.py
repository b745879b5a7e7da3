"""A training from its first step to its last: progress, checkpoints, signals, measurements and pictures."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn

from gpukern.runtime.mode import mode_of
from models import checkpoint, plots
from models.distributed import Group
from models.metrics import Metrics
from models.progress import progress_bar
from models.trainer import Trainer

CHECKPOINT, BEST = "checkpoint.pt", "best.pt"
LOSS_PLOT, FILTERS_PLOT, CURVES_PLOT = "loss.png", "filters.png", "curves.png"
#: Processes ask one another whether any was told to stop, which takes a message, after so many steps.
_ASK_EVERY = 10


class Interrupted(Exception):
    """The training was asked to stop by a signal, and has saved its checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number  # as shells report it


def make_console(group: Group | None = None) -> Console:
    """A terminal as wide as it is; a file or a pipe wide enough for every table. Only the first process prints."""
    console = Console(quiet=group is not None and not group.first)
    return console if console.is_terminal else Console(width=140, quiet=console.quiet)


def choose_device(name: str) -> torch.device:
    """RuntimeError if a GPU is asked for and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available: use --device cpu")
    return torch.device(name)


def describe_mode(device: torch.device) -> str:
    """Where the layers are computed, and by what."""
    mode = mode_of(torch.empty(0, device=device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{mode.value} mode on {name}"


def run(trainer: Trainer, path: Path, console: Console, checkpoint_every: int = 0, tensorboard: bool = False) -> None:
    """Train to the end. Saves to ``path`` at the start, after every epoch and every ``checkpoint_every`` steps.

    Beside it go ``metrics.jsonl`` and ``best.pt``, the weights of the epoch with the highest held-out accuracy.
    Interrupted, after saving once more, if SIGINT or SIGTERM arrives.
    """
    with collected_signals(trainer.group) as received, training_bar(console) as progress:
        metrics = Metrics(path.parent, trainer.epoch, tensorboard) if trainer.group.first else None
        save(trainer, path)
        while not trainer.finished:
            _epoch(trainer, path, console, progress, checkpoint_every, received, metrics)
            save(trainer, path)
            if trainer.epoch == trainer.best_epoch:
                save_best(trainer, path.with_name(BEST))
            _stop_if_asked(received, trainer.group)
        if metrics:
            metrics.close()
    if trainer.stalled and trainer.epoch < trainer.config.epochs:
        console.print(
            f"stopped early: no epoch has been better than {trainer.best_epoch}, "
            f"{max(trainer.accuracies):.2%}, for {trainer.config.patience} epochs",
            highlight=False,
        )


def save(trainer: Trainer, path: Path) -> None:
    """The state of the training, by the first of the processes."""
    if trainer.group.first:
        checkpoint.save(path, trainer.state_dict())


def save_best(trainer: Trainer, path: Path) -> None:
    """A checkpoint of the weights that were evaluated, without what only a training needs."""
    if trainer.group.first:
        kept = ("config", "directory", "fingerprint", "classes", "image_size", "epoch", "accuracies")
        state = trainer.state_dict()
        checkpoint.save(path, {name: state[name] for name in kept} | {"model": trainer.best_model.state_dict()})


def _epoch(
    trainer: Trainer, path: Path, console: Console, progress: Progress, checkpoint_every: int, received: list[int],
    metrics: Metrics | None,
) -> None:  # fmt: skip
    """What is left of the current epoch."""
    label = f"epoch {trainer.epoch + 1}/{trainer.config.epochs}"
    task = progress.add_task(
        label, total=trainer.steps_per_epoch, completed=trainer.position, loss=float("nan"), speed=0.0
    )
    start, samples, first, group = time.perf_counter(), 0, len(trainer.losses), trainer.group
    for seen in steps(trainer, progress, task):
        samples += seen
        asked = (group.size == 1 or trainer.position % _ASK_EVERY == 0) and group.any(bool(received))
        if asked or (checkpoint_every and trainer.position % checkpoint_every == 0):
            save(trainer, path)
            if asked:
                _stop_if_asked(received, group)
    losses = trainer.losses[first:]
    seconds = time.perf_counter() - start
    accuracy = trainer.end_epoch()
    trainer.history[-1] |= {"images_per_second": samples / seconds}
    progress.remove_task(task)
    if metrics:
        metrics.write(trainer.history[-1])
    mean = f"loss {sum(losses) / len(losses):.4f}   " if losses else ""
    trained = f"training accuracy {trainer.history[-1]['train_accuracy']:.2%}   " if trainer.data.as_bytes else ""
    console.print(f"{label}   {mean}{trained}held-out accuracy {accuracy:.2%}   {samples / seconds:,.0f} images/s",
                  highlight=False)  # fmt: skip


def steps(trainer: Trainer, progress: Progress, task: TaskID) -> Iterator[int]:
    """Take those that are left of the epoch, and show them; how many samples each saw."""
    start = shown = time.perf_counter()
    samples, position = 0, trainer.position
    while trainer.position < trainer.steps_per_epoch:
        seen = trainer.step()
        samples += seen
        now = time.perf_counter()
        if now - shown > 0.1 or trainer.position == trainer.steps_per_epoch:
            loss, speed = _running_loss(trainer), samples / (now - start)
            progress.update(task, advance=trainer.position - position, loss=loss, speed=speed)
            shown, position = now, trainer.position
        yield seen


def _running_loss(trainer: Trainer) -> float:
    last = trainer.losses[-max(1, plots.WINDOW // trainer.batch_size) :]
    return sum(last) / len(last)


def training_bar(console: Console) -> Progress:
    """A bar that also shows the fields ``loss`` and ``speed``."""
    return progress_bar(console, TextColumn("loss {task.fields[loss]:.4f}   {task.fields[speed]:,.0f} images/s"))


@contextlib.contextmanager
def collected_signals(group: Group) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second one acts as always.

    In one of several processes it does not: ``torchrun`` answers Ctrl-C, which all of them get, with a SIGTERM to each.
    """
    received: list[int] = []
    before: dict[int, Callable | int | None] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if group.size == 1:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        restore()


def _stop_if_asked(received: list[int], group: Group) -> None:
    """All processes or none."""
    if group.any(bool(received)):
        group.wait()
        raise Interrupted(received[0] if received else signal.SIGTERM)


def save_plots(trainer: Trainer, out: Path, title: str) -> tuple[Path, ...]:
    """PNG files in ``out``: the loss by mini-batches, the first-layer filters, and both sets' curves by epochs."""
    loss, filters, curves = (out / name for name in (LOSS_PLOT, FILTERS_PLOT, CURVES_PLOT))
    plots.plot_convergence(loss, trainer.losses, trainer.accuracies, len(trainer.train), trainer.batch_size, title)
    first = next(layer for layer in trainer.best_model.modules() if isinstance(layer, torch.nn.Conv2d))
    plots.plot_filters(filters, first.weight)
    plots.plot_curves(curves, trainer.history, title)
    return loss, filters, curves
