"""What a launch reads beside the parameters, and the texts that its kernels are made of."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import gpukern.optim as optim
from gpukern.optim._fused import codegen, device_tables, host
from gpukern.optim._fused.rules import ADAM, LAMB, SGD

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the kernels as the host has them")


def test_chunks_cover_every_tensor_once():
    rows = [device_tables.Row(16 * n, 0, (), 4, size, 0) for n, size in enumerate((5, 0, 4096, 4097, 1))]
    tensors, chunks = device_tables.tables(rows, 0, 2048)
    covered = [(int(c["tensor"]), int(c["number"])) for c in chunks]
    assert covered == [(0, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0)]
    assert [int(t["first_chunk"]) for t in tensors] == [0, 1, 1, 3, 6] and list(tensors["chunks"]) == [1, 0, 2, 3, 1]


def test_chunk_sizes_fill_the_device():
    assert device_tables.chunk_size(10**9, 132) == 65536
    assert device_tables.chunk_size(1000, 132) == 2048
    for elements in (10**6, 25 * 10**6, 10**8):
        size = device_tables.chunk_size(elements, 132)
        assert size in (2048, 65536) or elements / size >= 8 * 132


def test_tables_are_laid_out_as_the_compiler_lays_out_structs(tmp_path):
    variant = codegen.Variant(LAMB, "float32", "bfloat16", "float16", ("exp_avg", "exp_avg_sq"), 128)
    wanted = {
        "Tensor": device_tables.tensor_type(2),
        "Group": device_tables.group_type(LAMB),
        "Arguments": device_tables.arguments_type(128),
    }
    text = codegen.source(variant, "host.h") + "\n#include <cstdio>\n#include <cstddef>\nint main() {\n"
    for name, dtype in wanted.items():
        text += f'printf("%zu", sizeof({name}));\n'
        fields = [n for n in dtype.names if name != "Group" or n == "lr_place"]
        text += "".join(f'printf(" %zu", offsetof({name}, {"lr" if name == "Group" else n}));\n' for n in fields)
        text += 'printf("\\n");\n'
    (tmp_path / "layout.cpp").write_text(text + "}\n")
    command = ["g++", "-std=c++20", "-w", "-pthread", "layout.cpp", "-o", "layout"]
    subprocess.run(command, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout.splitlines()
    for line, (name, dtype) in zip(printed, wanted.items(), strict=True):
        fields = [n for n in dtype.names if name != "Group" or n == "lr_place"]
        assert list(map(int, line.split())) == [dtype.itemsize, *(dtype.fields[n][1] for n in fields)], name
    assert device_tables.arguments_type(device_tables.GRADIENTS[-1]).itemsize <= 32764


def test_elementwise_form_is_the_same_rule(tmp_path):
    """As cupy.ElementwiseKernel has it, here in a loop of the host's."""
    *parameters_text, operation = codegen.elementwise(ADAM)
    kinds = {"float32": "float", "float64": "double"}
    names = [word.split() for word in ", ".join(parameters_text).split(", ")]
    changed = ["p", *(state.name for state in ADAM.states)]
    given = ", ".join(
        f"{'float *' if name in changed or name == 'gradient' else kinds[kind] + ' '}{name}_" for kind, name in names
    )
    inside = "".join(
        f"float &{name} = {name}_[i];" if name in (*changed, "gradient") else f"const double {name} = {name}_;"
        for _, name in names
    )
    text = (
        f'#include <cmath>\nusing namespace std;\nextern "C" void run(int n, {given}) {{ for (int i = 0; i < n; ++i) {{'
    )
    (tmp_path / "e.cpp").write_text(f"{text} {inside} {operation} }} }}")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
    subprocess.run(["g++", *flags, "e.cpp", "-o", "e.so"], cwd=tmp_path, check=True)
    owner = torch.nn.Parameter(torch.randn(101))
    owner.grad = torch.randn(101)
    p, states = owner.detach().clone(), [torch.zeros(101) for _ in ADAM.states]
    optim.Adam([owner], amsgrad=True, weight_decay=0.1).step()
    tensors = [ctypes.c_void_p(t.data_ptr()) for t in (owner.grad, p, *states)]
    numbers = [ctypes.c_double(v) for v in (1e-3, 0.9, 0.999, 1e-8, 0.1, 1, 0, 0, 1)]
    ctypes.CDLL(str(tmp_path / "e.so")).run(101, tensors[0], *numbers, *tensors[1:])
    assert torch.equal(p, owner.detach())


def test_the_elementwise_kernel_is_cupy_s(monkeypatch):
    made = []
    stub = types.SimpleNamespace(ElementwiseKernel=lambda *texts, name: made.append((texts, name)))
    monkeypatch.setitem(sys.modules, "cupy", stub)
    optim.elementwise_kernel("Adam")
    assert made == [(codegen.elementwise(ADAM), "adam_elementwise_kernel")]
    optim.elementwise_kernel("AdamW")
    assert made[1:] == [(codegen.elementwise(ADAM), "adamw_elementwise_kernel")]
    with pytest.raises(ValueError, match="lamb needs norms of whole tensors"):
        optim.elementwise_kernel("LAMB")
    with pytest.raises(ValueError, match="unknown optimizer 'AdamX', expected one of SGD") as refused:
        optim.elementwise_kernel("AdamX")
    # Those that it names it takes, and no other.
    names = str(refused.value).split("expected one of ")[1].split(", ")
    for name in names:
        optim.elementwise_kernel(name)
    assert {*names, "LARS", "LAMB"} == {name for name in optim.__all__ if isinstance(getattr(optim, name), type)} - {
        "Optimizer"
    }


def test_a_missing_compiler_is_told(monkeypatch):
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    host.compiler.cache_clear()
    with pytest.raises(RuntimeError, match="there is no C\\+\\+ compiler: install g\\+\\+ or name one in CXX"):
        host.compiler()
    host.compiler.cache_clear()


def test_programs_are_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled = []
    real = host._compile
    monkeypatch.setattr(host, "_compile", lambda *given: compiled.append(given) or real(*given))
    variant = codegen.Variant(SGD, "float32", "float32", "float32", (), 128)
    library = host._library.__wrapped__
    assert library(variant) == library(variant) and len(compiled) == 1
    assert [path.suffix for path in (tmp_path / "gpukern" / "host").iterdir()] == [".so"]


def test_arguments_of_the_size_that_travels():
    assert (
        device_tables.room_for(1) == 128
        and device_tables.room_for(129) == 1024
        and device_tables.room_for(4032) == 4032
    )
    assert np.zeros(1, device_tables.arguments_type(128)).nbytes < 1200
