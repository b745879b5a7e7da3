"""Trainings started as a user starts them, in processes of their own and in reference mode."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """``start(module, *arguments)``: ``python -m module`` in the checkout, its output merged."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GPUKERN_EMULATE", "TRITON_INTERPRET")}
    processes = []

    def run(module: str, *arguments: object, threads: int = 1) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**environment, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"},
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()
