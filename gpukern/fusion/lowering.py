"""Lowering of a program and its matches to a graph of gpukern's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from gpukern.fusion.affine import is_batch_norm
from gpukern.fusion.constants import known_constant
from gpukern.fusion.folding import Folded, fold
from gpukern.fusion.match import Match
from gpukern.fusion.products import activation, image, pool
from gpukern.fusion.program import Program, arguments, assemble, aten, tensor_of, value
from gpukern.runtime.tensors import KERNEL_DTYPES


@dataclass(frozen=True)
class Lowered:
    """``module`` takes and returns flat tuples. ``names`` are of the nodes that have the matches' outputs.

    All nodes made for a match have its place among the matches as ``meta["gpukern_match"]``.
    """

    module: GraphModule
    names: tuple[str, ...]
    folded: tuple[Folded | None, ...]


def lower(program: Program, matches: Sequence[Match], *, channels_last: bool) -> Lowered:
    """Return ``program`` with one operator per match. Other nodes stay, except pools and activations."""
    return _Lowering(program, channels_last).lower(matches)


def rounded(program: Program, graph: Graph) -> dict[str, torch.Tensor]:
    """The constants of ``program`` that ``graph`` uses as they are, in the dtype that they were captured in."""
    found = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in program.constants:
            dtype = tensor_of(node).dtype
            if all(is_batch_norm(user) for user in node.users):
                # A variance beyond 65504 is infinite in fp16, and its channel would be zero.
                dtype = torch.promote_types(dtype, torch.float32)
            found[node.target] = program.constants[node.target].to(dtype)
    return found


class _Lowering:
    def __init__(self, program: Program, channels_last: bool) -> None:
        self.program = program
        self.graph, self.places = program.copy()
        self.packed = torch.channels_last if channels_last else torch.contiguous_format
        self.constants: dict[str, torch.Tensor] = {}
        self.moved: dict[Node, Node] = {}
        self.place = 0

    def lower(self, matches: Sequence[Match]) -> Lowered:
        new, folded = [], []
        for number, match in enumerate(matches):
            with self.graph.inserting_before(self.places[match.output]):
                self.place = number
                node, weights = self.fused(match, f"{match.operator.split('::')[1]}_{number}")
            old = self.places[match.output]
            old.replace_all_uses_with(node)
            self.moved[old] = node
            node.meta = {**old.meta, **node.meta}
            new.append(node)
            folded.append(weights)
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            _lower_one(self.graph, node)
        self.constants |= rounded(self.program, self.graph)
        self.graph.lint()
        module = assemble(self.graph, self.constants, self.program.modules)
        return Lowered(module, tuple(node.name for node in new), tuple(folded))

    def at(self, node: Node) -> Node:
        """Return the new node that holds the value of a node of the program."""
        place = self.places[node]
        return self.moved.get(place, place)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta["gpukern_match"] = self.place
        return node

    def held(self, name: str, tensor: torch.Tensor | None) -> Node | None:
        """A new constant of the fused model."""
        if tensor is None:
            return None
        self.constants[name] = tensor
        return self.graph.create_node("get_attr", name, name=name)

    # ---- matches ----

    def fused(self, match: Match, name: str) -> tuple[Node, Folded | None]:
        if match.product is None:
            return lower_batch_norm(self, match, name), None
        dtype = tensor_of(match.output).dtype
        weights = fold(self.program, match, dtype)
        input = self.cast(self.at(match.input), dtype, weights.dtype)
        residual = None
        if match.residual is not None:
            residual = self.cast(self.at(match.residual), dtype, weights.dtype)
        if match.operator.startswith("aten"):
            family = _aten
        else:
            family = {0: _linear, 3: _volumes}.get(match.product.spatial, _convolution)
        node = family(self, match, weights, input, residual, name)
        return self.cast(node, weights.dtype, dtype), weights

    def cast(self, node: Node, dtype: torch.dtype, wanted: torch.dtype) -> Node:
        return node if dtype is wanted else self.call(aten._to_copy.default, node, dtype=wanted)


def _convolution(to: _Lowering, match: Match, weights: Folded, input: Node, residual: Node | None, name: str) -> Node:
    """Lower to gpukern's 2-D operators; sequences are images of height 1."""
    product, flat = match.own_product, match.own_product.spatial == 1
    weight = weights.weight.unsqueeze(2) if flat else weights.weight
    weight = weight.contiguous(memory_format=to.packed)
    if flat:
        input = to.call(aten.unsqueeze.default, input, 2)
        residual = None if residual is None else to.call(aten.unsqueeze.default, residual, 2)
    operands: tuple[Node | None, ...] = input, to.held(f"{name}_weight", weight), to.held(f"{name}_bias", weights.bias)
    stride, dilation = image(product.stride, 1), image(product.dilation, 1)
    geometry: tuple[Any, ...]
    if product.transposed:
        assert not isinstance(product.padding, str)  # words are for convolutions
        geometry = (stride, image(product.padding, 0), image(product.output_padding, 0), dilation, product.groups)
        target = torch.ops.gpukern.conv_transpose2d.default
    else:
        padding = product.window_padding(tuple(weights.weight.shape[2:]))
        geometry = (stride, padding, dilation, product.groups)
        target = torch.ops.gpukern.conv2d.default
    if match.pool is not None:
        target = torch.ops.gpukern.conv2d_max_pool2d.default
    else:
        operands = *operands, residual
    geometry = tuple(list(each) if isinstance(each, tuple) else each for each in geometry)
    node = to.call(target, *operands, *geometry, *match.activation)
    return to.call(aten.squeeze.dim, node, 2) if flat else node


def _volumes(to: _Lowering, match: Match, weights: Folded, input: Node, residual: Node | None, name: str) -> Node:
    """Lower to gpukern's 3-D operators."""
    product = match.own_product
    weight, bias = to.held(f"{name}_weight", weights.weight.contiguous()), to.held(f"{name}_bias", weights.bias)
    geometry: tuple[Any, ...]
    if product.transposed:
        target = torch.ops.gpukern.conv_transpose3d.default
        geometry = product.stride, product.padding, product.output_padding, product.dilation, product.groups
    else:
        target = torch.ops.gpukern.conv3d.default
        padding = product.volume_padding(tuple(weights.weight.shape[2:]))
        geometry = product.stride, padding, product.dilation, product.groups
    geometry = tuple(list(each) if isinstance(each, tuple) else each for each in geometry)
    return to.call(target, input, weight, bias, residual, *geometry, *match.activation)


def _linear(to: _Lowering, match: Match, weights: Folded, input: Node, residual: Node | None, name: str) -> Node:
    """Lower to gpukern's linear layer, which takes rows."""
    weight, bias = to.held(f"{name}_weight", weights.weight.contiguous()), to.held(f"{name}_bias", weights.bias)
    target = torch.ops.gpukern.linear.default
    shape = tensor_of(match.own_product.input).shape
    if len(shape) == 2:
        return to.call(target, input, weight, bias, *match.activation)
    leading = [size if isinstance(size, int) else to.call(aten.sym_size.int, input, i) for i, size in enumerate(shape)]
    rows = to.call(aten.reshape.default, input, [-1, shape[-1]])
    node = to.call(target, rows, weight, bias, *match.activation)
    return to.call(aten.reshape.default, node, [*leading[:-1], weights.weight.shape[0]])


def _aten(to: _Lowering, match: Match, weights: Folded, input: Node, residual: Node | None, name: str) -> Node:
    """Lower to torch's own operator, which has no epilogue: only the weights change."""
    bias = None if weights.bias is None else weights.bias.to(weights.dtype)
    changed = {
        "input": input,
        "weight": to.held(f"{name}_weight", weights.weight.contiguous()),
        "bias": to.held(f"{name}_bias", bias),
    }
    given = {**arguments(match.own_product.node), **changed}
    return to.call(match.own_product.node.target, *given.values())


def lower_batch_norm(to: _Lowering, match: Match, name: str) -> Node:
    """Lower remaining batch norms, with what follows, to one pass: parameters and statistics in fp32."""
    given = arguments(match.core)

    def parameter(argument: str) -> Node | None:
        if given[argument] is None:
            return None
        return to.held(f"{name}_{argument}", known_constant(to.program, given[argument]).float())

    weight, bias, mean, var = (parameter(each) for each in ("weight", "bias", "running_mean", "running_var"))
    residual = None if match.residual is None else to.at(match.residual)
    return to.call(
        torch.ops.gpukern.batch_norm.default,
        *(to.at(match.input), weight, bias, residual, mean, var, given["eps"], *match.activation),
    )


# ---- what is in no match --------------------------------------------------------------------------------------------


def _lower_one(graph: Graph, node: Node) -> None:
    """Lower to gpukern's operator if there is one."""
    of_sequences = pool(node, 1)
    lowered = of_sequences or pool(node) or _activation(node) or _row_norm(node)
    if lowered is None:
        return
    target, (input, *others) = lowered
    with graph.inserting_before(node):
        if of_sequences:
            input = graph.call_function(aten.unsqueeze.default, (input, 2))
        new = graph.call_function(target, (input, *others))
        if of_sequences:
            new = graph.call_function(aten.squeeze.dim, (new, 2))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _activation(node: Node) -> tuple[Any, tuple] | None:
    found = activation(node)
    if found is None:
        return None
    operand = next(iter(arguments(node).values()))
    input = value(operand)
    # torch also takes integers, and makes fp32 of them.
    if input is None or input.dtype not in KERNEL_DTYPES:
        return None
    return torch.ops.gpukern.activation.default, (operand, *found)


_ROW_NORMS = {
    aten.layer_norm.default: torch.ops.gpukern.layer_norm.default,
    aten.rms_norm.default: torch.ops.gpukern.rms_norm.default,
}


def _row_norm(node: Node) -> tuple[Any, tuple] | None:
    """A layer or RMS norm, of rows: gpukern's operator takes one dimension at least before the normalized ones."""
    if node.target not in _ROW_NORMS:
        return None
    given = arguments(node)
    input, shape, eps = tensor_of(given["input"]), list(given["normalized_shape"]), given["eps"]
    if input.dtype not in KERNEL_DTYPES or input.dim() == len(shape):
        return None
    if eps is None:
        eps = torch.finfo(torch.float32).eps  # of what torch computes in
    parameters = [given[name] for name in ("weight", "bias") if name in given]
    return _ROW_NORMS[node.target], (given["input"], *parameters, None, shape, eps, "none", 0.0, None)
