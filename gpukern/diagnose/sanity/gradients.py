"""Gradients of a float64 copy beside central differences, at a few entries of each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils.parametrizations import _SpectralNorm

from gpukern.checking.models import in_full
from gpukern.diagnose.calling import call, floating, map_tensors, random_state_kept
from gpukern.diagnose.sanity.subject import Subject
from gpukern.diagnose.sanity.values import Check, Entry
from gpukern.formatting import count
from gpukern.fusion.errors import first_line

#: Steps of the differences: a kink that lies within the first may lie outside of a smaller one.
_STEPS = (1e-5, 1e-6, 1e-7)
#: Relative error up to which a derivative agrees.
TOLERANCE = 1e-4
#: Samples of the batch; a batch norm needs more than one.
_SAMPLES = 4


def check_gradients(subject: Subject) -> tuple[Check, tuple[Entry, ...]]:
    """Compare ∂L/∂θ with (L(θ + h) − L(θ − h))/2h, relative to the larger of the two."""
    name = "gradients"
    try:
        with in_full():
            entries = tuple(_entries(subject))
    except _Unchecked as problem:
        return Check(name, "not checked", str(problem)), ()
    except Exception as problem:  # a model that does not compute in float64
        return Check(name, "not checked", f"the model fails in float64: {first_line(problem)}"), ()
    if not entries:
        return Check(name, "not checked", "no parameter is trained"), ()
    bad = [entry for entry in entries if entry.error > TOLERANCE and not entry.kink]
    kinks = sum(entry.kink for entry in entries)
    beside = f", {count(kinks, 'kink')} left out" if kinks else ""
    if bad:
        worst = max(bad, key=lambda entry: entry.error)
        names = list(dict.fromkeys(entry.parameter for entry in bad))
        told = (
            f"{len(bad)} of {len(entries)} derivatives are wrong{beside}; that of {worst.parameter}[{worst.place}] is "
            f"{worst.analytic:.3g}, differences give {worst.numeric:.3g}"
        )
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return Check(
            name, "wrong", told, f"look at the backward of what uses {listed}, and at detach() and no_grad()"
        ), entries
    largest = max((entry.error for entry in entries if not entry.kink), default=0.0)
    return Check(
        name, "ok", f"{len(entries) - kinks} derivatives agree with differences within {largest:.0e}{beside}"
    ), entries


class _Unchecked(Exception):
    pass


def _entries(subject: Subject) -> Iterator[Entry]:
    model = subject.fresh().double()
    for module in model.modules():
        if isinstance(module, _SpectralNorm):  # in training it iterates, and its derivative leaves that out
            module.eval()
    batch = subject.some(subject.random_places(_SAMPLES))
    inputs, targets = (
        map_tensors(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, each) for each in batch
    )

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def loss() -> torch.Tensor:
        with torch.no_grad():
            for buffer, before in buffers:  # every call begins with the same running statistics
                buffer.copy_(before)
        with random_state_kept(subject.seed):
            output = call(model, inputs)
            if any(each.dtype is not torch.float64 for each in floating(output)):
                raise _Unchecked("the model returns another dtype than float64 in float64")
            return subject.loss(output, targets)

    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad and each.numel()]
    first = loss()
    if not first.requires_grad:
        raise _Unchecked("the loss does not depend on any parameter")
    gradients = torch.autograd.grad(first, [each for _, each in trained], allow_unused=True)
    with torch.no_grad():
        value = float(first)
        if not math.isfinite(value):
            raise _Unchecked(f"the loss is {value}")
        if float(loss()) != value:
            raise _Unchecked("the loss differs from call to call though the random numbers are the same")
        for number, place in _places(gradients, subject.entries, subject.seed):
            (name, parameter), gradient = trained[number], gradients[number]
            analytic = 0.0 if gradient is None else float(gradient.flatten()[place])
            yield _compare(name, place, parameter, analytic, value, lambda: float(loss()))


def _places(gradients: Sequence[torch.Tensor | None], entries: int, seed: int) -> Iterator[tuple[int, int]]:
    """(number of a parameter, place in it): where the gradient is largest, and at random, in all parameters or some."""
    generator = torch.Generator().manual_seed(seed)
    chosen = range(len(gradients))
    if 2 * len(gradients) > entries:
        # Always the first and the last: errors between them show in the first.
        some = torch.randperm(len(gradients), generator=generator)[: max(0, entries // 2 - 2)].tolist()
        chosen = sorted({0, len(gradients) - 1, *some})  # type: ignore[assignment]
    for number in chosen:
        gradient = gradients[number]
        if gradient is None:  # told by another check
            continue
        flat = gradient.flatten()
        yield from (
            (number, place)
            for place in {int(flat.abs().argmax()), int(torch.randint(len(flat), (), generator=generator))}
        )


def _compare(
    name: str, place: int, parameter: torch.Tensor, analytic: float, value: float, loss: Callable[[], float]
) -> Entry:
    entry = parameter.view(-1)[place : place + 1] if parameter.is_contiguous() else None
    before = float(parameter.flatten()[place])

    def at(moved: float) -> float:
        if entry is not None:
            entry.fill_(moved)
        else:
            _fill(parameter, place, moved)
        return loss()

    scale = max(1.0, abs(before))
    numeric = error = math.nan
    for step in _STEPS:
        h = step * scale
        up, down = at(before + h), at(before - h)
        # What rounding of the loss does to the difference.
        noise = 1e-14 * max(1.0, abs(value)) / h
        central = (up - down) / (2 * h)
        deviation = _error(analytic, central, noise)
        if math.isnan(error):
            numeric, error = central, deviation
        if deviation <= TOLERANCE:
            at(before)
            return Entry(name, place, analytic, central, deviation, kink=step != _STEPS[0])
        sides = (up - value) / h, (value - down) / h
    at(before)
    one_sided = abs(sides[0] - sides[1]) > 1e-3 * max(map(abs, sides)) + noise
    kink = one_sided and min(_error(analytic, side, noise) for side in sides) <= 1e-2
    # A derivative between those of both sides is one of the kink's too.
    kink = kink or (one_sided and min(sides) - noise <= analytic <= max(sides) + noise)
    return Entry(name, place, analytic, numeric, error, kink)


def _error(analytic: float, numeric: float, noise: float) -> float:
    difference = abs(analytic - numeric)
    if not math.isfinite(difference):
        return math.inf
    relative = difference / max(abs(analytic), abs(numeric)) if difference else 0.0
    return 0.0 if relative > TOLERANCE and difference <= noise else relative


def _fill(parameter: torch.Tensor, place: int, value: float) -> None:
    """Set an entry of a parameter in another layout than rows."""
    index = torch.unravel_index(torch.tensor(place), parameter.shape)
    parameter[index] = value
