"""Batch dimension of a model: finding it, exporting with it free, and checking that the model stays the same.

torch.export takes a free size to be 2 or more. A model's special case for a batch of one, an ``if`` or a
``squeeze()``, is not in the graph, and nothing in the graph shows it. So the original is run, at other sizes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from gpukern.fusion.errors import FusionError
from gpukern.fusion.report.values import Verification

#: For each leaf of the arguments: the name of its free first dimension, None if that is fixed.
Free = tuple[str | None, ...]

#: Sizes at which a fused model is compared with the original: the one that torch.export takes for a constant, and, if
#: that is the example's, or beside it, one that is neither even nor likely to be anything else in the model.
_SIZES = (1, 3)


class BatchMatters(Exception):
    """With a free batch the fused model is not the original; the message gives the reason."""


def choices(inputs: tuple, takes: Callable[[tuple], bool]) -> Iterator[Free]:
    """Return the possible batch dimensions, the likeliest first: of tensors of the highest rank, and all of its size.

    ``takes``: whether the original accepts arguments. Inputs whose sizes may differ are free independently.
    """
    leaves = pytree.tree_leaves(inputs)
    tensors = [(place, leaf) for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    tensors.sort(key=lambda each: -each[1].dim())
    for size in dict.fromkeys(leaf.shape[0] for _, leaf in tensors if leaf.shape[0]):
        places = sorted(place for place, leaf in tensors if leaf.shape[0] == size)
        one = tuple("batch" if place in places else None for place in range(len(leaves)))
        if len(places) > 1:
            first = tuple("batch" if place == places[0] else None for place in range(len(leaves)))
            if takes(resized(inputs, first, 3 if size != 3 else 2)):
                yield tuple(f"batch_{place}" if place in places else None for place in range(len(leaves)))
        yield one


def resized(inputs: Any, free: Free, size: int) -> Any:
    """``inputs`` with another size of the free dimensions: rows are left out, or come again, as other numbers."""

    def resize(leaf: Any, name: str | None) -> Any:
        if name is None:
            return leaf
        rows = torch.arange(size, device=leaf.device)
        resized = leaf[rows % leaf.shape[0]]
        if not leaf.is_floating_point():
            return resized
        # Rows that are the same have no variance, which a model may divide by.
        times = 1 - rows.div(leaf.shape[0], rounding_mode="floor") / 8
        return resized * times.to(leaf.dtype).view(-1, *[1] * (leaf.dim() - 1))

    leaves, structure = pytree.tree_flatten(inputs)
    return pytree.tree_unflatten([resize(*each) for each in zip(leaves, free, strict=True)], structure)


def size_of(inputs: tuple, free: Free) -> int:
    """Return the batch size of the example."""
    return next(leaf.shape[0] for leaf, name in zip(pytree.tree_leaves(inputs), free, strict=True) if name)


def export_any_batch(model: torch.nn.Module, inputs: tuple, free: Free) -> ExportedProgram:
    """``model`` with the ``free`` first dimensions of its tensors free, those of one name together."""
    if size_of(inputs, free) == 1:
        # torch.export takes a size of 1 for a constant.
        inputs = resized(inputs, free, 2)
    # A tensor that is given twice is two inputs.
    inputs = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, inputs)
    shapes, dims = ShapesCollection(), {name: Dim(name) for name in free if name}
    for leaf, name in zip(pytree.tree_leaves(inputs), free, strict=True):
        if name:
            shapes[leaf] = {0: dims[name]}
    return torch.export.export(model, inputs, dynamic_shapes=shapes)  # type: ignore[arg-type]


def require_that_it_runs(module: Callable[..., Any], inputs: tuple) -> None:
    """BatchMatters where a graph that was captured of two images fails for the one of the example."""
    try:
        module(*inputs)
    except Exception as error:  # wherever a shape is not as it was captured
        raise BatchMatters("a batch of one is a case of its own for the model") from error


def why_fixed(error: Exception) -> str | None:
    """Return torch.export's objection to a free batch, in words; None if its error is about something else."""
    text = str(error)
    if constant := re.search(
        r"marked batch\w* as dynamic but your code specialized it to be a constant \((\d+)\)", text
    ):
        return f"the model computes with {constant[1]} as a number"
    if guard := re.search(r"satisfy the generated guard (.+)", text):
        condition = re.sub(r"L(\[[^]]*\])+(\.\w+)*\.size\(\)\[0\]", "batch", guard[1]).rstrip(".")
        # A range without an end, in the words of SymPy and of torch.
        condition = re.sub(r" and batch <= (IntInfinity\(\)|int_oo)$", "", condition)
        return f"the model does otherwise for sizes without {condition}"
    return None


def sizes_apart(
    original: Callable[[tuple], Any],
    module: Callable[..., Any],
    judge: Callable[[tuple], Verification],
    inputs: tuple,
    free: Free,
) -> dict[str, list[int]]:
    """Return each free dimension's sizes, 0 or 1, that the fused ``module`` must refuse, because the original computes
    something else for them or fails. ``judge`` verifies the module for arguments; FusionError if the original fails.

    BatchMatters if another size is wrong.
    """
    apart: dict[str, list[int]] = {}
    for each in dict.fromkeys(filter(None, free)):
        alone = tuple(name if name == each else None for name in free)
        if not _same_shapes(original, module, resized(inputs, alone, 0)):
            apart.setdefault(each, []).append(0)
        for size in _SIZES:
            given = resized(inputs, alone, size)
            if size == size_of(inputs, alone) or _is_right(module, judge, given):
                continue
            if size != 1:
                raise BatchMatters(f"with a batch of {size} the result is not the original's")
            apart.setdefault(each, []).append(1)
    return apart


def may_lack_it(module: Callable[..., Any], judge: Callable[[tuple], Verification], inputs: tuple, free: Free) -> bool:
    """Whether all inputs but the first that have the batch may have a size of 1 in its place, as they could have
    been meant in an example of one image."""
    places = [place for place, name in enumerate(free) if name]
    if len(places) < 2 or len({name for name in free if name}) > 1 or size_of(inputs, free) != 1:
        return False
    first = tuple(name if place == places[0] else None for place, name in enumerate(free))
    return _is_right(module, judge, resized(inputs, first, 3))


def _is_right(module: Callable[..., Any], judge: Callable[[tuple], Verification], given: tuple) -> bool:
    try:
        return judge(given).passed
    except FusionError:  # of the original
        return False
    except Exception:  # of the fused graph, where a shape is not as it was captured
        return False


def _same_shapes(original: Callable[[tuple], Any], module: Callable[..., Any], given: tuple) -> bool:
    """Whether both return the same without an image, or both fail."""
    results = []
    for each in (original, lambda given: module(*given)):
        try:
            results.append(
                [tuple(leaf.shape) for leaf in pytree.tree_leaves(each(given)) if isinstance(leaf, torch.Tensor)]
            )
        except Exception:  # whatever a model raises
            return False
    return results[0] == results[1]
