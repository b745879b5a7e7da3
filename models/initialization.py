"""``python -m models.initialization``: the lecture's experiment on initial weights, and its question about equal ones.

Six layers of 4096 units get 16 samples of N(0, 1). What their weights were drawn from decides how the activations, and
the gradients on their way back, spread. After Glorot and Bengio, "Understanding the difficulty of training deep
feedforward neural networks", 2010, and He et al., "Delving Deep into Rectifiers", 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

from gpukern import tables
from gpukern.diagnose import MissingPackage, activation_statistics
from gpukern.diagnose.activation_picture import histogram
from gpukern.diagnose.activation_report import ActivationReport
from gpukern.diagnose.figures import BLUE, figure, written
from gpukern.formatting import brief
from models import data
from models.train import make_console

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

LAYERS, WIDTH, SAMPLES = 6, 4096, 16
#: Units of the network that is trained from constant weights, and how it is trained.
UNITS, STEPS, RATE = 8, 400, 0.1


@dataclass(frozen=True)
class Experiment:
    """``deviation`` of the weights as a multiple of 1/√D_in if ``by_width``, else as it is."""

    title: str
    activation: type[nn.Module]
    deviation: float
    by_width: bool = False

    def weight_deviation(self, width: int) -> float:
        return self.deviation / math.sqrt(width) if self.by_width else self.deviation


EXPERIMENTS = (
    Experiment("tanh, N(0, 0.01²)", nn.Tanh, 0.01),
    Experiment("tanh, N(0, 0.05²)", nn.Tanh, 0.05),
    Experiment("tanh, Xavier 1/√D", nn.Tanh, 1.0, by_width=True),
    Experiment("ReLU, Xavier 1/√D", nn.ReLU, 1.0, by_width=True),
    Experiment("ReLU, Kaiming √(2/D)", nn.ReLU, math.sqrt(2), by_width=True),
)


@dataclass(frozen=True)
class Features:
    """First-layer ``weights`` [K, pixels] after training from ``start``, and the share of held-out images it knows."""

    start: str
    weights: torch.Tensor
    accuracy: float

    @property
    def distinct(self) -> int:
        """The number of units of which no two have the same weights, but for rounding."""
        rows: list[torch.Tensor] = []
        for row in self.weights:
            if all((row - other).abs().max() > 1e-3 * self.weights.abs().max() for other in rows):
                rows.append(row)
        return len(rows)


def run(width: int = WIDTH, seed: int = 0, experiments: tuple[Experiment, ...] = EXPERIMENTS) -> list[ActivationReport]:
    """Statistics of each of the ``experiments``, all with the same N(0, 1) numbers scaled by their deviations."""
    generator = torch.Generator().manual_seed(seed)
    linear = [nn.Linear(width, width, bias=False, device="meta") for _ in range(LAYERS)]
    for layer in linear:
        layer.weight = nn.Parameter(torch.randn(width, width, generator=generator))
    samples = torch.randn(SAMPLES, width, generator=generator)
    gradient = torch.randn(SAMPLES, width, generator=generator)
    reports = []
    deviation = 1.0
    for experiment in experiments:
        wanted = experiment.weight_deviation(width)
        with torch.no_grad():
            for layer in linear:
                layer.weight.mul_(wanted / deviation)
        deviation = wanted
        model = nn.Sequential(*(module for layer in linear for module in (layer, experiment.activation())))
        reports.append(activation_statistics(model, samples, lambda output: (output * gradient).sum()))
    return reports


def train_features(constant: float | None, seed: int = 0) -> Features:
    """Train one hidden layer of tanh units on handwritten digits, from ``constant`` weights or by Xavier."""
    samples = data.load()
    images, labels = samples.train.images.flatten(1), samples.train.labels
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(images.shape[1], UNITS, device="meta"), nn.Tanh(), nn.Linear(UNITS, 10, device="meta")
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if constant is not None:
                parameter.fill_(constant)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        right = model(samples.held_out.images.flatten(1)).argmax(1) == samples.held_out.labels
    start = "Xavier" if constant is None else f"θ ≡ {constant:g}"
    return Features(start, next(model.parameters()).detach(), float(right.double().mean()))


def deviations(reports: list[ActivationReport], experiments: tuple[Experiment, ...] = EXPERIMENTS) -> Table:
    """A row for each experiment: deviations of the activations, and of the gradients below them."""
    made = tables.table(
        "weights", "of", *tables.numbers(*(f"layer {number + 1}" for number in range(LAYERS)), "saturated")
    )
    for experiment, report in zip(experiments, reports, strict=True):
        last = report.activations[-1]
        share = "" if last.saturated is None else f"{100 * last.saturated:.0f} %"
        values = (f"{layer.output.deviation:.2f}" for layer in report.activations)
        made.add_row(experiment.title, "activations", *values, share)
        gradients = (layer.gradient for layer in report.activations)
        made.add_row("", "∂L/∂x", *("" if each is None else brief(each.deviation) for each in gradients))
    return made


def draw(reports: list[ActivationReport], features: list[Features]) -> Figure:
    """A row of six histograms for each experiment, and below them the first-layer features."""
    heights = [1.4 * len(reports) + 0.4, 1.5 * len(features) + 0.4]
    made = figure(12, sum(heights))
    above, below = made.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = above.subplots(len(reports), LAYERS, squeeze=False)
    for row, experiment, report in zip(axes, EXPERIMENTS, reports, strict=True):
        for number, (cell, layer) in enumerate(zip(row, report.activations, strict=True)):
            histogram(cell, layer.output, BLUE)
            cell.set_title(f"layer {number + 1}: deviation {layer.output.deviation:.2f}", fontsize=8.5)
            cell.set_xlim((0, 3) if experiment.activation is nn.ReLU else (-1.05, 1.05))
        row[0].set_ylabel(experiment.title.replace(", ", "\n", 1), rotation=0, ha="right", va="center", fontsize=9)
    width = reports[0].layers[0].output.count // SAMPLES
    above.suptitle(f"Activations of six layers of {width} units (zeros of ReLUs are left out)", fontsize=12)
    _draw_features(below, features)
    return made


def _draw_features(part: SubFigure, features: list[Features]) -> None:
    side = math.isqrt(features[0].weights.shape[1])
    axes = part.subplots(len(features), UNITS, squeeze=False)
    for row, each in zip(axes, features, strict=True):
        for cell, weights in zip(row, each.weights, strict=True):
            limit = float(weights.abs().max()) or 1.0
            cell.imshow(weights.view(side, side).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
        row[0].set_ylabel(f"{each.start}\n{_told(each)}", rotation=0, ha="right", va="center", fontsize=9)
    title = f"Weights of {UNITS} first-layer units after training on handwritten digits (red: positive, blue: negative)"
    part.suptitle(title, fontsize=12)


def _told(features: Features) -> str:
    kinds = "1 feature" if features.distinct == 1 else f"{features.distinct} features"
    return f"{kinds}\n{100 * features.accuracy:.0f} % held out"


def _features() -> Iterator[Features]:
    for constant in (0.0, 0.01, None):
        yield train_features(constant)


def main(
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("runs/initialization.png"),
    width: Annotated[int, typer.Option(min=2, help="Units of a layer.")] = WIDTH,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
) -> None:
    """Show what becomes of activations and gradients in deep networks with different initial weights."""
    console = make_console()
    try:
        with console.status("six layers, five kinds of weights"):
            reports = run(width, seed)
        console.print(deviations(reports))
        with console.status("training from constant weights"):
            features = list(_features())
        written(draw(reports, features), out)
    except (MissingPackage, OSError, RuntimeError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for each in features:
        console.print(f"{each.start}: {UNITS} units learn {_told(each).replace(chr(10), ', ')}", highlight=False)
    console.print(f"picture {out}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
