"""How all tests run: on the GPU where there is one, otherwise the same kernels emulated on the CPU.

``GPUKERN_EMULATE=1`` forces emulation on a machine with a GPU; ``GPUKERN_EMULATE=0`` runs the plain-torch reference on
one without.
"""

from __future__ import annotations

import os

# Each process gets its share of the cores, and so do the processes it starts. Before numpy and torch make their pools.
THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# Plans are those of the code, not those that somebody measured on this machine.
os.environ["GPUKERN_PLANS"] = ""

import torch  # noqa: E402

# Before anything imports gpukern or Triton, both of which look at the environment once.
if not torch.cuda.is_available():
    os.environ.setdefault("GPUKERN_EMULATE", "1")
    os.environ.setdefault("GPUKERN_EMULATE_TF32", "1")

import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from gpukern.runtime.mode import EMULATE, Mode, force_mode  # noqa: E402
from gpukern.runtime.precision import fp32_products  # noqa: E402
from tests.device import DEVICE  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(THREADS)

# An emulated kernel is slow and its time says nothing: no deadline, few examples. In CI the same ones every time; on a
# GPU too, where each new shape would have its kernels compiled, which no cache that was brought along can know.
hypothesis.settings.register_profile("local", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") or DEVICE.type == "cuda" else "local")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU when emulating."""
    return DEVICE


@pytest.fixture(params=["reference", "kernels"])
def where(request, device):
    """The device of the tensors; its mode is in force meanwhile."""
    if request.param == "kernels":
        yield device
    else:
        with force_mode(Mode.REFERENCE):
            yield torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_seeds(request: pytest.FixtureRequest) -> None:
    """Random numbers depend on the test's name only, not on which tests ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialized memory is NaN, so that what a kernel forgets to write shows.

    ``pytestmark = pytest.mark.usefixtures("poisoned")`` poisons a whole file.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="module")
def reference_mode() -> Iterator[None]:
    """Plain torch serves every tensor, in whole files that test what is made of models, not the kernels."""
    with force_mode(Mode.REFERENCE):
        yield


@pytest.fixture
def full_fp32() -> Iterator[None]:
    """Convolutions of fp32 in full, for tests whose bounds know no TF32, which PyTorch allows by default."""
    with fp32_products("ieee"):
        yield


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``run_python(code, *args, **environment)``: a fresh interpreter, in reference mode unless told otherwise."""

    def run(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if k not in ("GPUKERN_EMULATE", "TRITON_INTERPRET")}
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            capture_output=True,
            text=True,
            timeout=300,
            env={**inherited, "PYTHONPATH": paths, **environment},
            check=False,
        )

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    # A whole file that is skipped while it is collected has no keywords.
    need_gpu = sum("gpu" in getattr(report, "keywords", ()) for report in skipped)
    mode = "on the GPU" if DEVICE.type == "cuda" else "emulated" if EMULATE else "reference only"
    terminalreporter.write_line(
        f"kernels: {mode}; skipped because they need a GPU: {need_gpu}, for other reasons: {len(skipped) - need_gpu}"
    )
