"""Values by which a model is judged: its outputs, or the numbers behind them if it returns only choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: The tensors by which a model is judged, from a call of it with a tuple of arguments.
See = Callable[[Callable[..., Any], tuple], list[torch.Tensor]]


def returned(model: Callable[..., Any], inputs: tuple) -> list[torch.Tensor]:
    """The tensors that ``model`` returns."""
    return leaves(model(*inputs))


def decided(model: Callable[..., Any], inputs: tuple) -> list[torch.Tensor]:
    """The floating-point numbers that a call of ``model`` makes choices by, in the order of the choices."""
    with _Decisions() as made:
        model(*inputs)
    return made.operands


def leaves(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _chooses(func: Any, results: list[torch.Tensor]) -> bool:
    # The indices of a max pool are for a backward pass, and fused pools have none; int8 is how numbers are stored.
    if "pool" in str(func) or getattr(func, "namespace", "") == "gpukern":
        return False
    return not all(leaf.is_floating_point() or leaf.dtype in (torch.int8, torch.uint8) for leaf in results)


class _Decisions(TorchDispatchMode):
    """Records the floating-point operands of operators whose results are not floating point: argmax, comparisons."""

    #: Branches of control flow count too.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _chooses(func, leaves(result)):
            self.operands += [leaf.clone() for leaf in leaves((args, kwargs)) if leaf.is_floating_point()]
        return result
