"""Counter of the multiply-adds of operators as they run, whichever layer or function calls them."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _of_cells(input: torch.Tensor, weights: list[torch.Tensor]) -> int:
    """A recurrent layer multiplies its matrices once for every step of every sequence."""
    return math.prod(input.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def _of_bilinear(*given: Any) -> int:
    tensors, places = given[:3], given[3:6]
    shapes = []
    for tensor, unsqueezed in zip(tensors, places, strict=True):
        for place in sorted(unsqueezed):
            tensor = tensor.unsqueeze(place)
        shapes.append(tensor.shape)
    return math.prod(torch.broadcast_shapes(*shapes))


#: Products of operators that torch's own counter leaves out. A matrix times a vector counts neither there nor here:
#: it is how spectral_norm looks at a weight.
_MORE: dict[Any, Callable[..., int]] = {
    aten.addbmm: lambda bias, a, b, *_, **__: a.numel() * b.shape[2],
    aten._addmm_activation: lambda bias, a, b, *_, **__: a.numel() * b.shape[1],
    aten._trilinear: _of_bilinear,
    aten.mkldnn_rnn_layer: lambda input, w0, w1, *_, **__: _of_cells(input, [w0, w1]),
    aten._cudnn_rnn: lambda input, weights, *_, **__: _of_cells(input, weights),
}


#: Namespaces whose operators are products only if there is a formula.
_WITHOUT_PRODUCTS = ("aten", "prim", "prims", "gpukern", "profiler")


class Products(TorchDispatchMode):
    """Calls ``found(multiply_adds, output)`` for every operator that multiplies matrices or convolves.

    The formulas are those of :mod:`torch.utils.flop_counter`, with whatever was registered there, and :data:`_MORE`.
    """

    supports_higher_order_operators = True

    def __init__(self, found: Callable[[int, Any], None]) -> None:
        super().__init__()
        self._found = found
        #: Operators that are neither torch's nor gpukern's and have no formula, in order.
        self.unknown: dict[str, None] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        packet = func._overloadpacket
        formula, own = flop_counter.flop_registry.get(packet), _MORE.get(packet)
        if formula is None and own is None:
            with self:  # in inference mode operators arrive here before they are taken apart
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self._found(formula(*args, **kwargs, out_val=result) // 2, result)
        elif own is not None:
            self._found(own(*args, **kwargs), result)
        elif func.namespace not in _WITHOUT_PRODUCTS:
            self.unknown[packet._qualified_op_name] = None
        return result

    def _higher_order(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Count the branch that torch.cond takes; operators inside other higher-order operators are not counted."""
        if func is torch.ops.higher_order.cond:
            taken, left, operands = args[1:4]
            with self:
                return (taken if args[0] else left)(*operands)
        self.unknown[func.name()] = None
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_parts() -> Iterator[None]:
    """Run operator by operator what fused and compiled code would hide: attention, encoder layers, torch.compile."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
