"""A captured model as a graph of ATen operators with its weights beside it, and how such graphs are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import TreeSpec

from gpukern.fusion.calls import Signature

aten = torch.ops.aten


@dataclass(frozen=True)
class InputSpec:
    """A tensor that the model takes: its sizes (None for the batch where that is free) and dtype; ``batch``: the name
    of the free size, which is one for all inputs that call it so; ``example``: the dtype that the example had."""

    sizes: tuple[int | None, ...]
    dtype: torch.dtype
    batch: str | None = None
    example: torch.dtype | None = None

    @property
    def is_image(self) -> bool:
        """Whether it has a memory format to choose: 4-D and floating point."""
        return len(self.sizes) == 4 and self.dtype.is_floating_point


@dataclass(frozen=True)
class Program:
    """A model in evaluation mode, as values: graphs are copied before they are changed.

    ``graph`` has a placeholder for each leaf of the arguments, a ``get_attr`` for each tensor in ``constants`` (the
    model's own, unrounded) and returns a flat tuple. Each node's ``meta["val"]`` has shape and dtype, ``meta`` also
    the module it stands in. ``modules`` are the graphs of control flow. ``inputs`` has None for what is no tensor.
    ``leaves`` are the paths of modules without children, ``given`` what of the example is no tensor (None for those),
    ``signature`` that of the model's ``forward``.
    """

    graph: Graph
    constants: dict[str, torch.Tensor]
    modules: dict[str, torch.nn.Module]
    inputs: tuple[InputSpec | None, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    dynamic_batch: bool
    leaves: frozenset[str]
    notes: tuple[str, ...] = ()
    given: tuple[Any, ...] = ()
    signature: Signature = field(default_factory=Signature)

    @property
    def free(self) -> tuple[str | None, ...]:
        """The name of each argument leaf's free batch."""
        return tuple(None if spec is None else spec.batch for spec in self.inputs)

    def with_graph(self, graph: Graph, constants: dict[str, torch.Tensor] | None = None) -> Program:
        return replace(self, graph=graph, constants=self.constants if constants is None else constants)

    def copy(self) -> tuple[Graph, dict[Node, Node]]:
        """Copy the graph, and map each node to its copy."""
        graph, places = Graph(), dict[Node, Node]()
        result = graph.graph_copy(self.graph, places)
        graph.output(result)
        return graph, places


def assemble(graph: Graph, constants: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module]) -> GraphModule:
    """``graph`` with the constants that it names as buffers of a module."""
    root = torch.nn.Module()
    for target in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        if target in modules:
            root.add_module(target, modules[target])
        else:
            root.register_buffer(target, constants[target])
    module = GraphModule(root, graph)
    return module.eval()


def in_branches(program: Program) -> Iterator[Node]:
    """The nodes of graphs that control flow chooses from."""
    for module in program.modules.values():
        for inner in module.modules():
            if isinstance(inner, GraphModule):
                yield from inner.graph.nodes


# ---- reading nodes -------------------------------------------------------------------------------------------------


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and (not targets or node.target in targets)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of an operator by their names, defaults included."""
    found, operator = {}, node.target
    assert isinstance(operator, torch._ops.OpOverload)
    for number, argument in enumerate(operator._schema.arguments):
        if number < len(node.args):
            found[argument.name] = node.args[number]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value
    return found


def value(node: Any) -> torch.Tensor | None:
    """Return ``node``'s value in the capture, as a tensor without data; None for what is not a tensor."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val if isinstance(val, torch.Tensor) else None


def tensor_of(node: Any) -> torch.Tensor:
    """:func:`value` of a node that is a tensor."""
    found = value(node)
    assert found is not None, f"{node} is a tensor"
    return found


def first_operand(node: Node) -> Any:
    """What a call takes first, in graphs of operators mostly a node."""
    return node.args[0]


def sole_user(node: Node) -> Node | None:
    """The one operator that takes ``node``, if the model does not return it."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op == "call_function" else None


def module_path(node: Node) -> str:
    """The path in the model of the innermost module that computes ``node``; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([entry[0] for entry in stack.values()]), "")
    # A second call of a module is exported as "conv@1"; what export itself adds belongs to none.
    return "" if path.startswith("_empty_nn_module_stack") else path.split("@")[0]


def operation(node: Node) -> str:
    """Name a node's operation: "conv2d", "batch_norm", "add"."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def title(node: Node) -> str:
    """Name a node for reports: the module's path if it is a layer, else the node's name with its module's path."""
    path = module_path(node)
    return f"{path} ({node.name})" if path else node.name


def is_view(node: Node) -> bool:
    """Whether a call computes nothing: another view of a tensor, an element of a tuple, a size, a check."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    aliases = any(returned.alias_info is not None for returned in schema.returns)
    return aliases or value_of_any(node) is None


def value_of_any(node: Node) -> Any:
    """The tensor, or the tensors, that ``node`` is; None for sizes and checks."""
    val = node.meta.get("val")
    if isinstance(val, (tuple, list)):
        return next((each for each in val if isinstance(each, torch.Tensor)), None)
    return val if isinstance(val, torch.Tensor) else None


def elements(tensor: torch.Tensor) -> int:
    return math.prod(int(size) for size in tensor.shape)
