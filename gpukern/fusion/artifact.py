"""Fused models as files: torch.export's ``.pt2`` with the report inside."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gpukern.fusion.archive import check_archive
from gpukern.fusion.batch import export_any_batch
from gpukern.fusion.calls import Signature
from gpukern.fusion.capture import quiet
from gpukern.fusion.errors import FusionError, first_line
from gpukern.fusion.module import FusedModule, Interface
from gpukern.fusion.program import InputSpec
from gpukern.fusion.report import IN_ARCHIVE, FusionReport
from gpukern.runtime.files import replacing
from gpukern.runtime.records import build, plain

#: The archive's entry for the network's call interface; with the report it identifies a fused model.
_INTERFACE = "gpukern_interface.json"
#: The folder in the archive that contains all entries.
_FOLDER = "import_gpukern_before_torch_export_load"
#: Note to those who open the archive: torch.export.load finds no operators that were not imported.
_HINT = "README.txt"
_HINT_TEXT = """A model fused by gpukern. Load it with gpukern.load("this.pt2"), or with

    import gpukern  # registers the operators that the graph calls
    torch.export.load("this.pt2")

Without the import, torch says only that it cannot deserialize the file.
"""
#: Metadata in which torch.export keeps a node's source.
_OF_SOURCES = ("stack_trace", "from_node", "source_fn_stack", "torch_fn", "custom")
_PATH = re.compile(r"(?:\b[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+([^\s/\\:'\"]+)")
#: Types of the interface's constants in a file.
_PLAIN = (type(None), bool, int, float, str)


def save(path: str | os.PathLike[str], module: FusedModule, report: FusionReport, example: tuple, free: bool) -> None:
    """Write ``path`` whole or not at all. FusionError if torch.export cannot capture the network of ``module``, or if a
    file cannot hold what it takes or returns.

    ``free``: whether the batch size is. The file has the network alone, for the inputs that the module prepares.
    """
    path = Path(path)
    prepared = tuple(_without_values(leaf) for leaf in module.prepared(example))
    try:
        with quiet(), torch.no_grad():
            if free:
                names = tuple(None if spec is None else spec.batch for spec in module.interface.inputs)
                exported = export_any_batch(module.network, prepared, names)
            else:
                exported = torch.export.export(module.network, prepared)
    except Exception as error:  # export raises of all kinds
        raise FusionError(f"torch.export cannot capture the fused network: {first_line(error)}") from error
    _forget_sources(exported)
    told = replace(report, model=_without_paths(report.model), notes=tuple(map(_without_paths, report.notes)))
    extra = {IN_ARCHIVE: told.to_json(), _INTERFACE: _checked_text(module.interface), _HINT: _HINT_TEXT}
    with replacing(path) as draft, quiet(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".fused.") as folder:
        # torch puts the file's name into the archive, and draft's has the number of this process.
        written = Path(folder) / f"{_FOLDER}.pt2"
        torch.export.save(exported, written, extra_files=extra)
        os.replace(written, draft)


def _checked_text(interface: Interface) -> str:
    """:func:`_interface_as_text`. FusionError for what no file can hold: a class of the user's in what is given or
    returned."""
    foreign = {type(each).__name__ for each in interface.constants if type(each) not in _PLAIN}
    if foreign:
        raise FusionError(
            f"a file cannot hold the example's {', '.join(sorted(foreign))}, a constant of the fused model: "
            "fuse with a number, a flag or a word in its place"
        )
    try:
        return _interface_as_text(interface)
    except NotImplementedError as error:
        raise FusionError(
            f"a file cannot hold how arguments or results are arranged: {first_line(error)} "
            "Or take and return tuples, lists and dicts"
        ) from error


def _without_values(leaf: Any) -> Any:
    """Return the example for the file, with shape and dtype but none of the values that the user fused with."""
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _forget_sources(exported: torch.export.ExportedProgram) -> None:
    """Remove the source file and line that torch.export records for each operator."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for each in _OF_SOURCES:
                node.meta.pop(each, None)


def _without_paths(text: str) -> str:
    """Reduce paths in the report to file names: they are paths on the user's machine."""
    return _PATH.sub(r"\1", text)


def read(path: str | os.PathLike[str]) -> tuple[FusedModule, FusionReport, tuple, bool]:
    """Read the output of :func:`save`. FileNotFoundError without a file; FusionError if it is another or damaged."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise FusionError(f"{path} is no file")
    if not zipfile.is_zipfile(path):  # torch would write its traceback to the log before it raises
        raise FusionError(f"{path} cannot be read as a fused model: it is no .pt2 file, or not the whole of one")
    check_archive(path, ".pt2 file", FusionError)
    extra = {IN_ARCHIVE: "", _INTERFACE: ""}
    try:
        with quiet():
            exported = torch.export.load(path, extra_files=extra)
            # Without torch's checks of the sizes: the module has its own.
            network = exported.module(check_guards=False)
    except Exception as error:  # of all kinds, by where the damage is
        raise FusionError(f"{path} cannot be read as a fused model: {first_line(error)}") from error
    if not all(extra.values()):
        raise FusionError(f"{path} is a .pt2 file, but no fused model: gpukern.fuse(...).save writes those")
    try:
        report = FusionReport.from_json(extra[IN_ARCHIVE])
        interface = _interface_of(extra[_INTERFACE])
        example = pytree.tree_unflatten(exported.example_inputs[0], interface.in_spec)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FusionError(f"the report in {path} cannot be read: {error}") from error
    free = any(spec is not None and None in spec.sizes for spec in interface.inputs)
    return FusedModule(network, interface), report, example, free


@dataclass(frozen=True)
class _StoredInput:
    """An :class:`InputSpec` with the names of its dtypes."""

    sizes: tuple[int | None, ...]
    dtype: str
    batch: str | None
    example: str | None


@dataclass(frozen=True)
class _StoredInterface:
    """An :class:`Interface` as stored in the file: every field under its name, tree specs as torch writes them."""

    inputs: tuple[_StoredInput | None, ...]
    in_spec: str
    out_spec: str
    channels_last: bool
    constants: tuple[Any, ...]
    apart: dict[str, list[int]]
    may_lack_it: bool
    signature: Signature


def _interface_as_text(interface: Interface) -> str:
    fields = {field.name: getattr(interface, field.name) for field in dataclasses.fields(interface)}
    fields["inputs"] = tuple(spec and _stored_input(spec) for spec in interface.inputs)
    fields |= {name: pytree.treespec_dumps(fields[name]) for name in ("in_spec", "out_spec")}
    return json.dumps(plain(_StoredInterface(**fields)))


def _stored_input(spec: InputSpec) -> _StoredInput:
    example = None if spec.example is None else _name(spec.example)
    return _StoredInput(spec.sizes, _name(spec.dtype), spec.batch, example)


def _interface_of(text: str) -> Interface:
    stored = build(_StoredInterface, json.loads(text), "the interface")
    fields = {field.name: getattr(stored, field.name) for field in dataclasses.fields(stored)}
    fields["inputs"] = tuple(
        spec and InputSpec(spec.sizes, _dtype(spec.dtype), spec.batch, spec.example and _dtype(spec.example))
        for spec in stored.inputs
    )
    return Interface(**fields | {name: pytree.treespec_loads(fields[name]) for name in ("in_spec", "out_spec")})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
