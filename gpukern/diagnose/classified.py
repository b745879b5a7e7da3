"""What a classifier confuses: the confusion matrix, and the samples it is wrong about."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpukern.diagnose.figures import GREY, figure, panels, written
from gpukern.diagnose.images import check_images, show_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

#: Classes up to which the picture shows numbers, and names.
_NUMBERED, _NAMED = 20, 40


@dataclass(frozen=True)
class Confusion:
    """``counts[t][p]``: samples of class t that were taken for p. ``str()`` and rich print a row for each class."""

    counts: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The share of samples whose class was found."""
        total = sum(map(sum, self.counts))
        return sum(row[number] for number, row in enumerate(self.counts)) / total

    @property
    def worst(self) -> tuple[tuple[str, str, int], ...]:
        """(class, what it was taken for, how often) of all confusions, the most frequent first."""
        pairs = (
            (self.names[truth], self.names[taken], number)
            for truth, row in enumerate(self.counts)
            for taken, number in enumerate(row)
            if number and taken != truth
        )
        return tuple(sorted(pairs, key=lambda pair: -pair[2]))

    def __rich__(self) -> Table:
        from gpukern import tables
        from gpukern.formatting import percent

        columns = tables.numbers("samples", "found (recall)", "right when said (precision)")
        made = tables.table("class", *columns, "most taken for", title=f"accuracy {percent(self.accuracy, 1)}")
        counts = np.array(self.counts)
        for number, name in enumerate(self.names):
            own, samples, said = counts[number, number], counts[number].sum(), counts[:, number].sum()
            others = counts[number].copy()
            others[number] = 0
            taken = f"{self.names[others.argmax()]} ({others.max():,})" if others.any() else ""
            shares = (percent(own / of, 1) if of else "–" for of in (samples, said))
            made.add_row(name, f"{samples:,}", *shares, taken)
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the matrix, shaded by the share of each class; write it to ``path`` if given."""
        counts = np.array(self.counts, dtype=np.float64)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        side = max(4.2, min(12.0, 0.5 * len(counts) + 1.6))
        made = figure(side + 0.4, side)
        axes = made.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set(xlabel="taken for", ylabel="class", title=f"accuracy {100 * self.accuracy:.1f} %")
        axes.spines[:].set_visible(False)
        if len(counts) <= _NUMBERED:
            for (truth, taken), number in np.ndenumerate(counts):
                colour = "white" if shares[truth, taken] > 0.5 else GREY if truth != taken else "black"
                axes.text(
                    taken, truth, f"{number:.0f}" if number else "", ha="center", va="center", color=colour, fontsize=8
                )
        if len(counts) <= _NAMED:
            turned: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, self.names)) > 3 else {}
            axes.set_xticks(range(len(counts)), self.names, **turned, fontsize=8)
            axes.set_yticks(range(len(counts)), self.names, fontsize=8)
        axes.tick_params(length=0)
        return written(made, path)


def confusion(predictions: torch.Tensor, labels: torch.Tensor, names: Sequence[str] = ()) -> Confusion:
    """Count which class was taken for which.

    ``predictions`` are logits [N, C, …] or classes of the shape of ``labels`` [N, …]; labels below 0, such as those
    that a loss ignores, are left out. ``names`` of the classes; their numbers without.

    Raises
    ------
    ValueError for shapes, labels or a number of names that do not fit, and where no sample is left.
    """
    predictions, labels = torch.as_tensor(predictions).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    classes = len(names)
    if predictions.dim() == labels.dim() + 1:
        classes = predictions.shape[1]
        _refuse_nan(predictions)
        predictions = predictions.argmax(1)
    if predictions.shape != labels.shape or labels.is_floating_point() or predictions.is_floating_point():
        raise ValueError(
            f"expected logits [N, C, …] or classes [N, …] and labels [N, …], got {list(predictions.shape)} "
            f"({predictions.dtype}) and {list(labels.shape)} ({labels.dtype})"
        )
    counted = labels >= 0
    predictions, labels = predictions[counted].long(), labels[counted].long()
    if not len(labels):
        raise ValueError("confusion() has no sample with a label")
    classes = classes or 1 + int(torch.maximum(labels, predictions).max())
    if int(labels.max()) >= classes or int(predictions.max()) >= classes or int(predictions.min()) < 0:
        raise ValueError(f"labels and predictions must be 0 to {classes - 1}")
    if names and len(names) != classes:
        raise ValueError(f"there are {classes} classes, and {len(names)} names")
    counts = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)
    return Confusion(
        tuple(map(tuple, counts.tolist())), tuple(map(str, names)) or tuple(str(number) for number in range(classes))
    )


@dataclass(frozen=True)
class Misclassified:
    """Samples that were taken for another class, the surest mistakes first: places in the batch, and classes."""

    images: torch.Tensor
    places: tuple[int, ...]
    labels: tuple[int, ...]
    predictions: tuple[int, ...]
    probabilities: tuple[float, ...]
    names: tuple[str, ...]
    total: int

    def __rich__(self) -> Table:
        from gpukern import tables

        made = tables.table(
            *tables.numbers("sample"), "class", "taken for", *tables.numbers("probability"),
            title=f"{len(self.places):,} of {self.total:,} are misclassified",
        )  # fmt: skip
        for place, label, taken, probability in zip(
            self.places, self.labels, self.predictions, self.probabilities, strict=True
        ):
            made.add_row(str(place), self.names[label], self.names[taken], f"{probability:.2f}")
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)

    def plot(self, path: str | os.PathLike[str] | None = None, *, most: int = 24) -> Figure:
        """Draw the first ``most``: class, what it was taken for, and the probability that was given to that."""
        number = min(most, len(self.places))
        columns = max(1, min(8, number))
        made, axes = panels(
            max(1, -(-number // columns)), columns, 1.45 * columns + 0.3, 1.75 * -(-number // columns) + 0.6
        )
        for cell in axes.flat:
            cell.set_axis_off()
        for index, cell in zip(range(number), axes.flat, strict=False):
            show_image(cell, self.images[index])
            label, taken = self.names[self.labels[index]], self.names[self.predictions[index]]
            cell.set_title(f"{label} → {taken}\n{100 * self.probabilities[index]:.0f} %", fontsize=8)
        made.suptitle(f"{len(self.places):,} of {self.total:,} misclassified, the surest first", fontsize=11)
        return written(made, path)


def misclassified(
    images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str] = ()
) -> Misclassified:
    """Find the ``images`` [N, C, H, W] whose largest of the ``logits`` [N, C] is not that of their label [N].

    They are sorted by the softmax probability of the wrong class, the largest first: what stands there is often a
    wrong label.

    Raises
    ------
    TypeError, ValueError for shapes, labels or a number of names that do not fit.
    """
    images = check_images(images, "misclassified")
    logits, labels = torch.as_tensor(logits).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if logits.dim() != 2 or labels.shape != (len(images),) or len(logits) != len(images):
        raise ValueError(
            f"expected logits [N, C] and labels [N] for {len(images)} images, "
            f"got {list(logits.shape)} and {list(labels.shape)}"
        )
    _refuse_nan(logits)
    classes = logits.shape[1]
    if names and len(names) != classes:
        raise ValueError(f"there are {classes} classes, and {len(names)} names")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be 0 to {classes - 1}")
    sure, taken = logits.double().softmax(1).max(1)
    wrong = (taken != labels).nonzero()[:, 0]
    places = wrong[sure[wrong].argsort(descending=True, stable=True)]
    return Misclassified(
        images.detach()[places.to(images.device)],
        tuple(places.tolist()),
        tuple(labels[places].tolist()),
        tuple(taken[places].tolist()),
        tuple(sure[places].tolist()),
        tuple(map(str, names)) or tuple(str(number) for number in range(classes)),
        len(images),
    )


def _refuse_nan(logits: torch.Tensor) -> None:
    """ValueError: the largest of logits that are NaN is the first, which would count as a prediction."""
    if bool(logits.isnan().any()):
        raise ValueError("logits are NaN")
