"""Imports run one way, plans know no torch, kernels know nothing but Triton."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "gpukern"
#: Each may import from itself and from what comes before it.
LAYERS = ("version", "runtime", "ops", "functional", "nn", "convert", "summary", "info", "cli")
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TORCH_FREE = ("plan.py", "problem.py", "cost.py", "device.py", "roofline.py", "integers.py")
KERNELS = ("kernels.py", "weight_kernels.py", "gather.py", "functions.py")


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in ("bench", "models", "tests")
        if top == "gpukern":
            assert rest.split(".")[0] in allowed, f"{layer} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name in TORCH_FREE], ids=str)
def test_plans_know_neither_torch_nor_triton(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"torch", "triton", "numpy", "cupy"}
    # What they import from gpukern is as free of them.
    inner = {name.rsplit(".", 1)[0] for name in imported(path) if name.startswith("gpukern.")}
    assert all(f"{module.rsplit('.', 1)[1]}.py" in TORCH_FREE for module in inner)


@pytest.mark.parametrize("path", [p for p in MODULES if p.name in KERNELS], ids=str)
def test_kernels_know_only_triton(path):
    for name in imported(path):
        assert name.split(".")[0] in ("triton", "typing") or any(f".{k.removesuffix('.py')}." in name for k in KERNELS)
