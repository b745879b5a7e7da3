"""Argument conversion and checks as torch's: an integer for both dimensions or a pair; tensors where required."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, strided


def as_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from an integer, or a sequence of one or two. TypeError or RuntimeError as torch raises them."""
    if type(value) is int:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        return value
    first, second = _numbers(name, value, 2, "a pair of ints")
    return first, second


def as_single(name: str, value: int | Sequence[int]) -> tuple[int]:
    """(length,) from an integer, or a sequence of one; as :func:`as_pair`."""
    if type(value) is int:
        return (value,)
    (length,) = _numbers(name, value, 1, "a sequence of one")
    return (length,)


def as_triple(name: str, value: int | Sequence[int]) -> tuple[int, int, int]:
    """(depth, height, width) from an integer, or a sequence of one or three; as :func:`as_pair`."""
    if type(value) is int:
        return value, value, value
    depth, height, width = _numbers(name, value, 3, "three ints")
    return depth, height, width


def _numbers(name: str, value: int | Sequence[int], count: int, of: str) -> tuple[int, ...]:
    if isinstance(value, (bool, float, str)):
        raise TypeError(f"{name} must be an int or {of}, got {value!r}")
    try:
        given = value if isinstance(value, Sequence) else (value,)
        numbers = tuple(_index(v) for v in given)
    except TypeError:
        raise TypeError(f"{name} must be an int or {of}, got {value!r}") from None
    if len(numbers) not in (1, count):
        raise RuntimeError(
            f"expected {name} to be a single integer value or a list of {count} values, but got {list(numbers)}"
        )
    return numbers if len(numbers) == count else numbers * count


def as_shape(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """A tuple of ints, or of a tracer's sizes, from a sequence. TypeError for anything else, as torch raises it."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be tuple of ints, not {type(value).__name__}")
    for place, each in enumerate(value):
        if type(each) is not int and not isinstance(each, torch.SymInt):
            try:
                _index(each)
            except TypeError:
                raise TypeError(
                    f"{name} must be tuple of ints, but found element of type {type(each).__name__} at pos {place}"
                ) from None
    return tuple(each if isinstance(each, torch.SymInt) else _index(each) for each in value)  # type: ignore[misc]


def as_int(name: str, value: int) -> int:
    """``value``, or the number that a tensor of one integer holds. TypeError for anything else, as torch raises it."""
    if type(value) is int:
        return value
    try:
        return _index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def as_float(name: str, value: float) -> float:
    """``value`` of a number, or of a tensor without dimensions. TypeError for anything else, as torch raises it."""
    if isinstance(value, (float, int)) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        return float(value)
    raise TypeError(f"{name} must be a number, got {value!r}")


def as_bool(name: str, value: bool) -> bool:
    """``value``. TypeError unless it is a bool, as torch raises it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def _index(value: Any) -> int:
    """Convert an integer as torch does: any kind of bool is refused."""
    if isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype is torch.bool):
        raise TypeError("a bool is no integer here")
    return operator.index(value)


def check_tensors(function: str, *tensors: torch.Tensor, optional: tuple[torch.Tensor | None, ...] = ()) -> None:
    """Raise TypeError for anything that is not a tensor; only the ``optional`` ones may be None.

    NotImplementedError for tensors without strides, sparse ones for example, and for nested ones.
    """
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}(): expected a Tensor, but got {type(tensor).__name__}")
        if tensor.layout is not strided:
            raise NotImplementedError(f"{function}(): expected a tensor of torch.strided, but got {tensor.layout}")
        if tensor.is_nested:
            raise NotImplementedError(f"{function}(): expected a tensor with one size, but got a nested one")
    for other in optional:
        if other is not None and not isinstance(other, Tensor):
            raise TypeError(f"{function}(): expected a Tensor or None, but got {type(other).__name__}")


def check_operand_tensors(
    function: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> None:
    """:func:`check_tensors` with an optional bias and residual, in less time."""
    if not (
        isinstance(input, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
        and (residual is None or isinstance(residual, Tensor))
        and input.layout is strided
        and weight.layout is strided
        and not input.is_nested
        and not weight.is_nested
    ):
        check_tensors(function, input, weight, optional=(bias, residual))


def check_batched_or_not(
    function: str, input: torch.Tensor, too_few: type[Exception] = RuntimeError, batched: int = 4
) -> bool:
    """Whether ``input`` is one image [C, H, W], not a batch. RuntimeError for any other rank than 3 and 4; ``too_few``
    for a smaller one, where torch looks for a dimension that does not exist. ``batched`` is the rank of a batch."""
    rank = input.dim()
    if rank == batched:
        return False
    if rank == batched - 1:
        return True
    raise (too_few if rank < batched - 1 else RuntimeError)(
        f"expected {batched - 1}D (unbatched) or {batched}D (batched) input to {function}, "
        f"but got input of size: {list(input.shape)}"
    )
