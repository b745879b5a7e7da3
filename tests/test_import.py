"""``import gpukern`` loads little, and needs neither Triton nor CuPy."""

from __future__ import annotations

import json

# Makes packages as good as not installed: no import, no spec, no version.
WITHOUT = """
import importlib.metadata, sys

class Blocker:
    def __init__(self, *names):
        self.names = names
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    def hide(self):
        import importlib.util
        sys.meta_path.insert(0, self)
        plain_spec, plain_version = importlib.util.find_spec, importlib.metadata.version
        def find_spec(name, package=None):
            return None if name.split(".")[0] in self.names else plain_spec(name, package)
        def version(package):
            if package.split("-")[0] in self.names:
                raise importlib.metadata.PackageNotFoundError(package)
            return plain_version(package)
        importlib.util.find_spec, importlib.metadata.version = find_spec, version

Blocker("triton", "cupy").hide()
"""


def test_import_loads_nothing_beyond_torch(run_python):
    """Triton alone takes 200 ms, torch._dynamo more than a second."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import gpukern
print(json.dumps([name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names]))
"""
    loaded = json.loads(run_python(code).stdout)
    assert "gpukern.optim" in loaded
    assert not [name for name in loaded if name.split(".")[0] != "gpukern"]


def test_emulation_does_not_slow_the_import(run_python):
    run = run_python("import gpukern, sys; print('triton' in sys.modules)", GPUKERN_EMULATE="1")
    assert run.stdout == "False\n", run.stderr


def test_reference_mode_needs_neither_triton_nor_cupy(run_python):
    code = """
import torch, gpukern
model = gpukern.convert(torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(18, 3)
))
model(torch.randn(2, 1, 8, 8)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
print("trained")
"""
    run = run_python(WITHOUT + code)
    assert run.stdout == "trained\n", run.stderr


def test_info_says_that_triton_and_cupy_are_missing(run_python):
    run = run_python(WITHOUT + "from gpukern.cli import app; app(['info'])")
    assert run.returncode == 0, run.stderr
    lines = dict(line.split(": ", 1) for line in run.stdout.splitlines())
    assert lines["Triton"] == lines["CuPy"] == "not installed"
    assert lines["CPU tensors"].startswith("reference")
    assert "pip install triton" in lines["missing Triton"]
    assert 'pip install "gpukern[cuda1' in lines["missing CuPy"]


def test_emulation_without_triton_is_a_clear_error_on_first_use(run_python):
    code = """
import torch, gpukern
layer = gpukern.nn.Conv2d(1, 1, 3)
try:
    layer(torch.randn(1, 1, 4, 4))
except RuntimeError as error:
    print(error)
"""
    run = run_python(WITHOUT + code, GPUKERN_EMULATE="1")
    assert "pip install triton" in run.stdout, run.stderr
    info = run_python(WITHOUT + "from gpukern.cli import app; app(['info'])", GPUKERN_EMULATE="1")
    assert "CPU tensors: nothing runs (GPUKERN_EMULATE=1 is set and Triton cannot be used)" in info.stdout


def test_emulation_asked_for_after_triton_was_imported_is_a_clear_error(run_python):
    code = """
import triton, os
os.environ["GPUKERN_EMULATE"] = "1"
import torch, gpukern
try:
    gpukern.functional.relu(torch.randn(4))
except RuntimeError as error:
    print(error)
"""
    run = run_python(code)
    assert "import gpukern first" in run.stdout, run.stderr


def test_what_users_catch_and_annotate_is_at_the_top(run_python):
    """And is loaded only where it is used."""
    code = """
import sys, torch, gpukern
assert not {"gpukern.fusion.model", "gpukern.fusion.report", "gpukern.tune"} & set(sys.modules)
try:
    gpukern.fuse(torch.nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))
except gpukern.FusionError as error:
    print("refused")
fused = gpukern.fuse(torch.nn.Linear(2, 2), torch.randn(3, 2))
assert isinstance(fused, gpukern.FusedModel) and isinstance(fused.report, gpukern.FusionReport)
try:
    gpukern.tune.tune(torch.nn.Linear(2, 2), torch.zeros(1, 2))
except gpukern.TuneError as error:
    print(error)
from gpukern.tune import TuneError
assert gpukern.TuneError is TuneError
assert all(hasattr(gpukern, name) for name in gpukern.__all__) and not hasattr(gpukern, "tuner")
"""
    run = run_python(code)
    assert run.stdout.startswith("refused\ntuning measures on a CUDA device"), run.stderr


def test_the_package_of_fuse_is_found_by_its_earlier_name(run_python):
    """The same modules, whatever was imported first, and ``gpukern.fuse`` stays the function."""
    code = """
import importlib, sys
import gpukern
from gpukern.fuse import FusedModel, FusionError, FusionReport
from gpukern.fuse.errors import FusionError as from_module
from gpukern.fuse.sources import SourceError
from gpukern.fuse.weights.load import load_weights
import gpukern.fusion.sources
assert FusionError is from_module is gpukern.FusionError and SourceError is gpukern.fusion.sources.SourceError
assert FusedModel is gpukern.FusedModel and FusionReport is gpukern.FusionReport
for name in ("errors", "sources", "weights.load"):
    module = sys.modules[f"gpukern.fuse.{name}"]
    assert module is sys.modules[f"gpukern.fusion.{name}"]
    assert module.__name__ == module.__spec__.name == f"gpukern.fusion.{name}"
assert callable(gpukern.fuse) and gpukern.fuse.__module__ == "gpukern.fusion.api"
try:
    importlib.import_module("gpukern.fuse.nothing")
except ModuleNotFoundError as error:
    print(error)
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "No module named 'gpukern.fuse.nothing'"
