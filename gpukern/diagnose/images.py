"""Pictures of images and filters."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.figures import GREY, panels, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Filters that are drawn; more would be too small to see.
MOST_FILTERS = 96


def plot_filters(
    model: torch.nn.Module | torch.Tensor, *, columns: int = 0, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw the filters [K, C, R, S] of a model's first convolution, or those given, as local image templates.

    Filters of three channels are drawn in colours, each from its smallest to its largest weight; others as the mean
    over C, red positive, blue negative, all on one scale. ``columns``: filters in a row, chosen if 0.

    Raises
    ------
    DiagnoseError for a model without a two-dimensional convolution; ValueError for a tensor of another rank.
    """
    weight = _first_filters(model)
    if weight.dim() != 4 or not weight.numel():
        raise ValueError(f"plot_filters() draws filters [K, C, R, S], got {list(weight.shape)}")
    filters = weight.detach().float().cpu()[:MOST_FILTERS]
    columns = columns or min(len(filters), max(5, math.ceil(math.sqrt(1.6 * len(filters)))))
    rows = math.ceil(len(filters) / columns)
    size = 1.25 if len(filters) <= 40 else 0.8
    figure, axes = panels(rows, columns, size * columns + 1.2, size * rows + 0.7)
    colours = filters.shape[1] == 3
    limit = float(filters.mean(1).abs().max())
    for index, cell in enumerate(axes.flat):
        cell.set_axis_off()
        if index >= len(filters):
            continue
        if colours:
            cell.imshow(_stretched(filters[index].permute(1, 2, 0).numpy()))
        else:
            drawn = cell.imshow(filters[index].mean(0).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        if len(filters) <= 40:
            cell.set_title(str(index), fontsize=8, color=GREY, pad=2)
    figure.suptitle("First-layer filters: local image templates", fontsize=12)
    if not colours:
        figure.colorbar(drawn, ax=axes, shrink=0.7, aspect=30, label="weight").outline.set_visible(False)
    return written(figure, path)


def _first_filters(model: torch.nn.Module | torch.Tensor) -> torch.Tensor:
    if isinstance(model, torch.Tensor):
        return model
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"plot_filters() takes a module or its filters, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            return module.weight
    raise DiagnoseError("the model has no two-dimensional convolution, whose filters could be drawn")


def _stretched(image: np.ndarray) -> np.ndarray:
    """The values from the smallest to the largest, as 0 to 1."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else np.full_like(image, 0.5)


def show_image(axes: Axes, image: torch.Tensor) -> None:
    """Draw an image [C, H, W] or [H, W], normalized or not: its values are stretched from black to white."""
    values = image.detach().float().cpu()
    values = values[None] if values.dim() == 2 else values
    axes.set_axis_off()
    if values.shape[0] == 3:
        axes.imshow(_stretched(values.permute(1, 2, 0).numpy()))
    else:
        axes.imshow(_stretched(values.mean(0).numpy()), cmap="gray")


def check_images(images: object, asked_by: str) -> torch.Tensor:
    """Return ``images`` if they are [N, C, H, W] or [N, H, W]; TypeError or ValueError if not."""
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"{asked_by}() takes images as one tensor, got {type(images).__name__}")
    if images.dim() not in (3, 4) or not images.numel():
        raise ValueError(f"{asked_by}() takes images [N, C, H, W] or [N, H, W], got {list(images.shape)}")
    return images
