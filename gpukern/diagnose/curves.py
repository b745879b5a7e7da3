"""The picture of a training: the loss, and the gap between what is learned and what holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gpukern.diagnose.figures import BLUE, FAINT, GREY, ORANGE, panels, style, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The lecture averages the loss over the last (e.g.) 1000 samples.
WINDOW = 1000


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


def plot_training(
    losses: Sequence[float],
    validation_losses: Sequence[float] = (),
    *,
    accuracies: Sequence[float] = (),
    validation_accuracies: Sequence[float] = (),
    path: str | os.PathLike[str] | None = None,
    title: str = "",
    labels: tuple[str, str] = ("training", "validation"),
) -> Figure:
    """Draw the training loss and the validation loss by epochs, and likewise accuracies; the gap between is filled.

    ``losses`` are those of every epoch, or of every mini-batch, the same number in each epoch: then each epoch's mean
    is drawn too. The number of epochs is that of the validation losses, of accuracies, or of the losses, whichever of
    these is the first that is given. Accuracies are shares, 0 to 1. ``path``: where the picture is written; ``labels``
    name the two sets.

    Raises
    ------
    ValueError for lengths that fit no number of epochs; MissingPackage without matplotlib.
    """
    lengths = [len(each) for each in (validation_losses, validation_accuracies, accuracies, losses) if len(each)]
    epochs = lengths[0] if lengths else 0
    if len(losses) % max(epochs, 1):
        raise ValueError(f"{len(losses)} losses are no whole number of mini-batches in each of {epochs} epochs")
    for name, each in (("accuracies", accuracies), ("validation_accuracies", validation_accuracies)):
        if len(each) not in (0, epochs):
            raise ValueError(f"expected {epochs} {name}, one for each epoch, got {len(each)}")
    both = bool(len(accuracies) or len(validation_accuracies))
    figure, axes = panels(1, 1 + both, 6.0 + 5.0 * both, 4.0)
    if len(losses):
        both_losses = np.asarray(losses, dtype=np.float64), np.asarray(validation_losses, dtype=np.float64)
        _losses(axes[0, 0], both_losses, epochs, labels)
    axes[0, 0].set(ylabel="loss", xlabel="epoch")
    if both:
        first, second = (100 * np.asarray(values, dtype=np.float64) for values in (accuracies, validation_accuracies))
        _pair(axes[0, 1], first, second, labels)
        axes[0, 1].set(ylabel="accuracy, %", xlabel="epoch")
        if len(first) and len(second):
            gap = first[-1] - second[-1]
            axes[0, 1].set_title(f"gap at the end: {gap:.1f} points", fontsize=10, color=GREY)
    if title:
        figure.suptitle(title, fontsize=12)
    return written(figure, path)


def _losses(axes: Axes, both: tuple[np.ndarray, np.ndarray], epochs: int, labels: tuple[str, str]) -> None:
    losses, validation = both
    each = len(losses) // epochs
    if each > 1:
        steps = np.arange(1, len(losses) + 1) / each
        axes.plot(steps, losses, color=FAINT, linewidth=0.6, label="every mini-batch")
    _pair(axes, losses.reshape(epochs, each).mean(1), validation, labels)
    positive = np.concatenate([losses, validation])
    if (positive > 0).all() and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0.0, positive[np.isfinite(positive)].min(initial=0.0)))
    if len(validation) and np.isfinite(validation).any() and (best := int(np.nanargmin(validation))) < epochs - 1:
        axes.axvline(best + 1, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(f"{labels[1]}: the loss is least after epoch {best + 1}", fontsize=10, color=GREY)
    axes.legend(frameon=False, fontsize=9)


def _pair(axes: Axes, training: np.ndarray, validation: np.ndarray, labels: tuple[str, str]) -> None:
    """Draw both by epochs, and fill what lies between."""
    shown: list[tuple[np.ndarray, str, str]] = [(training, BLUE, labels[0]), (validation, ORANGE, labels[1])]
    if len(training) == len(validation):
        axes.fill_between(np.arange(1, len(training) + 1), training, validation, color=FAINT, alpha=0.45, linewidth=0)
    for values, colour, label in shown:
        if len(values):
            few: Any = "o" if len(values) < 25 else None
            axes.plot(np.arange(1, len(values) + 1), values, color=colour, marker=few, markersize=3.5, label=label)
    axes.locator_params(axis="x", integer=True)
    style(axes)
