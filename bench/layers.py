"""Layers of the networks, recorded from the networks themselves: they run once on tensors without memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from bench.results import Use
from gpukern.explain.layers import LayerCall
from gpukern.explain.layers import distinct as distinct_calls
from gpukern.explain.layers import layer_calls as calls_of
from models.zoo import network as find

P = TypeVar("P")


@functools.cache
def layer_calls(network: str, batch: int) -> tuple[LayerCall, ...]:
    """Return the layer calls in the order of the forward."""
    made = find(network)
    with torch.device("meta"):
        return calls_of(made.make().eval(), torch.empty(batch, *made.input_size))


def distinct(network: str, batch: int, problem_of: Callable[[LayerCall], P | None]) -> Iterator[tuple[Use, P]]:
    """The problems that ``problem_of`` sees in the network's layers, each once, with its first layer and the count."""
    found = ((call, problem_of(call)) for call in layer_calls(network, batch))
    for first, count, problem in distinct_calls(found):
        yield Use(find(network).name, first.name, count), problem
