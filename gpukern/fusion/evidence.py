"""Checks of the example before it is used as proof: an example may prove nothing.

It proves nothing if the original is random or keeps a state, returns no number, no finite number, or the same for every
example: then a wrong model passes as well. A class that is the same for every example proves nothing either, but the
numbers from which it is chosen do. An example of a single value, or one outside the model's domain, is replaced by a
better one if the original accepts that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern import formatting
from gpukern.fusion.decisions import See, decided, returned
from gpukern.fusion.errors import FusionError
from gpukern.fusion.given import devices_of, duplicate
from gpukern.fusion.verify import DISAGREEMENT, FACTOR, cast, distance

#: Roundings by which two calls may differ: on a GPU sums are added in any order.
_ROUNDINGS = 16.0
#: A bound that would let visible errors pass.
_WIDE = 0.1
_NOTHING = "nothing can be proved by this example"
_INSTEAD = "give another example, or fuse with verify=False, unproved"


@dataclass(frozen=True)
class Evidence:
    """``inputs``: the example to verify with. ``outputs``: the leaves of what the original returns for them.
    ``difference``: by how much a second call differs, 0 if only by rounding. ``notes``: for the report. ``see``: the
    values to verify by."""

    inputs: tuple
    outputs: list[Any]
    difference: float
    notes: tuple[str, ...]
    see: See = returned


def gather(model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> Evidence:
    """Call ``model``, a private copy in ``dtype``, and check its outputs. FusionError if nothing can be proved."""
    found, notes = _best(model, inputs, dtype)
    tensors = [leaf for leaf in found.first if isinstance(leaf, torch.Tensor)]
    if not any(leaf.numel() for leaf in tensors):
        what = "no elements" if tensors else f"no tensor, but {', '.join(type(leaf).__name__ for leaf in found.first)}"
        raise FusionError(f"{_NOTHING}: the original returns {what}; {_INSTEAD}")
    if found.finite == 0:
        raise FusionError(f"{_NOTHING}: the original returns no finite number; {_INSTEAD}")
    if found.finite < 1:
        notes.append(
            f"The original is not finite in {formatting.percent(1 - found.finite, 1)} of its output for the example: "
            "there it is proved only that the fused model is not finite either"
        )
    see: See = returned
    difference = distance(_tensors(found.second), tensors)
    if difference <= _ROUNDINGS * torch.finfo(dtype).eps:
        difference = 0.0
        see, told = _dull(model, found, dtype)
        notes += told
    if see is returned and not any(map(_is_floating, tensors)):
        notes.append(
            f"No output is of floating-point numbers: {formatting.percent(DISAGREEMENT)} of the elements may differ"
        )
    return Evidence(found.inputs, found.first, difference, tuple(notes), see)


def on_bound(unfused: float, bound: float) -> list[str]:
    """A note where the bound of a verification is wide; FusionError where it would let a model of zeros pass."""
    allowed, own = formatting.number(bound, 2), formatting.number(unfused, 2)
    if not bound < 1:
        raise FusionError(
            f"{_NOTHING}: in the fused model's dtype the original is {own} of its size from the truth, and "
            f"with {allowed} allowed a model that returns zeros would pass; {_INSTEAD}"
        )
    told = f"The proof is weak: an error of {allowed} is allowed, the original has one of {own} in this dtype"
    return [told] if bound > _WIDE else []


def require_rest(
    model: torch.nn.Module, inputs: tuple, dtype: torch.dtype, expected: list[Any], module: Callable[..., Any]
) -> None:
    """Raise FusionError if the fused ``module``'s outputs that are not floating point differ from ``expected``."""
    outputs = pytree.tree_leaves(module(*inputs))
    rest = [place for place, leaf in enumerate(expected) if not _is_floating(leaf)]
    if len(outputs) != len(expected):
        raise FusionError(f"the fused model is wrong: it returns {len(outputs)} values, the original {len(expected)}")
    unfused = expected
    if rest and len(rest) < len(expected):
        unfused = pytree.tree_leaves(duplicate(model).to(dtype)(*cast(inputs, dtype)))
    for place in rest:
        allowed = FACTOR * _share(unfused[place], expected[place]) + DISAGREEMENT
        if (share := _share(outputs[place], expected[place])) > allowed:
            raise FusionError(
                f"the fused model is wrong: output {place} differs from the original's in "
                f"{formatting.percent(share, 1)} of its elements"
            )


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _share(leaf: Any, expected: Any) -> float:
    """Return the share of elements that differ."""
    if not isinstance(expected, torch.Tensor) or not isinstance(leaf, torch.Tensor):
        same = type(leaf) is type(expected) and (leaf == expected or isinstance(leaf, float))
        return 0.0 if same else 1.0
    if leaf.shape != expected.shape:
        return 1.0
    return (leaf != expected).double().mean().item() if leaf.numel() else 0.0


# ---- calls of the original -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Calls:
    """Two calls of one copy for ``inputs``: the leaves of the results. ``finite``: the share of finite numbers."""

    inputs: tuple
    first: list[Any]
    second: list[Any]

    @property
    def finite(self) -> float:
        numbers = [leaf for leaf in _tensors(self.first) if leaf.is_floating_point() and leaf.numel()]
        count = sum(leaf.numel() for leaf in numbers)
        return sum(int(leaf.isfinite().sum()) for leaf in numbers) / count if count else 1.0


def _calls(model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> _Calls:
    copied, typed = duplicate(model), inputs
    for cast_first in (False, True):
        try:
            if cast_first:  # as the fused model will do
                copied, typed = duplicate(model), cast(inputs, dtype)
            results = [pytree.tree_leaves(copied(*_fresh(typed))) for _ in range(2)]
        except Exception as error:  # whatever a model raises
            failure = error
        else:
            return _Calls(inputs, *results)
    where = devices_of(model, pytree.tree_leaves(inputs))
    told = f"{type(failure).__name__}: {failure}{where and '; '}{where}"
    raise FusionError(f"the model fails for the example: {told}") from failure


def _fresh(inputs: tuple) -> tuple:
    """Copy the input: some models write into it."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, inputs)


def _tensors(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# ---- the example -----------------------------------------------------------------------------------------------------


def _best(model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> tuple[_Calls, list[str]]:
    """Return the calls for the example, or for one that replaces it, and the note about that."""
    if any(map(_is_flat, pytree.tree_leaves(inputs))):
        for better in (_varied, _fractions):
            found = _tried(
                model, pytree.tree_map(lambda leaf, of=better: of(leaf) if _is_flat(leaf) else leaf, inputs), dtype
            )
            if found is not None and found.finite == 1:
                told = "verified with random numbers in its place, for which the original is finite"
                return found, [f"An example input has one value throughout: {told}"]
        return _calls(model, inputs, dtype), ["An example input has one value throughout: it proves little"]
    given = _calls(model, inputs, dtype)
    if given.finite == 1:
        return given, []
    other = _tried(model, pytree.tree_map(_fractions, inputs), dtype)
    if other is None or other.finite <= given.finite or (given.finite and other.finite < 1):
        return given, []
    return other, [
        f"The original is finite in {formatting.percent(given.finite, 1)} of its output for the example: "
        "verified with numbers between 0 and 1 in its place"
    ]


def _tried(model: torch.nn.Module, inputs: tuple, dtype: torch.dtype) -> _Calls | None:
    try:
        return _calls(model, inputs, dtype)
    except FusionError:
        return None


def _is_flat(leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
        return False
    return bool((leaf == leaf.flatten()[0]).all())


def _noise(leaf: torch.Tensor) -> torch.Tensor:
    return torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)


def _varied(leaf: torch.Tensor) -> torch.Tensor:
    """Return random numbers of the sign and size of the example's single value."""
    return _noise(leaf) if not leaf.flatten()[0] else leaf * (0.5 + _noise(leaf).sigmoid())


def _fractions(leaf: Any) -> Any:
    """Return numbers between 0 and 1, where roots, logarithms and the like are defined."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
        return leaf
    return _noise(leaf).sigmoid()


def _another(inputs: tuple) -> tuple:
    """Another example of numbers of the same size. Indices beside images stay, and rows of numbers, which may be boxes
    with indices, shrink a little: out of range they could end a process on a GPU."""
    floating = any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(inputs))

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dtype is torch.bool or floating > leaf.is_floating_point():
            return leaf
        if leaf.dim() >= 3 or not floating:
            order = torch.randperm(leaf.numel(), generator=torch.Generator().manual_seed(0)).to(leaf.device)
            leaf = leaf.flatten()[order].view(leaf.shape)
        return leaf * (1 - _noise(leaf).sigmoid() / 4) if leaf.is_floating_point() else leaf

    return pytree.tree_map(other, inputs)


# ---- outputs that prove nothing --------------------------------------------------------------------------------------


def _dull(model: torch.nn.Module, found: _Calls, dtype: torch.dtype) -> tuple[See, list[str]]:
    """Return the values to verify by, and notes on outputs that are the same for another example.

    FusionError if all of them are, and are not chosen by numbers that differ.
    """
    other = _tried(model, _another(found.inputs), dtype)
    if other is None or len(other.first) != len(found.first):
        return returned, []
    pairs = [
        (number, leaf, again)
        for number, (leaf, again) in enumerate(zip(found.first, other.first, strict=True))
        if isinstance(leaf, torch.Tensor) and isinstance(again, torch.Tensor) and leaf.numel()
    ]
    same = {number: leaf for number, leaf, again in pairs if _equal(leaf, again)}
    if not pairs or len(same) < len(pairs):
        told = {number: "the same" if leaf.any() else "zeros" for number, leaf in same.items()}
        little = "for another example too: of it little is proved"
        return returned, [f"Output {number} is {what} {little}" for number, what in told.items()]
    if not any(map(_is_floating, same.values())) and _decides_by_others(model, found.inputs, other.inputs, dtype):
        return decided, ["The outputs are the same for another example too: verified by the numbers they are chosen by"]
    what = "the same" if any(leaf.any() for leaf in same.values()) else "only zeros"
    raise FusionError(f"{_NOTHING}: the original returns {what} for another example too; {_INSTEAD}")


def _decides_by_others(model: torch.nn.Module, inputs: tuple, others: tuple, dtype: torch.dtype) -> bool:
    """Whether the choices in ``model`` are made by other numbers for another example."""
    here, there = (decided(duplicate(model), cast(each, dtype)) for each in (inputs, others))
    return not all(map(_equal, here, there))


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are equal, with NaN equal to NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
