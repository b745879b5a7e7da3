"""Arguments as torch takes them: an integer for both dimensions or a pair; tensors where tensors are due."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from an integer, or a sequence of one or two. TypeError or RuntimeError as torch raises them."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    if isinstance(value, (bool, float, str)):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    try:
        numbers = tuple(operator.index(v) for v in value) if isinstance(value, Sequence) else (operator.index(value),)
    except TypeError:
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}") from None
    if len(numbers) not in (1, 2):
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of 2 values, but got {list(numbers)}"
        )
    return numbers[0], numbers[-1]


def check_tensors(function: str, input: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raise TypeError for anything that is no tensor; only ``others`` may be None."""
    for tensor in (input, *others):
        if not isinstance(tensor, torch.Tensor) and (tensor is not None or tensor is input):
            raise TypeError(f"{function}(): expected a Tensor, but got {type(tensor).__name__}")


def check_batched_or_not(function: str, input: torch.Tensor) -> bool:
    """Whether ``input`` is one image [C, H, W] and no batch. RuntimeError for any other rank than 3 and 4."""
    rank = input.dim()
    if rank == 4:
        return False
    if rank == 3:
        return True
    raise RuntimeError(
        f"expected 3D (unbatched) or 4D (batched) input to {function}, but got input of size: {list(input.shape)}"
    )
