"""Dynamo's graph with the calls that gpukern fuses written as ATen operators, which is what the matcher reads.

Dynamo records what the model called: functions of ``torch`` and ``torch.nn.functional``, operators of Python, methods
of tensors. Those named here become overloads of ``torch.ops.aten`` of the same meaning, as do gpukern's own operators,
which are what Dynamo sees of layers of ``gpukern.nn``; all others stay as they are. A call that changes its operand in
place becomes the one that does not where nothing else can see the difference.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from gpukern.fusion.decompose import write_out
from gpukern.fusion.program import value
from gpukern.ops._activation.reference import IN_TORCH

aten = torch.ops.aten

#: (overload, its arguments, whether the call changes the first of them)
_Call = tuple[Any, tuple[Any, ...], bool]
_Reader = Callable[[Node], "_Call | None"]


def read(module: GraphModule) -> Graph:
    """Return a copy of the graph of ``module``; each node's ``meta["val"]`` is its value in the capture."""
    graph, places = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, places))
    for old, new in places.items():
        new.meta = {**old.meta, "val": old.meta.get("example_value"), "nn_module_stack": _paths(old)}
    _number(graph, "context", _changes_context)
    for node in list(graph.nodes):
        call = _aten_call(node)
        if call is not None:
            _replace(graph, node, *call)
    write_out(graph)
    _number(graph, "region", _changes_context, _changes_tensor)
    return graph


def _replace(graph: Graph, node: Node, target: Any, args: tuple[Any, ...], in_place: bool) -> None:
    if in_place and not _is_own(args[0], node):
        return
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = {**node.meta, "fresh": True}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    new._rename(node.name)


def _is_own(operand: Any, user: Node) -> bool:
    """Whether ``operand`` is memory that only ``user`` reads: the result of a call read here, which makes a tensor.

    And recorded as it is, since a tensor that changes where gradients are not recorded keeps those it has.
    """
    if not isinstance(operand, Node) or not operand.meta.get("fresh", False):
        return False
    return set(operand.users) == {user} and operand.meta["context"] == user.meta["context"]


def _paths(node: Node) -> dict[str, tuple[str, Any]]:
    """The stack of modules with paths in the model: "layer1.0.conv1" for Dynamo's "L['self'].layer1.0.conv1"."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (_ROOT.sub("", path), *rest) for key, (path, *rest) in stack.items()}


_ROOT = re.compile(r"^[LG]\[['\"][^]]*['\"]\]\.?|^self\.?")


# ---- order ---------------------------------------------------------------------------------------------------------


def _number(graph: Graph, name: str, *changes: Callable[[Node], bool]) -> None:
    """Number the stretches between calls that change something: ``meta[name]``.

    The "context" is that of autocast and of gradients' recording. A "region" ends where a tensor changes, too: what is
    computed in one may not be computed in another.
    """
    number = 0
    for node in graph.nodes:
        number += any(change(node) for change in changes)
        node.meta[name] = number


def _changes_context(node: Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    return "autocast" in name or "grad_enabled" in name or "inference" in name or module == "torch.autograd.grad_mode"


def _changes_tensor(node: Node) -> bool:
    """Whether a call may change a tensor in place, other than counters as those of batch norms."""
    operand = value(node.args[0]) if node.args else None
    if operand is not None and operand.dim() == 0 and not operand.is_floating_point():
        return False
    if isinstance(node.target, str):
        if node.op != "call_method":
            return False
        return node.target == "__setitem__" or (node.target.endswith("_") and not node.target.endswith("__"))
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or name.endswith("_") or "out" in node.kwargs or _is_asked_to(node.target, node)


_IN_PLACE = frozenset((
    operator.setitem, operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imatmul,
    operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
    operator.ixor,
))  # fmt: skip


def _is_asked_to(function: Callable[..., Any], node: Node) -> bool:
    """Whether ``inplace`` is given to a function that has it."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    try:
        return bool(_call_of(function, node).get("inplace"))
    except (TypeError, ValueError):  # no signature to read, as of builtins: they have no such argument
        return False


# ---- calls ---------------------------------------------------------------------------------------------------------


def _aten_call(node: Node) -> _Call | None:
    """The call that ``node`` is in operators of ATen; None for all that is not named below."""
    known: dict[Any, _Reader] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
    reader = known.get(node.target)
    try:
        return reader(node) if reader else None
    except TypeError:  # arguments that the operator does not have, as ``out``
        return None


def _bound(target: torch._ops.OpOverload, node: Node) -> dict[str, Any]:
    """The arguments of a function of torch by the names in the operator's schema, up to the last one given."""
    schema = target._schema.arguments
    names = [argument.name for argument in schema]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    if len(node.args) > len(names) or not given.keys() <= set(names):
        raise TypeError(f"{target} has no argument {given.keys() - set(names)}")
    last = max(number for number, name in enumerate(names) if name in given)
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema[: last + 1]}


def _operator(target: torch._ops.OpOverload, *sizes: str) -> _Reader:
    """A function of torch with the operator's arguments; those named ``sizes`` may be one number for all dimensions."""

    def read(node: Node) -> _Call:
        given = _bound(target, node)
        return target, tuple(_listed(each) if name in sizes else each for name, each in given.items()), False

    return read


def _listed(sizes: Any) -> Any:
    if isinstance(sizes, str):
        return sizes
    return [sizes] if isinstance(sizes, int) else list(sizes or ())


def _convolution(name: str) -> _Reader:
    packet, sizes = getattr(aten, name), ("stride", "padding", "dilation")
    by_numbers, by_name = (_operator(target, *sizes) for target in (packet.default, packet.padding))

    def read(node: Node) -> _Call | None:
        padding = node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
        return (by_name if isinstance(padding, str) else by_numbers)(node)

    return read


def parameters_of(function: Any) -> list[str]:
    """The names of a Python function's parameters; none of a builtin's."""
    return [*inspect.signature(function).parameters] if inspect.isfunction(function) else []


def _call_of(function: Callable[..., Any], node: Node) -> dict[str, Any]:
    """The arguments of ``node`` by the names of a Python function, defaults included."""
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _batch_norm(node: Node) -> _Call | None:
    given = _call_of(F.batch_norm, node)
    tensors = (given[name] for name in ("input", "weight", "bias", "running_mean", "running_var"))
    return aten.batch_norm.default, (*tensors, given["training"], given["momentum"], given["eps"], True), False


def _activation(function: Callable[..., Any], target: torch._ops.OpOverload, *names: str) -> _Reader:
    """A function of ``torch.nn.functional`` with ``inplace``, and of its other arguments those ``names``."""

    def read(node: Node) -> _Call | None:
        given = _call_of(function, node)
        return target, (given["input"], *(given[name] for name in names)), bool(given.get("inplace"))

    return read


def _one_operand(target: torch._ops.OpOverload, in_place: bool = False) -> _Reader:
    def read(node: Node) -> _Call | None:
        return (target, node.args, in_place) if len(node.args) == 1 and not node.kwargs else None

    return read


def _addition(in_place: bool) -> _Reader:
    def read(node: Node) -> _Call | None:
        operands = node.args
        if len(operands) != 2 or node.kwargs.get("alpha", 1) != 1 or node.kwargs.keys() - {"alpha"}:
            return None
        a, b, result = (value(each) for each in (*operands, node))
        if a is None or b is None or result is None:
            return None
        if in_place and result.dtype is not torch.promote_types(a.dtype, b.dtype):
            return None  # written to a dtype that the sum would not have
        return aten.add.Tensor, operands, in_place

    return read


def _adaptive_pool(node: Node) -> _Call | None:
    given = _bound(aten.adaptive_avg_pool2d.default, node)
    input, size, image = given["self"], given["output_size"], value(given["self"])
    sizes = [size] * 2 if isinstance(size, int) or size is None else list(size)
    if image is None or len(sizes) != 2:
        return None
    whole = [own if size is None else size for own, size in zip(image.shape[-2:], sizes, strict=True)]
    known = all(type(size) is int for size in whole)
    return (aten.adaptive_avg_pool2d.default, (input, whole), False) if known else None


def _max_pool(node: Node) -> _Call | None:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    defaults = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    given = defaults | dict(zip(names, node.args, strict=False)) | node.kwargs
    if given["return_indices"] or len(node.args) > len(names):
        return None
    sizes = (_listed(given[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    return aten.max_pool2d.default, (given["input"], *sizes, given["ceil_mode"]), False


_SIZES = "stride", "padding", "output_padding", "dilation"
_PLAIN = [name for name in IN_TORCH if parameters_of(getattr(F, name)) == ["input", "inplace"]]
_FUNCTIONS: dict[Any, _Reader] = {
    torch.conv1d: _convolution("conv1d"),
    torch.conv2d: _convolution("conv2d"),
    torch.conv3d: _convolution("conv3d"),
    torch.conv_transpose1d: _operator(aten.conv_transpose1d.default, *_SIZES),
    torch.conv_transpose2d: _operator(aten.conv_transpose2d.input, *_SIZES),
    F.linear: _operator(aten.linear.default),
    F.batch_norm: _batch_norm,
    # All that may change their operand are called in the same way.
    **{getattr(F, name): _activation(getattr(F, name), target) for name, target in IN_TORCH.items() if name in _PLAIN},
    F.hardtanh: _activation(F.hardtanh, aten.hardtanh.default, "min_val", "max_val"),
    F.leaky_relu: _activation(F.leaky_relu, aten.leaky_relu.default, "negative_slope"),
    F.gelu: _operator(aten.gelu.default),
    F.sigmoid: _one_operand(aten.sigmoid.default),
    F.tanh: _one_operand(aten.tanh.default),
    torch.relu: _one_operand(aten.relu.default),
    torch.relu_: _one_operand(aten.relu.default, True),
    torch.sigmoid: _one_operand(aten.sigmoid.default),
    torch.tanh: _one_operand(aten.tanh.default),
    operator.add: _addition(False),
    torch.add: _addition(False),
    operator.iadd: _addition(True),
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _operator(aten.avg_pool2d.default, "kernel_size", "stride", "padding"),
    F.adaptive_avg_pool2d: _adaptive_pool,
}
_METHODS: dict[Any, _Reader] = {
    "relu": _one_operand(aten.relu.default),
    "relu_": _one_operand(aten.relu.default, True),
    "sigmoid": _one_operand(aten.sigmoid.default),
    "tanh": _one_operand(aten.tanh.default),
    "add": _addition(False),
    "add_": _addition(True),
}
