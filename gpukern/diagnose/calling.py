"""Calls and copies of a user's model that leave no trace on it."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from gpukern.diagnose.errors import DiagnoseError
from gpukern.fusion.errors import FusionError, first_line
from gpukern.fusion.given import check_weights, duplicate


def call(model: torch.nn.Module, inputs: Any) -> Any:
    """Return the output for ``inputs``: positional arguments in a tuple or list, named ones in a dict, or the one.

    The model gets copies of the tensors: a first layer that works in place would leave other inputs to the next call.
    """
    inputs = map_tensors(torch.clone, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def python_module(model: Any, asked_by: str) -> torch.nn.Module:
    """``model``, or what torch.compile wrapped, whose layers can be watched. TypeError for anything else."""
    while type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        model = model._orig_mod
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{asked_by}() watches Python modules, and TorchScript has compiled this one: pass the original"
        )
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{asked_by}() takes a torch.nn.Module, got {type(model).__name__}")
    return model


def copied(model: torch.nn.Module, asked_by: str) -> torch.nn.Module:
    """A deep copy without gradients. DiagnoseError if there is none, or the model lacks its weights."""
    try:
        check_weights(model)
        made = duplicate(model)
    except FusionError as problem:
        raise DiagnoseError(str(problem).replace("fuse() takes", f"{asked_by}() takes")) from problem
    for parameter in made.parameters():
        parameter.grad = None
    return made


def copied_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, copy_of_model: torch.nn.Module
) -> torch.optim.Optimizer:
    """A copy of ``optimizer``, with its state, that updates the parameters of the copy of the model."""
    pairs = zip(model.parameters(), copy_of_model.parameters(), strict=True)
    memo: dict[int, Any] = {id(original): twin for original, twin in pairs}
    try:
        return copy.deepcopy(optimizer, memo)
    except Exception as problem:  # whatever an optimizer keeps
        raise DiagnoseError(f"the optimizer cannot be copied: {first_line(problem)}") from problem


@contextlib.contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Leave the random states of torch, NumPy and Python as they were; inside, all begin with ``seed`` if given."""
    numpys, pythons = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            seed_everything(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Give buffers, such as running statistics, and the modes of all modules back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    owned = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        for module, names in owned:
            module._buffers.update(names)
        for module, training in modes:
            module.training = training


def floating(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors in ``value``, in order."""
    leaves = pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in ``value``, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def map_tensors(function: Any, value: Any) -> Any:
    """``value`` with every tensor in it replaced by ``function`` of it."""
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, value)


def first_samples(value: Any, number: int, of: int) -> Any:
    """The first ``number`` samples of every tensor in ``value`` whose first dimension is the batch's ``of``."""
    return map_tensors(lambda leaf: leaf[:number] if leaf.dim() and leaf.shape[0] == of else leaf, value)


def device_of(model: torch.nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer; None for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def moved(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors on ``device``."""
    return value if device is None else map_tensors(lambda leaf: leaf.to(device), value)
