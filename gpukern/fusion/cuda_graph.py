"""Replay of a module's launches as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

#: Calls before the capture, in which kernels are compiled and allocators settle.
_WARM_UP = 3


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    outputs: Any


class Replayed:
    """A call of a module for inference, captured once for each set of input shapes, dtypes and devices.

    Inputs are copied to where the capture reads them, outputs cloned: a later call does not overwrite them.
    Every captured shape keeps its memory.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._captured: dict[tuple, _Captured] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without captures, which read the memory of this one: a copy makes its own."""
        return {"_call": self._call, "_captured": {}}

    def __call__(self, *inputs: Any) -> Any:
        """RuntimeError for tensors that are not on a CUDA device."""
        leaves, structure = pytree.tree_flatten(inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or any(not tensor.is_cuda for tensor in tensors):
            raise RuntimeError("cuda_graph=True replays launches on a CUDA device: expected CUDA tensors")
        key = (structure, *(_kind(leaf) for leaf in leaves))
        with torch.cuda.device(tensors[0].device), torch.no_grad():
            captured = self._captured.get(key)
            if captured is None:
                captured = self._captured[key] = self._capture(leaves, structure)
            for place, given in zip(captured.inputs, leaves, strict=True):
                if isinstance(given, torch.Tensor):
                    place.copy_(given)
            captured.graph.replay()
            return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, captured.outputs)

    def _capture(self, leaves: list[Any], structure: pytree.TreeSpec) -> _Captured:
        places = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        inputs = pytree.tree_unflatten(places, structure)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._call(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._call(*inputs)
        return _Captured(graph, places, outputs)


def _kind(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
