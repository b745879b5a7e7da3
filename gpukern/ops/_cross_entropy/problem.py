"""Cross entropy as a problem: its options, and what does not fit together. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gpukern.runtime.integers import require

NONE, MEAN, SUM = "none", "mean", "sum"


class Options(NamedTuple):
    """What a call computes, beside its tensors."""

    reduction: str
    ignore_index: int
    smoothing: float


def check_weight(weight: Sequence[int] | None, input: Sequence[int], probabilities: bool) -> None:
    """Raise RuntimeError, as torch does, for a weight that is not one for each class. Arguments are shapes."""
    classes = input[min(1, len(input) - 1)]
    if weight is None or tuple(weight) == (classes,):
        return
    if len(input) == 4 and not probabilities:
        raise RuntimeError("weight tensor should be defined either for all or no classes")
    raise RuntimeError(
        f"{'cross_entropy: ' if probabilities else ''}weight tensor should be defined either for all {classes} classes "
        f"or no classes but got weight tensor of shape: {list(weight)}"
    )


def check_labels(input: Sequence[int], target: Sequence[int]) -> None:
    """Raise what torch raises, in its words, for shapes of logits and class indices that do not fit."""
    rank = len(input)
    if rank == 0:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    if rank == 1:
        require(len(target) <= 1, "0D or 1D target tensor expected, multi-target not supported")
        if len(target) == 1 and target[0] != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target[0]}")
        return
    if not target or target[0] != input[0]:
        size = target[0] if target else 0
        raise ValueError(f"Expected input batch_size ({input[0]}) to match target batch_size ({size}).")
    wanted = [input[0], *input[2:]]
    if list(target) == wanted:
        return
    require(rank != 2, "0D or 1D target tensor expected, multi-target not supported")
    require(rank == 4, f"Expected target size {wanted}, got {list(target)}")
    require(
        len(target) == 3,
        f"only batches of spatial targets supported (3D tensors) but got targets of dimension: {len(target)}",
    )
    raise RuntimeError(f"size mismatch (got input: {list(input)} , target: {list(target)}")
