"""Which layers the networks have, read off the networks themselves: they run once on tensors without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from bench.results import Use
from models.zoo import network as find

P = TypeVar("P")


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that has no layers inside: its name, and the shape it was given."""

    name: str
    module: torch.nn.Module
    input_shape: tuple[int, ...]


@functools.cache
def layer_calls(network: str, batch: int) -> tuple[LayerCall, ...]:
    """In the order of the forward."""
    calls: list[LayerCall] = []
    made = find(network)
    with torch.device("meta"):
        model = made.make().eval()
        image = torch.empty(batch, *made.input_size)
    for name, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(functools.partial(_record, calls, name))
    with torch.no_grad():
        model(image)
    return tuple(calls)


def _record(calls: list[LayerCall], name: str, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    calls.append(LayerCall(name, module, tuple(inputs[0].shape)))


def distinct(network: str, batch: int, problem_of: Callable[[LayerCall], P | None]) -> Iterator[tuple[Use, P]]:
    """The problems that ``problem_of`` sees in the network's layers, each once, with its first layer and the count."""
    counts: dict[P, tuple[str, int]] = {}
    for call in layer_calls(network, batch):
        problem = problem_of(call)
        if problem is not None:
            first, count = counts.get(problem, (call.name, 0))
            counts[problem] = first, count + 1
    for problem, (first, count) in counts.items():
        yield Use(find(network).name, first, count), problem
