"""gpukern: layers for PyTorch on Triton kernels, optimizers on CuPy, fusion for inference, testable without a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpukern import data, functional, fusion, nn, onnx, optim
from gpukern.checking import CheckError, check
from gpukern.convert import convert
from gpukern.densify import DenseError, dense
from gpukern.flops import register_formulas
from gpukern.fusion import FusionError, fuse, load
from gpukern.runtime.renamed import keep_old_name
from gpukern.summary import summary
from gpukern.tiles import predict_tiles
from gpukern.version import __version__

if TYPE_CHECKING:
    from gpukern import diagnose, tune
    from gpukern.checking.report import CheckReport
    from gpukern.compiler.report import CompileReport, compile_report
    from gpukern.densify import DenseNetwork, DenseReport
    from gpukern.fusion import FusedModel, FusionReport
    from gpukern.tune import TuneError

__all__ = [
    "CheckError",
    "CheckReport",
    "CompileReport",
    "DenseError",
    "DenseNetwork",
    "DenseReport",
    "FusedModel",
    "FusionError",
    "FusionReport",
    "TuneError",
    "__version__",
    "check",
    "compile_report",
    "convert",
    "data",
    "dense",
    "diagnose",
    "functional",
    "fuse",
    "load",
    "nn",
    "onnx",
    "optim",
    "predict_tiles",
    "summary",
    "tune",
]

#: Imported at the first use: ``import gpukern`` must not wait for them.
_LATER = {
    "CheckReport": "gpukern.checking.report",
    "CompileReport": "gpukern.compiler.report",
    "DenseNetwork": "gpukern.densify",
    "DenseReport": "gpukern.densify",
    "FusedModel": "gpukern.fusion",
    "FusionReport": "gpukern.fusion",
    "TuneError": "gpukern.tune",
    "compile_report": "gpukern.compiler.report",
}


def __getattr__(name: str) -> Any:
    if name in ("diagnose", "tune"):
        return importlib.import_module(f"gpukern.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)


# The package of the function ``gpukern.fuse`` had its name.
keep_old_name("gpukern.fuse", fusion)
register_formulas()
onnx.register_decompositions()
