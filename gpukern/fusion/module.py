"""The fused model as a module: it checks and prepares what it is given, then runs the graph."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from gpukern.fusion.calls import AS_IN_THE_EXAMPLE, Signature, text, told
from gpukern.fusion.eager_calls import call_directly
from gpukern.fusion.program import InputSpec, Program

#: Stands for a tensor of the example.
_TENSOR = object()


@dataclass(frozen=True)
class Interface:
    """Call interface of a fused model: the leaves of its arguments (None for what is not a tensor), their structure,
    and that of the results. ``channels_last``: whether images are made so. ``constants``: the example's numbers, flags
    and words in their places (None for tensors). ``signature``: of the original. ``apart``: the sizes that a free
    batch, by its name, must not have. ``may_lack_it``: whether all inputs but the first may have a batch of 1.
    """

    inputs: tuple[InputSpec | None, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    channels_last: bool
    constants: tuple[Any, ...]
    signature: Signature
    apart: dict[str, list[int]] = field(default_factory=dict)
    may_lack_it: bool = False

    @classmethod
    def of(cls, program: Program, channels_last: bool) -> Interface:
        specs = program.in_spec, program.out_spec
        return cls(program.inputs, *specs, channels_last, program.given, program.signature)

    @functools.cached_property
    def arguments(self) -> tuple[str | None, ...]:
        """The text of each argument in the example, None for one with tensors in it."""
        leaves = [_TENSOR if spec else each for spec, each in zip(self.inputs, self.constants, strict=True)]
        return tuple(text(argument) for argument in pytree.tree_unflatten(leaves, self.in_spec))

    def example_of(self, place: int) -> Any:
        """Return an argument without tensors, as it was in the example."""
        return pytree.tree_unflatten(self.constants, self.in_spec)[place]

    def other_structure(self, inputs: tuple) -> str:
        """Describe ``inputs`` whose structure differs from the example's."""
        expected = pytree.tree_unflatten(self.constants, self.in_spec)
        for place, (given, example) in enumerate(zip(inputs, expected, strict=True)):
            now, before = pytree.tree_structure(given), pytree.tree_structure(example)
            if now != before:
                words = f"{self._argument(place)} was {_arrangement(before)}, got {_arrangement(now)}"
                return f"expected arguments as in the example: {words}"
        return f"expected arguments as in the example, {self.in_spec}"

    def named(self, number: int) -> str:
        """Name a leaf for a message: "argument 'sizes'[1]"."""
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(self.inputs)), self.in_spec))
        place: Any
        (place, *inner), _ = paths[number]
        return f"{self._argument(place.idx)}{pytree.keystr(tuple(inner))}"

    def _argument(self, place: int) -> str:
        return f"argument {self.signature.arguments(self.in_spec.num_children)[place]!r}"


class ForInference(torch.nn.Module):
    """A module in evaluation mode. ``train()`` is refused, as what it would change was folded."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> ForInference:
        if mode:
            raise RuntimeError("a fused model is for inference, and cannot be trained: fuse the model after training")
        return super().train(False)


class FusedModule(ForInference):
    """Takes and returns what the model did, in the dtype it was fused for. For inference: it has buffers only.

    Floating-point inputs are cast to that dtype, with a warning if it is not the example's either, and, images, made
    channels_last if that was requested, once, here. Autocast has no effect, and a warning says so.
    """

    def __init__(self, network: GraphModule, interface: Interface) -> None:
        super().__init__()
        self.network = call_directly(network)
        self.interface = interface
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # pickle writes float8 tensors, and cannot read them: they are kept as bytes.
        found = {name: each for name, each in self.network.named_buffers() if each.dtype is torch.float8_e4m3fn}
        state = self.__dict__.copy()
        if found:
            network = copy.copy(self.network)
            network._buffers = self.network._buffers | {name: each.view(torch.uint8) for name, each in found.items()}
            state["_modules"] = {**self._modules, "network": network}
        return state | {"_float8": tuple(found)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_float8", ())
        super().__setstate__(state)
        for name in names:
            self.network._buffers[name] = self.network.get_buffer(name).view(torch.float8_e4m3fn)
        # A graph is traced anew where it is unpickled, and has the registered operators again.
        self.network = call_directly(self.network)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the model. TypeError or ValueError for arguments unlike the example; a free batch may differ."""
        return self.in_order(*self.bound(inputs, named))

    def in_order(self, *inputs: Any) -> Any:
        """Run the model on arguments in the order of the example's."""
        return pytree.tree_unflatten(self._run(self.prepared(inputs)), self.interface.out_spec)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedModule:
        """Move tensors, as ``to()`` does. RuntimeError for a dtype that the model was not fused for."""
        wanted = fn(torch.empty(0, dtype=self._dtype)).dtype
        if wanted is not self._dtype:
            raise RuntimeError(
                f"a fused model computes in the dtype it was fused for, {self._dtype}: "
                f"fuse the model with dtype={wanted}"
            )

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor.new_empty(0))
            # Biases and the statistics of batch norms may be wider, and stay so.
            return fn(tensor) if moved.dtype is tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @property
    def _dtype(self) -> torch.dtype:
        held = (spec.dtype for spec in (*self.interface.inputs, *self.buffers()) if spec is not None)
        return next((dtype for dtype in held if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)

    def _run(self, prepared: list[Any]) -> tuple:
        device = next(leaf.device.type for leaf in prepared if isinstance(leaf, torch.Tensor))
        # Tensors without memory have no autocast, and querying it raises.
        if device == "meta" or not torch.is_autocast_enabled(device):
            return self.network(*prepared)
        self._tell("a fused model ignores autocast: it computes in the dtype that it was fused for")
        with torch.autocast(device, enabled=False):
            return self.network(*prepared)

    def _tell(self, words: str) -> None:
        """Warn once per model."""
        if words not in self._told and not torch.compiler.is_compiling():
            self._told.add(words)
            warnings.warn(f"gpukern: {words}", stacklevel=2)

    def bound(self, inputs: tuple, named: dict[str, Any]) -> tuple:
        """The arguments in the order of the example's, as many as it has."""
        arguments, signature = self.interface.arguments, self.interface.signature
        if not named and not signature.by_name and len(inputs) == len(arguments):
            return inputs
        return signature.bound(inputs, named, arguments)

    def prepared(self, inputs: tuple) -> list[Any]:
        """The leaves of the arguments, as the network takes them."""
        interface = self.interface
        inputs = tuple(
            interface.example_of(place) if each is AS_IN_THE_EXAMPLE else each for place, each in enumerate(inputs)
        )
        leaves, structure = pytree.tree_flatten(inputs)
        if structure != interface.in_spec:
            # A torch.Size is a tuple where it is put together again, as in the example.
            structure = pytree.tree_structure(pytree.tree_unflatten(leaves, structure))
        if structure != interface.in_spec:
            raise TypeError(interface.other_structure(inputs))
        known = zip(leaves, interface.inputs, interface.constants, strict=True)
        prepared = [self._prepared(number, *each) for number, each in enumerate(known)]
        self._check_batch(prepared)
        return prepared

    def _check_batch(self, leaves: list[Any]) -> None:
        sizes: dict[str, int] = {}
        for number, (leaf, spec) in enumerate(zip(leaves, self.interface.inputs, strict=True)):
            if spec is None or spec.batch is None:
                continue
            size = leaf.shape[0]
            if sizes.setdefault(spec.batch, size) != size and not (self.interface.may_lack_it and size == 1):
                raise ValueError(
                    f"expected inputs of one batch size, got {sizes[spec.batch]} and {size} (input {number})"
                )
            if size in self.interface.apart.get(spec.batch, ()):
                raise ValueError(
                    f"expected a batch of another size than {size}, which is a case of its own for the original: "
                    "fuse the model for that size"
                )

    def _prepared(self, number: int, leaf: Any, spec: InputSpec | None, constant: Any) -> Any:
        if spec is None:
            if leaf is not constant and text(leaf) != text(constant):
                raise ValueError(
                    f"{self.interface.named(number)} was {told(constant)} in the example, got {told(leaf)}: "
                    "fuse the model with it"
                )
            return constant
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"expected a tensor as input {number}, got {type(leaf).__name__}")
        _check_sizes(number, leaf, spec)
        if not spec.dtype.is_floating_point or not leaf.is_floating_point():
            if leaf.dtype is not spec.dtype:
                raise TypeError(f"expected input {number} of {spec.dtype}, got {leaf.dtype}")
            return leaf
        if leaf.dtype not in (spec.dtype, spec.example):
            self._tell(f"input {number} is {leaf.dtype}, and is cast to {spec.dtype}, for which the model was fused")
        if not spec.is_image:
            return leaf.to(spec.dtype)
        format = torch.channels_last if self.interface.channels_last else torch.contiguous_format
        return leaf.to(dtype=spec.dtype, memory_format=format)


def _arrangement(structure: pytree.TreeSpec) -> str:
    """Format a structure as "[*, *]"."""
    return str(pytree.tree_unflatten(["*"] * structure.num_leaves, structure)).replace("'*'", "*")


def _check_sizes(number: int, leaf: torch.Tensor, spec: InputSpec) -> None:
    fits = leaf.dim() == len(spec.sizes) and all(
        size is None or size == given for size, given in zip(spec.sizes, leaf.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join("batch" if size is None else str(size) for size in spec.sizes)
        raise ValueError(
            f"expected input {number} of shape [{sizes}], got {list(leaf.shape)}: fuse the model for that size"
        )
