"""Batches of a user's iterable: taken once, checked, and divided into those that ranges are measured on and those that
are kept aside for the proof."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern.fusion.calls import AS_IN_THE_EXAMPLE
from gpukern.fusion.module import FusedModule

#: Bytes of batches that are kept, for each of the two purposes. What comes after that is only observed.
BUDGET = 512 * 2**20

#: The leaves of a batch's arguments.
Leaves = list[Any]


@dataclass
class Data:
    """``observed``: batches for ranges, as far as they were kept; ``aside``: those of the proof. ``rows``: how many
    images each has had, with those that were not kept. ``shared``: whether both are the same, there being one image."""

    observed: list[Leaves] = field(default_factory=list)
    aside: list[Leaves] = field(default_factory=list)
    observed_rows: int = 0
    aside_rows: int = 0
    shared: bool = False

    @property
    def words(self) -> str:
        """For the report."""
        if self.shared:
            return (
                f"Calibrated on {self.observed_rows} of the batch's rows, and proved on the same: "
                "give more than one for a proof on others"
            )
        return (
            f"Calibrated on {self.observed_rows} rows of the batches given; {self.aside_rows} kept aside for the proof"
        )


def take(
    batches: Iterable[Any],
    module: FusedModule,
    free: Sequence[str | None],
    observe: Callable[[Leaves], None],
    track: Callable[[Iterable[Any]], Iterable[Any]] = lambda each: each,
) -> Data:
    """Go through ``batches`` once: every second is kept aside, the others are given to ``observe``.

    ``module`` says what a batch must be like, ``free`` which of its leaves have a free batch. Of a single batch some
    rows are kept aside. ValueError or TypeError, which tells the batch, for one that the model does not take or that is
    not finite, and without any.
    """
    data, held, number = Data(), None, 0
    for number, batch in enumerate(track(batches), start=1):
        leaves = _leaves(batch, number, module)
        rows = rows_of(leaves, free)
        if rows == 0:
            continue
        if held is None and not data.aside_rows:
            held = leaves  # it may be the only one, to be divided
            continue
        if held is not None:
            _observe(data, held, free, observe)
            held = None
            _keep(data, leaves, rows)
        elif _even(data):
            _observe(data, leaves, free, observe)
        else:
            _keep(data, leaves, rows)
    if held is not None:
        _divide(data, held, free, observe)
    if not data.observed_rows:
        told = "only empty batches" if number else "no batch"
        raise ValueError(f"calibrate has {told}: give some as the model takes them")
    _refuse_one_number([*data.observed, *data.aside])
    return data


def _refuse_one_number(batches: Sequence[Leaves]) -> None:
    """ValueError where all floating-point numbers are the same: zeros as a stand-in, of which any scale would do."""
    numbers = [leaf for leaves in batches for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel()]
    numbers = [leaf for leaf in numbers if leaf.is_floating_point()]
    if sum(leaf.numel() for leaf in numbers) < 2:
        return
    first = numbers[0].flatten()[0]
    if all(bool((leaf == first).all()) for leaf in numbers):
        told = f"calibrate has the same number everywhere, {float(first):g}"
        raise ValueError(f"{told}: ranges are measured on images like those that will come")


def _even(data: Data) -> bool:
    return data.aside_rows >= data.observed_rows or _bytes(data.aside) > BUDGET


def _observe(data: Data, leaves: Leaves, free: Sequence[str | None], observe: Callable[[Leaves], None]) -> None:
    observe(leaves)
    data.observed_rows += rows_of(leaves, free)
    if _bytes(data.observed) + _bytes([leaves]) <= BUDGET or not data.observed:
        data.observed.append(leaves)


def _keep(data: Data, leaves: Leaves, rows: int) -> None:
    data.aside.append(leaves)
    data.aside_rows += rows


def _divide(data: Data, leaves: Leaves, free: Sequence[str | None], observe: Callable[[Leaves], None]) -> None:
    rows = rows_of(leaves, free)
    half = (rows + 1) // 2
    data.shared = rows < 2 or not any(free)
    first, second = (leaves, leaves) if data.shared else (part(leaves, free, 0, half), part(leaves, free, half, rows))
    _observe(data, first, free, observe)
    _keep(data, second, rows_of(second, free))


def part(leaves: Leaves, free: Sequence[str | None], start: int, end: int) -> Leaves:
    """Some rows of a batch."""
    return [leaf[start:end] if name else leaf for leaf, name in zip(leaves, free, strict=True)]


def rows_of(leaves: Leaves, free: Sequence[str | None]) -> int:
    """The images of a batch; 1 where the batch is not free."""
    sizes = [leaf.shape[0] for leaf, name in zip(leaves, free, strict=True) if name]
    return min(sizes, default=1)


def few(batches: Sequence[Leaves], free: Sequence[str | None], rows: int) -> Iterator[Leaves]:
    """The first ``rows`` of ``batches``, or all."""
    for leaves in batches:
        found = rows_of(leaves, free)
        if not any(free):
            yield leaves
            return
        yield leaves if found <= rows else part(leaves, free, 0, rows)
        rows -= found
        if rows <= 0:
            return


def _bytes(batches: Sequence[Leaves]) -> int:
    tensors = (leaf for leaves in batches for leaf in leaves if isinstance(leaf, torch.Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors)


# ---- one batch -------------------------------------------------------------------------------------------------------


def _leaves(batch: Any, number: int, module: FusedModule) -> Leaves:
    """The leaves of a batch as the model's arguments, checked."""
    where = f"batch {number} of calibrate"
    inputs = _arguments(batch, module, where)
    try:
        module.prepared(inputs)
    except (TypeError, ValueError) as problem:
        raise type(problem)(f"{where}: {problem}") from None
    known = module.interface
    leaves = pytree.tree_leaves(
        tuple(known.example_of(place) if each is AS_IN_THE_EXAMPLE else each for place, each in enumerate(inputs))
    )
    device = next((held.device for held in module.buffers()), torch.device("cpu"))
    # Copies: a generator may write the next batch into the same memory.
    leaves = [leaf.detach().to(device, copy=True) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            raise ValueError(f"{where} has NaN or infinity: no range can be measured")
    return leaves


def _arguments(batch: Any, module: FusedModule, where: str) -> tuple:
    """What of a batch the model takes, in the order of the example; labels that come after it are left."""
    wanted = module.interface.in_spec.num_children
    batch = pytree.tree_map(lambda leaf: torch.as_tensor(leaf) if type(leaf).__module__ == "numpy" else leaf, batch)
    if isinstance(batch, Mapping):
        try:
            return module.bound((), dict(batch))
        except TypeError as problem:
            raise TypeError(f"{where}: {problem}") from None
    if not isinstance(batch, (tuple, list)):
        batch = (batch,)
    if len(batch) < wanted:
        raise ValueError(f"{where} has {len(batch)} of the model's {wanted} arguments")
    # Arguments that the example left at their defaults, or gave as constants, need not be repeated.
    return tuple(batch[:wanted])
