"""Unwrapping of a model, and tensors of zeros as its input."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern.summary.layers import dimensions
from gpukern.summary.views import tensors

_KINDS = {1: "[C, L]", 2: "[C, H, W]", 3: "[C, D, H, W]"}


def original(model: object) -> torch.nn.Module:
    """Return the module with Python layers: the one inside a wrapper of torch.compile."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "summary() watches the calls of Python modules, and TorchScript has compiled this one: pass the original"
        )
    if type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        return original(model._orig_mod)
    if isinstance(model, torch.nn.Module):
        return model
    hint = ": pass its .module()" if callable(getattr(model, "module", None)) else ""
    raise TypeError(f"summary() takes a torch.nn.Module, and got {type(model).__name__}{hint}")


def example(model: torch.nn.Module, input_size: Any) -> tuple[Any, ...]:
    """The arguments of a call: a tensor for each size, a batch of one or more, or what was given with tensors in it."""
    if isinstance(input_size, (torch.Tensor, Mapping)):
        inputs = [input_size]
    else:
        inputs = list(input_size) if isinstance(input_size, Sequence) else [input_size]
    if inputs and all(map(tensors, inputs)):
        return tuple(inputs)
    several = bool(inputs) and all(isinstance(each, (list, tuple, torch.Size)) for each in inputs)
    sizes: list[tuple[Any, ...]] = [tuple(each) for each in inputs] if several else [tuple(inputs)]
    if not isinstance(input_size, Sequence) or not all(isinstance(n, Integral) for size in sizes for n in size):
        raise TypeError(f"expected sizes, a list of sizes, or tensors, got {_told(input_size)}")
    batched = _is_batch(sizes[0], _dimensions(model))
    like, looks_up = _like(model), _looks_up(model)
    return tuple(
        torch.zeros(
            (max(size[0], 1), *size[1:]) if batched else (1, *size),
            dtype=torch.long if looks_up and number == 0 else like.dtype,
            device=like.device,
        )
        for number, size in enumerate(sizes)
    )


def _told(given: Any) -> str:
    """Format for a message: sizes of tensors, not their values."""
    leaves, structure = pytree.tree_flatten(given)
    told = [f"tensor{list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return repr(pytree.tree_unflatten(told, structure))


def _is_batch(size: tuple[int, ...], spatial: int | None) -> bool:
    """Whether ``size`` has the batch dimension: the model's first layers decide, else its rank does."""
    rank = len(size)
    if spatial is not None and rank in (spatial + 1, spatial + 2):
        return rank == spatial + 2
    if rank not in (1, 2, 3, 4):
        kind = _KINDS.get(spatial or 2)
        raise ValueError(
            f"expected {kind} or [features], with or without the batch size, got {list(size)}: "
            "for another layout pass a tensor, the batch first"
        )
    return rank % 2 == 0


def _dimensions(model: torch.nn.Module) -> int | None:
    """Spatial dimensions of the first layer that determines them."""
    known = (dimensions(module) for module in model.modules())
    return next((number for number in known if number is not None), None)


def _like(model: torch.nn.Module) -> torch.Tensor:
    """Return a tensor of the model's own dtype and device."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def _looks_up(model: torch.nn.Module) -> bool:
    """Whether the first layer takes whole numbers."""
    layers = (module for module in model.modules() if not any(module.children()))
    return isinstance(next(layers, None), (torch.nn.Embedding, torch.nn.EmbeddingBag))
