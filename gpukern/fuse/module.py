"""The fused model as a module: it checks and prepares what it is given, then runs the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from gpukern.fuse.direct import call_directly
from gpukern.fuse.program import InputSpec, Program


@dataclass(frozen=True)
class Interface:
    """How a fused model is called: the leaves of its arguments (None for what is no tensor), how these are arranged,
    and how the results are. ``channels_last``: whether images are made so."""

    inputs: tuple[InputSpec | None, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    channels_last: bool

    @classmethod
    def of(cls, program: Program, channels_last: bool) -> Interface:
        return cls(program.inputs, program.in_spec, program.out_spec, channels_last)


class FusedModule(torch.nn.Module):
    """Takes and returns what the model did, in the dtype it was fused for. For inference: it has buffers only.

    Floating-point inputs are cast to that dtype and, images, made channels_last if that was asked for, once, here.
    """

    def __init__(self, network: GraphModule, interface: Interface) -> None:
        super().__init__()
        self.network = call_directly(network)
        self.interface = interface
        self.training = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A graph is traced anew where it is unpickled, and has the registered operators again.
        self.network = call_directly(self.network)

    def forward(self, *inputs: Any) -> Any:
        """TypeError or ValueError for what is not like the example; the batch may be another where it is free."""
        return pytree.tree_unflatten(self.network(*self.prepared(inputs)), self.interface.out_spec)

    def prepared(self, inputs: tuple) -> list[Any]:
        """The leaves of the arguments, as the network takes them."""
        leaves, structure = pytree.tree_flatten(inputs)
        if structure != self.interface.in_spec:
            raise TypeError(f"expected arguments as in the example, {self.interface.in_spec}, got {structure}")
        return [self._prepared(*each) for each in enumerate(zip(leaves, self.interface.inputs, strict=True))]

    def _prepared(self, number: int, given: tuple[Any, InputSpec | None]) -> Any:
        leaf, spec = given
        if spec is None:
            return leaf
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"expected a tensor as input {number}, got {type(leaf).__name__}")
        _check_sizes(number, leaf, spec)
        if not spec.dtype.is_floating_point or not leaf.is_floating_point():
            return leaf
        if not spec.is_image:
            return leaf.to(spec.dtype)
        format = torch.channels_last if self.interface.channels_last else torch.contiguous_format
        return leaf.to(dtype=spec.dtype, memory_format=format)


def _check_sizes(number: int, leaf: torch.Tensor, spec: InputSpec) -> None:
    fits = leaf.dim() == len(spec.sizes) and all(
        size is None or size == given for size, given in zip(spec.sizes, leaf.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("batch" if size is None else str(size) for size in spec.sizes)
        raise ValueError(
            f"expected input {number} of shape [{sizes}], got {list(leaf.shape)}: fuse the model for that size"
        )
