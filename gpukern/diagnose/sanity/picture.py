"""The picture of a sanity check: a handful being learned, updates beside weights, derivatives beside differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from gpukern.diagnose.figures import BLUE, FAINT, GREEN, GREY, ORANGE, panels, style
from gpukern.diagnose.sanity.gradients import TOLERANCE
from gpukern.diagnose.sanity.training import USUAL
from gpukern.diagnose.sanity.values import Measured, SanityValues

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Weights with a name beside their bar.
_NAMED = 24
#: Relative errors that are drawn alike.
_LEAST = 1e-13
_VERDICTS = {"ok": GREEN, "warning": "#b07d00", "wrong": "#c2331a", "not checked": GREY}


def draw(report: SanityValues) -> Figure:
    """Three panels; one whose numbers were not measured says so."""
    made, axes = panels(1, 3, 14, 4.2)
    _draw_handful(axes[0, 0], report.measured)
    _draw_updates(axes[0, 1], report.measured)
    _draw_derivatives(axes[0, 2], report.measured)
    titles = zip(axes[0], ("a handful learned", "updates", "gradients"), strict=True)
    for cell, name in titles:
        verdict = report[name].verdict
        cell.set_title(f"{name}: {verdict}", color=_VERDICTS[verdict], fontsize=11)
    made.suptitle(report.model, fontsize=12)
    return made


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)


def _draw_handful(axes: Axes, measured: Measured) -> None:
    losses = np.array(measured.handful)
    if not len(losses) or not np.isfinite(losses).any():
        return _nothing(axes)
    axes.plot(losses, color=BLUE, linewidth=1.6)
    if (losses[np.isfinite(losses)] > 0).all():
        axes.set_yscale("log")
    axes.set(xlabel="steps of Adam", ylabel="loss of a few examples")
    style(axes)


def _draw_updates(axes: Axes, measured: Measured) -> None:
    ratios = {name: ratio for name, ratio in measured.updates.items() if math.isfinite(ratio) and ratio > 0}
    if not ratios:
        return _nothing(axes)
    places = np.arange(len(ratios))[::-1]
    axes.axvspan(*USUAL, color=FAINT, alpha=0.35, linewidth=0)
    axes.axvline(1e-3, color=GREY, linewidth=1, linestyle=":")
    axes.plot(list(ratios.values()), places, "o", color=ORANGE, markersize=5)
    names = [name.removesuffix(".weight") for name in ratios]
    if len(ratios) <= _NAMED:
        axes.set_yticks(places, [name if len(name) <= 20 else f"…{name[-19:]}" for name in names], fontsize=8)
    else:
        axes.set_yticks([places[0], places[-1]], [names[0][-20:], names[-1][-20:]], fontsize=8)
    axes.set(xscale="log", xlabel="‖Δθ‖/‖θ‖ of a step (dotted: 1e-3)")
    axes.set_xlim(min(5e-5, 0.5 * min(ratios.values())), max(2e-2, 2 * max(ratios.values())))
    style(axes)


def _draw_derivatives(axes: Axes, measured: Measured) -> None:
    if not measured.derivatives:
        return _nothing(axes)
    kinds = (
        ("agree", BLUE, [each for each in measured.derivatives if not each.kink and each.error <= TOLERANCE]),
        ("kinks", GREY, [each for each in measured.derivatives if each.kink]),
        ("wrong", "#c2331a", [each for each in measured.derivatives if not each.kink and each.error > TOLERANCE]),
    )
    for label, colour, entries in kinds:
        if entries:
            sizes = [max(abs(each.numeric), 1e-12) for each in entries]
            errors = [min(max(each.error, _LEAST), 10.0) for each in entries]
            axes.plot(sizes, errors, "o", color=colour, markersize=5, alpha=0.8, label=f"{len(entries)} {label}")
    axes.axhline(TOLERANCE, color=GREY, linewidth=1, linestyle=":")
    axes.set(
        xscale="log", yscale="log", xlabel="|∂L/∂θ| by central differences", ylabel="relative error (dotted: bound)"
    )
    axes.set_ylim(_LEAST / 3, 30)
    axes.legend(frameon=False, fontsize=9)
    style(axes)
