"""The learning-rate range test: a short training whose rate grows until the loss does. See the function."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from gpukern.diagnose.calling import (
    call,
    copied,
    copied_optimizer,
    device_of,
    map_tensors,
    moved,
    python_module,
    random_state_kept,
    seed_everything,
)
from gpukern.diagnose.errors import DiagnoseError
from gpukern.diagnose.figures import BLUE, FAINT, GREEN, GREY, ORANGE, panels, style, written
from gpukern.formatting import brief
from gpukern.runtime.files import write_text
from gpukern.runtime.records import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Step = Callable[[torch.nn.Module, torch.optim.Optimizer, Any], Any]
#: Shares of the fall of the loss at which the suggested interval begins and ends.
_BEGINS, _ENDS = 0.1, 0.9
#: A fall smaller than this share of the first loss is none.
_FALL = 0.02


@dataclass(frozen=True)
class RangeTest:
    """``losses`` by ``rates``, also ``smoothed``; ``suggested``: the lowest and the highest rate to try, or None.

    ``steepest`` is the rate at which the smoothed loss falls fastest, ``diverged`` whether the test ended for that.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggested: tuple[float, float] | None
    steepest: float | None
    diverged: bool

    @property
    def finding(self) -> str:
        """The result in words."""
        if self.suggested is None:
            return "the loss falls at no rate: test a wider range, more steps, or gpukern.diagnose.sanity_check"
        low, high = map(brief, self.suggested)
        end = "" if self.diverged else "; the loss has not grown: test higher rates too"
        return f"rates from {low} to {high}, the loss falls fastest at {brief(self.steepest or 0.0)}{end}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the loss by the rate, with the suggested interval; write the picture to ``path`` if given."""
        return written(_draw(self), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return all values as JSON, and write them to ``path`` if given: atomically, or OSError."""
        text = json.dumps(plain(self, name_nonfinite=True), ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def __rich__(self) -> Table:
        from gpukern import tables

        made = tables.table(*tables.numbers("learning rate", "loss", "smoothed"), caption=self.finding)
        for number in sorted({round(each * (len(self.rates) - 1) / 11) for each in range(12)}):
            made.add_row(brief(self.rates[number]), f"{self.losses[number]:.4g}", f"{self.smoothed[number]:.4g}")
        return made

    def __str__(self) -> str:
        from gpukern.tables import as_text

        return as_text(self)


def learning_rate_range_test(
    model: torch.nn.Module,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Any, Any], torch.Tensor] = F.cross_entropy,
    *,
    training_step: Step | None = None,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    divergence: float = 4.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> RangeTest:
    """Train copies with the rate lowest · (highest/lowest)^(t/(steps − 1)) in step t, and find where they learn.

    After Smith, "Cyclical Learning Rates for Training Neural Networks", 2017.
    The loss is smoothed exponentially, s ← β s + (1 − β) L, divided by 1 − βᵗ. The interval begins where it has fallen
    by a tenth of all its fall and ends where by nine tenths, both before its least value. The test ends early when
    the smoothed loss is above ``divergence`` times its least value, or a loss is not finite.

    Parameters
    ----------
    model, optimizer:
        stay as they are, copies are trained; other settings of the optimizer, such as momentum, are kept. Groups of
        parameters keep the ratios of their rates, the first one has the rate of the test.
    batches:
        pairs (inputs, targets): a loader or a list, from the start again where it ends; or a single pair of tensors.
    loss:
        ``loss(output, targets)``.
    training_step:
        ``training_step(model, optimizer, batch)``, which returns the loss, in place of zero_grad, forward, backward
        and step.
    smoothing:
        β, from 0 up to 1.
    seed:
        of all random numbers, such as dropout's.
    progress:
        called with the number of steps that are done and in all.

    Returns
    -------
    A :class:`RangeTest`: ``suggested``, ``plot``, ``to_json``; it prints as a table. Random states stay as they are.

    Raises
    ------
    ValueError for rates that do not grow, fewer than ten steps, a β outside, or no batches; DiagnoseError if model or
    optimizer cannot be copied, or a step returns no loss.
    """
    model = python_module(model, "learning_rate_range_test")
    if not 0 < lowest < highest < math.inf or steps < 10 or not 0 <= smoothing < 1 or divergence <= 1:
        raise ValueError(
            "expected 0 < lowest < highest, steps of 10 or more, smoothing from 0 up to 1 and divergence above 1, "
            f"got {lowest}, {highest}, {steps}, {smoothing}, {divergence}"
        )
    trained = copied(model, "learning_rate_range_test").train()
    with random_state_kept(), torch.enable_grad():
        seed_everything(seed)
        given = _endless(batches, device_of(model))
        found = _sweep(
            trained, copied_optimizer(optimizer, model, trained), given, training_step or _plain(loss),
            [lowest * (highest / lowest) ** (number / (steps - 1)) for number in range(steps)],
            smoothing, divergence, progress or (lambda done, total: None),
        )  # fmt: skip
    return _judge(*found)


def _endless(batches: Any, device: torch.device | None) -> Iterator[Any]:
    if isinstance(batches, (tuple, list)) and len(batches) == 2 and isinstance(batches[0], torch.Tensor):
        batches = [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a loader or pairs (inputs, targets), got {type(batches).__name__}")
    if iter(batches) is batches:  # ends for good
        raise TypeError("batches must be an iterable that can begin again, such as a loader or a list, got an iterator")
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield map_tensors(torch.clone, moved(batch, device))  # for a step that works in place
        if empty:
            raise ValueError("there are no batches")


def _plain(loss: Callable[[Any, Any], torch.Tensor]) -> Step:
    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        optimizer.zero_grad()
        value = loss(call(model, inputs), targets)
        value.backward()
        optimizer.step()
        return value

    return step


def _sweep(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    step: Step,
    rates: list[float],
    smoothing: float,
    divergence: float,
    progress: Callable[[int, int], None],
) -> tuple[list[float], list[float], list[float], bool]:
    """The rates that were tried, the losses, smoothed ones, and whether they diverged."""
    base = optimizer.param_groups[0]["lr"]
    factors = [float(group["lr"] / base) if base else 1.0 for group in optimizer.param_groups]
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    for number, rate in enumerate(rates):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        value = step(model, optimizer, next(batches))
        if not isinstance(value, (torch.Tensor, float)) or (isinstance(value, torch.Tensor) and value.numel() != 1):
            raise DiagnoseError(f"a training step must return its loss, one number, got {type(value).__name__}")
        losses.append(float(value.detach() if isinstance(value, torch.Tensor) else value))
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smoothed.append(average / (1 - smoothing ** (number + 1)))
        progress(number + 1, len(rates))
        least = min(smoothed)
        if not math.isfinite(smoothed[-1]) or (number > 5 and smoothed[-1] > least + (divergence - 1) * abs(least)):
            return rates[: number + 1], losses, smoothed, True
    return rates, losses, smoothed, False


def _judge(rates: list[float], losses: list[float], smoothed: list[float], diverged: bool) -> RangeTest:
    finite = [value if math.isfinite(value) else math.inf for value in smoothed]
    best = min(range(len(finite)), key=finite.__getitem__)
    # One mini-batch is harder than another: the loss before it falls is the median of the first tenth.
    start = statistics.median(finite[: max(3, len(finite) // 10)])
    fall = start - finite[best]
    suggested = steepest = None
    if best > 0 and math.isfinite(fall) and fall > _FALL * max(abs(start), 1e-12):
        # From the least value back, so that a first mini-batch that is easy is no fall.
        above = [
            max((number for number in range(best) if start - finite[number] < share * fall), default=0)
            for share in (_BEGINS, _ENDS)
        ]
        places = [min(number + 1, best) for number in above]
        suggested = rates[places[0]], rates[places[1]]
        slopes = {number: finite[number - 1] - finite[number] for number in range(max(1, places[0]), places[1] + 1)}
        steepest = rates[max(slopes, key=slopes.__getitem__)]
    return RangeTest(tuple(rates), tuple(losses), tuple(smoothed), suggested, steepest, diverged)


def _draw(test: RangeTest) -> Figure:
    made, cells = panels(1, 1, 7.5, 4.4)
    axes = cells[0, 0]
    axes.plot(test.rates, test.losses, color=FAINT, linewidth=1, label="each step")
    axes.plot(test.rates, test.smoothed, color=BLUE, linewidth=2, label="smoothed")
    if test.suggested is not None:
        low, high = test.suggested
        axes.axvspan(low, high, color=GREEN, alpha=0.13, linewidth=0, label=f"suggested: {brief(low)} to {brief(high)}")
        axes.axvline(test.steepest or low, color=ORANGE, linewidth=1.2, linestyle=":", label="falls fastest")
    finite = [value for value in test.smoothed if math.isfinite(value)]
    if finite:
        # What follows the divergence is of no interest.
        room = max(finite[0] - min(finite), 1e-6 * abs(finite[0]), 1e-9)
        lowest = min(value for value in test.losses if math.isfinite(value))
        axes.set_ylim(min(lowest, min(finite)) - 0.1 * room, finite[0] + 1.0 * room)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning-rate range test")
    if test.suggested is None:
        axes.text(0.5, 0.95, "the loss falls at no rate", transform=axes.transAxes, ha="center", va="top", color=GREY)
    axes.legend(frameon=False, fontsize=9)
    style(axes)
    return made
