"""The pictures of a training: how the loss fell, what the first layer looks for, the gap to held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    # Only programs draw: better before the training than after it.
    raise SystemExit("error: matplotlib is missing, of the extra demo: pip install -e '.[demo]'") from None

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import ArrayLike

#: The lecture averages the loss over the last (e.g.) 1000 samples.
WINDOW = 1000

_RAW, _MEAN, _ACCURACY = "#b8c4d6", "#1f4e9c", "#c2571a"


def trailing_mean(losses: ArrayLike, sizes: ArrayLike, window: int = WINDOW) -> np.ndarray:
    """For every step, the loss averaged over the last ``window`` samples, or over all where there are fewer.

    ``losses`` are means over mini-batches of ``sizes`` samples, which count as a whole: batches of more than
    ``window`` samples are not averaged.
    """
    counts = np.asarray(sizes, dtype=np.float64)
    samples = np.concatenate([[0], np.cumsum(counts)])
    sums = np.concatenate([[0], np.cumsum(np.asarray(losses) * counts)])
    last = np.arange(1, len(samples))
    first = np.minimum(np.searchsorted(samples, samples[1:] - window, side="left").clip(0), last - 1)
    return (sums[last] - sums[first]) / (samples[last] - samples[first])


def batch_sizes(steps: int, training_size: int, batch_size: int) -> np.ndarray:
    """Samples of each of the first ``steps`` mini-batches; an epoch's last one takes what is left."""
    per_epoch = math.ceil(training_size / batch_size)
    left = training_size - (per_epoch - 1) * batch_size
    return np.where((np.arange(steps) + 1) % per_epoch, batch_size, left)


def plot_convergence(
    path: Path, losses: Sequence[float], accuracies: Sequence[float], training_size: int, batch_size: int, title: str
) -> None:
    """Loss by samples seen: every mini-batch, and averaged; below it the held-out error after every epoch."""
    sizes = batch_sizes(len(losses), training_size, batch_size)
    seen = np.cumsum(sizes)
    # A logarithm has no place for a loss that rounds to zero.
    positive = np.maximum(np.asarray(losses, dtype=np.float64), 1e-7)
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(2.2, 1), layout="constrained"
    )
    above.plot(seen, positive, color=_RAW, linewidth=0.8, label=f"every mini-batch ({batch_size} samples)")
    above.plot(seen, trailing_mean(positive, sizes), color=_MEAN, linewidth=2, label=f"last {WINDOW:,} samples")
    above.set(yscale="log", ylabel="cross-entropy loss", title=title)
    above.legend(frameon=False)
    ends = training_size * np.arange(1, len(accuracies) + 1)
    below.plot(ends, 100 * np.asarray(accuracies), color=_ACCURACY, marker="o", markersize=4)
    if accuracies:
        below.annotate(
            f"{100 * accuracies[-1]:.1f} %", (ends[-1], 100 * accuracies[-1]), (0, 6), ha="center",
            textcoords="offset points", color=_ACCURACY,
        )  # fmt: skip
    below.margins(y=0.25)
    below.set(ylabel="held-out accuracy, %", xlabel="training samples seen (dotted: end of an epoch)")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (above, below):
        style(axes)
        for end in ends[:: max(1, len(ends) // 30)]:
            axes.axvline(end, color="#999999", linewidth=0.6, linestyle=":")
    write(figure, path)


def plot_filters(path: Path, weight: torch.Tensor, columns: int = 5) -> None:
    """The filters [K, C, R, S] of a first layer, averaged over C, as the local image templates they are.

    Of more than 64 the first 64.
    """
    weight = weight[:64]
    filters = weight.detach().float().mean(1).cpu().numpy()
    limit = float(np.abs(filters).max())
    rows = math.ceil(len(filters) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.35 * columns + 1.2, 1.35 * rows + 0.6), layout="constrained", squeeze=False
    )
    for cell in axes.flat:
        cell.set_axis_off()
    for index, (cell, template) in enumerate(zip(axes.flat, filters, strict=False)):
        picture = cell.imshow(template, cmap="RdBu_r", vmin=-limit, vmax=limit)
        cell.set_title(str(index), fontsize=8, color="#666666", pad=2)
    figure.suptitle("First-layer filters: local image templates", fontsize=12)
    figure.colorbar(picture, ax=axes, shrink=0.7, aspect=30, label="weight").outline.set_visible(False)
    write(figure, path)


def plot_curves(path: Path, history: Sequence[Mapping[str, float]], title: str) -> None:
    """Loss and accuracy on training and on held-out images after every epoch; the gap between them is shaded."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    epochs = [measured["epoch"] for measured in history]
    for axes, what, scale in ((left, "loss", 1), (right, "accuracy", 100)):
        train, held_out = (
            [scale * measured[f"{part}_{what}"] for measured in history] for part in ("train", "held_out")
        )
        axes.fill_between(epochs, train, held_out, color=_RAW, alpha=0.4, linewidth=0)
        axes.plot(epochs, train, color=_MEAN, linewidth=1.6, label="training images, as they are")
        axes.plot(epochs, held_out, color=_ACCURACY, linewidth=1.6, label="held-out images")
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        style(axes)
        if history and what == "accuracy":
            gap = train[-1] - held_out[-1]
            axes.set_title(f"gap at the end: {gap:.1f} points", fontsize=10, color="#666666")
    left.set(ylabel="cross-entropy loss", ylim=(0, None))
    right.set(ylabel="accuracy, %")
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=12)
    write(figure, path)


def style(axes: plt.Axes) -> None:
    """The look of all curves: little but the curves."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)


def write(figure: plt.Figure, path: Path) -> None:
    """As a PNG file, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
