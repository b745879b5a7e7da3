"""Capture of a model as a :class:`Program`: export in evaluation mode, with a free batch size, on a copy."""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from gpukern.convert import REPLACEMENTS
from gpukern.fusion.batch import Free, choices, export_any_batch, why_fixed
from gpukern.fusion.calls import Signature
from gpukern.fusion.decompose import write_out
from gpukern.fusion.errors import FusionError, first_line
from gpukern.fusion.given import check_weights, devices_of, duplicate
from gpukern.fusion.program import InputSpec, Program, arguments, aten
from gpukern.runtime.evaluation import evaluate

#: gpukern's layers, and the torch layers whose operators fusion supports.
_PLAIN = {ours: theirs for theirs, ours in REPLACEMENTS.items()}


def private_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in evaluation mode with tensors of its own. FusionError if it cannot be copied, or lacks its weights."""
    check_weights(model)
    copied = duplicate(model)
    for module in copied.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
    return evaluate(copied)


def capture_program(
    model: torch.nn.Module, exact: torch.nn.Module, inputs: tuple, signature: Signature, *, dynamic_batch: bool
) -> Program:
    """``model`` (a private copy, in the dtype to run in) as a program with the weights of ``exact``, the same model.

    ``signature`` is that of the original, whose arguments ``inputs`` are in order.

    FusionError, with torch.export's message, if it cannot be captured.
    """
    notes: list[str] = []
    exported, free = _export(model, inputs, dynamic_batch, notes)
    weights = {
        **dict(exact.named_parameters(remove_duplicate=False)),
        **dict(exact.named_buffers(remove_duplicate=False)),
    }
    leaves = frozenset(name for name, module in model.named_modules() if not dict(module.named_children()))
    program = _program(exported, weights, inputs, free, leaves, notes)
    given = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(inputs))
    return replace(program, given=given, signature=signature)


def _export(
    model: torch.nn.Module, inputs: tuple, dynamic_batch: bool, notes: list[str]
) -> tuple[ExportedProgram, Free | None]:
    """Export with the free dimensions, None if there are none."""
    if dynamic_batch:
        why = "no input has a first dimension"
        for free in choices(inputs, functools.partial(_takes, model)):
            try:
                with quiet():
                    return export_any_batch(model, inputs, free).run_decompositions({}), free
            except Exception as error:  # export raises all kinds; the next try shows whether the batch is the cause
                why = why_fixed(error) or first_line(error)
    try:
        with quiet():
            exported = torch.export.export(model, inputs).run_decompositions({})
    except Exception as error:
        where = devices_of(model, pytree.tree_leaves(inputs))
        told = f"{first_line(error)}{where and '; '}{where}"
        raise FusionError(f"torch.export cannot capture the model: {told}") from error
    if dynamic_batch:
        notes.append(f"The batch size is fixed, as in the example: {why}")
    return exported, None


def _takes(model: torch.nn.Module, inputs: tuple) -> bool:
    try:
        with torch.no_grad():
            duplicate(model)(*inputs)
    except Exception:  # whatever a model raises
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch.export's internal warnings and changes of flags, and export as on a machine without cuDNN.

    On a GPU PyTorch checks whether the batch is small enough for cuDNN (batch norm of float32: 65,535 images), and
    torch.export takes the result for a limit of the model, under which no batch size is free any more.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        with warnings.catch_warnings(), _products_left_alone():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.cudnn.enabled = before


@contextlib.contextmanager
def _products_left_alone() -> Iterator[None]:
    """Keep the fp32 precision flags of cuDNN and oneDNN unchanged while they are switched off and on again.

    torch.export reads all of their flags to put them back. That fails where ``torch.backends.cudnn.conv`` was given a
    precision and recurrent layers were not, and elsewhere leaves convolutions with a precision of their own, which no
    longer follows ``torch.backends.fp32_precision``.
    """
    backends: tuple[Any, ...] = torch.backends.cudnn, torch.backends.mkldnn
    try:
        for backend in backends:
            backend.set_flags = functools.partial(_switch, backend)
        yield
    finally:
        for backend in backends:
            vars(backend).pop("set_flags", None)  # the module's own attribute is visible again


def _switch(backend: Any, _enabled: bool | None = None) -> tuple[bool]:
    """``set_flags`` of a backend, as far as its first flag; what it was before."""
    before = backend.enabled
    if _enabled is not None:
        backend.enabled = _enabled
    return (before,)


# ---- from torch.export's program to ours -----------------------------------------------------------------------------


def _program(
    exported: ExportedProgram,
    weights: dict[str, torch.Tensor],
    inputs: tuple,
    free: Free | None,
    leaves: frozenset[str],
    notes: list[str],
) -> Program:
    graph, places, constants = Graph(), dict[Node, Node](), dict[str, torch.Tensor]()
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    changed = {spec.target for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.BUFFER_MUTATION}
    held: dict[str, str] = {}
    modules = {}
    for node in exported.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            modules[node.target] = getattr(exported.graph_module, node.target)
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind is InputKind.USER_INPUT:
            places[node] = graph.node_copy(node, places.__getitem__)
            continue
        tensor = weights.get(spec.target)
        constants[node.name] = (exported.constants[spec.target] if tensor is None else tensor).detach()
        held[node.name] = spec.target
        places[node] = graph.create_node("get_attr", node.name, name=node.name)
        places[node].meta = dict(node.meta)
    returned = _outputs(exported, notes)
    graph.output(torch.fx.map_arg(returned, places.__getitem__))
    _simplify_batch_norm(graph)
    _frozen_instance_norms(graph)
    graph.eliminate_dead_code()
    _check_state(graph, held, changed, notes)
    write_out(graph)
    _normalize(graph)
    tensors = pytree.tree_leaves(inputs)
    given = tuple(map(_input_spec, tensors, free or [None] * len(tensors)))
    positional = pytree.tree_structure(inputs)
    return Program(
        graph,
        constants,
        modules,
        given,
        positional,
        exported.call_spec.out_spec,
        free is not None,
        leaves,
        tuple(notes),
    )


def _outputs(exported: ExportedProgram, notes: list[str]) -> tuple:
    """Return the model's outputs, without those that are writes to its arguments or buffers."""
    (output,) = (node for node in exported.graph.nodes if node.op == "output")
    written = [
        spec.target for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_INPUT_MUTATION
    ]
    if written:
        notes.append(f"The fused model does not write into {', '.join(written)}, which the model does in forward")
    returned = []
    for spec, each in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is OutputKind.USER_OUTPUT:
            returned.append(each)
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            notes.append(f"The model overwrites its input {spec.target}; the fused model leaves it as it is")
    return tuple(returned)


def _input_spec(leaf: Any, batch: str | None) -> InputSpec | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    sizes = tuple(leaf.shape)
    return InputSpec((None, *sizes[1:]) if batch else sizes, leaf.dtype, batch)


def _simplify_batch_norm(graph: Graph) -> None:
    """Use ``aten.batch_norm``, which returns one tensor, for the forms whose returned statistics are unused."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("aten._native_batch_norm_legit"):
            continue
        live = [user for user in node.users if user.users]
        if len(live) != 1 or live[0].target is not operator.getitem or live[0].args[1] != 0:
            continue  # the statistics are used
        with graph.inserting_before(node):
            simple = graph.call_function(aten.batch_norm.default, _batch_norm_arguments(node))
        simple.meta = {**node.meta, "val": live[0].meta["val"]}
        live[0].replace_all_uses_with(simple)


def _frozen_instance_norms(graph: Graph) -> None:
    """Use ``aten.batch_norm`` for instance norms with running statistics, of which it is the same function."""
    for node in graph.nodes:
        if node.target is aten.instance_norm.default and not arguments(node)["use_input_stats"]:
            given = arguments(node)
            tensors = (given[name] for name in ("input", "weight", "bias", "running_mean", "running_var"))
            node.target, node.kwargs = aten.batch_norm.default, {}
            node.args = (*tensors, False, given["momentum"], given["eps"], False)


def _batch_norm_arguments(node: Node) -> tuple:
    given = arguments(node)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        statistics, training = (given["running_mean"], given["running_var"]), False
    else:
        training = given["training"]
        # In training the running statistics are only written.
        statistics = (None, None) if training else (given["running_mean"], given["running_var"])
    return given["input"], given["weight"], given["bias"], *statistics, training, given["momentum"], given["eps"], False


def _check_state(graph: Graph, held: dict[str, str], changed: set[str], notes: list[str]) -> None:
    """Buffers that the model changes must not be read by it: a fused model has no state."""
    for node in graph.nodes:
        if node.op == "get_attr" and held.get(node.target) in changed:
            raise FusionError(
                f"the model changes its buffer {held[node.target]!r} in forward and computes with it: "
                "a fused model keeps no state"
            )
    if changed:
        notes.append(f"The fused model does not update {', '.join(sorted(changed))}, which the model does in forward")


def _normalize(graph: Graph) -> None:
    """Remove operators that change no value: clones (dropout in evaluation is one), casts to the same dtype, + 0.

    A view becomes a reshape: the fused model's tensors may have other strides than those of the capture.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


_IDENTITIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.contiguous.default,
)


def _is_identity(node: Node) -> bool:
    adds_nothing = node.target is aten.add.Tensor and type(node.args[1]) in (int, float) and node.args[1] == 0
    if not adds_nothing and node.target not in _IDENTITIES:
        return False
    # Keep the clone of an input: the model must not return the tensor it was given.
    if not isinstance(node.args[0], Node) or node.args[0].op == "placeholder":
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)
