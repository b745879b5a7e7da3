"""Which parts of a network learn, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def matches(name: str, pattern: str) -> bool:
    """Whether ``name``, of a parameter, is that of ``pattern`` or lies in the layer of that name; ``*`` is any text."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def freeze(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Take the parameters that match any of ``patterns`` out of training; their names.

    ``"!head"`` means all that do not match ``head``. ValueError for a pattern that matches none.
    """
    frozen = set()
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        negated, wanted = pattern.startswith("!"), pattern.removeprefix("!")
        matched = {name for name in names if matches(name, wanted)}
        if not matched:
            raise ValueError(f"no parameter is called {wanted!r}: there are {', '.join(_beginnings(names))}")
        frozen |= set(names) - matched if negated else matched
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return [name for name in names if name in frozen]


def thaw(model: nn.Module) -> None:
    """Let all parameters learn."""
    model.requires_grad_(True)


def hold_batch_norms(model: nn.Module) -> None:
    """Put batch norms with frozen parameters into evaluation mode, in which their statistics stay too.

    To be called after every ``model.train()``.
    """
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            parameters = list(layer.parameters(recurse=False))
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                layer.eval()


def groups(model: nn.Module, lr: float, scales: Sequence[tuple[str, float]]) -> Any:
    """Parameters for an optimizer: each goes with the factor of the first pattern that matches it, else with 1.

    ValueError for a pattern that no parameter is left for.
    """
    if not scales:
        return model.parameters()
    found: list[list[nn.Parameter]] = [[] for _ in range(len(scales) + 1)]
    for name, parameter in model.named_parameters():
        place = next((i for i, (pattern, _) in enumerate(scales) if matches(name, pattern)), len(scales))
        found[place].append(parameter)
    for (pattern, _), parameters in zip(scales, found, strict=False):
        if not parameters:
            names = [name for name, _ in model.named_parameters()]
            raise ValueError(f"no parameter is left for {pattern!r}: there are {', '.join(_beginnings(names))}")
    factors = [factor for _, factor in scales] + [1.0]
    return [
        {"params": parameters, "lr": lr * factor}
        for parameters, factor in zip(found, factors, strict=True)
        if parameters
    ]


def _beginnings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))
