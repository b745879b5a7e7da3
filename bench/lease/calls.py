"""The two calls of a GPU that is there for a quarter of an hour: what is worth most, first.

``first`` says whether the kernels are right and how the forward pass does against cuDNN; what is found there is mended,
and ``second`` measures the rest. Their kernels are those that ``make lease`` compiles.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from bench.steps import Step, suite_step

MINUTES = {"first": 5.0, "second": 400 / 60}
_LIBRARY = ("--peers", "library")
_RESNET = ("--suite", "resnet50")
#: Those with tests that need a GPU.
_GPU_TESTS = (
    "tests/fusion/test_cuda_graph.py",
    "tests/optim/test_cuda.py",
    "tests/fusion/test_timing.py",
    "tests/tune",
)


def smoke(folder: Path, kind: str, limit: float, *options: str, dry: bool = True) -> Step:
    out = str(folder / f"smoke-{kind}.jsonl")
    command = (sys.executable, "-m", "bench.smoke", kind, "--out", out, *options)
    return Step(f"smoke-{kind}", command, limit=limit, dry=dry)


def optimizer_times(folder: Path, limit: float) -> Step:
    """Time two optimizers over ResNet-50's tensors."""
    few = (*_RESNET, "--computation", "Adam", "--computation", "SGD, momentum", "--filter", "plain")
    step = suite_step(folder, "optimizer", "resnet50", *_LIBRARY, *few, limit=limit)
    return replace(step, dry=False)  # CuPy needs a device


def first(folder: Path) -> list[Step]:
    """Is everything right, and how does the forward pass do? At most five minutes."""
    inference = (*_LIBRARY, *_RESNET, "--batch", "128", "--batch", "1")
    return [
        smoke(folder, "convolutions", 80),
        suite_step(folder, "conv", "forward-32", *_LIBRARY, "--computation", "forward", limit=120),
        smoke(folder, "operators", 60),
        suite_step(folder, "inference", "resnet50-128-1", *inference, limit=120),
        smoke(folder, "optimizers", 40, "--first", "2", dry=False),  # CuPy needs a device
        optimizer_times(folder, 40),
        suite_step(folder, "linear", "resnet50-32", *_LIBRARY, limit=60),
        suite_step(folder, "pool", "resnet50-32", *_LIBRARY, limit=60),
    ]


def second(folder: Path) -> list[Step]:
    """Gradients, training, depthwise layers, compilers, tests. At most seven minutes.

    Other plans, with hundreds of kernels that nothing else launches, are left to ``more``.
    """
    gradients = ("--computation", "input gradient", "--computation", "weight gradient")
    depthwise = ("--suite", "mobilenet_v2", "--filter", "groups", "--computation", "forward")
    compilers = (*_LIBRARY, "--peers", "compile", *_RESNET, "--batch", "128", "--batch", "1")
    workers = str(max(1, min(12, (os.cpu_count() or 1) - 2)))
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", workers, "--maxfail=20", *_GPU_TESTS)
    return [
        suite_step(folder, "conv", "gradients-32", *_LIBRARY, *gradients, limit=150),
        suite_step(folder, "model", "resnet50-32", *_LIBRARY, limit=90),
        suite_step(folder, "conv", "depthwise-32", *_LIBRARY, *depthwise, limit=60),
        suite_step(folder, "epilogue", "resnet50-32", *_LIBRARY, limit=60),
        suite_step(folder, "inference", "resnet50-compile", *compilers, limit=120),
        # The same shapes in every run: a kernel that was compiled for one serves the next.
        Step("gpu-tests", pytest, environment={"CI": "1"}, limit=100, dry=False),
    ]
