"""Fused models as files: torch.export's ``.pt2`` with the report inside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from gpukern.fuse.batch import export_any_batch
from gpukern.fuse.calls import Signature
from gpukern.fuse.capture import first_line, quiet
from gpukern.fuse.errors import FusionError
from gpukern.fuse.files import replacing
from gpukern.fuse.model import FusedModel
from gpukern.fuse.module import FusedModule, Interface
from gpukern.fuse.program import InputSpec
from gpukern.fuse.report import IN_ARCHIVE, FusionReport

#: The name in the archive of how the network is called; by it and the report a fused model is told from others.
_INTERFACE = "gpukern_interface.json"
#: Fields of it that JSON can hold.
_AS_IT_IS = ("channels_last", "constants", "apart", "may_lack_it")


def save(path: str | os.PathLike[str], module: FusedModule, report: FusionReport, example: tuple, free: bool) -> None:
    """Write ``path`` whole or not at all. FusionError if torch.export cannot capture the network of ``module``.

    ``free``: whether the batch size is. The file has the network alone, for the inputs that the module prepares.
    """
    path = Path(path)
    prepared = tuple(module.prepared(example))
    try:
        with quiet(), torch.no_grad():
            if free:
                names = tuple(spec and spec.batch for spec in module.interface.inputs)
                exported = export_any_batch(module.network, prepared, names)
            else:
                exported = torch.export.export(module.network, prepared)
    except Exception as error:  # export raises of all kinds
        raise FusionError(f"torch.export cannot capture the fused network: {first_line(error)}") from error
    extra = {IN_ARCHIVE: report.to_json(), _INTERFACE: _interface_as_text(module.interface)}
    with replacing(path) as draft, quiet():
        torch.export.save(exported, draft, extra_files=extra)


def read(path: str | os.PathLike[str], cuda_graph: bool) -> FusedModel:
    """:func:`gpukern.load`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise FusionError(f"{path} is no file")
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
    return FusedModel(FusedModule(network, interface), report, example, free, cuda_graph)


def _interface_as_text(interface: Interface) -> str:
    inputs = [
        spec and {"sizes": spec.sizes, "dtype": str(spec.dtype).removeprefix("torch."), "batch": spec.batch}
        for spec in interface.inputs
    ]
    specs = {"in_spec": pytree.treespec_dumps(interface.in_spec), "out_spec": pytree.treespec_dumps(interface.out_spec)}
    given = {name: getattr(interface, name) for name in _AS_IT_IS}
    return json.dumps({"inputs": inputs, **specs, **given, "signature": interface.signature.plain()})


def _interface_of(text: str) -> Interface:
    found = json.loads(text)
    inputs = (
        spec and InputSpec(tuple(spec["sizes"]), getattr(torch, spec["dtype"]), spec["batch"])
        for spec in found["inputs"]
    )
    specs = {name: pytree.treespec_loads(found[name]) for name in ("in_spec", "out_spec")}
    given = {name: tuple(found[name]) if isinstance(found[name], list) else found[name] for name in _AS_IT_IS}
    return Interface(inputs=tuple(inputs), **specs, **given, signature=Signature.from_plain(found["signature"]))
