"""Lowering of a graph and its matches to the functions of :mod:`gpukern.compiler.steps`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from gpukern import functional
from gpukern.compiler import steps
from gpukern.compiler.aten_graph import parameters_of
from gpukern.compiler.steps import Statistics
from gpukern.fusion.eager_calls import call_one_directly
from gpukern.fusion.match import Match
from gpukern.fusion.products import Product, activation, image, pool
from gpukern.fusion.program import arguments, tensor_of, value
from gpukern.ops._activation.properties import PROPERTIES
from gpukern.ops._pointwise_norm.planner import why_not
from gpukern.ops.activation import needs_input
from gpukern.runtime.tensors import KERNEL_DTYPES


def lower(graph: Graph, matches: Sequence[Match], *, recompute: bool | None) -> None:
    """Rewrite ``graph``: a function or two for each match, and gpukern's functions for what is in none.

    ``recompute``: what batch norms return is computed once more in backward where it can be, instead of being saved;
    None: by :func:`gpukern.compiler.steps.norm`.
    """
    _Lowering(graph, matches, recompute).lower()
    for node in list(graph.nodes):
        _lower_alone(graph, node)
    _count_batches_at_once(graph)
    graph.lint()  # dead code stays: what changes a tensor in place has no users


class _Pointwise(NamedTuple):
    """The match of a 1×1 convolution and its batch norm, and that of the batch norm before it."""

    match: Match
    inner: Match


class _Lowering:
    def __init__(self, graph: Graph, matches: Sequence[Match], recompute: bool | None) -> None:
        self.graph, self.matches, self.recompute = graph, matches, recompute
        self.moved: dict[Node, Node] = {}
        self.cores = {match.core: match for match in matches}
        self.additions = {match.add: match for match in matches if match.add is not None}
        # Read at once: a node that was erased has no arguments.
        self.numbers = {norm: _numbers(norm) for match in matches if (norm := _norm_of(match)) is not None}
        #: Of a batch norm that adds another one's result, that one: both run in one pass.
        self.partners = {match.output: partner for match in matches if (partner := self.partner(match)) is not None}
        paired = {id(partner) for partner in self.partners.values()}
        self.paired = [match for match in matches if id(match) in paired]
        #: By the output of a match, the 1×1 convolution between two batch norms that it is, or that it adds ...
        self.pointwise: dict[Node, _Pointwise] = {}
        for match in matches:
            if (found := self.between_norms(match)) is not None:
                self.pointwise[match.output] = found
        #: ... and the matches that become part of it: those of the batch norms before, and of what is added.
        self.before = [found.inner for found in self.pointwise.values()]
        self.later = [found.match for output, found in self.pointwise.items() if found.match.output is not output]
        #: How many read the result of a batch norm, where it is handed on with its origin.
        self.readers = {match.output: self.count_readers(match) for match in matches}

    def lower(self) -> None:
        for match in self.matches:
            if match in self.later:
                continue  # part of the match that adds it
            if match in self.paired or match in self.before:
                node = self.convolved(match)
            else:
                node = self.normalized(match) if _norm_of(match) is not None else self.alone(match)
            core = self.pointwise[match.output].match if match.output in self.pointwise else match
            node.meta = {**match.output.meta, "gpukern_match": core}
            match.output.replace_all_uses_with(node)
            self.moved[match.output] = node
            self.erase(match)
            if core is not match:
                self.erase(core)

    def erase(self, match: Match) -> None:
        for old in reversed(match.nodes):
            self.graph.erase_node(old)

    # ---- who reads a result ----

    def count_readers(self, match: Match) -> int:
        """The number of convolutions and residuals that read a batch norm's result, 0 if anything else does."""
        node = match.output
        if _norm_of(match) is None or tensor_of(node).dim() != 4:
            return 0
        readers = [user for user in node.users if self.reads(user, node)]
        convolves = any(user in self.cores for user in readers)
        return len(readers) if convolves and len(readers) == len(node.users) else 0

    def reads(self, user: Node, node: Node) -> bool:
        if user.meta.get("region") != node.meta.get("region"):
            return False
        if user in self.additions:
            by = self.additions[user]
            return _norm_of(by) is not None and by.residual is node and by.output is not node
        reader = self.cores.get(user)
        if reader is None or reader.product is None or node in (reader.product.weight, reader.product.bias):
            return False
        takes = reader.norm is not None or not reader.fuses
        return takes and reader.product.input is node and reader.product.kind == "conv2d"

    # ---- functions ----

    def at(self, node: Any) -> Any:
        """Return the node that has the value of one of a match: where one was replaced, the new one."""
        return self.moved.get(node, node)

    def operands(self, product: Product) -> tuple[Any, Any, Any]:
        return self.at(product.input), self.at(product.weight), self.at(product.bias)

    def call(self, before: Node, function: Callable[..., Any], *args: Any) -> Node:
        with self.graph.inserting_before(before):
            return self.graph.call_function(function, args)

    def normalized(self, match: Match) -> Node:
        norm = _norm_of(match)
        assert norm is not None
        if match.output in self.pointwise:
            return self.pointwise_norm(match)
        z = self.at(arguments(norm)["input"]) if match.product is None else self.convolved(match)
        place = norm if match.add is None else match.add
        numbers, more = self.numbers[norm], (*match.activation, self.readers[match.output], self.recompute)
        if match.output in self.partners:
            partner = self.partners[match.output]
            other = partner.norm
            assert other is not None
            return self.call(place, steps.norm_pair, z, *numbers, self.at(partner.output), *self.numbers[other], *more)
        weight, bias, statistics = numbers
        return self.call(place, steps.norm, z, weight, bias, self.at(match.residual), statistics, *more)

    def convolved(self, match: Match) -> Node:
        """The product of a match, with what its kernel makes for the batch norm."""
        product, norm = match.own_product, _norm_of(match)
        assert norm is not None
        *_, statistics = self.numbers[norm]
        # Where sizes are free, Dynamo makes inputs of the numbers too.
        operands: tuple[Any, ...] = statistics
        known = all(each.op in ("placeholder", "get_attr") for each in operands if isinstance(each, Node))
        place = match.core if known else norm
        made = self.call(place, steps.convolution, *self.operands(product), _geometry(product), statistics)
        made.meta = {**match.core.meta, "gpukern_match": match}
        return made

    def partner(self, match: Match) -> Match | None:
        """The match whose batch norm's result ``match`` adds, if nothing else reads it and both can be one pass."""
        other = next((each for each in self.matches if each.output is match.residual), None)
        if other is None or match.norm is None or other.norm is None or other.output is not other.norm:
            return None
        images = tensor_of(match.output).dim() == 4 and len(other.output.users) == 1
        alike = other.output.meta.get("region") == match.output.meta.get("region")
        training = all(arguments(norm)["training"] is True for norm in (match.norm, other.norm))
        return other if images and alike and training and not needs_input(match.activation[0]) else None

    def between_norms(self, match: Match) -> _Pointwise | None:
        """The 1×1 convolution of ``match``, or of its partner, if it can be one step with the norms on both sides."""
        partner = self.partners.get(match.output)
        if match in self.paired or needs_input(match.activation[0]):
            return None
        for each in (match, partner):
            inner = None if each is None else self.norm_before(each)
            # The partner's norm is moved to the sum of both.
            if each is not None and inner is not None and (each is match or _has_own_statistics(each)):
                return _Pointwise(each, inner)
        return None

    def norm_before(self, match: Match) -> Match | None:
        """The match of the batch norm that only the 1×1 convolution of ``match`` reads."""
        product, norm = match.product, match.norm
        if product is None or norm is None or product.kind != "conv2d" or product.bias is not None:
            return None
        inner = next((each for each in self.matches if each.output is product.input), None)
        if inner is None or inner.norm is None or inner.add is not None or inner in self.paired:
            return None
        outputs, channels, *taps = tensor_of(product.weight).shape
        is_pointwise = taps == [1, 1] and _geometry(product) == steps.POINTWISE
        if inner.output in self.pointwise or why_not(channels, outputs):
            return None
        training = all(arguments(each)["training"] is True for each in (norm, inner.norm))
        return inner if is_pointwise and training and self.count_readers(inner) == 1 else None

    def pointwise_norm(self, match: Match) -> Node:
        """A 1×1 convolution, the batch norms on both sides of it, and what is added."""
        core, inner = self.pointwise[match.output]
        norm, inner_norm, product = core.norm, inner.norm, core.own_product
        assert norm is not None
        assert inner_norm is not None
        added, other = self.at(match.residual), self.partners.get(match.output)
        partner = None
        if other is not None:
            other = match if core is other else other
            assert other.norm is not None
            made = self.convolved(other) if other is match else self.at(other.output)
            added, partner = None, (made, *self.numbers[other.norm])
        return self.call(
            norm if match.add is None else match.add,
            steps.pointwise_norm,
            *(self.at(inner.output), *self.numbers[inner_norm], inner.activation, self.at(product.weight)),
            *(*self.numbers[norm], added, partner, *match.activation, self.readers[match.output], self.recompute),
        )

    def alone(self, match: Match) -> Node:
        """A product without a batch norm, with its epilogue."""
        product, place = match.own_product, match.core if match.add is None else match.add
        operands, residual = self.operands(product), self.at(match.residual)
        if product.kind == "linear":
            return self.call(place, steps.linear, *operands, *match.activation)
        if product.transposed:
            geometry = _transposed_geometry(product)
            return self.call(place, steps.transposed, *operands, residual, geometry, *match.activation)
        if not match.fuses and product.kind == "conv2d":
            return self.call(place, steps.convolution_alone, *operands, _geometry(product))
        return self.call(
            place,
            steps.convolution_with_epilogue,
            *operands,
            self.at(match.residual),
            _geometry(product),
            *match.activation,
        )


def _norm_of(match: Match) -> Node | None:
    return match.core if match.product is None else match.norm


def _has_own_statistics(match: Match) -> bool:
    """Whether nothing else in the graph uses the running statistics of the batch norm."""
    assert match.norm is not None
    given = arguments(match.norm)
    kept = (given[name] for name in ("running_mean", "running_var"))
    return all(len(each.users) == 1 for each in kept if isinstance(each, Node))


def _numbers(norm: Node) -> tuple[Any, Any, Statistics]:
    """Weight, bias and statistics of a batch norm."""
    given = arguments(norm)
    kept = given["running_mean"], given["running_var"]
    return given["weight"], given["bias"], Statistics(*kept, given["training"], given["momentum"], given["eps"])


def _geometry(product: Product) -> tuple[Any, ...]:
    if product.kind == "linear":
        return (1, 1), (0, 0, 0, 0), (1, 1), 1
    kernel = tuple(int(size) for size in tensor_of(product.weight).shape[2:])
    return image(product.stride, 1), product.window_padding(kernel), image(product.dilation, 1), product.groups


def _transposed_geometry(product: Product) -> tuple[Any, ...]:
    assert not isinstance(product.padding, str)  # words are for convolutions
    stride, dilation = image(product.stride, 1), image(product.dilation, 1)
    return stride, image(product.padding, 0), image(product.output_padding, 0), product.groups, dilation


# ---- what is in no match --------------------------------------------------------------------------------------------

_POOLS: dict[Any, Callable[..., Any]] = {
    torch.ops.gpukern.max_pool2d.default: functional.max_pool2d,
    torch.ops.gpukern.avg_pool2d.default: steps.avg_pool2d,
    torch.ops.gpukern.adaptive_avg_pool2d.default: functional.adaptive_avg_pool2d,
}
#: Functions that no operator stands for here: gpukern's have the same signature. Some change their operand, or have
#: arguments of their own.
_SAME: dict[Any, Callable[..., Any]] = {
    F.layer_norm: functional.layer_norm,
    torch.layer_norm: steps.layer_norm,
    F.rms_norm: functional.rms_norm,
    torch.rms_norm: functional.rms_norm,
    torch.ops.aten.layer_norm.default: functional.layer_norm,
    torch.ops.aten.rms_norm.default: functional.rms_norm,
    **{
        getattr(F, name): getattr(functional, name)
        for name in PROPERTIES
        if "inplace" in parameters_of(getattr(F, name, None))
    },
}


def _lower_alone(graph: Graph, node: Node) -> None:
    """Lower to gpukern's function if there is one."""
    call_one_directly(node)
    if node.op != "call_function" or value(node) is None or tensor_of(node).dtype not in KERNEL_DTYPES:
        return
    if node.target in _SAME:
        node.target = _SAME[node.target]
        return
    pooled, activated = pool(node), activation(node)
    if pooled is not None:
        function, args = _POOLS[pooled[0]], pooled[1]
    elif activated is not None:
        function, args = steps.functional_activation, (next(iter(arguments(node).values())), *activated)
    else:
        return
    with graph.inserting_before(node):
        new = graph.call_function(function, tuple(args))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _count_batches_at_once(graph: Graph) -> None:
    """Batch norms count their batches, each in a launch of its own: add one to all the counters by one call."""
    counts = [node for node in graph.nodes if node.op == "call_method" and node.target == "add_" and _counts(node)]
    if len(counts) < 2:
        return
    for device in dict.fromkeys(tensor_of(node).device for node in counts):
        together = [node for node in counts if tensor_of(node).device == device]
        with graph.inserting_before(together[0]):
            graph.call_function(torch._foreach_add_, ([node.args[0] for node in together], 1))
        for node in together:
            graph.erase_node(node)


def _counts(node: Node) -> bool:
    counter = node.args[0]
    return (
        node.args[1:] == (1,)
        and not node.kwargs
        and not node.users
        and isinstance(counter, Node)
        and counter.op == "placeholder"
        and len(counter.users) == 1
        and value(counter) is not None
        and tensor_of(counter).dtype is torch.int64
        and tensor_of(counter).dim() == 0
    )
