"""``gpukern.compile_report``: what ``torch.compile(backend="gpukern")`` makes of a model, group by group."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch._dynamo.eval_frame import OptimizedModule
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from gpukern import tables
from gpukern.compiler.backend import Compiled, Options, compile_graph
from gpukern.formatting import MISSING, count, size
from gpukern.fusion.describe import modules_of
from gpukern.fusion.match import Match
from gpukern.fusion.program import module_path
from gpukern.runtime.accesses import AccessFinder, tensors
from gpukern.runtime.compile_only import Launch, record_launches
from gpukern.runtime.device import named_device

#: Names listed of those that share a reason.
_LISTED = 6


class Left(NamedTuple):
    """Something that runs by itself: the module's path (or, in the model's own forward, the call's name), and why."""

    name: str
    reason: str


@dataclass
class Traffic:
    """Launches of gpukern's kernels, and the bytes of all tensors that they read and write, each once a launch."""

    launches: int = 0
    bytes: int = 0

    def add(self, other: Traffic) -> None:
        self.launches += other.launches
        self.bytes += other.bytes

    def without(self, others: Iterable[Traffic]) -> Traffic:
        others = list(others)
        return Traffic(
            self.launches - sum(each.launches for each in others), self.bytes - sum(each.bytes for each in others)
        )


@dataclass(frozen=True)
class CompiledGroup:
    """Calls that run together: ``modules`` are their paths in the model, ``pattern`` what is computed.

    ``graph`` counts from 0: Dynamo makes several where the model does what it cannot record. ``between_norms``: whether
    neither the convolution's input nor its output is stored, see :mod:`gpukern.ops.pointwise_norm`.
    """

    modules: tuple[str, ...]
    pattern: str
    graph: int
    forward: Traffic = field(default_factory=Traffic)
    backward: Traffic = field(default_factory=Traffic)
    between_norms: bool = False


@dataclass(frozen=True)
class CompileReport:
    """What was fused and what was not. ``forward`` and ``backward`` count all launches of gpukern's kernels in a step,
    those of no group too, with the plans that ``device`` gets. ``training``: the mode that the model was in.
    ``saved``: bytes that autograd keeps for backward, parameters not counted.

    ``print(report)``, or ``rich.print``, shows it; :meth:`to_json` has everything.
    """

    model: str
    training: bool
    device: str
    graphs: int
    groups: tuple[CompiledGroup, ...]
    left: tuple[Left, ...]
    forward: Traffic
    backward: Traffic
    saved: int

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        return tables.as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _rendered(self)


def compile_report(
    model: torch.nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    device: str = "h200",
) -> CompileReport:
    """Report what ``torch.compile(model, backend="gpukern", options=options)`` makes of a training step.

    The model is copied, on the CPU, and run once in the mode it is in, forward and the backward of the sum of its
    outputs: every launch is recorded as ``device`` would get it, and none is made. So no GPU is needed, and what the
    copy computes are no values: a model that decides by them may take another way. As ``torch._dynamo.explain``, it
    resets what Dynamo has compiled before.

    Parameters
    ----------
    model:
        of ``torch.nn`` layers, or what ``torch.compile`` made of one, whose options are not looked at; it stays as it
        is.
    args, kwargs:
        an example: a tensor, or a tuple of arguments, and keyword arguments.
    options:
        those of ``torch.compile``: ``skip`` and ``recompute``.
    device:
        a name that ``gpukern explain`` knows, as "h200" or "a100".

    Raises
    ------
    TypeError for a model, device or options of another kind; ValueError for an unknown device; NotImplementedError for
    tensors on the meta device; RuntimeError in a process with ``GPUKERN_EMULATE=1``.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"compile_report: expected a torch.nn.Module, but got {type(model).__name__}")
    if not isinstance(device, str):
        raise TypeError(f'compile_report: expected the name of a device, as "h200", but got {device!r}')
    if isinstance(model, OptimizedModule):
        model = model._orig_mod
    given = (*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs)))
    if any(isinstance(each, torch.Tensor) and each.is_meta for each in given):
        raise NotImplementedError(
            'compile_report: tensors on the meta device have no data to copy; model.to_empty(device="cpu") gives a '
            "model some"
        )
    read, spec = Options.read(options), named_device(device)
    copied = copy.deepcopy(model).cpu()
    operands, named = pytree.tree_map_only(
        torch.Tensor,
        lambda each: each.detach().cpu(),
        (args if isinstance(args, tuple) else (args,), dict(kwargs or {})),
    )
    leaves = frozenset(name for name, part in model.named_modules() if not any(part.children()))
    recorder = _Recorder(leaves, {_storage(each) for each in (*copied.parameters(), *copied.buffers())})

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Any:
        return recorder.graph(compile_graph(module, read)).run

    torch._dynamo.reset()
    with record_launches(spec, recorder.launched), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda tensor: tensor):
            result = torch.compile(copied, backend=backend)(*operands, **named)
        recorder.backward_begins()
        outputs = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor) and each.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(each) for each in outputs])
    return CompileReport(
        type(model).__name__,
        model.training,
        spec.name,
        recorder.graphs,
        tuple(
            dataclasses.replace(group, between_norms=any(group is each for each in recorder.between_norms))
            for group in recorder.groups.values()
        ),
        tuple(recorder.left),
        *recorder.totals,
        sum(recorder.saved.values()),
    )


class _Recorder:
    """Counts launches, each for the group that runs then."""

    def __init__(self, leaves: frozenset[str], parameters: set[int]) -> None:
        self.leaves, self.parameters = leaves, parameters
        self.graphs = 0
        self.groups: dict[Match, CompiledGroup] = {}
        self.left: list[Left] = []
        self.between_norms: list[CompiledGroup] = []
        self.totals = Traffic(), Traffic()
        self.saved: dict[int, int] = {}
        self.current: CompiledGroup | None = None
        self.direction = 0
        self._accesses = AccessFinder()

    def graph(self, compiled: Compiled) -> Interpreter:
        for match in compiled.found.matches:
            modules = modules_of(match, self.leaves)
            self.groups[match] = CompiledGroup(modules, match.pattern, self.graphs)
        self.left += [Left(module_path(each.node) or each.node.name, each.reason) for each in compiled.found.declined]
        self.graphs += 1
        for part in compiled.module.modules():
            if isinstance(part, GraphModule) and part is not compiled.module:  # a checkpoint's
                part.forward = _Watched(part, self).run
        return _Watched(compiled.module, self)

    def launched(self, launch: Launch) -> None:
        given = tensors(launch)
        moved = sum(given[i].numel() * given[i].itemsize for which in self._accesses(launch) for i in which)
        self.totals[self.direction].add(Traffic(1, moved))
        if self.current is not None:
            if launch.kernel == "pointwise_forward_kernel":
                self.between_norms.append(self.current)
            (self.current.backward if self.direction else self.current.forward).add(Traffic(1, moved))

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if (storage := _storage(tensor)) not in self.parameters:
            self.saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def backward_begins(self) -> None:
        self.direction, self.current = 1, None


class _Watched(Interpreter):
    """Runs a compiled graph and tells the recorder whose turn it is, in its backward too."""

    def __init__(self, module: GraphModule, recorder: _Recorder) -> None:
        super().__init__(module)
        self.recorder = recorder

    def run_node(self, n: Node) -> Any:
        group = self.recorder.groups.get(n.meta.get("gpukern_match"))  # type: ignore[arg-type]
        given = _grad_fns(self.fetch_args_kwargs_from_env(n))
        self.recorder.current = group
        result = super().run_node(n)
        self.recorder.current = None
        if group is not None and n.op == "call_function":
            for each in _between(given, _grad_fns(result)):
                each.register_prehook(lambda grads: setattr(self.recorder, "current", group))
                each.register_hook(lambda *grads: setattr(self.recorder, "current", None))
        return result


def _grad_fns(values: Any) -> set[Any]:
    leaves = pytree.tree_leaves(values)
    return {each.grad_fn for each in leaves if isinstance(each, torch.Tensor) and each.grad_fn is not None}


def _between(given: set[Any], made: set[Any]) -> Iterator[Any]:
    """Nodes of autograd that a call made: it may end, or begin, with a view."""
    seen, left = set(given), [*made]
    while left:
        if (node := left.pop()) not in seen and not hasattr(node, "variable"):  # a leaf's, which adds its gradient up
            seen.add(node)
            yield node
            left += [each for each, _ in node.next_functions if each is not None]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---- on a terminal --------------------------------------------------------------------------------------------------


def _rendered(report: CompileReport) -> Iterator[RenderableType]:
    launches = f"{report.forward.launches:,} + {report.backward.launches:,} launches of gpukern's kernels"
    moved = f"{size(report.forward.bytes)} + {size(report.backward.bytes)} read and written"
    graphs, mode = count(report.graphs, "graph"), "" if report.training else ", in evaluation mode"
    yield Text(f'{report.model} by torch.compile(backend="gpukern"): {graphs}, plans of {report.device}{mode}', "bold")
    yield Text(f"forward + backward: {launches}, {moved}; {size(report.saved)} saved for backward")
    if report.groups:
        yield _groups(report)
    if any(group.between_norms for group in report.groups):
        yield Text("* between two batch norms: neither what the convolution reads nor what it gives is stored")
    yield from _left(report)


def _groups(report: CompileReport) -> Table:
    columns = tables.numbers("launches forward", "launches backward", "moved forward", "moved backward")
    made = tables.table(tables.Column(""), "modules", "runs together", *columns, narrow=True)
    for number, group in enumerate(report.groups, start=1):
        pattern = f"{group.pattern} *" if group.between_norms else group.pattern
        made.add_row(str(number), Text(_together(group.modules)), Text(pattern), *_cells(group))
    others = (
        report.forward.without(group.forward for group in report.groups),
        report.backward.without(group.backward for group in report.groups),
    )
    if any(each.launches for each in others):
        made.add_row("", "", Text("by themselves"), *_cells(CompiledGroup((), "", 0, *others)))
    return made


def _cells(group: CompiledGroup) -> Iterator[str]:
    """The numbers of a row: none of a direction without launches, as of a norm whose backward is another group's."""
    traffic = group.forward, group.backward
    yield from (f"{each.launches:,}" if each.launches else MISSING for each in traffic)
    yield from (size(each.bytes) if each.launches else MISSING for each in traffic)


def _together(modules: Sequence[str]) -> str:
    """Paths with what they share in front: "layer1.0: conv1, bn1" for "layer1.0.conv1" and "layer1.0.bn1"."""
    owners = zip(*(path.split(".")[:-1] for path in modules), strict=False)
    shared = "".join(f"{names[0]}." for names in itertools.takewhile(lambda names: len(set(names)) == 1, owners))
    if len(modules) < 2 or not shared:
        return ", ".join(modules)
    return f"{shared[:-1]}: {', '.join(path.removeprefix(shared) for path in modules)}"


def _left(report: CompileReport) -> Iterator[RenderableType]:
    if not report.left:
        return
    reasons: dict[str, list[str]] = {}
    for each in report.left:
        reasons.setdefault(each.reason, []).append(each.name)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    grid.add_column(overflow="fold")
    for reason, names in reasons.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        grid.add_row(str(len(names)), Text.assemble((reason, "yellow"), ": ", ", ".join(names[:_LISTED]), more))
    yield Group(Text("not fused, because", style="bold"), grid)
