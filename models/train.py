"""``python -m models.train``: LeNet-5 by mini-batch gradient descent, stopped and resumed at will.

Samples are shuffled anew every epoch. Kernels run on a GPU, the plain-torch reference on a CPU.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from gpukern.runtime.mode import mode_of
from models import checkpoint, data, plots
from models.trainer import OPTIMIZERS, Config, Trainer

OptimizerName = Enum("OptimizerName", {name: name for name in OPTIMIZERS}, type=str)  # type: ignore[misc]
DeviceName = Enum("DeviceName", {"auto": "auto", "cpu": "cpu", "cuda": "cuda"}, type=str)

CHECKPOINT, LOSS_PLOT, FILTERS_PLOT = "checkpoint.pt", "loss.png", "filters.png"


class Interrupted(Exception):
    """The training was asked to stop by a signal, and has saved its checkpoint."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = 128 + signal_number  # as shells report it


def make_console() -> Console:
    """A terminal as wide as it is; a file or a pipe wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def choose_device(name: str) -> torch.device:
    """RuntimeError if a GPU is asked for and there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available: use --device cpu")
    return torch.device(name)


def describe_mode(device: torch.device) -> str:
    """Where the layers are computed, and by what."""
    mode = mode_of(torch.empty(0, device=device))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{mode.value} mode on {name}"


def run(trainer: Trainer, path: Path, console: Console, checkpoint_every: int = 0) -> None:
    """Train to the end. Saves to ``path`` at the start, after every epoch and every ``checkpoint_every`` steps.

    Interrupted, after saving once more, if SIGINT or SIGTERM arrives.
    """
    with _signals() as received, progress_bar(console) as progress:
        checkpoint.save(path, trainer.state_dict())
        while not trainer.finished:
            _epoch(trainer, path, console, progress, checkpoint_every, received)
            checkpoint.save(path, trainer.state_dict())
            _stop_if_asked(received)


def _epoch(
    trainer: Trainer, path: Path, console: Console, progress: Progress, checkpoint_every: int, received: list[int]
) -> None:
    """What is left of the current epoch."""
    label = f"epoch {trainer.epoch + 1}/{trainer.config.epochs}"
    task = progress.add_task(
        label, total=trainer.steps_per_epoch, completed=trainer.position, loss=float("nan"), speed=0.0
    )
    start, samples, first = time.perf_counter(), 0, len(trainer.losses)
    for seen in steps(trainer, progress, task):
        samples += seen
        if received or (checkpoint_every and trainer.position % checkpoint_every == 0):
            checkpoint.save(path, trainer.state_dict())
            _stop_if_asked(received)
    losses = trainer.losses[first:]
    speed = samples / (time.perf_counter() - start)
    accuracy = trainer.end_epoch()
    progress.remove_task(task)
    mean = f"loss {sum(losses) / len(losses):.4f}   " if losses else ""
    console.print(f"{label}   {mean}held-out accuracy {accuracy:.2%}   {speed:,.0f} images/s", highlight=False)


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


def progress_bar(console: Console) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}   {task.fields[speed]:,.0f} images/s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying in the middle of a step; a second one acts as always."""
    received: list[int] = []
    before: dict[int, Callable | int | None] = {}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
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


def _stop_if_asked(received: list[int]) -> None:
    if received:
        raise Interrupted(received[0])


def save_plots(trainer: Trainer, out: Path, title: str) -> tuple[Path, Path]:
    """The convergence and the first-layer filters as PNG files in ``out``."""
    loss, filters = out / LOSS_PLOT, out / FILTERS_PLOT
    plots.plot_convergence(loss, trainer.losses, trainer.accuracies, len(trainer.train), trainer.batch_size, title)
    plots.plot_filters(filters, trainer.model.conv1.weight)
    return loss, filters


def _merged(options: dict[str, Any], stored: dict[str, Any]) -> Config:
    """The options given, completed by those of the training to resume (none: an empty dictionary)."""
    given = {name: value for name, value in options.items() if value is not None}
    config = {**stored, **given}
    if stored and config["optimizer"] != stored["optimizer"]:  # whose settings mean nothing to the other one
        config |= {name: given.get(name) for name in ("lr", "momentum")}
    return Config(**config)


def _keep_previous(path: Path, console: Console) -> None:
    """A new training must not cost an old one."""
    if path.exists():
        kept = path.with_suffix(".previous.pt")
        path.replace(kept)
        console.print(f"kept the checkpoint of an earlier training as {kept} (--resume goes on with it instead)")


def train(options: dict[str, Any], directory: Path | None, out: Path, device: torch.device, resume: bool,
          checkpoint_every: int, console: Console, compiled: bool = False) -> None:  # fmt: skip
    """The whole command. CheckpointError, FileNotFoundError, ValueError and Interrupted say what went wrong."""
    path = out / CHECKPOINT
    state = checkpoint.load(path) if resume else None
    config = _merged(options, state["config"] if state else {})
    if directory is None and state and state["directory"]:
        directory = Path(state["directory"])
    samples = data.load(directory)
    trainer = Trainer(config, samples, device, compiled)
    if state:
        trainer.load_state_dict(state)
    else:
        _keep_previous(path, console)
    console.print(f"LeNet-5, {describe_mode(device)}; {len(trainer.train):,} training and {len(trainer.held_out):,} "
                  f"held-out images from {samples.name}", highlight=False)  # fmt: skip
    console.print(", ".join(f"{name} {value}" for name, value in asdict(config).items() if value is not None),
                  highlight=False)  # fmt: skip
    run(trainer, path, console, checkpoint_every)
    loss, filters = save_plots(trainer, out, f"LeNet-5 on {samples.name}")
    console.print(f"checkpoint {path}, loss {loss}, filters {filters}", highlight=False)


def main(
    epochs: Annotated[int | None, typer.Option(min=0, help="Passes over the training set. (default 10)")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="1: stochastic; 'all' or 0: batch gradient descent. (default 32)", metavar="INTEGER|all"),
    ] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option(help="From gpukern.optim. (default momentum)")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate. (default depends on the optimizer)")] = None,
    momentum: Annotated[float | None, typer.Option(min=0, help="For momentum, nesterov. (default 0.9)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights and shuffling. (default 0)")] = None,
    batch_norm: Annotated[
        bool | None, typer.Option("--batch-norm/--no-batch-norm", help="One before every ReLU. (default none)")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Directory of MNIST-like IDX files. (default: scikit-learn's digits)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where checkpoint and plots go.")] = Path("runs/lenet"),
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Also save every so many steps; 0: never.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help='By torch.compile(model, backend="gpukern").')] = False,
) -> None:
    """Train LeNet-5. Ctrl-C saves a checkpoint; --resume goes on from it, on a CPU to the very same weights."""
    console = make_console()
    options = {
        "epochs": epochs,
        "batch_size": _parse_batch_size(batch_size),
        "optimizer": optimizer and optimizer.value,
        "lr": lr,
        "momentum": momentum,
        "seed": seed,
        "batch_norm": batch_norm,
    }
    try:
        train(options, data, out, choose_device(device.value), resume, checkpoint_every, console, compiled)
    except Interrupted as interruption:
        console.print(f"{interruption}: saved {out / CHECKPOINT}; go on with --resume", highlight=False)
        raise typer.Exit(interruption.exit_code) from None
    except (checkpoint.CheckpointError, OSError, ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _parse_batch_size(text: str | None) -> int | None:
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal():
        raise typer.BadParameter(f"expected a number of samples or 'all', got {text!r}", param_hint="--batch-size")
    return int(text)


if __name__ == "__main__":
    typer.run(main)
