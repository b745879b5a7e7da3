"""Optimizers with their options, parameters of awkward sizes, and one update in fp64 with its error bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import gpukern.optim as optim
from gpukern.runtime.mode import Mode, mode_of
from tests.device import DEVICE

#: Odd sizes, one element, none, more than a chunk, and one that begins in the middle of 16 bytes.
SHAPES = ((3, 5, 7), (1,), (0,), (4099,), (2, 9, 1, 1), ())


@dataclass(frozen=True)
class Case:
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> type[optim.Optimizer]:
        return getattr(optim, self.name)

    @property
    def torchs(self) -> type[torch.optim.Optimizer] | None:
        return getattr(torch.optim, self.name, None)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.options.items() if value)])


def combinations(name: str, **choices: tuple) -> Iterator[Case]:
    for values in itertools.product(*choices.values()):
        yield Case(name, dict(zip(choices, values, strict=True)))


_DECAY, _BOTH = (0, 0.1), (False, True)
CASES = [
    *combinations("SGD", lr=(0.1,), momentum=(0, 0.9), dampening=(0, 0.2), weight_decay=_DECAY, maximize=_BOTH),
    *combinations("SGD", lr=(0.1,), momentum=(0.9,), nesterov=(True,), weight_decay=_DECAY, maximize=_BOTH),
    *combinations(
        "Adagrad",
        lr_decay=(0, 0.5),
        weight_decay=_DECAY,
        initial_accumulator_value=(0, 0.3),
        maximize=_BOTH,
    ),
    *combinations("RMSprop", momentum=(0, 0.9), centered=_BOTH, weight_decay=_DECAY, maximize=_BOTH),
    *combinations("Adam", amsgrad=_BOTH, weight_decay=_DECAY, maximize=_BOTH),
    *combinations("Adam", decoupled_weight_decay=(True,), weight_decay=_DECAY, amsgrad=_BOTH),
    *combinations("AdamW", amsgrad=_BOTH, maximize=_BOTH),
    *combinations("Lion", weight_decay=_DECAY, maximize=_BOTH),
    *combinations("LARS", momentum=(0, 0.9), dampening=(0, 0.2), weight_decay=_DECAY, maximize=_BOTH),
    *combinations("LARS", momentum=(0.9,), nesterov=(True,)),
    *combinations("LAMB", weight_decay=_DECAY, maximize=_BOTH),
]
#: One with every state, of each.
FULL = [
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    Case("Adagrad", {"weight_decay": 0.1}),
    Case("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    Case("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    Case("AdamW"),
    Case("Lion", {"weight_decay": 0.1}),
    Case("LARS", {"lr": 10.0, "momentum": 0.9, "weight_decay": 0.1}),
    Case("LAMB", {"weight_decay": 0.1}),
]
#: What torch has.
KNOWN = [case for case in FULL if case.torchs is not None]


def parameters(dtype: torch.dtype = torch.float32, device: Any = "cpu", seed: int = 0) -> list[torch.nn.Parameter]:
    """Of :data:`SHAPES`, one of channels_last, and one that no 16 bytes begin with."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    found = [made(*shape) for shape in SHAPES]
    found.append(made(4, 3, 5, 5).contiguous(memory_format=torch.channels_last))
    found.append(made(131)[1:])
    return [torch.nn.Parameter(tensor) for tensor in found]


def give_gradients(owners: list[torch.nn.Parameter], seed: int, dtype: torch.dtype | None = None) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for parameter in owners:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        parameter.grad = torch.empty_like(parameter, dtype=dtype).copy_(gradient)


def numbers(case: Case) -> dict[str, float]:
    """The hyperparameters by the names of the rule."""
    optimizer = case.ours([torch.nn.Parameter(torch.zeros(1))], **case.options)
    _, values = optimizer._hyperparameters.of(optimizer.param_groups[0])
    return dict(zip(optimizer._rule.hyperparameters, values, strict=True))


of_kernels = pytest.mark.skipif(
    mode_of(torch.empty(0, device=DEVICE)) is Mode.REFERENCE, reason="of launches, and there are none"
)
ADAM, MOMENTUM = Case("Adam"), Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2})


def made(case: Case, where, dtype=torch.float32, **more):
    owners = parameters(dtype, where)
    return case.ours(owners, **case.options, **more), owners


def values(owners) -> list[torch.Tensor]:
    return [owner.detach().clone() for owner in owners]


def equal(these, those) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def close(these, those) -> bool:
    """Two fp32 ways of a few updates."""
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(these, those, strict=True))


def steps(optimizer, owners, *seeds: int) -> None:
    for seed in seeds:
        give_gradients(owners, seed)
        optimizer.step()
