"""One step of an optimizer: which parameters go into which launch, and whether that still holds."""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpukern.optim._fused.device_tables import GRADIENTS
from gpukern.optim._fused.fallback import Plain
from gpukern.optim._fused.hyperparameters import Numbers
from gpukern.optim._fused.param_state import Amp, Entry, Settings, has_values, kept, local
from gpukern.optim._fused.rules import Rule
from gpukern.optim._fused.tensor_group import TensorGroup
from gpukern.runtime.mode import Mode, mode_of
from gpukern.runtime.tensors import check_kernel_dtype

_parameters = operator.itemgetter("params")


class _Another(Exception):
    """Two tensors are not the same object."""


class _ObjectsOnly(TorchFunctionMode):
    """Lists and dicts test two elements for identity before equality, which is refused here: so they are compared by
    identity, at the speed of C."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Another


class Step:
    """A step of the parameters that have had a gradient. ``entry_of`` returns a parameter's entry, created at first,
    and ``states`` is where it is kept."""

    def __init__(
        self,
        rule: Rule,
        groups: Sequence[dict[str, Any]],
        numbers: Sequence[Numbers],
        entry_of: Callable[[torch.Tensor, int], Entry],
        states: Mapping[torch.Tensor, dict[str, Any]],
        settings: Settings,
    ) -> None:
        self._rule, self._settings = rule, settings
        self._numbers, self._kept = numbers, [kept(rule, values) for _, values in numbers]
        self._parameters = _parameters_of(groups)
        self._waiting: list[torch.Tensor] = []
        found: dict[tuple, list[Entry]] = {}
        turns: collections.Counter[torch.Tensor] = collections.Counter()
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                if parameter.grad is None:
                    self._waiting.append(parameter)
                else:
                    # One that a group has twice, of which torch warns, is updated twice: not by one launch.
                    turns[parameter] += 1
                    entry = entry_of(parameter, number)
                    kind = _kind(entry, local(parameter.grad), rule)
                    found.setdefault((turns[parameter], kind), []).append(entry)
        self._parts: list[TensorGroup | Plain] = []
        for (_, kind), entries in found.items():
            if kind[0] is Mode.REFERENCE:
                self._parts.append(Plain(rule, entries, settings))
                continue
            # As many as fit one launch.
            for first in range(0, len(entries), GRADIENTS[-1]):
                self._parts.append(TensorGroup(rule, entries[first : first + GRADIENTS[-1]], kind[3], settings))
        for part in self._parts:
            part.set_groups(self._on(part.device))
        # Copies: the user may change the dicts' contents, and may replace them.
        self._states = [dict(held) for held in states.values()]

    def fits(
        self,
        groups: Sequence[dict[str, Any]],
        numbers: Sequence[Numbers],
        states: Mapping[torch.Tensor, dict[str, Any]],
    ) -> bool:
        """Whether :meth:`run` may follow, for the gradients present now."""
        try:
            with _ObjectsOnly():
                if _parameters_of(groups) != self._parameters or list(states.values()) != self._states:
                    return False
        except Exception:  # _Another, or any error of comparing the user's own entries
            return False
        if any(parameter.grad is not None for parameter in self._waiting):
            return False
        if numbers is not self._numbers:
            if [kept(self._rule, values) for _, values in numbers] != self._kept:
                return False
            self.set_numbers(numbers)
        return all([part.take_gradients() for part in self._parts])

    def set_numbers(self, numbers: Sequence[Numbers]) -> None:
        """Set hyperparameters that keep the same states; unchanged ones are not sent again."""
        changed = not _same_numbers(numbers, self._numbers)
        self._numbers = numbers
        for part in self._parts:
            # A learning rate on another device may have changed in place.
            if changed or any(lr is not None and lr.device != part.device for lr, _ in numbers):
                part.set_groups(self._on(part.device))

    def run(self, amp: Amp) -> torch.Tensor | None:
        """Update; return the sum of the squares of all gradients, fp64 [1], if their norm is limited."""
        by_device = {part.device: _on_device(amp, part.device) for part in self._parts}
        square_sum = None
        if self._settings.max_grad_norm and self._parts:
            sums = [part.square_sum(by_device[part.device]) for part in self._parts]
            square_sum = sums[0]
            if len(sums) > 1:
                square_sum = torch.stack([each.to(sums[0].device) for each in sums]).sum(0)
                for each in sums:
                    each.copy_(square_sum)
        for part in self._parts:
            part.update(by_device[part.device])
        return square_sum

    def _on(self, device: torch.device) -> list[Numbers]:
        """Return the hyperparameters for ``device``: the value of a learning rate that is elsewhere."""
        found = []
        for lr, values in self._numbers:
            if lr is not None and lr.device != device:
                values, lr = (lr.item(), *values[1:]), None
            found.append((lr, values))
        return found


def _parameters_of(groups: Sequence[dict[str, Any]]) -> list[list[torch.Tensor]]:
    return list(map(list, map(_parameters, groups)))


def _same_numbers(these: Sequence[Numbers], those: Sequence[Numbers]) -> bool:
    return len(these) == len(those) and all(
        lr is other and values == others for (lr, values), (other, others) in zip(these, those, strict=True)
    )


def _kind(entry: Entry, gradient: torch.Tensor, rule: Rule) -> tuple:
    """Return a key that is equal for parameters that can be updated together."""
    parameter = entry.parameter
    mode = mode_of(parameter)
    if gradient.layout is not torch.strided or not has_values(parameter):
        mode = Mode.REFERENCE
    if mode is Mode.REFERENCE:
        return mode, parameter.device
    for dtype in (parameter.dtype, gradient.dtype, entry.state_dtype):
        check_kernel_dtype(f"gpukern.optim, {rule.name}", dtype)
    return mode, parameter.device, parameter.dtype, gradient.dtype, entry.state_dtype, entry.master is not None


def _on_device(amp: Amp, device: torch.device) -> Amp:
    """Move the numbers to where kernels can read them: fp32 on ``device``."""
    if amp.grad_scale is None and amp.found_inf is None:
        return amp
    moved = (
        None if each is None else each.to(device=device, dtype=torch.float32, non_blocking=True)
        for each in (amp.grad_scale, amp.found_inf)
    )
    return Amp(*moved)
