"""The command line, and the data behind ``gpukern info``."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import gpukern
from gpukern import info
from gpukern.cli import app
from gpukern.info import Component
from gpukern.optim._fused import host
from gpukern.runtime.mode import EMULATE, Mode
from gpukern.runtime.precision import fp32_products

runner = CliRunner()


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{gpukern.__version__}\n")


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "gpukern", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{gpukern.__version__}\n")


def test_without_a_command_it_shows_what_there_is():
    result = runner.invoke(app, [])
    assert all(name in result.output for name in ("info", "explain", "tune", "Usage"))
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
    assert names == [
        "gpukern",
        "Python",
        "platform",
        "PyTorch",
        "Triton",
        "CuPy",
        "NumPy",
        "NVIDIA driver",
        "C++ compiler",
    ]
    assert [served["tensors"] for served in gathered["modes"]] == ["CPU", "CUDA"]
    assert len(gathered["devices"]) == torch.cuda.device_count()


def test_info_on_a_terminal_is_a_table(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert "\x1b[1m" in runner.invoke(app, ["info"], color=True).output


def test_info_follows_the_tf32_flags():
    for precision in ("tf32", "ieee"):
        with fp32_products(precision, precision):
            assert info.gather().tf32_convolution is info.gather().tf32_matmul is (precision == "tf32")


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
    (missing,) = info._missing(triton, cupy, driver, Component("C++ compiler", "12.2.0"))
    assert missing.install == f'pip install "gpukern[{extra}]"'


def test_cpu_build_beside_a_driver_is_missing_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    usable = Component("any", "1")
    assert [missing.name for missing in info._missing(usable, usable, usable, usable)] == ["PyTorch with CUDA"]


def test_the_compiler_is_reported(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    compiler.write_text("#!/bin/sh\necho 'my-c++ (Some Linux 9.1.0-2) 13.3.0'\n")
    compiler.chmod(0o755)
    host.compiler.cache_clear()
    monkeypatch.setenv("CXX", str(compiler))
    try:
        found = info._compiler()
        assert (found.version, found.detail, found.usable) == ("13.3.0", str(compiler), True)
        monkeypatch.setattr(host, "version", _not_executable)
        assert info._compiler().problem == "cannot be run: Exec format error"
        monkeypatch.setattr(host.shutil, "which", lambda program: None)
        host.compiler.cache_clear()
        assert info._compiler() == Component("C++ compiler", None)
        missing = {missing.name: missing.install for missing in info.gather().missing}
        assert "g++" in missing["C++ compiler"]
        assert runner.invoke(app, ["info"]).exit_code == 0
    finally:
        host.compiler.cache_clear()


def _not_executable(path):
    raise OSError("Exec format error")


def test_what_runs_depends_on_cupy_and_the_compiler(monkeypatch):
    there, absent = Component("any", "1"), Component("any", None)
    monkeypatch.setattr(info, "EMULATE", False)
    told = [info._cuda_mode(there, cupy, (object(),), None).reason for cupy in (there, absent)]
    assert "optimizers through CuPy" in told[0] and "no optimizers without CuPy" in told[1]
    monkeypatch.setattr(info, "mode_of", lambda tensor: Mode.EMULATED)
    told = [info._cpu_mode(there, compiler).reason for compiler in (there, absent)]
    assert "optimizers compiled for the host" in told[0] and "not without a C++ compiler" in told[1]


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
        "device cuda:0: NVIDIA H100, compute capability 9.0, 132 SMs, 80 GiB, 227 KiB shared memory per block"
    )

    def fails():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.cuda, "device_count", fails)
    assert "devices: RuntimeError: CUDA driver initialization failed" in runner.invoke(app, ["info"]).output


# ---- gpukern explain -----------------------------------------------------------------------------------------------

CONV = ("explain", "conv", "2x16x6x6", "24x3x3", "--arch", "h100", "--no-compile")


def explained(*arguments: str):
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_explain_takes_a_convolution_from_the_command_line():
    options = ("--stride", "2x1", "--padding", "1", "--dilation", "1x2", "--groups", "2", "--dtype", "tf32")
    (found,) = explained(*CONV, *options, "--layout", "NCHW", "--epilogue", "bias,residual,relu")
    assert (found["problem"]["P"], found["problem"]["Q"], found["problem"]["groups"]) == (3, 4, 2)
    assert (found["computation"], found["kind"], found["device"]) == ("forward", "tf32", "H100")
    assert found["channels_last"] is False and explained(*CONV)[0]["channels_last"] is True
    of_batch_norms = {"statistics": False, "norm_grad": False}
    assert found["epilogue"] == {"bias": True, "activation": "relu", "residual": True, **of_batch_norms}
    assert found["not_compiled"] == "not compiled: --no-compile" and found["ranking"]
    # 2·N·P·Q·K·(C/groups)·R·S, and x, w, y and the residual in fp32.
    assert found["flops"] == 2 * 2 * 3 * 4 * 24 * 8 * 9
    assert found["bytes"] <= 4 * (2 * 16 * 36 + 24 * 8 * 9 + 2 * 2 * 24 * 12)


def test_explain_takes_all_directions_and_named_architectures():
    found = explained(*CONV[:4], "--arch", "sm_80", "--no-compile", "--direction", "all", "--epilogue", "relu")
    assert [each["computation"] for each in found] == ["forward", "input gradient", "weight gradient"]
    assert {each["device"] for each in found} == {"A100"}
    assert [each["epilogue"]["activation"] for each in found] == ["relu", "none", "none"]


def test_explain_takes_a_fully_connected_layer():
    found = explained("explain", "linear", "128x4096", "1000", "--no-compile", "--direction", "all")
    assert [each["problem"]["K"] for each in found] == [1000, 4096, 1000]
    assert {each["flops"] for each in found} == {2 * 128 * 4096 * 1000}
    assert found[1]["computation"].startswith("input gradient")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("conv", "2x16x6", "24x3x3"), "NxCxHxW: '2x16x6' has 3 sizes"),
        (("conv", "2x16x6x6", "24x3"), "KxRxS: '24x3' has 2 sizes"),
        (("conv", "2x16x6x6", "24x9x9"), "Kernel size can't be greater"),
        (("conv", "1000000x4x56x56", "4x3x3"), "pixels are more than"),
        (("conv", "2x16x6x6", "24x3x3", "--stride", "0"), "--stride: '0' is no size"),
        (("conv", "2x16x6x6", "24x3x3", "--padding", "-1"), "--padding: '-1' is no size"),
        (("conv", "2x16x6x6", "24x3x3", "--dilation", "1x1x1"), "--dilation: '1x1x1' is no size"),
        (("conv", "2x16x6x6", "24x3x3", "--groups", "5"), "do not divide into 5 groups"),
        (("conv", "2x16x6x6", "24x3x3", "--groups", "0"), "groups"),
        (("conv", "2x16x6x6", "24x3x3", "--dtype", "int4"), "--dtype: no dtype is called 'int4'"),
        (("conv", "2x16x6x6", "24x3x3", "--arch", "sm_75"), "--arch: no device or architecture is called 'sm_75'"),
        (("conv", "2x16x6x6", "24x3x3", "--direction", "up"), "--direction: no direction is called 'up'"),
        (("conv", "2x16x6x6", "24x3x3", "--layout", "HWCN"), "--layout: no layout is called 'HWCN'"),
        (("conv", "2x16x6x6", "24x3x3", "--epilogue", "softmax"), "--epilogue: an epilogue has no part 'softmax'"),
        (("conv", "2x16x6x6", "24x3x3", "--epilogue", "relu", "--direction", "weight-grad"), "only a forward has"),
        (("linear", "128", "10"), "MxC: '128' has 1 size, expected 2 joined by x"),
        (("linear", "128x64", "0"), "K"),
        (("linear", "128x64", "10", "--epilogue", "residual"), "adds no residual"),
    ],
)
def test_explain_says_what_it_does_not_understand(arguments, message):
    result = runner.invoke(app, ["explain", *arguments])
    assert result.exit_code == 2
    told = " ".join(result.stderr.replace("│", " ").split())
    assert message in told, told


def test_explain_is_plain_when_piped_and_says_why_nothing_is_compiled():
    """Here the interpreter has taken the compiler's place."""
    result = runner.invoke(app, [*CONV[:-1], "--direction", "all"])
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert not any(line != line.rstrip() for line in result.output.splitlines())
    assert result.output.count("┤") == 3 * 12
    if EMULATE:
        assert "not compiled: GPUKERN_EMULATE=1 replaces the compiler" in result.output


def test_explain_on_a_terminal_is_coloured(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    assert "\x1b[1m" in runner.invoke(app, CONV, color=True).output


def test_explain_without_triton_predicts(run_python):
    """Where there are no packages of it: the plan is pure Python."""
    code = "import sys; sys.modules['triton'] = None; from gpukern.cli import app; app(['explain', *sys.argv[1:]])"
    result = run_python(code, *CONV[1:-1], "--direction", "all")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("expected µs") == 3 and result.stdout.count("not compiled: Triton is not installed") == 3


def test_no_option_is_named_like_its_placeholder():
    """Some versions of Typer and click take such a metavar for the option's name: --layer became --LAYER."""

    def commands(command, path=()):
        yield path, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from commands(inner, (*path, name))

    seen = 0
    for path, command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            for flag in [flag for flag in parameter.opts if flag.startswith("--")]:
                assert flag == flag.lower(), (path, flag)
                seen += 1
    assert seen > 20
    for source in (Path(gpukern.__file__).parent).rglob("*.py"):
        for name, metavar in re.findall(
            r"(\w+): Annotated\[[^=]*?typer\.Option\(metavar=\"(\w+)\"", source.read_text()
        ):
            assert name != metavar.lower(), f"{source}: name the option --{name} in so many words"
