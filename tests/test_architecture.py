"""Imports run one way and in no circle, plans need no torch, kernels nothing but Triton."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

from gpukern import conv

PACKAGE = Path(__file__).resolve().parents[1] / "gpukern"
#: Each may import from itself and from what comes before it. A package named with a dot is a layer of its own: what
#: convolution kernels have in their epilogues lies below them, the operators themselves above.
LAYERS = (
    *(
        "version",
        "formatting",
        "tables",
        "pages",
        "runtime",
        "ops._images",
        "ops._pixels",
        "ops._normalization",
        "ops._activation",
        "ops._reduction",
        "ops._quantize",
        "ops._pool2d",
        "conv",
        "ops",
        "flops",
        "onnx",
        "functional",
        "nn",
        "data",
        "optim",
        "tiles",
        "copies",
        "convert",
        "summary",
        "densify",
        "info",
    ),
    *("explain", "tune", "fusion", "checking", "diagnose", "compiler", "cli"),
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
#: Pure Python: what plans are made of, on any machine.
TORCH_FREE = (
    "cache.py",
    "choice.py",
    "cost.py",
    "cost_model.py",
    "database.py",
    "device.py",
    "estimate.py",
    "exclusions.py",
    "family.py",
    "runtime/files.py",
    "float8_sums.py",
    "geometry.py",
    "integers.py",
    "plan.py",
    "planner.py",
    "problem.py",
    "properties.py",
    "records.py",
    "registry.py",
    "roofline.py",
    "splits.py",
    "strides.py",
)
CONV = PACKAGE / "conv"
#: Files of one public operation each, called as it is.
OPERATIONS = (
    *("activation", "augment", "batch_norm", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "cross_entropy", "dropout", "group_norm"),
    *("layer_norm", "linear", "rms_norm", "softmax"),
)
#: What runs on the device.
KERNELS = (
    "_normalization.py",
    "_pixels.py",
    "epilogue.py",
    "functions.py",
    "indexing.py",
    "kernels.py",
    "norm_grad.py",
    "requantize.py",
    "shared_sums.py",
    "tf32.py",
    "weight_kernels.py",
)


def imported(path: Path) -> set[str]:
    """Every module that ``path`` imports, at the top or inside functions, with dots."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> Path:
    """The module that an imported ``name`` is, or is in."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    module = path.with_suffix(".py")
    return module if module.exists() else path.parent.with_suffix(".py")


def module_of(name: str) -> Path:
    """The same, where that may be a package."""
    whole = PACKAGE.parent.joinpath(*name.split("."), "__init__.py")
    package = file_of(name).with_suffix("") / "__init__.py"
    return next((path for path in (whole, package) if path.exists()), file_of(name))


def layer_of(module: str) -> str:
    """The layer of ``module``, named without the package in front."""
    return max((layer for layer in LAYERS if f"{module}.".startswith(f"{layer}.")), key=len)


def torch_free(path: Path) -> bool:
    """Whether ``path`` is one of :data:`TORCH_FREE`, by its name or by its folder and name."""
    return path.name in TORCH_FREE or "/".join(path.parts[-2:]) in TORCH_FREE


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    layer = layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts).replace("__main__", "cli"))
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in ("bench", "models", "tests")
        if top == "gpukern":
            assert layer_of(rest) in allowed, f"{layer} imports {name}"


#: Modules that import others by names they put together, and what these name; the rest are a user's own, or optional.
PUT_TOGETHER = {
    "conv/families/registry.py": "conv/families/*/plan.py",
    "conv/prepare.py": "conv/families/*/launch.py",
    "diagnose/extras.py": "",
    "diagnose/sources.py": "",
    "fusion/sources.py": "",
    "info.py": "",
    "ops/_operators.py": "ops/[!_]*.py",
    "runtime/mode.py": "",
    "runtime/renamed.py": "",
    "tune/sources.py": "",
}


def imported_late(path: Path) -> set[Path]:
    """Modules that ``path`` names in strings: in ``_LATER``, for ``import_module`` and for ``Implementations``."""
    own, names = str(path.relative_to(PACKAGE)), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LATER":
            names |= {str(each.value) for each in ast.walk(node.value) if isinstance(each, ast.Constant)}
        elif isinstance(node, ast.Call) and node.args:
            function, argument = ast.unparse(node.func).rpartition(".")[2], node.args[0]
            if function == "Implementations":
                names |= {f"{argument.value}.{module}" for module in ("launch", "reference")}
            elif function == "import_module" and isinstance(argument, ast.Constant):
                names.add(argument.value)
            elif function == "import_module":
                assert own in PUT_TOGETHER or path.stem == "__init__", f"{own}: what does it import?"
    named = {module_of(name) for name in names if name.startswith("gpukern.")}
    return named | {module for pattern in [PUT_TOGETHER.get(own)] if pattern for module in PACKAGE.glob(pattern)}


def test_no_modules_import_each_other_in_a_circle():
    """Nor inside functions, nor by names in strings: what waits for its first use may not hide one."""
    graph = {path: {*map(module_of, imported(path)), *imported_late(path)} & set(MODULES) - {path} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def definitions(path: Path) -> set[str]:
    """The names of functions, classes and values that a module makes at its top."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_modules_do_not_hold_a_definition_of_their_own_name():
    """Whoever imports both has to call one of them something else. Public functions alone are excepted."""
    found = set()
    for path in MODULES:
        module = path.parent if path.name == "__init__.py" else path.with_suffix("")
        if module.name.lstrip("_") in definitions(path):
            found.add(str(module.relative_to(PACKAGE)))
    assert found == {"convert", "summary", "tune", *(f"ops/{name}" for name in OPERATIONS)}


@pytest.mark.parametrize("path", [*filter(torch_free, MODULES)], ids=str)
def test_plans_know_neither_torch_nor_triton(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"torch", "triton", "numpy", "cupy"}
    # What they import from gpukern is as free of them.
    inner = {file_of(name) for name in imported(path) if name.startswith("gpukern.")}
    assert all(map(torch_free, inner)), inner


@pytest.mark.parametrize("path", [p for p in MODULES if p.name in KERNELS], ids=str)
def test_kernels_know_only_triton(path):
    for name in imported(path):
        assert name.split(".")[0] in ("triton", "typing") or any(f".{k.removesuffix('.py')}." in name for k in KERNELS)


OUTSIDE = sorted(
    path
    for folder in ("gpukern", "bench", "models")
    for path in (PACKAGE.parent / folder).rglob("*.py")
    if CONV not in path.parents
)


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_the_convolution_engine_is_entered_by_its_door(path):
    inside = {name.removeprefix("gpukern.conv.") for name in imported(path) if name.startswith("gpukern.conv.")}
    assert inside <= set(conv.__all__)


@pytest.mark.parametrize("path", sorted(CONV.rglob("*.py")), ids=lambda path: str(path.relative_to(CONV)))
def test_nobody_inside_uses_the_door(path):
    for name in imported(path):
        if name.startswith("gpukern.conv.") and name.count(".") == 2:
            module = CONV / name.removeprefix("gpukern.conv.")
            assert module.with_suffix(".py").exists(), name


def test_all_that_the_door_names_is_there():
    assert len(conv.__all__) == len(set(conv.__all__))
    assert all(getattr(conv, name) is not None for name in conv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        conv.nothing  # noqa: B018 - the access is what is tested
