"""The pictures of a training: how the loss fell, what the first layer looks for, the gap to held-out images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError:
    # Only programs draw: better before the training than after it.
    raise SystemExit("error: matplotlib is missing, of the extra demo: pip install -e '.[demo]'") from None

import numpy as np
import torch

from gpukern import diagnose
from gpukern.diagnose.curves import WINDOW, trailing_mean
from gpukern.diagnose.figures import BLUE, FAINT, ORANGE, panels, style, written

__all__ = ["WINDOW", "batch_sizes", "plot_convergence", "plot_curves", "plot_filters", "trailing_mean"]


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
    figure, cells = panels(2, 1, 9, 6.5, sharex=True, height_ratios=(2.2, 1))
    above, below = cells[:, 0]
    above.plot(seen, positive, color=FAINT, linewidth=0.8, label=f"every mini-batch ({batch_size} samples)")
    above.plot(seen, trailing_mean(positive, sizes), color=BLUE, linewidth=2, label=f"last {WINDOW:,} samples")
    above.set(yscale="log", ylabel="cross-entropy loss", title=title)
    above.legend(frameon=False)
    ends = training_size * np.arange(1, len(accuracies) + 1)
    below.plot(ends, 100 * np.asarray(accuracies), color=ORANGE, marker="o", markersize=4)
    if accuracies:
        below.annotate(
            f"{100 * accuracies[-1]:.1f} %", (ends[-1], 100 * accuracies[-1]), (0, 6), ha="center",
            textcoords="offset points", color=ORANGE,
        )  # fmt: skip
    below.margins(y=0.25)
    below.set(ylabel="held-out accuracy, %", xlabel="training samples seen (dotted: end of an epoch)")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for axes in (above, below):
        style(axes)
        for end in ends[:: max(1, len(ends) // 30)]:
            axes.axvline(end, color="#999999", linewidth=0.6, linestyle=":")
    written(figure, path)


def plot_filters(path: Path, weight: torch.Tensor, columns: int = 5) -> None:
    """The filters [K, C, R, S] of a first layer as the local image templates they are."""
    diagnose.plot_filters(weight, columns=columns, path=path)


def plot_curves(path: Path, history: Sequence[Mapping[str, float]], title: str) -> None:
    """Loss and accuracy on training and on held-out images after every epoch; the gap between them is shaded."""
    losses, held_out, accuracies, held_out_accuracies = (
        [measured[f"{part}_{what}"] for measured in history]
        for what in ("loss", "accuracy")
        for part in ("train", "held_out")
    )
    diagnose.plot_training(
        losses, held_out, accuracies=accuracies, validation_accuracies=held_out_accuracies, path=path, title=title,
        labels=("training images, as they are", "held-out images"),
    )  # fmt: skip
