"""The parameters of one device and one combination of dtypes, updated by kernels: one launch for all of them."""

from __future__ import annotations

import contextlib
import itertools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from gpukern.optim._fused.codegen import Variant
from gpukern.optim._fused.device_tables import Row, arguments_type, chunk_size, groups_table, room_for, tables
from gpukern.optim._fused.param_state import (
    Amp,
    Entry,
    Settings,
    in_order_of,
    is_dense,
    local_gradient,
    place_of,
    same_order,
)
from gpukern.optim._fused.rules import Rule

_place, _stride = torch.Tensor.data_ptr, torch.Tensor.stride
_gradient, _dtype, _layout = map(operator.attrgetter, ("grad", "dtype", "layout"))
#: Replaces an empty gradient's address, which is 0 like that of an absent one.
_EMPTY = 16
#: Number of multiprocessors that the host pretends to have.
_HOST_MULTIPROCESSORS = 2


class Program(Protocol):
    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None: ...


class TensorGroup:
    """``entries`` with gradients of one dtype. A gradient of None leaves its parameter, state and step unchanged."""

    def __init__(self, rule: Rule, entries: Sequence[Entry], gradient: torch.dtype, settings: Settings) -> None:
        self.entries, self.gradient_dtype = entries, gradient
        self.device = entries[0].parameter.device
        self._rule, self._settings = rule, settings
        self._owners = [entry.owner for entry in entries]
        self._parameters = [entry.parameter for entry in entries]
        # Checked in every step: ``parameter.data`` may have been replaced, and then has another address.
        self._place_of = place_of(self._owners)
        self._places = list(map(self._place_of, self._owners))
        self._shapes = [owner.shape for owner in self._owners]
        # A parameter with gaps is updated in a dense copy, which has its states.
        self._copies = {
            number: torch.empty_like(parameter)
            for number, parameter in enumerate(self._parameters)
            if not is_dense(parameter)
        }
        self._dense = [self._copies.get(number, parameter) for number, parameter in enumerate(self._parameters)]
        self._strides = [dense.stride() for dense in self._dense]
        # So may the ``data`` of a state, whose old memory may then be reused: a kernel must not write there.
        self._held_states = [
            held for entry in entries for held in (*entry.states, entry.master, entry.step) if held is not None
        ]
        self._state_places = list(map(_place, self._held_states))
        self._turn = 0
        # Gradients are held no longer than a step: memory that zero_grad() releases is free for the next backward.
        self._seen: list[Callable[[], torch.Tensor | None]] = []
        #: For each gradient whether it is absent, empty if all are present; None: none was checked.
        self._missing: list[bool] | None = None
        self._present: list[torch.Tensor] = []
        self._substituted = False
        #: Indices of those present; None: all.
        self._numbers: list[int] | None = None
        self._amp = Amp()
        #: Indices of the states that any of the parameters keeps.
        self._kept = [s for s in range(len(rule.states)) if any(entry.states[s] is not None for entry in entries)]
        variant = self._variant()
        self._program = _program(variant, self.device)
        self._make_tables(variant)

    # ---- tables on the device --------------------------------------------------------------------------------------

    def _variant(self) -> Variant:
        first = self.entries[0]
        parameter, gradient, state = (str(dtype).removeprefix("torch.") for dtype in self._dtypes())
        states = tuple(self._rule.states[s].name for s in self._kept)
        stochastic = self._settings.stochastic_rounding and first.parameter.dtype is torch.bfloat16
        room = room_for(len(self.entries))
        has_master = first.master is not None
        return Variant(self._rule, parameter, gradient, state, states, room, has_master, stochastic)

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        first = self.entries[0]
        return first.parameter.dtype, self.gradient_dtype, first.state_dtype

    def _make_tables(self, variant: Variant) -> None:
        rows = [self._row(number) for number in range(len(self.entries))]
        on_device = self.device.type == "cuda"
        processors = (
            torch.cuda.get_device_properties(self.device).multi_processor_count if on_device else _HOST_MULTIPROCESSORS
        )
        chunk = chunk_size(sum(row.size for row in rows), processors)
        tensors, chunks = tables(rows, len(variant.states), chunk)
        self._blocks = len(chunks)
        self._arguments = np.zeros(1, arguments_type(variant.gradients))
        self._held = {"tensors": self._upload(tensors), "chunks": self._upload(chunks)}
        self._held["arrived"] = torch.zeros(1, dtype=torch.int32, device=self.device)
        if self._settings.max_grad_norm or self._rule.norms:
            sizes = {"partial": 2 * len(chunks), "norms": 2 * len(rows), "square_sum": 1}
            for name, size in sizes.items():
                self._held[name] = torch.zeros(size, dtype=torch.float64, device=self.device)
        for name, held in self._held.items():
            self._arguments[name] = _place(held)
        for name, value in (
            ("max_norm", self._settings.max_grad_norm),
            ("max_value", self._settings.max_grad_value),
            ("tensor_count", len(rows)),
            ("chunk_size", chunk),
            ("seed", self._settings.seed & 0xFFFFFFFF),
        ):
            self._arguments[name] = value
        self._pointers = self._arguments["gradients"][0]

    def _row(self, number: int) -> Row:
        entry = self.entries[number]
        states = tuple(0 if (state := entry.states[s]) is None else _place(state) for s in self._kept)
        master = 0 if entry.master is None else _place(entry.master)
        dense = self._dense[number]
        return Row(_place(dense), master, states, _place(entry.step), dense.numel(), entry.group)

    def _upload(self, table: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(table.view(np.uint8)).to(self.device)

    def set_groups(self, groups: Sequence[tuple[torch.Tensor | None, Sequence[float]]]) -> None:
        """Set hyperparameters by group, each with the learning rate if that is a tensor on this device."""
        table = groups_table(self._rule, [(0 if lr is None else _place(lr), values) for lr, values in groups])
        held = torch.from_numpy(table.view(np.uint8))
        if "groups" in self._held:
            # At the address that a captured graph reads.
            self._held["groups"].copy_(held)
            return
        self._held["groups"] = held.to(self.device)
        self._arguments["groups"] = _place(self._held["groups"])

    # ---- a step ----------------------------------------------------------------------------------------------------

    def take_gradients(self) -> bool:
        """Record the gradients' addresses; False if this group no longer fits them."""
        gradients = list(map(_gradient, self._owners))
        if list(map(self._place_of, self._owners)) != self._places or not self._is_untouched():
            return False
        kinds = set(map(type, gradients))
        missing = list(map(operator.is_, gradients, itertools.repeat(None))) if type(None) in kinds else []
        if self._substituted or missing != self._missing or not self._saw(gradients) or not self._are_there(gradients):
            self._missing = None
            taken = gradients if kinds == {torch.Tensor} and self._are_as_expected(gradients) else self._checked()
            if taken is None:
                return False
            self._look_at(gradients, taken, missing)
        return True

    def _is_untouched(self) -> bool:
        """Whether all states have the same addresses, and the first parameter, and another one in every step, the same
        sizes.

        Replaced tensors in the optimizer's state are always detected, as are a parameter and a state's ``data`` with
        another address. The sizes detect a parameter that was shortened in place: code that does so does it to all,
        and checking all would take as long as all the rest.
        """
        self._turn = (self._turn + 1) % len(self.entries)
        return list(map(_place, self._held_states)) == self._state_places and all(
            self._owners[number].shape == self._shapes[number] for number in (0, self._turn)
        )

    def _are_as_expected(self, gradients: list[torch.Tensor]) -> bool:
        """Whether no tensor needs an individual check. Fast."""
        try:
            strides = list(map(_stride, gradients))
        except RuntimeError:  # a sparse one has none, or zeros
            return False
        if strides != self._strides or set(map(_dtype, gradients)) != {self.gradient_dtype}:
            return False
        # Without dimensions a sparse one has those of a dense one.
        return () not in self._strides or set(map(_layout, gradients)) == {torch.strided}

    def _are_there(self, gradients: list[torch.Tensor | None]) -> bool:
        """Whether these, already checked, have the same addresses: ``gradient.data`` may have been replaced, with
        other strides too."""
        self._present = self._present_of(gradients)
        return list(map(_place, self._present)) == self._gradient_places

    def _look_at(
        self, gradients: list[torch.Tensor | None], taken: list[torch.Tensor | None], missing: list[bool]
    ) -> None:
        """Record which of the gradients are present, and their identities."""
        self._missing = missing
        self._substituted = taken is not gradients and any(map(operator.is_not, taken, gradients))
        self._numbers = None
        if missing:
            self._numbers = [number for number, gradient in enumerate(taken) if gradient is not None]
            self._pointers[:] = 0
        self._seen = list(map(weakref.ref, self._present_of(gradients)))
        self._present = self._present_of(taken)
        self._gradient_places = list(map(_place, self._present))
        numbers = slice(len(self._present)) if self._numbers is None else self._numbers
        places = self._gradient_places
        self._pointers[numbers] = [place or _EMPTY for place in places] if 0 in places else places

    def _saw(self, gradients: list[torch.Tensor | None]) -> bool:
        """Whether these are the objects that were checked: none of those is gone, as none of these is None."""
        present = self._present_of(gradients)
        # Usually all are new or none is.
        if present and present[0] is not self._seen[0]():
            return False
        return all(map(operator.is_, present, [seen() for seen in self._seen]))

    def _present_of(self, gradients: list[Any]) -> list[torch.Tensor]:
        return gradients if self._numbers is None else [gradients[number] for number in self._numbers]

    def _checked(self) -> list[torch.Tensor | None] | None:
        """Return the gradients local, dense and in their parameters' order; None if a dtype differs."""
        taken: list[torch.Tensor | None] = []
        for owner, strides, dense in zip(self._owners, self._strides, self._dense, strict=True):
            found = local_gradient(owner)
            if found is not None:
                if found.dtype is not self.gradient_dtype or found.layout is not torch.strided:
                    return None
                if found.stride() != strides and not same_order(found, dense):
                    found = in_order_of(found, dense)
            taken.append(found)
        return taken

    def square_sum(self, amp: Amp) -> torch.Tensor:
        """Launch the sum of the squares of all gradients, fp64 [1] on the device; the update reads it there."""
        self._set(amp)
        self._program.launch("square_sum_kernel", self._blocks, self._arguments)
        return self._held["square_sum"]

    def update(self, amp: Amp) -> None:
        self._set(amp)
        for number, copy in self._copies.items():
            copy.copy_(self._parameters[number])
        if self._rule.norms:
            self._program.launch("norms_kernel", self._blocks, self._arguments)
        self._program.launch("update_kernel", self._blocks, self._arguments)
        for number, copy in self._copies.items():
            self._parameters[number].copy_(copy)
        # Autograd must be notified, or it would differentiate with overwritten values.
        torch.autograd.graph.increment_version(self._parameters)
        self._present = []

    def _set(self, amp: Amp) -> None:
        for name in ("grad_scale", "found_inf"):
            given = getattr(amp, name)
            if given is not getattr(self._amp, name):
                self._arguments[name] = 0 if given is None else _place(given)
        self._amp = amp


_stand_ins: list[Callable[[Variant, torch.device], Program]] = []


@contextlib.contextmanager
def programs_from(make: Callable[[Variant, torch.device], Program]) -> Iterator[None]:
    """Inside the block, groups of tensors launch the programs that ``make`` returns in place of compiled ones.

    For tools that count launches, or time all of a step but them.
    """
    _stand_ins.append(make)
    try:
        yield
    finally:
        _stand_ins.pop()


def _program(variant: Variant, device: torch.device) -> Program:
    if _stand_ins:
        return _stand_ins[-1](variant, device)
    if device.type == "cuda":
        from gpukern.optim._fused.cuda import device_program

        return device_program(variant, device.index)
    from gpukern.optim._fused.host import HostProgram

    return HostProgram(variant)
