"""A parameter with its states, and the properties of its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from gpukern.optim._fused.rules import Rule

#: Types without a shard inside.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class Settings:
    """Settings of a whole optimizer: see :class:`gpukern.optim.Optimizer`."""

    max_grad_norm: float = 0.0
    max_grad_value: float = 0.0
    stochastic_rounding: bool = False
    seed: int = 0


@dataclass(eq=False)
class Entry:
    """A parameter's entry. ``states`` has None for those that its group does not keep. ``group``: its number.

    All tensors are local ones, the own shard of a DTensor.
    """

    owner: torch.Tensor
    parameter: torch.Tensor
    master: torch.Tensor | None
    states: tuple[torch.Tensor | None, ...]
    step: torch.Tensor
    group: int

    @property
    def state_dtype(self) -> torch.dtype:
        return next((state.dtype for state in self.states if state is not None), self.parameter.dtype)


@dataclass
class Amp:
    """Values from torch.amp.GradScaler for an optimizer: the loss's factor, and whether a gradient is not finite."""

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


def local(tensor: Any) -> Any:
    """Return the local shard of a DTensor; other tensors unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


def local_gradient(owner: Any) -> torch.Tensor | None:
    """Return the gradient of ``owner``'s local part. One with another placement, such as a pending sum, is
    redistributed: every process does so."""
    gradient = owner.grad
    if type(gradient) in _PLAIN or gradient is None:
        return gradient
    if getattr(gradient, "placements", None) != getattr(owner, "placements", None):
        gradient = gradient.redistribute(placements=owner.placements)
    gradient = local(gradient)
    # It may still be in transit from other processes.
    return gradient.wait() if hasattr(gradient, "wait") else gradient


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are values to compute: not on the meta device, nor under a tracer, which estimate the memory."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether only a part of the tensor is local."""
    return not all(placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def place_of(tensors: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], int]:
    """Return the fastest function that gives the address of a tensor's local part, for any of ``tensors``."""
    if all(type(tensor) in _PLAIN for tensor in tensors):
        return torch.Tensor.data_ptr
    return lambda tensor: local(tensor).data_ptr()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements fill its memory from first to last, each once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether equal places in memory are equal places of the tensors, which have one shape."""
    return (
        all(size == 1 or s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True)) or a.numel() == 0
    )


def in_order_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself or a copy, dense as ``like`` is or would be."""
    if is_dense(tensor) and same_order(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def kept(rule: Rule, numbers: tuple[float, ...]) -> tuple[bool, ...]:
    """Return which states a group of these hyperparameters keeps."""
    return tuple([place is None or bool(numbers[place]) for place in _conditions(rule)])


@functools.cache
def _conditions(rule: Rule) -> tuple[int | None, ...]:
    """Return for each state the hyperparameter that decides whether it is kept; None: it always is."""
    return tuple(rule.hyperparameters.index(state.when) if state.when else None for state in rule.states)
