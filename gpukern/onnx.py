"""gpukern's operators in terms of torch's, from which ``torch.onnx.export(dynamo=True)`` makes standard ONNX.

The exporter finds them by itself::

    torch.onnx.export(gpukern.convert(model), (x,), "model.onnx", dynamo=True)
    torch.onnx.export(gpukern.fuse(model, x), (x,), "model.onnx", dynamo=True)

Everyone else who wants a graph of torch's operators only, as other compilers do, gives them to torch.export::

    torch.export.export(model, (x,)).run_decompositions({**torch.export.default_decompositions(), **decompositions()})
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from gpukern.ops._operators import OPERATORS
from gpukern.ops._quantize.decompositions import DECOMPOSITIONS
from gpukern.ops.batch_norm import batch_norm
from gpukern.ops.layer_norm import layer_norm
from gpukern.ops.pool2d import adaptive_avg_pool2d
from gpukern.ops.rms_norm import rms_norm
from gpukern.ops.softmax import softmax
from gpukern.runtime.import_hooks import when_imported

__all__ = ["decompositions"]


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """Return the decomposition of each operator that a model's forward calls, in training too, into torch's.

    For sizes that are symbols as well. Layouts are not kept, nor are the bits: torch's operators round in their way.
    """
    found = {overload: operator.decomposition for overload, operator in OPERATORS.items() if operator.decomposition}
    single = [overload for overload in found if len(overload._schema.returns) == 1]
    norms = batch_norm, layer_norm, rms_norm
    return {
        **found,
        **{overload: _rounded_once(found[overload]) for overload in single},
        **{norm.overload: _rounded_once(norm.decomposition, torch.float32) for norm in norms},
        adaptive_avg_pool2d.overload: _adaptive_avg_pool2d,
        **{getattr(torch.ops.gpukern, name).default: function for name, function in DECOMPOSITIONS.items()},
        softmax.overload: softmax.decomposition,  # its result may be wider than its operand
    }


def _rounded_once(computation: Callable[..., torch.Tensor], least: torch.dtype | None = None) -> Callable:
    """``computation`` in the widest dtype of its operands and of ``least``.

    Its result is in the dtype among the arguments, if there is one, else in that of the first operand.
    """

    def compute(input: torch.Tensor, *others: Any) -> torch.Tensor:
        floating = [each.dtype for each in (input, *others) if _is_floating(each)]
        dtype = functools.reduce(torch.promote_types, floating, least or input.dtype)
        given = (each.to(dtype) if _is_floating(each) else each for each in (input, *others))
        wanted = next((each for each in others if isinstance(each, torch.dtype)), input.dtype)
        return computation(*given).to(wanted)

    return compute


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _adaptive_avg_pool2d(input: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    if all(size == 1 for size in output_size):
        # torch's own way there changes strides in place, which the exporter does not take.
        return input.mean((2, 3), keepdim=True)
    return adaptive_avg_pool2d.decomposition(input, output_size)


def register_decompositions() -> None:
    """Give them to torch's exporter when it is imported. Its table is not torch's global one, by which shapes are found
    under ``torch.compile`` too."""
    when_imported("torch.onnx._internal.exporter._decomp", _extend)


def _extend(exporter: ModuleType) -> None:
    make = exporter.create_onnx_friendly_decomposition_table

    def make_with_ours(known: Any) -> dict[Any, Callable]:
        # Not those that the user translates: see torch.onnx.export's custom_translation_table.
        ours = {operator: function for operator, function in decompositions().items() if operator not in known}
        return {**make(known), **ours}

    exporter.create_onnx_friendly_decomposition_table = make_with_ours  # type: ignore[attr-defined]
