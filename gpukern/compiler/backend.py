"""The backend of ``torch.compile(model, backend="gpukern")``.

Dynamo hands over a graph of what the model called, before autograd. It comes back as a function that calls gpukern's
kernels behind autograd functions of its own, so that a training step runs as it would eagerly: under the autocast that
is on when it is called, with gradients accumulated by autograd, in DistributedDataParallel and under GradScaler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from gpukern.compiler import checkpointing
from gpukern.compiler.aten_graph import read
from gpukern.compiler.front import find
from gpukern.compiler.lowering import lower
from gpukern.fusion.matcher import Found


@dataclass(frozen=True)
class Options:
    """What ``torch.compile(options={...})`` may say.

    ``skip``: paths of modules whose layers are left to torch, with ``*`` and ``?`` as in :func:`gpukern.fuse`.
    ``recompute``: what batch norms return is not saved for backward but computed once more where a convolution needs
    it: less memory, one more pass over it for each. By default those that are large and have no residual.
    """

    skip: tuple[str, ...] = ()
    recompute: bool | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any] | None) -> Options:
        """Raises TypeError for names and values that are not these."""
        given = dict(given or {})
        unknown = given.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"gpukern has no option {', '.join(map(repr, sorted(unknown)))}; there are: {known}")
        skip = given.get("skip", ())
        if isinstance(skip, str) or not all(isinstance(each, str) for each in skip):
            raise TypeError(f"skip: expected a sequence of module paths, but got {skip!r}")
        recompute = given.get("recompute")
        if recompute is not None and not isinstance(recompute, bool):
            raise TypeError(f"recompute: expected a bool, but got {recompute!r}")
        return cls(tuple(skip), recompute)


@dataclass(frozen=True)
class Compiled:
    """A graph made of gpukern's functions, and what was found in the one it was made from."""

    module: GraphModule
    found: Found


def gpukern(
    module: GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile a graph of Dynamo. ``mode``, if anything, is "default": gpukern has no others."""
    if mode not in (None, "default"):
        raise ValueError(f"gpukern has no mode {mode!r}: leave it out")
    return compile_graph(module, Options.read(options)).module.forward


def compile_graph(module: GraphModule, options: Options) -> Compiled:
    """Rewrite ``module``, and the graphs under it that are run as checkpoints, without changing it."""
    graph = read(module)
    found = find(graph, options.skip)
    lower(graph, found.matches, recompute=options.recompute)
    inner = checkpointing.replace(graph, module, lambda part: compile_graph(part, options))
    root = torch.nn.Module()
    for name in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        _put(root, name, inner[name].module if name in inner else _get(module, name))
    made = GraphModule(root, graph, "Gpukern")
    made.meta = dict(module.meta)
    parts = [found, *(each.found for each in inner.values())]
    return Compiled(
        made, Found([m for part in parts for m in part.matches], [d for part in parts for d in part.declined])
    )


def _get(module: torch.nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _put(root: torch.nn.Module, path: str, held: Any) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        if not hasattr(root, owner):
            root.add_module(owner, torch.nn.Module())
        root = getattr(root, owner)
    if isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter):
        root.register_buffer(name, held)
    else:
        setattr(root, name, held)


__all__ = ["Compiled", "Options", "compile_graph", "gpukern"]
