"""Checks and copies of the user's model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from gpukern.copies import deep_copy
from gpukern.fusion.errors import FusionError
from gpukern.runtime import kept

_QUANTIZED = "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized"


def check_weights(model: torch.nn.Module) -> None:
    """FusionError, naming it, for a parameter, buffer or layer that has no values or none that fusing can read."""
    for name, tensor in _tensors(model):
        if is_lazy(tensor):
            raise FusionError(f"the model has lazy layers, whose sizes are not known yet: call it once before ({name})")
        if tensor.is_meta:
            raise FusionError(
                f"the model has no weights: {name} is on the meta device. Give it memory with to_empty(device=...), "
                "and load its weights"
            )
        if tensor.layout is not torch.strided:
            raise FusionError(f"{name} of the model is sparse or packed ({tensor.layout}): fuse() takes dense tensors")
        if tensor.is_quantized:
            raise FusionError(f"{name} of the model is quantized ({tensor.dtype}): fuse() takes floating-point weights")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise FusionError(
                f"{name or 'the model'} is compiled by TorchScript: fuse() takes the model as it was before"
            )
        if type(module).__module__.startswith(_QUANTIZED):
            raise FusionError(
                f"{name or 'the model'} is a quantized layer ({type(module).__name__}): fuse the model as it was before"
            )


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` without DistributedDataParallel around it, which torch.export does not capture."""
    while isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def devices_of(model: torch.nn.Module, inputs: Any) -> str:
    """Describe the devices of the example and the weights if they differ; else ""."""
    found: dict[str, str] = {}
    for name, tensor in _tensors(model):
        found.setdefault(str(tensor.device), name)
    example = sorted({str(leaf.device) for leaf in inputs if isinstance(leaf, torch.Tensor)})
    if set(found) | set(example) <= set(example[:1]):
        return ""
    weights = ", ".join(f"{name} on {device}" for device, name in found.items())
    return f"the example is on {' and '.join(example)}, of the model's tensors {weights}"


def duplicate(model: torch.nn.Module) -> torch.nn.Module:
    """A deep copy, without the graphs of activations that the model keeps. FusionError, naming what has no copy."""
    memo: dict[int, Any] = {}
    kept.fill(memo, model)
    try:
        return deep_copy(model, dict(memo), share_tensors=False)
    except Exception as error:  # any error of a class's own copying
        told = f"{type(error).__name__}: {error}"
        raise FusionError(f"the model cannot be copied: {_uncopied(model, memo)}{told}") from error


def _uncopied(model: torch.nn.Module, memo: dict[int, Any]) -> str:
    """The attribute that cannot be copied, in words."""
    of_torch = ("_modules", "_parameters", "_buffers")
    for path, module in model.named_modules():
        for name, held in vars(module).items():
            if name in of_torch:
                continue
            try:
                copy.deepcopy(held, {**memo, **{id(each): each for each in model.modules()}})
            except Exception:
                whose = f"{path}.{name}" if path else name
                return f"there is no copy of its attribute {whose!r}, a {type(held).__name__}; "
    return ""
