"""``python -m models.optimizers``: the optimizers beside one another, on LeNet-5 and on two surfaces of the lecture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from models import data as datasets
from models.optimizer_plots import LOOKS, plot_losses, plot_paths
from models.running import choose_device, describe_mode, make_console, steps, training_bar
from models.train import DeviceName
from models.trainer import Config, Trainer

LOSS_PLOT, PATHS_PLOT = "optimizers.png", "optimizer-paths.png"
_WIDTHS = (15, 18, 19, 9, 9)


def compare(epochs: int, samples: datasets.Data, device: torch.device, console: Console) -> list[Trainer]:
    """LeNet-5 trained from the same weights on the same mini-batches, once with each optimizer.

    ValueError where a training diverges.
    """
    console.print(_row("optimizer", "learning rate", "loss, last epoch", "held-out accuracy", "best", "seconds"))
    trainers = []
    for name in LOOKS:
        start = time.perf_counter()
        trainer = _trained(Trainer(Config(epochs=epochs, optimizer=name), samples, device), console)
        trainers.append(trainer)
        row = _row(*_results(trainer), f"{time.perf_counter() - start:.0f}")
        console.print(row, highlight=False)
    return trainers


def _trained(trainer: Trainer, console: Console) -> Trainer:
    title = LOOKS[trainer.config.optimizer][0]
    with training_bar(console) as progress:
        total = trainer.config.epochs * trainer.steps_per_epoch
        task = progress.add_task(title, total=total, loss=float("nan"), speed=0.0)
        while not trainer.finished:
            for _ in steps(trainer, progress, task):
                pass
            trainer.end_epoch()
    return trainer


def _row(name: str, *cells: str) -> str:
    """Of a table that grows while one waits."""
    return f"{name:<9}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _results(trainer: Trainer) -> tuple[str, ...]:
    losses = trainer.losses[-trainer.steps_per_epoch :]
    return (
        LOOKS[trainer.config.optimizer][0],
        f"{trainer.config.lr:g}",
        f"{sum(losses) / len(losses):.4f}",
        f"{trainer.accuracies[-1]:.2%}",
        f"{max(trainer.accuracies):.2%}",
    )


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set, with each optimizer.")] = 10,
    data: Annotated[
        Path | None, typer.Option(help="Directory of MNIST-like IDX files. (default: scikit-learn's digits)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("runs/optimizers"),
    device: Annotated[DeviceName, typer.Option(help="auto: a GPU if there is one.")] = DeviceName.auto,
) -> None:
    """Train LeNet-5 with each optimizer and draw all their losses; draw their paths down a bowl and off a saddle."""
    console = make_console()
    try:
        where = choose_device(device.value)
        samples = datasets.load(data)
        console.print(f"LeNet-5, {describe_mode(where)}; {len(samples.train):,} training and "
                      f"{len(samples.held_out):,} held-out images from {samples.name}", highlight=False)  # fmt: skip
        trainers = compare(epochs, samples, where, console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    plot_losses(out / LOSS_PLOT, trainers, f"LeNet-5 on {samples.name}, each optimizer with its learning rate")
    plot_paths(out / PATHS_PLOT)
    console.print(f"loss curves {out / LOSS_PLOT}, paths {out / PATHS_PLOT}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
