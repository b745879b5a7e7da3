"""Parameters updated by plain torch: on a CPU without emulation, and those with sparse gradients or without values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from gpukern.optim._fused.param_state import Amp, Entry, Settings, has_values, local_gradient, place_of
from gpukern.optim._fused.reference import UPDATES
from gpukern.optim._fused.rules import Rule


class Plain:
    """Has the interface of :class:`TensorGroup`, and updates one tensor after the other."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], settings: Settings) -> None:
        self.entries = entries
        self.device = entries[0].parameter.device
        self._rule, self._settings = rule, settings
        self._owners = [entry.owner for entry in entries]
        self._has_values = has_values(entries[0].parameter)
        self._place_of = place_of(self._owners) if self._has_values else id
        self._places = list(map(self._place_of, self._owners))
        self._square_sum = torch.zeros(1, dtype=torch.float64, device=self.device)

    def set_groups(self, groups: Sequence[tuple[torch.Tensor | None, Sequence[float]]]) -> None:
        names = self._rule.hyperparameters
        self._groups = [(lr, dict(zip(names, values, strict=True))) for lr, values in groups]

    def take_gradients(self) -> bool:
        self._taken = list(map(local_gradient, self._owners))
        return list(map(self._place_of, self._owners)) == self._places

    def square_sum(self, amp: Amp) -> torch.Tensor:
        if not self._has_values:
            return self._square_sum
        scale = 1.0 if amp.grad_scale is None else amp.grad_scale.item()
        squares = [(g.to(_wide(g)) / scale).double().square().sum() for g in self._taken if g is not None]
        self._square_sum.copy_(sum(squares, torch.zeros((), dtype=torch.float64, device=self.device)))
        return self._square_sum

    def update(self, amp: Amp) -> None:
        # Hold gradients no longer: memory that zero_grad() releases is free for the next backward.
        taken, self._taken = self._taken, []
        if not self._has_values:
            return
        if amp.found_inf is not None and amp.found_inf.item() != 0:
            return
        for number, (entry, gradient) in enumerate(zip(self.entries, taken, strict=True)):
            if gradient is not None:
                self._update(number, entry, gradient, amp)

    def _update(self, number: int, entry: Entry, gradient: torch.Tensor, amp: Amp) -> None:
        wide = _wide(entry.parameter)
        gradient = self._clipped(gradient.to_dense().to(wide), amp)
        held = entry.parameter if entry.master is None else entry.master
        # Tensors that are wide already are updated in place, the others as a copy.
        updated = held.to(wide)
        states = {name: state.to(wide) for name, state in self._kept(entry)}
        lr, values = self._groups[entry.group]
        numbers = {**values, "step": entry.step.item() + 1}
        if lr is not None:
            numbers["lr"] = lr.item()
        UPDATES[self._rule.name](updated, gradient, states, numbers)
        for name, state in self._kept(entry):
            _keep(state, states[name])
        if entry.master is None and self._settings.stochastic_rounding and held.dtype is torch.bfloat16:
            updated = _rounded_at_random(updated, self._settings.seed, number, int(numbers["step"]))
        _keep(held, updated)
        if entry.master is not None:
            entry.parameter.copy_(updated)
        entry.step.add_(1)

    def _kept(self, entry: Entry) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the existing states, by name."""
        for state, held in zip(self._rule.states, entry.states, strict=True):
            if held is not None:
                yield state.name, held

    def _clipped(self, gradient: torch.Tensor, amp: Amp) -> torch.Tensor:
        if amp.grad_scale is not None:
            gradient = gradient / amp.grad_scale.item()
        if limit := self._settings.max_grad_norm:
            gradient = gradient * (limit / (self._square_sum.sqrt() + 1e-6)).clamp(max=1.0).squeeze().to(gradient)
        if limit := self._settings.max_grad_value:
            gradient = gradient.clamp(-limit, limit)
        return gradient


def _keep(held: torch.Tensor, updated: torch.Tensor) -> None:
    if updated is not held:
        held.copy_(updated)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _rounded_at_random(x: torch.Tensor, seed: int, number: int, step: int) -> torch.Tensor:
    """Round to bfloat16, up with the probability of the truncated fraction; with the kernel's random bits."""
    place = torch.empty_like(x, dtype=torch.int64)
    place.as_strided((x.numel(),), (1,)).copy_(torch.arange(x.numel()))

    start = _mixed((seed & 0xFFFFFFFF) ^ _mixed(number ^ _mixed(step)))
    random = _mixed(start ^ _mixed(place & 0xFFFFFFFF)) & 0xFFFF
    bits = x.float().view(torch.int32)
    safe = (bits & 0x7FFFFFFF) < 0x7F7F0000
    carried = ((bits.to(torch.int64) & 0xFFFFFFFF) + random) & 0xFFFF0000
    carried = torch.where(carried >= 2**31, carried - 2**32, carried).to(torch.int32).view(torch.float32)
    return torch.where(safe, carried, x)


def _mixed(x: torch.Tensor | int) -> torch.Tensor | int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
