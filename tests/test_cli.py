"""The command line, and the data behind ``gpukern info``."""

from __future__ import annotations

import importlib
import json
import subprocess
import types

import pytest
import torch
from typer.testing import CliRunner

import gpukern
from gpukern import info
from gpukern.cli import app
from gpukern.info import Component

runner = CliRunner()


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{gpukern.__version__}\n")


def test_without_a_command_it_shows_what_there_is():
    result = runner.invoke(app, [])
    assert "info" in result.output and "Usage" in result.output
    assert runner.invoke(app, ["no-such-command"]).exit_code == 2


def test_info_is_plain_when_piped(run_python):
    result = run_python("from gpukern.cli import app; app(['info'])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() and "\x1b" not in result.stdout
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert lines["gpukern"] == gpukern.__version__
    assert lines["PyTorch"].startswith(torch.__version__)
    assert lines["CPU tensors"].startswith("reference")


def test_info_as_json_has_every_part():
    result = runner.invoke(app, ["info", "--json"])
    gathered = json.loads(result.output)
    names = [component["name"] for component in gathered["components"]]
    assert names == ["gpukern", "Python", "platform", "PyTorch", "Triton", "CuPy", "NumPy", "NVIDIA driver"]
    assert [served["tensors"] for served in gathered["modes"]] == ["CPU", "CUDA"]
    assert len(gathered["devices"]) == torch.cuda.device_count()


def test_info_on_a_terminal_is_a_table(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert "\x1b[1m" in runner.invoke(app, ["info"], color=True).output


def test_info_follows_the_tf32_flags():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert info.gather().tf32_matmul
        torch.set_float32_matmul_precision("highest")
        assert not info.gather().tf32_matmul
    finally:
        torch.set_float32_matmul_precision(before)


def test_broken_imports_are_reported(monkeypatch):
    plain = importlib.import_module

    def import_module(name, package=None):
        if name == "cupy":
            raise ImportError("libnvrtc.so.12: cannot open shared object file")
        if name == "triton":
            raise RuntimeError("broken installation")
        return plain(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    gathered = info.gather()
    components = {component.name: component for component in gathered.components}
    assert (
        components["CuPy"].problem == "cannot be imported: ImportError: libnvrtc.so.12: cannot open shared object file"
    )
    assert components["Triton"].problem == "cannot be imported: RuntimeError: broken installation"
    missing = {missing.name: missing.install for missing in gathered.missing}
    assert "triton" in missing["Triton"] and "gpukern[cuda1" in missing["CuPy"]
    assert runner.invoke(app, ["info"]).exit_code == 0


def test_several_cupy_packages_are_a_problem(monkeypatch):
    monkeypatch.setattr(info, "package_version", {"cupy-cuda12x": "14.2.0", "cupy": "13.0"}.get)
    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace())
    component = info._component("CuPy", "cupy", info._CUPY_PACKAGES)
    assert component.detail == "cupy-cuda12x and cupy" and "uninstall" in component.problem


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13")])
def test_cupy_is_installed_for_pytorchs_cuda(monkeypatch, cuda, extra):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    triton, cupy, driver = Component("Triton", "3.7.1"), Component("CuPy", None), Component("NVIDIA driver", "580.1")
    (missing,) = info._missing(triton, cupy, driver)
    assert missing.install == f'pip install "gpukern[{extra}]"'


def test_cpu_build_beside_a_driver_is_missing_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    usable = Component("any", "1")
    assert [missing.name for missing in info._missing(usable, usable, usable)] == ["PyTorch with CUDA"]


def test_driver_version_comes_from_nvidia_smi_or_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(info.shutil, "which", lambda program: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(info.subprocess, "run", lambda *args, **kwargs: answer)
    assert info.driver_version() == "580.65.06"

    def fails(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(info.subprocess, "run", fails)
    kernel = tmp_path / "version"
    kernel.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    monkeypatch.setattr(info, "Path", lambda path: kernel)
    assert info.driver_version() == "550.54.15"
    kernel.unlink()
    assert info.driver_version() is None


def test_devices_are_described_and_their_failure_too(monkeypatch):
    properties = types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
        shared_memory_per_block_optin=227 * 1024,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    line = next(line for line in runner.invoke(app, ["info"]).output.splitlines() if line.startswith("device cuda:0"))
    assert line == (
        "device cuda:0: NVIDIA H100, compute capability 9.0, 132 SMs, 80.0 GiB, 227 KiB shared memory per block"
    )

    def fails():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "device_count", fails)
    assert "devices: RuntimeError: CUDA driver initialization failed" in runner.invoke(app, ["info"]).output
