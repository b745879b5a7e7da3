"""Environment of a run: device, driver, versions, the code's own identity, and the settings in force."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import gpukern
from bench.results import Environment
from gpukern.info import driver_version, package_version
from gpukern.runtime.mode import EMULATE

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> Environment:
    """Return the environment of a run on ``device`` that starts now."""
    commit, modified = revision()
    return Environment(
        device_type="cuda" if device.type == "cuda" else "cpu",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        gpukern=gpukern.__version__,
        source=source_hash(),
        commit=commit,
        modified=modified,
        date=now(),
        platform=f"{platform.system()} {platform.machine()}",
        flags=flags(),
        device=device_name(device),
        **(_gpu(device) if device.type == "cuda" else {}),
    )


def device_name(device: torch.device) -> str:
    """Return the name that the device reports."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def now() -> str:
    """UTC to the second, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@functools.cache
def source_hash() -> str:
    """Hash all files of the package ``gpukern``: equal hashes mean equal kernels, whatever the commit."""
    package = ROOT / "gpukern"
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".json", ".cuh", ".h")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def revision() -> tuple[str | None, bool]:
    """(commit, whether files differ from it).

    ``GPUKERN_COMMIT`` takes precedence over git: a checkout may have come without its git, or with an older one.
    """
    if told := os.environ.get("GPUKERN_COMMIT"):
        return told, False
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, False
    # Results and other files that the measuring itself writes change no code.
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", "gpukern", "bench/*.py", "models")
    return commit, bool(changed)


def run_name() -> str:
    """Name a run with the code as it is: by the commit, or by the code's hash where that is more precise."""
    commit, modified = revision()
    if commit is None:
        return source_hash()
    return f"{commit[:10]}-{source_hash()[:8]}" if modified else commit[:10]


def run_folder(device: torch.device) -> Path:
    """DEVICE/RUN, where a run's files go below the folder of all results."""
    name = device_name(device)
    return Path(slug(name if device.type == "cuda" else f"cpu {name}")) / run_name()


def slug(name: str) -> str:
    """``name`` as a folder: lower-case letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def flags() -> dict[str, Any]:
    """Every setting that changes what a convolution or a matrix product runs."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return {
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "matmul.allow_fp16_reduced_precision_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "matmul.allow_bf16_reduced_precision_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "threads": torch.get_num_threads(),
        # Interpreted kernels are never to stand in one table with others.
        **({"GPUKERN_EMULATE": True} if EMULATE else {}),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "l2_cache": properties.L2_cache_size,
        "memory": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def _processor() -> str:
    """The CPU's own name, on Linux; platform.processor() often says only "x86_64"."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
