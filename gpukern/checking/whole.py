"""Runs of the whole model: what every layer gets and returns, and how far errors of its layers carry.

The bound on an error in the model is statistical. The float64 model runs some more times, and what each layer returns,
forward and backward, is changed at random: by a third of the layer's own bound, relative to its norm. A bound is six
standard deviations of sums, or two roundings. A right model in the dtype is no further from the truth than four times
the root mean square of what that does to a tensor, and what the layer's own bound and a rounding beside layers add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from gpukern.checking.bounds import disturbed
from gpukern.checking.layer import Call
from gpukern.checking.models import Unit, floating, map_floating

#: Runs with changed layers, and the factor on what they do.
DRAWS, FACTOR = 4, 4.0
#: Roundings beside layers: sums of branches, functions.
ROUNDINGS = 1.0


@dataclass
class Run:
    """The ``calls`` of each unit by its place, and the gradients of parameters by their names."""

    calls: dict[int, list[Call]] = field(default_factory=dict)
    outputs: list[torch.Tensor] = field(default_factory=list)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)


#: (place of the unit, tensor) → a changed tensor.
Change = Callable[[int, torch.Tensor], torch.Tensor]


def run(
    model: torch.nn.Module,
    units: Sequence[Unit],
    inputs: tuple[tuple, dict[str, Any]],
    seeds: Sequence[torch.Tensor] | Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    *,
    keep: torch.dtype | None = None,
    change: Change | None = None,
) -> Run:
    """Call ``model``, and differentiate with the gradients ``seeds`` of its outputs.

    ``keep``: round what each layer gets to this dtype, and keep it.
    """
    found = Run()
    with ExitStack() as stack:
        for place, unit in enumerate(units):
            _watch(model, place, unit, found, keep, change, stack)
        args, kwargs = map_floating(torch.clone, inputs)  # the first layer may work in place
        returned = floating(model(*args, **kwargs))
        found.outputs = [each.detach() for each in returned]
        outputs = [each for each in returned if each.requires_grad]
        if outputs:
            if callable(seeds):
                seeds = seeds(outputs)
            grads = [seed.to(output.dtype) for seed, output in zip(seeds, outputs, strict=True)]
            torch.autograd.backward(outputs, grads)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.grads[name] = parameter.grad.detach()
            parameter.grad = None
    return found


def _watch(
    model: torch.nn.Module,
    place: int,
    unit: Unit,
    found: Run,
    keep: torch.dtype | None,
    change: Change | None,
    stack: ExitStack,
) -> None:
    """Record the calls of a unit in ``found`` until ``stack`` ends."""
    calls = found.calls.setdefault(place, [])

    def begin(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        needs = [each.requires_grad for each in floating((args, kwargs))]
        if keep is None:
            args, kwargs = (), {}
        else:
            kept = keep
            args, kwargs = map_floating(lambda tensor: tensor.detach().to(kept, copy=True), (args, kwargs))
        calls.append(Call(args, kwargs, needs=needs))

    def end(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if change is not None:
            output = disturbed(output, lambda tensor: change(place, tensor))
        call = calls[-1]
        for number, each in enumerate(floating(output)):
            call.outputs.append(each.detach().clone())  # the next layer may work in place
            call.grads.append(None)
            if each.requires_grad:
                each.register_hook(_keeper(call, number))
        return output

    first, last = (model.get_submodule(name) for name in (unit.names[0], unit.names[-1]))
    stack.callback(first.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(last.register_forward_hook(end).remove)


def _keeper(call: Call, number: int) -> Callable[[torch.Tensor], None]:
    def keep(grad: torch.Tensor) -> None:
        call.grads[number] = grad.detach()

    return keep


def tensors(run: Run, scale: float = 1.0) -> Iterator[tuple[tuple[int, int, str] | str, torch.Tensor]]:
    """Yield what two runs can be compared by: outputs of layers and gradients of these by (place, call, what), and the
    gradients of parameters by their names. ``scale`` is that of the gradients."""
    for place, calls in run.calls.items():
        for number, call in enumerate(calls):
            for index, output in enumerate(call.outputs):
                yield (place, number, f"output{index or ''}"), output
                grad = call.grads[index]
                if grad is not None:
                    yield (place, number, f"output{index or ''} gradient"), grad.double() / scale
    for name, grad in run.grads.items():
        yield name, grad.double() / scale


def spread(draws: Iterator[Run], truth: Run) -> dict[Any, float]:
    """The root mean square of ‖y − ref‖ / ‖ref‖ over ``draws``, of every tensor of ``truth``."""
    exact = dict(tensors(truth))
    squares: dict[Any, float] = dict.fromkeys(exact, 0.0)
    count = 0
    for draw in draws:
        count += 1
        for key, tensor in tensors(draw):
            if key in exact:
                squares[key] += distance(tensor, exact[key]) ** 2
    return {key: math.sqrt(square / max(count, 1)) for key, square in squares.items()}


def distance(tensor: torch.Tensor, truth: torch.Tensor) -> float:
    """‖y − ref‖ / ‖ref‖ where the truth is finite; infinite if y is not, or of another shape."""
    if tensor.shape != truth.shape:
        return math.inf
    tensor, truth = tensor.double(), truth.double()
    error, norm = (tensor - truth).norm().item(), truth.norm().item()
    if not math.isfinite(error):
        finite = truth.isfinite()
        if not bool(tensor.isfinite()[finite].all()):
            return math.inf
        error, norm = (torch.where(finite, each, 0.0).norm().item() for each in (tensor - truth, truth))
    return error / (norm or 1.0)
