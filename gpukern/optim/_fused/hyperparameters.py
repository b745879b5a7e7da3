"""The hyperparameters of all groups as numbers, recomputed only where they may have changed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

#: A group's hyperparameters in the order of the rule, and its learning rate where that is a tensor on a device.
Numbers = tuple[torch.Tensor | None, tuple[float, ...]]

_PLAIN = {float, int, bool}


class Hyperparameters:
    """``names`` of a group's entries, the learning rate first; an entry that is a tuple has several of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._rate, self._rest = operator.itemgetter(names[0]), operator.itemgetter(*names[1:])
        self._seen: tuple[list[Any], list[tuple[Any, ...]]] = [], []
        self._constant = False
        self._numbers: list[Numbers] = []

    def __call__(self, groups: Sequence[dict[str, Any]]) -> list[Numbers]:
        """Return those of all groups: the same list as before if nothing changed. ValueError for a learning rate on a
        device that is not float32."""
        rates, others = list(map(self._rate, groups)), list(map(self._rest, groups))
        if not (self._constant and _same_objects(rates, self._seen[0]) and others == self._seen[1]):
            self._numbers = list(map(_numbers, rates, others))
            self._constant = all(map(_stay, (_on_cpu(rates), *zip(*others, strict=True))))
            self._seen = rates, others
        return self._numbers

    def of(self, group: dict[str, Any]) -> Numbers:
        """Return those of one group."""
        return _numbers(self._rate(group), self._rest(group))


def _numbers(lr: Any, others: tuple[Any, ...]) -> Numbers:
    flat: list[Any] = []
    for value in others:
        if isinstance(value, (tuple, list)):
            flat += value
        else:
            flat.append(value)
    if not isinstance(lr, torch.Tensor) or lr.device.type == "cpu":
        return None, (float(lr), *map(float, flat))
    if lr.dtype is not torch.float32:
        raise ValueError(f"A learning rate on {lr.device} must be float32, got {lr.dtype}")
    return lr, (0.0, *map(float, flat))


def _on_cpu(rates: list[Any]) -> list[Any]:
    """Return the rates whose values matter here; of those on a device only the identity does."""
    return [rate for rate in rates if not (isinstance(rate, torch.Tensor) and rate.device.type != "cpu")]


def _stay(values: Sequence[Any]) -> bool:
    """Whether these, one of each group, change only by replacement. Tensors and lists may change in place."""
    kinds = set(map(type, values))
    return kinds <= _PLAIN or (kinds == {tuple} and _stay(list(itertools.chain.from_iterable(values))))


def _same_objects(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))
