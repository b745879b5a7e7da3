"""Installed software and devices, and gpukern's use of them. Plain data; ``gpukern info`` prints it.

Nothing here raises: software that cannot be imported or queried is reported as such.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from gpukern.optim._fused import host
from gpukern.runtime.mode import EMULATE, Mode, mode_of
from gpukern.runtime.precision import conv_precision, matmul_precision
from gpukern.version import __version__

_CUPY_PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")


@dataclass(frozen=True)
class Component:
    """A piece of software: ``version`` is None where it is not installed, ``problem`` why it cannot be used."""

    name: str
    version: str | None
    detail: str = ""
    problem: str | None = None

    @property
    def usable(self) -> bool:
        return self.version is not None and self.problem is None


@dataclass(frozen=True)
class Device:
    """A CUDA device. Memory in bytes; ``shared_memory`` is the most that one block can request."""

    index: int
    name: str
    compute_capability: str
    sm_count: int
    memory: int
    shared_memory: int


@dataclass(frozen=True)
class Served:
    """The mode that serves tensors on ``tensors``, by name, or None if none does, and why."""

    tensors: str
    mode: str | None
    reason: str


@dataclass(frozen=True)
class Missing:
    """A missing component, its purpose, and the line that installs it."""

    name: str
    purpose: str
    install: str


@dataclass(frozen=True)
class Info:
    components: tuple[Component, ...]
    devices: tuple[Device, ...]
    #: the error that prevented listing the devices
    device_problem: str | None
    #: whether PyTorch's flags allow TF32 products of fp32 tensors
    tf32_convolution: bool
    tf32_matmul: bool
    modes: tuple[Served, ...]
    missing: tuple[Missing, ...]


def gather() -> Info:
    """Inspect this machine. Imports Triton and CuPy; queries ``nvidia-smi`` and the compiler for versions."""
    torch_ = Component("PyTorch", torch.__version__, _torch_build())
    triton = _component("Triton", "triton", ("triton",))
    cupy = _component("CuPy", "cupy", _CUPY_PACKAGES)
    numpy = _component("NumPy", "numpy", ("numpy",))
    driver = Component("NVIDIA driver", driver_version())
    compiler = _compiler()
    devices, device_problem = _devices()
    return Info(
        components=(
            Component("gpukern", __version__),
            Component("Python", platform.python_version(), sys.executable),
            Component("platform", platform.platform()),
            torch_,
            triton,
            cupy,
            numpy,
            driver,
            compiler,
        ),
        devices=devices,
        device_problem=device_problem,
        tf32_convolution=conv_precision(torch.float32) == "tf32",
        tf32_matmul=matmul_precision(torch.float32) == "tf32",
        modes=(_cpu_mode(triton, compiler), _cuda_mode(triton, cupy, devices, device_problem)),
        missing=_missing(triton, cupy, driver, compiler),
    )


# ---- software ------------------------------------------------------------------------------------------------------


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA"


def _component(name: str, module_name: str, packages: tuple[str, ...]) -> Component:
    installed = {package: version for package in packages if (version := package_version(package))}
    detail = " and ".join(installed) if list(installed) != [module_name] else ""
    version = next(iter(installed.values()), None)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a broken CUDA library makes anything come out of an import
        if version is None and isinstance(error, ModuleNotFoundError) and error.name == module_name:
            return Component(name, None)
        return Component(name, version or "unknown", detail, f"cannot be imported: {type(error).__name__}: {error}")
    problem = None
    if len(installed) > 1:
        problem = "several packages provide it: uninstall all but one"
    return Component(name, version or str(getattr(module, "__version__", "unknown")), detail, problem)


def package_version(package: str) -> str | None:
    """Return the version of an installed package, by its installation name; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, from its own tool or the kernel; None without one."""
    program = shutil.which("nvidia-smi")
    if program:
        try:
            answer = subprocess.run(
                [program, "--query-gpu=driver_version", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
            return answer.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    try:  # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  ..."
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _compiler() -> Component:
    """Return the C++ compiler that compiles the optimizers' kernels for the host."""
    try:
        path = host.compiler()
    except RuntimeError:
        return Component("C++ compiler", None)
    try:
        # "g++ (Debian 12.2.0-14) 12.2.0": in parentheses stands the package.
        version = re.search(r"\d+(\.\d+)+", re.sub(r"\(.*?\)", "", host.version(path)))
    except OSError as error:
        return Component("C++ compiler", "unknown", path, f"cannot be run: {error}")
    return Component("C++ compiler", version[0] if version else "unknown", path)


# ---- devices -------------------------------------------------------------------------------------------------------


def _devices() -> tuple[tuple[Device, ...], str | None]:
    try:
        if not torch.cuda.is_available():
            return (), None
        return tuple(_device(index) for index in range(torch.cuda.device_count())), None
    except Exception as error:  # a driver that is too old, a device that fell off the bus, ...
        return (), f"{type(error).__name__}: {error}"


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        index=index,
        name=properties.name,
        compute_capability=f"{properties.major}.{properties.minor}",
        sm_count=properties.multi_processor_count,
        memory=properties.total_memory,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


# ---- what would run ------------------------------------------------------------------------------------------------


def _cpu_mode(triton: Component, compiler: Component) -> Served:
    if mode_of(torch.empty(0)) is Mode.REFERENCE:
        return Served("CPU", Mode.REFERENCE.value, "plain PyTorch; GPUKERN_EMULATE=1 runs the kernels instead")
    if not triton.usable:
        return Served("CPU", None, "GPUKERN_EMULATE=1 is set and Triton cannot be used")
    optimizers = "compiled for the host" if compiler.usable else "not without a C++ compiler"
    reason = f"GPUKERN_EMULATE=1: the kernels in Triton's interpreter, those of the optimizers {optimizers}"
    return Served("CPU", Mode.EMULATED.value, reason)


def _cuda_mode(triton: Component, cupy: Component, devices: tuple[Device, ...], device_problem: str | None) -> Served:
    if EMULATE:
        return Served("CUDA", None, "GPUKERN_EMULATE=1 is set: CUDA tensors are refused")
    if device_problem:
        return Served("CUDA", None, device_problem)
    if not devices:
        return Served("CUDA", None, "PyTorch sees no CUDA device")
    if not triton.usable:
        return Served("CUDA", None, "Triton cannot be used")
    optimizers = "those of the optimizers through CuPy" if cupy.usable else "no optimizers without CuPy"
    return Served("CUDA", Mode.KERNELS.value, f"gpukern's Triton kernels, {optimizers}")


def _missing(triton: Component, cupy: Component, driver: Component, compiler: Component) -> tuple[Missing, ...]:
    missing = []
    if not triton.usable:
        missing.append(Missing("Triton", "the kernels, on a GPU or emulated", _triton_install(triton)))
    if driver.version and not torch.version.cuda:
        install = "pip install --force-reinstall torch"
        missing.append(Missing("PyTorch with CUDA", "the kernels on this machine's GPU", install))
    if not cupy.usable:
        missing.append(Missing("CuPy", "the optimizers' kernels on a GPU", _cupy_install()))
    if not compiler.usable:
        purpose = "the optimizers' kernels emulated (GPUKERN_EMULATE=1)"
        missing.append(Missing("C++ compiler", purpose, "install g++ 11 or later, or name another in CXX"))
    return tuple(missing)


def _triton_install(triton: Component) -> str:
    if sys.platform != "linux":
        return "not to be had: Triton's packages are for Linux"
    return "pip install triton" if triton.version is None else "pip install --force-reinstall triton"


def _cupy_install() -> str:
    cuda = torch.version.cuda
    if cuda is None:
        return 'pip install "gpukern[cuda12]" or "gpukern[cuda13]", as the CUDA of your PyTorch'
    return f'pip install "gpukern[cuda{"12" if cuda.startswith("12.") else "13"}]"'
